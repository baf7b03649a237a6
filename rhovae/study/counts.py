"""Counts driven by a latent AR(1): which Gaussian posterior finds its time constant? notebooks/10

    y_t ~ Poisson(exp(rate + z_t)),    z a stationary AR(1), standard deviation `scale`,
                                       correlation exp(-|t - s| / time_constant)

The bound needs no draws, as E_q exp(z_t) = exp(m_t + v_t / 2). Every family has free parameters for
each series; they, the time constant, the scale and the rate are maximised together.
"""

import math
import time
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal, kl_divergence
from torch.func import functional_call

from .. import AR1Normal, AR1Prior, ar1

FAMILIES = ("diagonal", "whitened", "karhunen-loeve", "ar1", "stepped", "sites", "full")


class Belief(NamedTuple):
    """What the bound needs of a Gaussian posterior of z, for each series."""

    mean: Tensor  # (series, steps)
    variance: Tensor  # (series, steps)
    kl: Tensor  # to the prior, nats, (series,)
    covariance: Callable[[], Tensor]  # dense, (series, steps, steps)


def ar1_prior(log_time_constant: Tensor, log_scale: Tensor, steps: int) -> AR1Normal:
    """`AR1Prior` as a function of its parameters, over `steps` unit steps, batch shape (1,)."""
    parameters = {"log_time_constant": log_time_constant, "log_scale": log_scale}
    return functional_call(
        AR1Prior(1, 1.0), {name: value.reshape(1) for name, value in parameters.items()}, (steps,)
    )


