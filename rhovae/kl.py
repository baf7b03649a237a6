"""KL divergences between AR1Normal and the normals of torch, registered when rhovae is imported.

With them come those of dense normals to a diagonal one, which torch lacks and the heads need.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from torch.distributions.kl import kl_divergence, register_kl

from . import ar1
from .distribution import AR1Normal, _check_same_event


@register_kl(AR1Normal, AR1Normal)
def _kl_ar1normal_ar1normal(q: AR1Normal, p: AR1Normal) -> Tensor:
    """KL(q || p) in O(d): p's innovations, seen through q.                    (2.5), notebooks/02

    In p's units, q is the chain y_j = w_j x_j with w = q.scale / p.scale, and p whitens y_j to
    (y_j - r_p y_{j-1}) / c_p. Its second moment under q has a part that q carries over and one that
    is fresh. Each step is a KL for itself, at least 0, and determinants, which are large where a
    divergence may be small, are never subtracted.
    """
    _check_same_event(q, p)
    w = q.stddev / p.stddev
    carried = (w[..., 1:] * q.rho - w[..., :-1] * p.rho) / p._innovation
    fresh = w[..., 1:] * q._innovation / p._innovation
    # Where q's innovation scale is too small for its type, its logarithm is not.
    told = fresh > torch.finfo(fresh.dtype).tiny
    apart = w[..., 1:].log() + (q._log_steps - p._log_steps) / 2
    log = torch.where(told, torch.where(told, fresh, 1).log(), apart)
    shift = p._whiten((q.loc - p.loc) / p.scale).square().sum(-1)
    steps = (carried.square() + _kl_of_scale(log)).sum(-1)
    return 0.5 * (_kl_of_scale(w[..., 0].log()) + steps + shift)


def _kl_of_scale(log: Tensor) -> Tensor:
    """r^2 - 1 - 2 log r, at least 0, from log r; to more digits than from r where r is near 1."""
    return torch.expm1(2 * log) - 2 * log


@register_kl(AR1Normal, Independent)
def _kl_ar1normal_independent(q: AR1Normal, p: Independent) -> Tensor:
    """KL(q || p) for p = Independent(Normal, 1), the prior of a VAE.         (2.4), notebooks/02"""
    loc, scale = _diagonal_parameters(p)
    _check_same_event(q, p)
    shift = (q.loc - loc) / scale
    ratio = q.scale / scale
    terms = torch.sub(shift.square() + ratio.square(), ratio.log(), alpha=2)
    return 0.5 * (terms.sum(-1) - (q._log_det_correlation + q._latent))


@register_kl(Independent, AR1Normal)
def _kl_independent_ar1normal(q: Independent, p: AR1Normal) -> Tensor:
    loc, scale = _diagonal_parameters(q)
    return kl_divergence(AR1Normal(loc, scale, rho=loc.new_zeros(1), validate_args=False), p)


@register_kl(AR1Normal, MultivariateNormal)
@register_kl(AR1Normal, LowRankMultivariateNormal)
def _kl_ar1normal_dense(q: AR1Normal, p: Distribution) -> Tensor:
    _check_same_event(q, p)
    dense = MultivariateNormal(q.loc, scale_tril=q.scale_tril, validate_args=False)
    return kl_divergence(dense, p)


@register_kl(MultivariateNormal, AR1Normal)
@register_kl(LowRankMultivariateNormal, AR1Normal)
def _kl_dense_ar1normal(q: Any, p: AR1Normal) -> Tensor:
    """KL(q || p) in O(d^2): the trace is the squared norm of q's whitened Cholesky factor."""
    _check_same_event(q, p)
    columns = (q.scale_tril / p.stddev.unsqueeze(-1)).mT
    whitened = ar1.whiten(columns, p.rho.unsqueeze(-2), p._innovation.unsqueeze(-2))
    trace = whitened.square().sum((-2, -1))
    shift = p._whiten((q.loc - p.loc) / p.scale).square().sum(-1)
    half_log_det = q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (trace + shift - p._latent) + p._half_log_det - half_log_det


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def _kl_dense_independent(q: Distribution, p: Independent) -> Tensor:
    """KL(q || p) for any normal q and diagonal p, which torch does not have.  (2.3), notebooks/02

    -H(q) + 1/2 sum_j [log(2 pi s_j) + (Var_q(z_j) + (E_q z_j - m_j)^2) / s_j], s and m those of p.
    """
    loc, scale = _diagonal_parameters(p)
    _check_same_event(q, p)
    second_moment = (q.variance + (q.mean - loc).square()) / scale.square()
    constant = 2 * scale.log() + math.log(2 * math.pi)
    return 0.5 * (constant + second_moment).sum(-1) - q.entropy()


def _diagonal_parameters(distribution: Independent) -> tuple[Tensor, Tensor]:
    """loc and scale of a diagonal normal over one event dimension."""
    base = distribution.base_dist
    if not isinstance(base, Normal) or distribution.reinterpreted_batch_ndims != 1:
        raise NotImplementedError(
            "This KL divergence is known for Independent(Normal(...), 1), but the other "
            f"distribution is {distribution}."
        )
    return base.loc, base.scale
