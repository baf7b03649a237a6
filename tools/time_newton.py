"""How far is one Newton step from the maximum of the likelihood? python tools/time_newton.py

`counts.maximum_likelihood` takes one step from where the chain's bound is largest. Here a second
one follows, with the best chain for the parameters after the first step, and draws of it. The
gradient is then that of this chain's bound, which was 0 before, plus what the draws add. Two sets
of data for each setting of notebook 10; one line each in data/results/time/newton.jsonl.
"""

import math
from itertools import product

from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import kl_divergence

from rhovae.study import counts as study
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import run_missing

PATH = DATA_FOLDER / "results" / "time" / "newton.jsonl"
SEEDS = (0, 4)


def main() -> None:
    chosen = [
        {"time_constant": tau, "rate": rate, "seed": seed}
        for seed, tau, rate in product(SEEDS, (9.5, 49.5), (-1.0, 1.0))
    ]
    run_missing(PATH, chosen, two_steps)


def two_steps(time_constant: float, rate: float, seed: int) -> dict:
    """Both steps in log time constant, log scale and rate, and the standard errors of both."""
    counts, _ = study.simulate(time_constant, rate, seed)
    found = study.fit(counts, "stepped", tolerance=1e-4)
    theta = [math.log(found.time_constant), math.log(found.scale), found.rate]
    theta = counts.new_tensor(theta)
    first, first_error = newton_step(counts, found, theta, seed=10_000 + seed)
    theta = theta + first
    at = theta[0].exp().item(), theta[1].exp().item(), theta[2].item()
    found = study.fit(counts, "stepped", first=at, learn=False, tolerance=1e-4)
    second, second_error = newton_step(counts, found, theta, seed=10_000 + seed)
    return {
        "steps": [first.tolist(), second.tolist()],
        "monte_carlo_errors": [first_error.tolist(), second_error.tolist()],
    }


def newton_step(
    counts: Tensor, found: study.Fit, theta: Tensor, seed: int, draws: int = 6000
) -> tuple[Tensor, Tensor]:
    """From theta, at which `found` is the best chain; the step and its Monte Carlo error, (3,)."""
    q = study.posterior("stepped", found.free, found.prior)

    def bound(at: Tensor) -> Tensor:
        prior = study.ar1_prior(at[0], at[1], counts.shape[-1])
        fitted = study.expected_log_likelihood(counts, at[2], q.mean, q.variance)
        return (fitted - kl_divergence(q, prior)).sum()

    sums = study.sums_of_draws(counts, q, draws, seed)
    return study.newton_step(counts, theta, sums, jacobian(bound, theta))


if __name__ == "__main__":
    main()
