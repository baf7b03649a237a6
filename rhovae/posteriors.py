"""Posterior heads: encoder features -> q(z|x), one small module per Gaussian family.

A head is made as `POSTERIORS[name](features, latent)` and called on features of shape
(batch, features). Each adds to the `latent` outputs for the mean the few that describe its
covariance; `numbers_per_image` counts them all, and the parameters of a head are
(features + 1) * numbers_per_image.
"""

import torch
from torch import Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from .distribution import AR1Normal


class PosteriorHead(nn.Module):
    """One linear layer per number group: `loc` here, the covariance in the subclass."""

    def __init__(self, features: int, latent: int):
        if latent < 1:
            raise ValueError(f"latent is {latent}; a posterior needs at least 1 latent variable.")
        super().__init__()
        self.latent = latent
        self.loc = nn.Linear(features, latent)

    @property
    def numbers_per_image(self) -> int:
        """How many numbers the head outputs for each image."""
        return sum(layer.out_features for layer in self.children() if isinstance(layer, nn.Linear))

    def forward(self, features: Tensor) -> Distribution:
        raise NotImplementedError


class Isotropic(PosteriorHead):
    """N(loc, s I): one variance for all latent variables, latent + 1 numbers per image."""

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, 1)

    def forward(self, features: Tensor) -> Distribution:
        return _diagonal_normal(self.loc(features), self.log_variance(features))


class Diagonal(PosteriorHead):
    """N(loc, diag(s_1, ..., s_d)), the usual VAE: 2 latent numbers per image."""

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, latent)

    def forward(self, features: Tensor) -> Distribution:
        return _diagonal_normal(self.loc(features), self.log_variance(features))


class AR1(PosteriorHead):
    """N(loc, s R(rho)), rho-VAE: two scalars for the whole covariance, latent + 2 numbers.

    The layer before tanh outputs Fisher's z of rho, as in the paper (Sec. 3), and tanh itself is
    left to AR1Normal, which needs 1 - rho^2 more precisely than tanh can tell it.
    """

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, 1)
        self.fisher_z = nn.Linear(features, 1)

    def forward(self, features: Tensor) -> Distribution:
        scale = torch.exp(0.5 * self.log_variance(features))
        fisher_z = self.fisher_z(features)
        return AR1Normal(self.loc(features), scale, fisher_z=fisher_z, validate_args=False)


class AR1Scaled(PosteriorHead):
    """A variance for each latent variable and one correlation: 2 latent + 1 numbers.

    Contains the diagonal posterior (rho = 0) and the AR(1) one (equal variances).
    """

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, latent)
        self.fisher_z = nn.Linear(features, 1)

    forward = AR1.forward


class AR1Stepped(PosteriorHead):
    """A variance for each latent variable and a correlation for each step: 3 latent - 1 numbers.

    (3 for a single latent variable, as its one correlation is there and unused.)

    The general Gauss-Markov chain, i.e. every normal with a tridiagonal precision.
    """

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, latent)
        self.fisher_z = nn.Linear(features, max(latent - 1, 1))

    forward = AR1.forward


class LowRank(PosteriorHead):
    """N(loc, diag(s) + F F^T) with F of rank at most 2: 4 latent numbers per image."""

    rank = 2

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, latent)
        self.factor = nn.Linear(features, latent * self.rank)

    def forward(self, features: Tensor) -> Distribution:
        factor = self.factor(features).unflatten(-1, (self.latent, self.rank))
        diagonal = torch.exp(self.log_variance(features))
        loc = self.loc(features)
        return LowRankMultivariateNormal(loc, factor, diagonal, validate_args=False)


class Full(PosteriorHead):
    """Any covariance (L D)(L D)^T, L unit lower triangular, D diagonal: d (d + 3) / 2 numbers.

    (3 for d = 1, as its one entry below the diagonal is there and unused.)
    """

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.log_variance = nn.Linear(features, latent)
        self.below = nn.Linear(features, max(latent * (latent - 1) // 2, 1))

    def forward(self, features: Tensor) -> Distribution:
        scale = torch.exp(0.5 * self.log_variance(features))
        factor = torch.diag_embed(torch.ones_like(scale))
        rows, columns = torch.tril_indices(self.latent, self.latent, -1, device=features.device)
        factor[..., rows, columns] = self.below(features)[..., : len(rows)]
        loc = self.loc(features)
        return MultivariateNormal(loc, scale_tril=factor * scale.unsqueeze(-2), validate_args=False)


def _diagonal_normal(loc: Tensor, log_variance: Tensor) -> Distribution:
    scale = torch.exp(0.5 * log_variance)
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)


POSTERIORS = {
    "isotropic": Isotropic,
    "diagonal": Diagonal,
    "ar1": AR1,
    "ar1-scaled": AR1Scaled,
    "ar1-stepped": AR1Stepped,
    "low-rank": LowRank,
    "full": Full,
}
