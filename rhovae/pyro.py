"""AR1Normal for Pyro: the same distribution, with what `pyro.sample` asks for beside it.

pip install rhovae[pyro]
"""

try:
    from pyro.distributions.torch_distribution import TorchDistributionMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "rhovae.pyro needs Pyro, which is not installed; install it with: pip install rhovae[pyro]"
    ) from error

from . import distribution


class AR1Normal(distribution.AR1Normal, TorchDistributionMixin):
    __doc__ = distribution.AR1Normal.__doc__

    @property
    def arg_constraints(self):
        """Of the parameters that were given: Pyro makes new instances from all it finds here."""
        constraints = distribution.AR1Normal.arg_constraints
        return {name: constraints[name] for name in ("loc", "scale", self._given)}
