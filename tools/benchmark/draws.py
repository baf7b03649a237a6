"""A draw and its gradient with respect to mean, scale and correlation.

FUNCTIONS take the noise as well; as FAMILIES a distribution is made first and draws its own, as in
a model. All but the diagonal give the same numbers for the same noise, or seed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from rhovae import AR1Normal, ar1, kernels

from .clock import Calls, with_gradient


def loop(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """As the released code does, with the factor that it lacks: a tensor grown by columns."""
    x, innovation = noise[:, :1], (1 - rho**2).sqrt()
    for j in range(1, noise.shape[-1]):
        x = torch.cat((x, rho * x[:, -1:] + innovation * noise[:, j : j + 1]), -1)
    return loc + scale * x


def dense_cholesky(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """The closed-form factor as a matrix, times the noise: (1.5), notebooks/01."""
    return loc + scale * (ar1.cholesky(rho, noise.shape[-1]) @ noise.unsqueeze(-1)).squeeze(-1)


def fft(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """A shared rho makes the recursion a convolution with 1, rho, rho^2, ..."""
    latent = noise.shape[-1]
    innovations = torch.cat((noise[:, :1], (1 - rho**2).sqrt() * noise[:, 1:]), -1)
    size = good_size(2 * latent - 1)
    spectrum = torch.fft.rfft(rho ** torch.arange(latent), size)
    x = torch.fft.irfft(torch.fft.rfft(innovations, size) * spectrum, size)
    return loc + scale * x[:, :latent]


def good_size(least: int) -> int:
    """The next number without prime factors above 5, for which an FFT is fast."""
    size = least
    while pow(30, size.bit_length(), size):
        size += 1
    return size


def recorded_scan(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """The rounds (3.4) as autograd records them, without a backward pass of their own."""
    x, power, shift = torch.cat((noise[:, :1], (1 - rho**2).sqrt() * noise[:, 1:]), -1), rho, 1
    while shift < noise.shape[-1]:
        x = torch.cat((x[:, :shift], x[:, shift:] + power * x[:, :-shift]), -1)
        power, shift = power * power, 2 * shift
    return loc + scale * x


def ours(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    return kernels.draw(loc, scale, noise, rho)


def diagonal(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    return loc + scale * noise


def by_the_scan(function: Callable) -> Callable:
    """What a function does where there is no numba."""

    def call(*inputs):
        with kernels.use(False):
            return function(*inputs)

    return call


def ar1_normal(loc: Tensor, scale: Tensor, rho: Tensor) -> Tensor:
    return AR1Normal(loc, scale, rho, validate_args=False).rsample()


def multivariate_normal(loc: Tensor, scale: Tensor, rho: Tensor) -> Tensor:
    covariance = scale.square().unsqueeze(-1) * ar1.correlation(rho, loc.shape[-1])
    return MultivariateNormal(loc, covariance, validate_args=False).rsample()


def diagonal_normal(loc: Tensor, scale: Tensor, rho: Tensor) -> Tensor:
    normal = Normal(loc, scale.expand_as(loc), validate_args=False)
    return Independent(normal, 1, validate_args=False).rsample()


FUNCTIONS = {
    "loop": loop,
    "dense Cholesky factor": dense_cholesky,
    "FFT": fft,
    "recorded scan": recorded_scan,
    "ours by the scan": by_the_scan(ours),
    "ours": ours,
    "diagonal": diagonal,
}
FAMILIES = {
    "loop": lambda loc, scale, rho: loop(loc, scale, rho, torch.randn_like(loc)),
    "MultivariateNormal": multivariate_normal,
    "ours by the scan": by_the_scan(ar1_normal),
    "ours": ar1_normal,
    "diagonal": diagonal_normal,
}
LARGEST = {"loop": 1024, "dense Cholesky factor": 64, "MultivariateNormal": 64}


def parameters(batch: int, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """loc, scale and rho, as an encoder would give them."""
    loc = torch.randn(batch, latent, requires_grad=True)
    scale = (0.5 + torch.rand(batch, 1)).requires_grad_()
    rho = (1.8 * torch.rand(batch, 1) - 0.9).requires_grad_()
    return loc, scale, rho


def fits(name: str, latent: int) -> bool:
    return latent <= LARGEST.get(name, latent)


def functions(batch: int, latent: int) -> Calls:
    inputs = *parameters(batch, latent), torch.randn(batch, latent)
    chosen = {name: f for name, f in FUNCTIONS.items() if fits(name, latent)}
    return {name: with_gradient(f, *inputs) for name, f in chosen.items()}


def families(batch: int, latent: int) -> Calls:
    inputs = parameters(batch, latent)
    chosen = {name: f for name, f in FAMILIES.items() if fits(name, latent)}
    return {name: with_gradient(f, *inputs) for name, f in chosen.items()}
