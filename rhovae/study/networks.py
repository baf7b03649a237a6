"""Encoder and decoder bodies. The posterior head goes between them and knows neither.

`NETWORKS[name](image_shape, latent)` gives a `Bodies`: an encoder from images in [0, 1] of shape
(batch, *image_shape) to (batch, features), and a decoder from (batch, latent) to pixel logits of
shape (batch, *image_shape).
"""

from math import prod
from typing import NamedTuple

from torch import Tensor, nn


class Bodies(NamedTuple):
    encoder: nn.Module
    features: int
    decoder: nn.Module


def mlp(image_shape: tuple[int, ...], latent: int, hidden: int = 400) -> Bodies:
    """pixels-400-latent-400-pixels with ReLU, the network of the paper's notebooks."""
    pixels = prod(image_shape)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU())
    decoder = nn.Sequential(
        nn.Linear(latent, hidden),
        nn.ReLU(),
        nn.Linear(hidden, pixels),
        nn.Unflatten(-1, image_shape),
    )
    return Bodies(encoder, hidden, decoder)


def tanh_mlp(image_shape: tuple[int, ...], latent: int, hidden: int = 200) -> Bodies:
    """pixels-200-200-latent-200-200-pixels with tanh: that of Burda et al. (2016)."""
    pixels = prod(image_shape)
    encoder = nn.Sequential(
        *(nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh()),
        *(nn.Linear(hidden, hidden), nn.Tanh()),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, hidden), nn.Tanh()),
        *(nn.Linear(hidden, hidden), nn.Tanh()),
        *(nn.Linear(hidden, pixels), nn.Unflatten(-1, image_shape)),
    )
    return Bodies(encoder, hidden, decoder)


def cnn(image_shape: tuple[int, ...], latent: int, dense: int = 1024) -> Bodies:
    """Two 4x4 convolutions (64, 128 filters, stride 2), a dense layer, and the mirror image.

    Height and width must be divisible by 4.
    """
    channels, small = image_shape[0], _reduced(image_shape, 4, "cnn")
    inner = (128, *small)
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(prod(inner), dense), nn.ReLU()),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, dense), nn.ReLU()),
        *(nn.Linear(dense, prod(inner)), nn.ReLU(), nn.Unflatten(-1, inner)),
        *(nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(64, channels, 4, 2, 1),
    )
    return Bodies(encoder, dense, decoder)


def dcgan(image_shape: tuple[int, ...], latent: int, dense: int = 1024) -> Bodies:
    """Four convolutions 64-64-128-128 with batch norm after ReLU, a dense layer, and the mirror.

    The network of the paper's InfoVAE. Height and width must be divisible by 4.
    """
    channels, small = image_shape[0], _reduced(image_shape, 4, "dcgan")
    inner = (128, *small)
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, 64, 4, 2, 1), nn.ReLU(), nn.BatchNorm2d(64)),
        *(nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(64)),
        *(nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(), nn.BatchNorm2d(128)),
        *(nn.Conv2d(128, 128, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(128)),
        *(nn.Flatten(), nn.Linear(prod(inner), dense)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, dense), nn.ReLU()),
        *(nn.Linear(dense, prod(inner)), nn.ReLU(), nn.Unflatten(-1, inner)),
        *(nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.BatchNorm2d(64)),
        *(nn.ConvTranspose2d(64, 64, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(64)),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.BatchNorm2d(32)),
        nn.ConvTranspose2d(32, channels, 3, 1, 1),
    )
    return Bodies(encoder, dense, decoder)


def beta_cnn(image_shape: tuple[int, ...], latent: int) -> Bodies:
    """Five convolutions 32-32-64-64-256 down to one pixel, and the mirror image.

    The network of Higgins et al. (2017) and the paper's beta-VAE; it takes 64x64 images.
    """
    channels = image_shape[0]
    if tuple(image_shape[1:]) != (64, 64):
        raise ValueError(
            f"The network beta_cnn takes images of 64x64 pixels, but these have "
            f"{image_shape[1]}x{image_shape[2]}; set image_size=64 to have them resized."
        )
    encoder = nn.Sequential(
        *(nn.Conv2d(channels, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(64, 256, 4), nn.ReLU(), nn.Flatten()),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, 256), nn.ReLU(), nn.Unflatten(-1, (256, 1, 1))),
        *(nn.ConvTranspose2d(256, 64, 4), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(32, channels, 4, 2, 1),
    )
    return Bodies(encoder, 256, decoder)


def rows(image_shape: tuple[int, ...], latent: int, filters: int = 128, reach: int = 2) -> Bodies:
    """An image as a sequence of rows with one latent variable each, and a decoder that is local.

    Row t is decoded from z_{t - reach}, ..., z_{t + reach} alone, by the same weights for all rows.
    So the order of the latent variables is fixed: turning them would break the decoder. The
    encoder, pixels-400 as in `mlp`, sees the whole image.
    """
    channels, height, width = image_shape
    if latent != height:
        raise ValueError(
            f"The network rows has one latent variable per row, but latent is {latent} and the "
            f"images have {height} rows; set latent={height}."
        )
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(prod(image_shape), 400), nn.ReLU())
    decoder = nn.Sequential(
        *(nn.Unflatten(-1, (1, latent)), nn.Conv1d(1, filters, 2 * reach + 1, padding=reach)),
        *(nn.ReLU(), nn.Conv1d(filters, filters, 1), nn.ReLU()),
        nn.Conv1d(filters, channels * width, 1),
        _RowsToImage(channels),
    )
    return Bodies(encoder, 400, decoder)


class _RowsToImage(nn.Module):
    """(batch, channels * width, rows) -> (batch, channels, rows, width)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.channels, -1)).transpose(-1, -2)


def _reduced(image_shape: tuple[int, ...], factor: int, name: str) -> tuple[int, int]:
    """Height and width divided by a factor that must divide them."""
    _, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(
            f"The network {name} takes images whose height and width are divisible by {factor}, "
            f"but these have {height}x{width}; resize them (image_size) or choose mlp."
        )
    return height // factor, width // factor


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


NETWORKS = {"mlp": mlp, "cnn": cnn, "dcgan": dcgan, "beta_cnn": beta_cnn, "rows": rows,
            "tanh_mlp": tanh_mlp}  # fmt: skip
