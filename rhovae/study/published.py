"""The estimators of the paper's released code, exactly as published. For the audit only.

Both variants draw a chain whose innovations keep the full standard deviation sqrt(s),

    z_1 = sqrt(s) e_1,    z_j = r z_{j-1} + sqrt(s) e_j,    then + loc,                        (4.1)

with r = rho in the notebooks and r = 1 (rho forgotten, a random walk) in the script, whose losses
are those of the paper's Figure 1. They charge the KL divergence of another distribution,
N(loc, s R(rho)), and divide all of it but |loc|^2 by the batch size. Here each is a distribution
that samples what the code samples, with its true log_prob, entropy and KL, and beside that the KL
that the code charges.

Source: github.com/sssohrab/rho_VAE, notebooks/rho_VAE.ipynb, models.py, utils.py (2019).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from .. import ar1
from ..distribution import AR1Normal
from ..objectives import Terms, negative_elbo, standard_normal_like
from ..posteriors import AR1
from ..vae import VAE
from .data import to_unit_interval


class PublishedNormal(AR1Normal):
    """What the released code samples: (4.1), notebooks/04.

    The chain is Gauss-Markov, hence an AR1Normal. Its variances s v_j obey v_1 = 1,
    v_j = 1 + r^2 v_{j-1}; neighbours correlate by r sqrt(v_j / v_{j+1}); and its covariance has
    determinant s^d and trace s sum_j v_j.                                    (4.2), notebooks/04

    Args:
        loc: (*batch, latent).
        log_s: log of the innovation variance s, (*batch, 1).
        charged_fisher_z: Fisher's z of the rho that the code charges for, (*batch, 1).
        forget_rho: True for the script (r = 1), False for the notebooks (r = rho).
        epsilon: what the code adds inside log(1 - rho^2 + epsilon).
        charge_draw: True where the code puts the draw into its loss in the place of loc
            (RHO_BETAVAE and RHO_INFO_VAE).
    """

    def __init__(self, loc: Tensor, log_s: Tensor, charged_fisher_z: Tensor, forget_rho: bool,
                 epsilon: float, charge_draw: bool = False):  # fmt: skip
        self.log_s, self.charged_rho, self.epsilon = log_s, charged_fisher_z.tanh(), epsilon
        self.charge_draw = charge_draw
        r = torch.ones_like(log_s) if forget_rho else self.charged_rho
        variances = ar1.scan(torch.ones_like(loc), r.square())
        # 1 - r^2 v_j / v_{j+1} = 1 / v_{j+1}, so that atanh needs no difference near 1.
        correlation = r * (variances[..., :-1] / variances[..., 1:]).sqrt()
        scale = torch.exp(0.5 * log_s) * variances.sqrt()
        super().__init__(loc, scale, rho=correlation, validate_args=False)
        self.__dict__["_innovation"] = variances[..., 1:].rsqrt()

    def expand(self, batch_shape, _instance=None):
        """The same law as a plain AR1Normal; what the code charges belongs to its own batch."""
        return super().expand(batch_shape, AR1Normal.__new__(AR1Normal))

    @property
    def formula_kl(self) -> Tensor:
        """The paper's Eq. 6, the KL of N(loc, s R(rho)), in nats, shape (*batch,)."""
        return self.location_kl + self._covariance_kl

    @property
    def location_kl(self) -> Tensor:
        """|loc|^2 / 2, the part of the KL that the code charges in full, shape (*batch,)."""
        return 0.5 * self.loc.square().sum(-1)

    def charged_kl(self, batch_size: int) -> Tensor:
        """The KL term that the code puts into its loss, per image, shape (*batch,).

        |loc|^2 / 2 + (1/B) 1/2 (d (s - 1) - d log s - (d - 1) log(1 - rho^2 + epsilon))

        The 1/B comes from a sum over the batch inside a mean over the batch.  (4.3), notebooks/04
        Where the draw stands for loc, this is the mean over draws, with E|z|^2 for |loc|^2: the
        trace of the covariance is then charged in full, and its log-determinant is not.
        """
        trace = 0.5 * self.variance.sum(-1) if self.charge_draw else 0.0
        return self.location_kl + trace + self._covariance_kl / batch_size

    def charge(self, z: Tensor) -> Tensor:
        """That term for the draws z of a whole batch, (B, latent), per image, shape (B,)."""
        location = 0.5 * z.square().sum(-1) if self.charge_draw else self.location_kl
        return location + self._covariance_kl / len(z)

    @property
    def _covariance_kl(self) -> Tensor:
        d = self.loc.shape[-1]
        log_s, rho = self.log_s.squeeze(-1), self.charged_rho.squeeze(-1)
        log_det = d * log_s + (d - 1) * torch.log(1 - rho**2 + self.epsilon)
        return 0.5 * (d * (log_s.exp() - 1) - log_det)