def simulate(
    time_constant: float, rate: float, seed: int, scale: float = 1.0, series: int = 32,
    steps: int = 300,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Counts and the log-rates behind them, each (series, steps), float64."""
    generator = torch.Generator().manual_seed(seed)
    prior = ar1_prior(*torch.tensor([time_constant, scale], dtype=torch.float64).log(), steps)
    noise = torch.randn(series, steps, generator=generator, dtype=torch.float64)
    log_rate = rate + scale * ar1.correlate(noise, prior.rho)
    return torch.poisson(log_rate.exp(), generator=generator), log_rate


def expected_log_likelihood(counts: Tensor, rate: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E_q log p(y | z), nats per series.                                     (10.10), notebooks/10

    sum_t y_t (rate + m_t) - exp(rate + m_t + v_t / 2) - log y_t!

    Args:
        counts: (series, steps); NaN where nothing was observed.
        rate: mean of the log-rate, shape ().
        mean, variance: of z_t under q, (series, steps).
    Returns:
        Shape (series,).
    """
    seen = ~counts.isnan()
    y, log_rate = counts.where(seen, counts.new_zeros(())), rate + mean
    terms = y * log_rate - torch.exp(log_rate + variance / 2) - torch.lgamma(y + 1)
    return terms.where(seen, terms.new_zeros(())).sum(-1)


def start(family: str, prior: AR1Normal, series: int) -> dict[str, Tensor]:
    """Free parameters of a family with which every series' posterior is the prior.

    In `diagonal` it is the prior's marginals, as the prior is no member.
    """
    steps = prior.event_shape[0]
    flat = prior.loc.new_zeros(series, steps)
    fisher_z, log_scale = prior.fisher_z.detach(), prior.scale.detach().log()
    if family == "diagonal":
        return {"mean": flat, "log_scale": flat + log_scale}
    if family in ("whitened", "karhunen-loeve"):
        return {"mean": flat, "log_ratio": flat}
    if family == "ar1":
        return {"mean": flat, "log_scale": flat[:, :1] + log_scale,
                "fisher_z": flat[:, :1] + fisher_z}  # fmt: skip
    if family == "stepped":
        return {"mean": flat, "log_scale": flat + log_scale, "fisher_z": flat[:, 1:] + fisher_z}
    if family == "sites":
        # Observations with a tenth of the prior's precision: near the prior.
        return {"mean": flat, "log_weight": flat - 2 * log_scale + math.log(0.1)}
    if family == "full":
        factor = prior.scale_tril.detach()[0]
        rows, columns = torch.tril_indices(steps, steps, -1)
        return {
            "mean": flat,
            "log_diagonal": flat + factor.diagonal().log(),
            "below": factor[rows, columns].expand(series, -1),
        }
    raise ValueError(f"There is no family {family!r}; choose from {', '.join(FAMILIES)}.")


def posterior(family: str, free: dict[str, Tensor], prior: AR1Normal) -> Distribution:
    """The distribution that a family's free parameters stand for, but for those in a basis."""
    if family == "sites":
        # Observations of these precisions have this covariance, and can have any mean. To optimise
        # the mean in place of the values takes a tenth of the iterations.
        q = prior.condition(torch.zeros_like(free["mean"]), precision=free["log_weight"].exp())
        return AR1Normal(free["mean"], q.scale, fisher_z=q.fisher_z, validate_args=False)
    if family == "full":
        steps = free["mean"].shape[-1]
        rows, columns = torch.tril_indices(steps, steps, -1)
        factor = free["log_diagonal"].exp().diag_embed()
        factor[:, rows, columns] = free["below"]
        return MultivariateNormal(free["mean"], scale_tril=factor, validate_args=False)
    fisher_z = free.get("fisher_z", free["mean"].new_zeros(1))
    return AR1Normal(free["mean"], free["log_scale"].exp(), fisher_z=fisher_z, validate_args=False)


def belief(family: str, free: dict[str, Tensor], prior: AR1Normal) -> Belief:
    """What the bound needs of it."""
    if family in ("whitened", "karhunen-loeve"):
        return _in_a_basis(family, free, prior)
    q = posterior(family, free, prior)
    return Belief(q.mean, q.variance, kl_divergence(q, prior), lambda: q.covariance_matrix)


def _in_a_basis(family: str, free: dict[str, Tensor], prior: AR1Normal) -> Belief:
    """Independent coefficients in a basis in which the prior is white: z = mean + B sqrt(r) e.

    B B^T is the prior's covariance and r the ratio of variances of posterior and prior. B is the
    Cholesky factor (whitened), or the eigenvectors times the root of their eigenvalues.
    """
    ratio, unit_prior = free["log_ratio"].exp(), _one_of(prior)
    if family == "whitened":  # the squares of B's entries run along the chain as B's own do
        fresh = torch.cat((ratio[:, :1], prior._innovation.square() * ratio[:, 1:]), -1)
        variance = ar1.scan(fresh, prior.rho.square())
        basis = lambda: unit_prior.scale_tril  # noqa: E731
    else:
        values, vectors = torch.linalg.eigh(unit_prior.precision_matrix)
        matrix = vectors / values.sqrt()
        variance = ratio @ matrix.square().mT
        basis = lambda: matrix  # noqa: E731
    whitened = ar1.whiten(free["mean"] / prior.scale, prior.rho, prior._innovation)
    kl = (ratio - 1 - free["log_ratio"] + whitened.square()).sum(-1) / 2

    def covariance() -> Tensor:
        return prior.scale.square().unsqueeze(-1) * (basis() * ratio.unsqueeze(-2) @ basis().mT)

    return Belief(free["mean"], prior.scale.square() * variance, kl, covariance)


def _one_of(prior: AR1Normal) -> AR1Normal:
    """With standard deviation 1 and batch shape (), as the time constant is one for all series."""
    return AR1Normal(prior.loc[0], 1.0, fisher_z=prior.fisher_z[0], validate_args=False)


class Fit(NamedTuple):
    """Where the bound is largest."""

    time_constant: float
    scale: float
    rate: float
    bound: float  # nats per step
    belief: Belief
    prior: AR1Normal
    free: dict[str, Tensor]
    convergence: dict


def ascend(
    values: list[Tensor],
    objective: Callable[[], Tensor],
    iterations: int = 3000,
    tolerance: float = 1e-3,
) -> dict:
    """Move values to where the objective is largest, by L-BFGS.

    Args:
        iterations: at most so many.
        tolerance: the largest entry of the gradient to stop at.
    Returns:
        How well it has converged: the largest entry of the gradient, iterations, evaluations, what
        the last ten of these have changed, and seconds.
    """
    optimizer = torch.optim.LBFGS(
        values, max_iter=iterations, max_eval=2 * iterations, tolerance_grad=tolerance,
        tolerance_change=0, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip
    trace = []

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective()
        value.backward()
        trace.append(value.item())
        return value

    begin = time.perf_counter()
    optimizer.step(loss)
    return {
        "largest_gradient": max(value.grad.abs().max().item() for value in values),
        "iterations": optimizer.state[values[0]]["n_iter"],
        "evaluations": len(trace),
        "last_change": abs(trace[-1] - trace[max(0, len(trace) - 10)]),
        "optimisation_s": round(time.perf_counter() - begin, 2),
    }


def fit(
    counts: Tensor,
    family: str,
    first: tuple[float, ...] = (20.0, 0.5),
    learn: bool = True,
    iterations: int = 3000,
    tolerance: float = 1e-3,
) -> Fit:
    """Maximise the bound over time constant, scale, rate and every series' posterior, by L-BFGS.

    Args:
        counts: (series, steps), float64.
        family: one of FAMILIES.
        first: time constant and scale to start from, and rate, else the log of the mean count.
        learn: whether these three move at all.
        iterations: at most so many of L-BFGS.
        tolerance: largest entry of the gradient of the whole bound, nats, to stop at.
    """
    series, steps = counts.shape
    time_constant, scale, *rate = first
    rate = rate[0] if rate else counts.nanmean().log().item()
    centre = torch.tensor([math.log(time_constant), math.log(scale), rate], dtype=counts.dtype)
    first_free = start(family, ar1_prior(*centre[:2], steps), series)
    # What many counts pull at bends the bound more: in smaller units it does so as the rest does.
    unit = torch.tensor([0.1, 0.03, 0.01], dtype=counts.dtype)
    units = {n: min(1.0, (v.shape[-1] / steps) ** 0.5) for n, v in first_free.items()}
    moved = torch.zeros(3, dtype=counts.dtype, requires_grad=learn)
    moves = {name: torch.zeros_like(v).requires_grad_() for name, v in first_free.items()}

    def model() -> tuple[Belief, Tensor, AR1Normal, dict[str, Tensor]]:
        log_time_constant, log_scale, rate = centre + unit * moved
        prior = ar1_prior(log_time_constant, log_scale, steps)
        free = {name: v + units[name] * moves[name] for name, v in first_free.items()}
        q = belief(family, free, prior)
        bound = expected_log_likelihood(counts, rate, q.mean, q.variance) - q.kl
        return q, bound, prior, free

    convergence = ascend(
        [*moves.values(), *([moved] if learn else [])],
        lambda: model()[1].sum(),
        iterations=iterations,
        tolerance=tolerance,
    )
    convergence["last_change"] /= counts.numel()
    with torch.no_grad():
        q, bound, prior, free = model()
        time_constant, scale, rate = (centre + unit * moved).tolist()
    return Fit(math.exp(time_constant), math.exp(scale), rate, bound.sum().item() / counts.numel(),
               q, prior, free, convergence)  # fmt: skip


def coverage(q: Belief, rate: float, log_rate: Tensor, window: int = 50) -> tuple[float, float]:
    """How often 90 % intervals of q hold the mean log-rate over `window` steps, and their width.

    The windows do not overlap. Time constant, scale and rate are taken as learned: the intervals
    know nothing of the error of those.
    """
    steps = log_rate.shape[-1]
    windows = steps // window
    average = torch.zeros(windows, steps, dtype=log_rate.dtype)
    for i in range(windows):
        average[i, i * window : (i + 1) * window] = 1 / window
    half = 1.6448536269514722 * ((average @ q.covariance()) * average).sum(-1).sqrt()
    error = (rate + q.mean - log_rate) @ average.mT
    return (error.abs() < half).double().mean().item(), 2 * half.mean().item()


def maximum_likelihood(counts: Tensor, log_rate: Tensor, draws: int = 500, seed: int = 0) -> dict:
    """Time constant, scale and rate of the largest likelihood; intervals of the exact posterior.

    Args:
        draws: of every series' path, for the intervals.
        seed: of the draws.
    Returns:
        Like `run`.
    """
    moved = torch.zeros(3, dtype=counts.dtype, requires_grad=True)
    centre = counts.new_tensor([math.log(20.0), math.log(0.5), counts.mean().log()])
    unit = counts.new_tensor([0.1, 0.03, 0.01])  # as in `fit`
    convergence = ascend(
        [moved], lambda: forward_filter(counts, *(centre + unit * moved)).evidence.sum()
    )
    convergence["last_change"] /= counts.numel()
    with torch.no_grad():
        log_time_constant, log_scale, rate = centre + unit * moved
        found = forward_filter(counts, log_time_constant, log_scale, rate)
        z = paths(found, draws, seed)
    average = (rate + z).unflatten(-1, (-1, 50)).mean(-1)  # windows, as in `coverage`
    low, high = average.quantile(torch.tensor([0.05, 0.95]).to(counts), 0)
    windows = log_rate.unflatten(-1, (-1, 50)).mean(-1)
    return {
        "time_constant": log_time_constant.exp().item(),
        "scale": log_scale.exp().item(),
        "rate": rate.item(),
        "bound_per_step": found.evidence.sum().item() / counts.numel(),
        "coverage": ((low < windows) & (windows < high)).double().mean().item(),
        "width": (high - low).mean().item(),
        "draws": draws,
        **convergence,
    }


class Filtered(NamedTuple):
    """The exact posterior of z on a grid, from the first step on."""

    evidence: Tensor  # log p(y), nats, (series,)
    grid: Tensor  # values of z, (points,)
    transition: Tensor  # of the prior: row z_t, column z_{t+1}, (points, points)
    shares: Tensor  # p(z_t | y_1 ... y_t), (steps, series, points)


def forward_filter(
    counts: Tensor, log_time_constant: Tensor, log_scale: Tensor, rate: Tensor, points: int = 181
) -> Filtered:
    """The likelihood of the counts by numerical integration over z_t, step by step.

    p(y_1 ... y_t, z_t) = p(y_t | z_t) int p(z_t | z_{t-1}) p(y_1 ... y_{t-1}, z_{t-1}) dz_{t-1}

    The trapezoidal rule is exact to rounding for a Gaussian that is wider than about its spacing:
    181 points over 7 standard deviations to either side do for time constants up to 150 steps.

    Args:
        counts: (series, steps), all of them observed.
        log_time_constant, log_scale, rate: shape ().
    """
    x = torch.linspace(-7, 7, points, dtype=counts.dtype)  # z in units of its standard deviation
    spacing, z = x[1] - x[0], log_scale.exp() * x
    rho = (-(-log_time_constant).exp()).exp()
    fresh = (-torch.expm1(-2 * (-log_time_constant).exp())).sqrt()  # its variance is 1 - rho^2
    transition = Normal(rho * x.unsqueeze(-1), fresh).log_prob(x).exp() * spacing
    log_rate = rate + z
    share = Normal(torch.zeros_like(rate), 1.0).log_prob(x).exp() * spacing
    evidence, shares = counts.new_zeros(len(counts)), []
    for y in counts.mT.unsqueeze(-1):
        joint = share * (y * log_rate - log_rate.exp() - torch.lgamma(y + 1)).exp()
        total = joint.sum(-1, keepdim=True)
        evidence = evidence + total.squeeze(-1).log()
        shares.append(joint / total)
        share = shares[-1] @ transition
    return Filtered(evidence, z, transition, torch.stack(shares))


def paths(filtered: Filtered, draws: int, seed: int) -> Tensor:
    """Draws of z given all counts, (draws, series, steps): the last step first, then backwards."""
    generator = torch.Generator().manual_seed(seed)
    weight = filtered.shares[-1].expand(draws, -1, -1)
    steps = []
    for share in (*filtered.shares[:-1].flip(0), filtered.shares[0]):  # the last one is not used
        below = weight.cumsum(-1)
        level = torch.rand(below.shape[:-1], generator=generator, dtype=below.dtype).unsqueeze(-1)
        chosen = torch.searchsorted(below, level * below[..., -1:]).squeeze(-1)
        steps.append(filtered.grid[chosen])
        weight = share * filtered.transition.mT[chosen]
    return torch.stack(steps[::-1], -1)


def run(
    family: str, time_constant: float, rate: float, seed: int, scale: float = 1.0,
    series: int = 32, steps: int = 300,
) -> dict:  # fmt: skip
    """One run of the study: what a family, or maximum likelihood, makes of one set of counts."""
    counts, log_rate = simulate(time_constant, rate, seed, scale, series, steps)
    if family == "maximum-likelihood":
        return maximum_likelihood(counts, log_rate, seed=seed)
    found = fit(counts, family)
    share, width = coverage(found.belief, found.rate, log_rate)
    return {
        "time_constant": found.time_constant,
        "scale": found.scale,
        "rate": found.rate,
        "bound_per_step": found.bound,
        "coverage": share,
        "width": width,
        **found.convergence,
    }


def settings() -> list[dict]:
    """Every run of the study, seed by seed, and after them the slow ones, which are the full."""
    names = (*FAMILIES, "maximum-likelihood")
    runs = [
        {"family": family, "time_constant": time_constant, "rate": rate, "seed": seed}
        for seed, family, time_constant, rate in product(range(5), names, (9.5, 49.5), (-1.0, 1.0))
    ]
    return sorted(runs, key=lambda run: run["family"] == "full")
