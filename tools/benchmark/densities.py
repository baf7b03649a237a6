"""log_prob of given values and the KL to the prior, with the making of the distribution."""

import torch
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from rhovae import AR1Normal, ar1
from rhovae.objectives import standard_normal_like

from .clock import Calls, with_gradient
from .draws import fits, parameters


def ar1normal(loc, scale, rho):
    return AR1Normal(loc, scale, rho, validate_args=False)


def multivariate_normal(loc, scale, rho):
    covariance = scale.square().unsqueeze(-1) * ar1.correlation(rho, loc.shape[-1])
    return MultivariateNormal(loc, covariance, validate_args=False)


def low_rank(loc, scale, factor):
    variance = scale.square().expand_as(loc)
    return LowRankMultivariateNormal(loc, factor, variance, validate_args=False)


def diagonal(loc, scale):
    return Independent(Normal(loc, scale.expand_as(loc), validate_args=False), 1)


def densities(quantity: str, batch: int, latent: int) -> Calls:
    loc, scale, rho = parameters(batch, latent)
    factor = torch.randn(batch, latent, 2, requires_grad=True)
    value = torch.randn(batch, latent)
    prior = standard_normal_like(value)
    dense_prior = MultivariateNormal(torch.zeros(latent), torch.eye(latent), validate_args=False)

    def of(family, prior):
        if quantity == "log_prob":
            return lambda *inputs: family(*inputs).log_prob(value)
        return lambda *inputs: kl_divergence(family(*inputs), prior)

    families = {
        "ours": (ar1normal, prior, (loc, scale, rho)),
        "MultivariateNormal": (multivariate_normal, dense_prior, (loc, scale, rho)),
        "LowRankMultivariateNormal": (low_rank, dense_prior, (loc, scale, factor)),
        "diagonal": (diagonal, prior, (loc, scale)),
    }
    return {
        name: with_gradient(of(family, prior), *inputs)
        for name, (family, prior, inputs) in families.items()
        if fits(name, latent)
    }
