"""A chain of which every step was observed: its posterior, beside a draw of the chain itself."""

import torch

from rhovae import AR1Normal

from .clock import Calls, with_gradient
from .draws import ar1_normal, by_the_scan, parameters


def conditioned(loc, scale, rho, value, precision):
    """A draw after `condition`, differentiable in everything."""
    prior = AR1Normal(loc, scale, rho, validate_args=False)
    return prior.condition(value, precision=precision).rsample()


def conditioning(batch: int, steps: int) -> Calls:
    inputs = parameters(batch, steps)
    value = torch.randn(batch, steps, requires_grad=True)
    precision = (0.1 + torch.rand(batch, steps)).requires_grad_()
    calls = {}
    for name, how in (("", lambda f: f), (" by the scan", by_the_scan)):
        calls[f"prior{name}"] = with_gradient(how(ar1_normal), *inputs)
        calls[f"posterior{name}"] = with_gradient(how(conditioned), *inputs, value, precision)
    return calls
