"""British coal-mining disasters by year: the rate and its time constant. notebooks/10

The model of `counts` with one series, and with priors on what is learned there:

    log time_constant ~ N(log 20, 1),    log scale ~ N(0, 0.5),    rate ~ N(0, 1)

A posterior q(theta) q(z | theta) of theta = (time constant, scale, rate) and z has its largest
bound for q(theta) proportional to p(theta) exp(bound(theta)), with the best q(z | theta) of the
family that is compared. On a grid of theta this is a finite sum.          (10.12), notebooks/10
"""

import csv
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from .. import AR1Normal, ar1
from .counts import ar1_prior, expected_log_likelihood
from .data import DATA_FOLDER

# Mean and standard deviation.
PRIORS = {"log_time_constant": (math.log(20), 1.0), "log_scale": (0.0, 0.5), "rate": (0.0, 1.0)}
FAMILIES = ("chain", "diagonal", "whitened", "karhunen-loeve")
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
    last_change: float


def posterior_on_a_grid(counts: Tensor, family: str, sizes=(25, 17, 17), reach=3.0) -> Grid:
    """q(theta) proportional to p(theta) exp(bound(theta)), and q(z | theta).

    Args:
        counts: (steps,), NaN where nothing was observed.
        family: one of FAMILIES.
        sizes: points in time constant, scale and rate.
        reach: how many of the priors' standard deviations the grid covers on both sides.
    """
    axes = [
        loc + scale * torch.linspace(-reach, reach, size, dtype=counts.dtype)
        for (loc, scale), size in zip(PRIORS.values(), sizes, strict=True)
    ]
    log_scale, rate = (x.reshape(-1, 1) for x in torch.meshgrid(*axes[1:], indexing="ij"))
    parts = [best_posteriors(counts, family, tau, log_scale, rate) for tau in axes[0]]
    bound, mean, variance, changes = zip(*parts, strict=True)
    theta = torch.cartesian_prod(*axes).unbind(-1)
    log_prior = sum(Normal(*p).log_prob(x) for p, x in zip(PRIORS.values(), theta, strict=True))
    joint = torch.cat(bound) + log_prior
    cell = math.prod((x[1] - x[0]).item() for x in axes)
    weight = joint.softmax(0)
    return Grid(*theta, weight, torch.cat(mean), torch.cat(variance).sqrt(),
                joint.logsumexp(0).item() + math.log(cell),
                (weight * torch.cat(changes)).max().item())  # fmt: skip


