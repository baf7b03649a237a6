"""AR1Normal and AR1Prior for Pyro: the same, with what `pyro.sample` asks for beside it.

pip install rhovae[pyro]
"""

try:
    from pyro.distributions.torch_distribution import TorchDistributionMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rhovae.pyro needs Pyro, which is not installed; install it with: pip install rhovae[pyro]"
    ) from error

from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

from . import chains, distribution


class AR1Normal(distribution.AR1Normal, TorchDistributionMixin):
    __doc__ = distribution.AR1Normal.__doc__

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:  # type: ignore[override]
        """Of the parameters that were given: Pyro makes new instances from all it finds here."""
        every = distribution.AR1Normal.arg_constraints
        dependence = "rho" if self._given == ("rho",) else "fisher_z"
        return {name: every[name] for name in ("loc", "scale", dependence)}

    def conjugate_update(self, other: Distribution) -> tuple["AR1Normal", Tensor]:
        """This chain times a diagonal normal over the same variables, as Pyro asks for it.

        `pyro.infer.reparam.ConjugateReparam` takes the other as the guide: with noise of known
        scale, Normal(value, scale).to_event(1).

        Args:
            other: Independent(Normal, 1) with the event shape of this chain.
        Returns:
            The normalised product, and the logarithm of what the product integrates to: for every
            z, self.log_prob(z) + other.log_prob(z) is the sum of the two.
        """
        base = getattr(other, "base_dist", None)
        if not isinstance(other, Independent) or not isinstance(base, Normal):
            raise NotImplementedError(
                "AR1Normal.conjugate_update takes Normal(value, scale).to_event(1), but the other "
                f"distribution is {other}."
            )
        precision = base.scale.square().reciprocal()
        updated = self.condition(base.loc, precision=precision)
        return updated, self.log_evidence(base.loc, precision=precision, posterior=updated)


class AR1Prior(chains.AR1Prior):
    """`rhovae.AR1Prior` with Pyro's AR1Normal, and Sites, given it, is a guide.

    Model and guide register what they learn, and sample all channels as one event::

        def model(counts):
            pyro.module("prior", prior)
            with pyro.plate("series", len(counts)):
                z = pyro.sample("z", prior(steps).to_event(1))
                pyro.sample("counts", dist.Poisson(rate(z)).to_event(2), obs=counts)

        def guide(counts):
            pyro.module("encoder", encoder)
            pyro.module("sites", sites)
            with pyro.plate("series", len(counts)):
                pyro.sample("z", sites(encoder(counts), prior(steps)).to_event(1))

    With TraceMeanField_ELBO the KL divergence is taken in closed form.

    Args:
        channels, time_constant, scale, learn_time_constant, learn_scale: as there.
    """

    distribution = AR1Normal