class PublishedNotebook(AR1):
    """Posterior of the README and the notebooks: innovations without sqrt(1 - rho^2)."""

    forget_rho, epsilon = False, 1e-7

    def forward(self, features: Tensor) -> PublishedNormal:
        log_s, fisher_z = self.log_variance(features), self.fisher_z(features)
        return PublishedNormal(self.loc(features), log_s, fisher_z, self.forget_rho, self.epsilon)


class PublishedScript(PublishedNotebook):
    """Posterior of models.py, whose losses are those of Figure 1: a random walk without rho."""

    forget_rho, epsilon = True, 0.0


def published_loss(q: Distribution, z: Tensor, logits: Tensor, x: Tensor) -> Terms:
    """The loss the released code minimises and reports, per image and in nats.

    It depends on the size of the batch it is given. With any other posterior it is the negative
    ELBO, as in the code's baselines.                                          (4.3), notebooks/04
    """
    terms = negative_elbo(q, z, logits, x)
    if hasattr(q, "charge"):
        return terms._replace(loss=terms.reconstruction + q.charge(z))
    return terms


def divided_loss(q: Distribution, z: Tensor, logits: Tensor, x: Tensor) -> Terms:
    """The published division by the batch size, applied to the KL of *any* posterior.

    reconstruction + |loc|^2 / 2 + (KL - |loc|^2 / 2) / B: the control that separates the division
    from the choice of the posterior and from the sampler.                  (4.5), notebooks/04
    """
    terms = negative_elbo(q, z, logits, x)
    location = 0.5 * q.mean.square().sum(-1)
    charged = location + (terms.kl - location) / len(x)
    return terms._replace(loss=terms.reconstruction + charged)


@torch.no_grad()
def decompose(vae: VAE, images: Tensor, batch_size: int) -> dict[str, float]:
    """The KL of a posterior that charges another, in its versions, means over images in nats.

    Args:
        vae: a model with a published posterior, or that of INFO_VAE.
        images: uint8, (n, channels, height, width).
        batch_size: of the code's evaluation, which decides what it charges.
    Returns:
        kl_charged (in the reported loss), kl_formula (Eq. 6 of the paper, undivided), kl_true (of
        what is sampled), location (|loc|^2 / 2, common to all three) and the mean rho and log s,
        where there are such.
    """
    sums = torch.zeros(())
    for batch in images.split(batch_size):
        q: Any = vae.encode(to_unit_interval(batch))
        kl_true = kl_divergence(q, standard_normal_like(q.mean))
        per_image = {"kl_charged": q.charged_kl(len(batch)), "kl_formula": q.formula_kl,
                     "kl_true": kl_true, "location": q.location_kl}  # fmt: skip
        if isinstance(q, PublishedNormal):
            per_image |= {"rho": q.charged_rho.squeeze(-1), "log_s": q.log_s.squeeze(-1)}
        sums = sums + torch.stack(tuple(per_image.values())).sum(1).cpu().double()
    return dict(zip(per_image, (sums / len(images)).tolist(), strict=True))


PUBLISHED_POSTERIORS = {
    "published-notebook": PublishedNotebook,
    "published-script": PublishedScript,
}