def best_posteriors(
    counts: Tensor, family: str, log_time_constant: Tensor, log_scale: Tensor, rate: Tensor,
    iterations: int = 40,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The largest bound for each pair of scale and rate, at one time constant, by iteration.

    With w_t = E_q exp(log-rate_t), the largest bound has, in each family, a variance that is a
    function of w: the chain that of the prior's precision plus diag(w), (10.1); independent
    coefficients of a basis B with B B^T the prior's covariance the relative variances
    1 / (1 + sum_t w_t B_tk^2); the diagonal family 1 / (P_tt + w_t), P the prior's precision. The
    mean is that of the prior after observations m_t + (y_t - w_t) / w_t of precision w_t.

    Args:
        counts: (steps,).
        log_time_constant: shape ().
        log_scale, rate: (points, 1).
    Returns:
        The bound in nats (points,), mean and variance of the log-rate (points, steps), and what
        the last iteration has changed of the bound (points,).
    """
    steps, seen = len(counts), ~counts.isnan()
    y = counts.nan_to_num()
    one = ar1_prior(log_time_constant, log_time_constant.new_zeros(()), steps)
    prior = AR1Normal(one.loc, log_scale.exp(), fisher_z=one.fisher_z, validate_args=False)
    variance_given, divergence = _rules(family, prior, one)
    mean = rate.new_zeros(len(rate), steps)
    variance = prior.variance
    bounds, old = [], None
    for _ in range(iterations):
        w = (rate + mean + variance / 2).clamp(max=20).exp() * seen
        w = w if old is None else (w * old).sqrt()  # half a step, or it may swing
        old = w
        value = mean + torch.where(seen, (y - w) / w, 0)
        mean = prior.condition(value, precision=w).mean
        variance = variance_given(w)
        kl = divergence(mean, w)
        bounds.append(expected_log_likelihood(counts, rate, mean, variance) - kl)
    return bounds[-1], rate + mean, variance, (bounds[-1] - bounds[-2]).abs()


def _rules(family: str, prior: AR1Normal, one: AR1Normal):
    """Of a family: the best variance given w, and KL(q || prior) given mean and w."""
    if family == "chain":
        given = lambda w: prior.condition(torch.zeros_like(w), precision=w)  # noqa: E731

        def divergence(mean: Tensor, w: Tensor) -> Tensor:
            q = given(w)
            q = AR1Normal(mean, q.scale, fisher_z=q.fisher_z, validate_args=False)
            return kl_divergence(q, prior)

        return lambda w: given(w).variance, divergence
    if family == "diagonal":
        own = one.precision_matrix[0].diagonal() / prior.scale.square()

        def divergence(mean: Tensor, w: Tensor) -> Tensor:
            return kl_divergence(Independent(Normal(mean, (own + w).rsqrt()), 1), prior)

        return lambda w: 1 / (own + w), divergence
    values, vectors = torch.linalg.eigh(one.precision_matrix[0])
    basis = {"whitened": one.scale_tril[0], "karhunen-loeve": vectors / values.sqrt()}[family]
    squares, size = basis.square(), prior.scale.square()
    ratio = lambda w: 1 / (1 + size * (w @ squares))  # noqa: E731

    def divergence(mean: Tensor, w: Tensor) -> Tensor:
        r = ratio(w)
        shift = ar1.whiten(mean / prior.scale, prior.rho).square()
        return (r - 1 - r.log() + shift).sum(-1) / 2

    return lambda w: size * (ratio(w) @ squares.mT), divergence


def rates_of(grid: Grid, draws: int = 20_000, seed: int = 0) -> Tensor:
    """Draws of every year's rate, disasters a year, (draws, steps); years apart from each other."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(grid.weight, draws, replacement=True, generator=generator)
    noise = torch.randn(grid.mean[chosen].shape, generator=generator, dtype=grid.mean.dtype)
    return (grid.mean[chosen] + grid.stddev[chosen] * noise).exp()


class Sampler:
    """log p(counts, theta, z) in coordinates (theta, u) in which the posterior is nearly round.

    Given theta, z is normal a posteriori but for the likelihood. With sites in its place, Gaussian
    observations of precision w_t at v_t, it would be normal, with the precision P + diag(w) and a
    mean m; so z = m(theta) + R(theta)^-T u with R R^T = P + diag(w), and u is nearly N(0, I) for
    every theta. The density stays exact: its Jacobian is det R^-1. Dense, to lean on nothing that
    is compared with it.

    Args:
        counts: (steps,), NaN where nothing was observed.
    """

    def __init__(self, counts: Tensor):
        self.seen, self.counts = ~counts.isnan(), counts.nan_to_num()
        step = torch.arange(len(counts), dtype=counts.dtype)
        self.lag = (step.unsqueeze(-1) - step).abs()
        at = counts.new_tensor([loc for loc, _ in PRIORS.values()])
        scale, rate = at[1].reshape(1, 1), at[2].reshape(1, 1)
        _, mean, variance, _ = best_posteriors(counts, "chain", at[0], scale, rate)
        w = (mean + variance / 2).exp()[0] * self.seen
        self.site, self.weight = mean[0] + torch.where(self.seen, (self.counts - w) / w, 0), w

    def log_joint(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm, nats, of the density of (theta, u), but for a constant; the log-rates.

        Args:
            theta: in the order of PRIORS, (3,).
            u: (steps,).
        """
        log_time_constant, log_scale, rate = theta
        x, variance = (-log_time_constant).exp(), (2 * log_scale).exp()
        covariance = variance * torch.exp(-x * self.lag)
        # P + diag(w) through L^T W L + I, as covariance = L L^T and z = L noise.
        lower = torch.linalg.cholesky(covariance)
        identity = torch.eye(len(u), dtype=u.dtype)
        root = torch.linalg.cholesky(identity + lower.mT @ (self.weight.unsqueeze(-1) * lower))
        pulled = lower.mT @ (self.weight * (self.site - rate))
        inner = torch.linalg.solve_triangular(root, pulled.unsqueeze(-1), upper=False)
        noise = torch.linalg.solve_triangular(root.mT, inner + u.unsqueeze(-1), upper=True)
        log_rate = rate + (lower @ noise).squeeze(-1)
        loc, scale = theta.new_tensor(list(PRIORS.values())).unbind(-1)
        squares = ((theta - loc) / scale).square().sum() + noise.square().sum()
        fitted = self.counts * log_rate - log_rate.exp()
        jacobian = -root.diagonal().log().sum()
        return (fitted * self.seen).sum() - squares / 2 + jacobian, log_rate


def nuts(counts: Tensor, draws: int = 500, warmup: int = 200, chains: int = 4) -> dict:
    """Draws of the exact posterior by Pyro's NUTS, one chain after the other.

    Returns:
        Draws, (chains, draws) of each name in PRIORS and (chains, draws, steps) of `log_rate`, and
        the number of `divergences`.
    """
    import pyro
    from pyro.infer import MCMC, NUTS

    sampler = Sampler(counts)
    loc, scale = counts.new_tensor(list(PRIORS.values())).unbind(-1)
    samples, divergences = [], 0
    for chain in range(chains):
        pyro.set_rng_seed(chain)
        first = {"theta": loc + scale * torch.randn_like(loc), "u": torch.randn_like(counts)}
        kernel = NUTS(potential_fn=lambda at: -sampler.log_joint(at["theta"], at["u"])[0])
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True,
                    initial_params=first)  # fmt: skip
        mcmc.run()
        samples.append(mcmc.get_samples())
        divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    theta, u = (torch.stack([s[name] for s in samples]) for name in ("theta", "u"))
    pairs = zip(theta.flatten(0, 1), u.flatten(0, 1), strict=True)
    log_rate = torch.stack([sampler.log_joint(*pair)[1] for pair in pairs])
    found = dict(zip(PRIORS, theta.unbind(-1), strict=True))
    return found | {"log_rate": log_rate.unflatten(0, theta.shape[:2]), "divergences": divergences}
