"""British coal-mining disasters by year: the rate and its time constant. notebooks/10

The model of `counts` with one series, and with priors on what is learned there:

    log time_constant ~ N(log 20, 1),    log scale ~ N(0, 0.5),    rate ~ N(0, 1)

A posterior q(theta) q(z | theta) of theta = (time constant, scale, rate) and z has a largest bound
for q(theta) proportional to p(theta) exp(bound(theta)), with q(z | theta) of the family that is
compared. On a grid of theta this is a finite sum.
"""

import csv
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from .. import AR1Normal
from .counts import ar1_prior, ascend, belief, expected_log_likelihood, start
from .data import DATA_FOLDER

# Mean and standard deviation.
PRIORS = {"log_time_constant": (math.log(20), 1.0), "log_scale": (0.0, 0.5), "rate": (0.0, 1.0)}
WITHHELD = (1890, 1934)  # the two years that the usual series leaves out


def load_disasters() -> tuple[Tensor, Tensor, Tensor]:
    """Years, counts, and counts with NaN in the two withheld years, each (112,), float64."""
    with (DATA_FOLDER / "coal_mining_disasters.csv").open() as file:
        rows = list(csv.DictReader(file))
    year = torch.tensor([int(row["year"]) for row in rows])
    counts = torch.tensor([float(row["disasters"]) for row in rows], dtype=torch.float64)
    withheld = torch.isin(year, torch.tensor(WITHHELD))
    return year, counts, counts.masked_fill(withheld, math.nan)


class Grid(NamedTuple):
    """The best posterior for each theta of a grid; `weight` sums to 1 over it."""

    log_time_constant: Tensor  # (points,), as all but mean and stddev
    log_scale: Tensor
    rate: Tensor
    weight: Tensor
    mean: Tensor  # of the log-rate rate + z, (points, steps)
    stddev: Tensor
    log_evidence: float  # the bound of all, nats
    largest_gradient: float


def posterior_on_a_grid(counts: Tensor, family: str, sizes=(24, 14, 14), reach=3.2) -> Grid:
    """q(theta) proportional to p(theta) exp(bound(theta)), and q(z | theta).

    Args:
        counts: (steps,), NaN where nothing was observed.
        sizes: points in time constant, scale and rate.
        reach: how many of the priors' standard deviations the grid covers on both sides.
    """
    axes = [
        loc + scale * torch.linspace(-reach, reach, size, dtype=counts.dtype)
        for (loc, scale), size in zip(PRIORS.values(), sizes, strict=True)
    ]
    log_scale, rate = (x.reshape(-1, 1) for x in torch.meshgrid(*axes[1:], indexing="ij"))
    parts = [best_posteriors(counts, family, tau, log_scale, rate) for tau in axes[0]]
    theta = torch.cartesian_prod(*axes).unbind(-1)
    bound, mean, variance, gradient = zip(*parts, strict=True)
    log_prior = sum(Normal(*p).log_prob(x) for p, x in zip(PRIORS.values(), theta, strict=True))
    cell = math.prod((x[1] - x[0]).item() for x in axes)
    joint = torch.cat(bound) + log_prior
    return Grid(*theta, joint.softmax(0), torch.cat(mean), torch.cat(variance).sqrt(),
                joint.logsumexp(0).item() + math.log(cell), max(gradient))  # fmt: skip


def best_posteriors(
    counts: Tensor, family: str, log_time_constant: Tensor, log_scale: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest bound for each pair of scale and rate, at one time constant.

    Args:
        counts: (steps,).
        log_time_constant: shape ().
        log_scale, rate: (points, 1).
    Returns:
        The bound in nats (points,), mean and variance of the log-rate (points, steps), and the
        largest entry of the gradient that is left.
    """
    steps = len(counts)
    chain = ar1_prior(log_time_constant, log_time_constant.new_zeros(()), steps)
    prior = AR1Normal(chain.loc, log_scale.exp(), fisher_z=chain.fisher_z, validate_args=False)
    first = start(family, prior, len(rate))
    units = {name: min(1.0, (v.shape[-1] / steps) ** 0.5) for name, v in first.items()}
    moves = {name: torch.zeros_like(v).requires_grad_() for name, v in first.items()}

    def bound() -> tuple[Tensor, Tensor, Tensor]:
        free = {name: v + units[name] * moves[name] for name, v in first.items()}
        q = belief(family, free, prior)
        fitted = expected_log_likelihood(counts, rate, q.mean, q.variance)
        return fitted - q.kl, rate + q.mean, q.variance

    found = ascend(list(moves.values()), lambda: bound()[0].sum())
    with torch.no_grad():
        return *bound(), found["largest_gradient"]


def rates_of(grid: Grid, draws: int = 20_000, seed: int = 0) -> Tensor:
    """Draws of every year's rate, disasters a year, (draws, steps); years apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(grid.weight, draws, replacement=True, generator=generator)
    noise = torch.randn(grid.mean[chosen].shape, generator=generator, dtype=grid.mean.dtype)
    return (grid.mean[chosen] + grid.stddev[chosen] * noise).exp()


def disasters_model(counts: Tensor) -> None:
    """The same model for Pyro, non-centred, with the dense Cholesky factor (1.5) of the chain."""
    import pyro
    import pyro.distributions as dist

    log_time_constant, log_scale, rate = (
        pyro.sample(name, dist.Normal(*counts.new_tensor(p))) for name, p in PRIORS.items()
    )
    noise = pyro.sample("noise", dist.Normal(torch.zeros_like(counts), 1.0).to_event(1))
    log_rate = rate + log_scale.exp() * (factor(log_time_constant, len(counts)) @ noise)
    seen = ~counts.isnan()
    pyro.sample("counts", dist.Poisson(log_rate[seen].exp()).to_event(1), obs=counts[seen])


def factor(log_time_constant: Tensor, steps: int) -> Tensor:
    """L with z = scale L noise, (*batch, steps, steps).                      (1.5), notebooks/01

    The recursion of `AR1Normal` in operations that can be traced, which makes NUTS much faster.
    """
    x = (-log_time_constant).exp()[..., None, None]
    step = torch.arange(steps, dtype=x.dtype)
    lag = step.unsqueeze(-1) - step
    innovation = (-torch.expm1(-2 * x)).sqrt()
    first = step == 0
    return torch.exp(-x * lag.clamp(min=0)).tril() * (first + ~first * innovation)


def nuts(counts: Tensor, draws: int = 600, warmup: int = 400, chains: int = 4) -> dict:
    """Draws of the exact posterior by Pyro's NUTS, one chain after the other.

    Returns:
        Draws, (chains, draws) of each name in PRIORS and (chains, draws, steps) of `log_rate`, and
        the number of `divergences`.
    """
    import pyro
    from pyro.infer import MCMC, NUTS

    samples, divergences = [], 0
    for chain in range(chains):
        pyro.set_rng_seed(chain)
        kernel = NUTS(disasters_model, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(counts)
        samples.append(mcmc.get_samples())
        divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    found = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    chain = factor(found["log_time_constant"], len(counts)) @ found.pop("noise").unsqueeze(-1)
    found["log_rate"] = found["rate"].unsqueeze(-1) + found["log_scale"].exp().unsqueeze(
        -1
    ) * chain.squeeze(-1)
    return found | {"divergences": divergences}
