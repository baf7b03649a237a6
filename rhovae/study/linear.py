"""The price of a posterior family in a linear VAE, in closed form.           notebooks/07

A linear VAE with prior N(0, I), decoder x = W z + m and noise of variance s2 is probabilistic PCA
(Tipping and Bishop 1999). At its optimum all images have the same posterior covariance, with
eigenvalues v_i = s2 / lambda_i, where lambda_i are the largest eigenvalues of the data's covariance
and s2 is the mean of the others. A rotation of the latent space changes nothing but the axes, so
what a family of fixed shape costs depends on spectra alone, and s2 cancels.
"""

import torch
from torch import Tensor

from .. import ar1


def data_spectrum(images: Tensor) -> Tensor:
    """Eigenvalues of the covariance of images in [0, 1], largest first, float64.

    Args:
        images: uint8, (n, channels, height, width).
    """
    x = images.flatten(1).double() / 255
    x -= x.mean(0)
    return torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0)


def posterior_variances(spectrum: Tensor, latent: int) -> Tensor:
    """s2 / lambda_i, i = 1..latent: spectrum of the posterior covariance.    (7.2), notebooks/07"""
    if not 1 <= latent < len(spectrum):
        raise ValueError(
            f"latent is {latent}; with {len(spectrum)} eigenvalues it must lie between 1 and "
            f"{len(spectrum) - 1}, so that some are left for the noise."
        )
    return spectrum[latent:].mean() / spectrum[:latent]


def spectral_gap(shape: Tensor, variances: Tensor) -> Tensor:
    """KL from the best N(m, s Q C Q^T) to a normal, in nats.                 (7.4), notebooks/07

    min over s > 0 and rotations Q, for eigenvalues c_i of C and v_i of the normal, both sorted:

        d/2 log(mean_i c_i / v_i) - 1/2 sum_i log(c_i / v_i)

    which is d/2 times the log of the arithmetic over the geometric mean of c_i / v_i.

    Args:
        shape: eigenvalues c > 0, (..., d), in any order.
        variances: eigenvalues v > 0, (..., d), in any order.
    Returns:
        Nats, shape (...), at least zero, and zero where c is proportional to v.
    """
    ratio = shape.sort(-1).values / variances.sort(-1).values
    return 0.5 * (ratio.shape[-1] * ratio.mean(-1).log() - ratio.log().sum(-1))


def trained_gap(shape: Tensor, variances: Tensor) -> Tensor:
    """The same after training, in nats: the decoder gives way to the family.  (7.6), notebooks/07

    d log of the arithmetic over the geometric mean of sqrt(c_i / v_i): at most `spectral_gap`, and
    half of it where the spread is small.

    Args:
        shape, variances: as for `spectral_gap`; the variances are those of the best linear VAE.
    """
    root = (shape.sort(-1).values / variances.sort(-1).values).sqrt()
    return root.shape[-1] * root.mean(-1).log() - root.log().sum(-1)


def ar1_shape(rho: Tensor, latent: int) -> Tensor:
    """Eigenvalues of R(rho), (*rho.shape, latent)."""
    return torch.linalg.eigvalsh(ar1.correlation(rho.unsqueeze(-1), latent))


def best_rho(variances: Tensor, gap=spectral_gap, steps: int = 60) -> tuple[float, float]:
    """The rho in [0, 1) of the smallest gap, and that gap in nats.           (7.5), notebooks/07

    R(-rho) has the eigenvalues of R(rho), so only one side is searched: over a grid, which is then
    refined around its best point until neighbouring values differ by less than 1e-9.

    Args:
        variances: (d,).
        gap: `spectral_gap` or `trained_gap`.
        steps: points of a grid.
    """

    def price(rho: Tensor) -> Tensor:
        return gap(ar1_shape(rho, len(variances)), variances)

    low, high = 0.0, 1 - 1e-9
    while high - low > 1e-9:
        grid = torch.linspace(low, high, steps, dtype=torch.float64)
        best = int(price(grid).argmin())
        low, high = grid[max(best - 1, 0)].item(), grid[min(best + 1, steps - 1)].item()
    rho = (low + high) / 2
    return rho, price(torch.tensor(rho, dtype=torch.float64)).item()
