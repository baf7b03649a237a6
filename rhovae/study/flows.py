"""Two posteriors beyond ours, by Pyro's transforms: what a flow would give in the same network.

Their KL divergence has no closed form (for the Householder flow, a normal, Pyro knows none), so
`sampled_elbo` takes it by the draw. Needs pip install rhovae[pyro].
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, TransformedDistribution

from ..objectives import Terms, bernoulli_nll, standard_normal_like
from ..posteriors import Diagonal

MOMENT_DRAWS = 256


def sampled_elbo(q: Distribution, z: Tensor, logits: Tensor, x: Tensor) -> Terms:
    """The negative ELBO with log q(z|x) - log p(z) of the one draw in place of the KL divergence.

    Args, Returns:
        As `objectives.negative_elbo`.
    """
    reconstruction = bernoulli_nll(logits, x)
    kl = q.log_prob(z) - standard_normal_like(z).log_prob(z)
    return Terms(reconstruction + kl, reconstruction, kl)


class Flow(TransformedDistribution):
    """A transformed normal whose moments are those of 256 draws."""

    @functools.cached_property
    def _draws(self) -> Tensor:
        return self.sample((MOMENT_DRAWS,))

    @property
    def mean(self) -> Tensor:
        return self._draws.mean(0)

    @property
    def variance(self) -> Tensor:
        return self._draws.var(0)


class _FlowHead(Diagonal):
    """A diagonal normal, and transforms that see 64 further numbers of each image."""

    context_size = 64

    def __init__(self, features: int, latent: int):
        super().__init__(features, latent)
        self.context = nn.Linear(features, self.context_size)
        try:
            from pyro.distributions import transforms  # here, as it takes seconds
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The flows need Pyro, which is not installed; install it with: "
                "pip install rhovae[pyro]"
            ) from error
        # A single variable has nothing to be turned into or to depend on.
        self.steps = nn.ModuleList(self._steps(transforms) if latent > 1 else [])

    def _steps(self, transforms: Any) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, features: Tensor) -> Distribution:
        context, steps = self.context(features), cast(Any, self.steps)
        conditioned = [step.condition(context) for step in steps]
        return Flow(super().forward(features), conditioned, validate_args=False)


class InverseAutoregressive(_FlowHead):
    """Four gated autoregressive steps with one hidden layer of 320 units (Kingma et al. 2016).

    The order of the variables is reversed from one step to the next.
    """

    def _steps(self, transforms: Any) -> list[nn.Module]:
        from pyro.nn import ConditionalAutoRegressiveNN

        order: Any = torch.arange(self.latent)
        return [
            transforms.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(
                    self.latent, self.context_size, [320], permutation=permutation
                ),
                stable=True,
            )
            for permutation in 2 * (order, order.flip(0))
        ]


class Householder(_FlowHead):
    """Ten reflections, or one for each variable where those are fewer (Tomczak and Welling 2016).

    Each turns the ellipsoid of a diagonal normal, so this is a normal with a covariance of its own.
    """

    def _steps(self, transforms: Any) -> list[nn.Module]:
        count = min(10, self.latent)
        return [transforms.conditional_householder(self.latent, self.context_size, [64], count)]


FLOWS = {"iaf": InverseAutoregressive, "householder": Householder}
