"""The posterior family of GP-VAE, as a chain: precision U U^T with a bidiagonal U."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .. import ar1
from ..distribution import AR1Normal


def banded_normal(loc: Tensor, diagonal: Tensor, above: Tensor) -> AR1Normal:
    """N(loc, (U U^T)^-1) for U with `diagonal` on its diagonal and `above` right above it.

    U^T (z - loc) is standard noise e: its first row says u_1 z_1 = e_1, the others
    w_j z_j + u_{j+1} z_{j+1} = e_{j+1}. So z is a chain with coefficients -w_j / u_{j+1} and
    innovations of standard deviation 1 / u_{j+1}. Its marginal variances V follow a recursion of
    positive terms, and Fisher's z of neighbours is -asinh(w_j sqrt(V_j)): nothing cancels.

    Args:
        loc: mean, shape (*batch, steps).
        diagonal: u > 0, shape (*batch, steps).
        above: w, any real numbers, shape (*batch, steps - 1).
    Returns:
        AR1Normal of batch shape (*batch,) and event shape (steps,).
    Reference:
        Fortuin et al. (2020), GP-VAE, arXiv 1907.04155: `BandedJointEncoder` in the released code.
    """
    if above.shape[-1] != diagonal.shape[-1] - 1:
        raise ValueError(
            f"banded_normal: diagonal has shape {tuple(diagonal.shape)} and above "
            f"{tuple(above.shape)}; above must have one entry less along the last dimension."
        )
    coefficient = -above / diagonal[..., 1:]
    scale = ar1.scan(diagonal.square().reciprocal(), coefficient.square()).sqrt()
    if diagonal.shape[-1] == 1:  # one variable has no neighbour
        return AR1Normal(loc, scale, rho=0.0, validate_args=False)
    fisher_z = -torch.asinh(above * scale[..., :-1])
    return AR1Normal(loc, scale, fisher_z=fisher_z, validate_args=False)


class BandedHead(nn.Module):
    """Features of each step to GP-VAE's posterior: 3 numbers per step and channel.

    U = I + f(outputs) on both diagonals, with f = softplus, or the logistic sigmoid in the release
    for the medical data set and in PyPOTS. As f > 0, innovations are smaller than 1 and neighbours
    in time correlate negatively, whatever the outputs are.

    Args:
        features: number of features per step.
        channels: number of latent time series.
        link: f, from the real numbers to positive ones.
    Reference:
        Fortuin et al. (2020), GP-VAE, arXiv 1907.04155.
    """

    def __init__(self, features: int, channels: int, link=softplus):
        super().__init__()
        self.loc = nn.Linear(features, channels)
        self.diagonal = nn.Linear(features, channels)
        self.above = nn.Linear(features, channels)
        self.link = link

    def forward(self, features: Tensor) -> AR1Normal:
        """(batch, steps, features) -> AR1Normal of batch (batch, channels), event (steps,)."""
        layers = (self.loc, self.diagonal, self.above)
        loc, diagonal, above = (layer(features).mT for layer in layers)
        # The last entry above the diagonal has no place in U; the release drops it too.
        return banded_normal(loc, 1 + self.link(diagonal), self.link(above[..., :-1]))
