"""Encoder and decoder bodies. The posterior head goes between them and knows neither.

`NETWORKS[name](image_shape, latent)` gives a `Bodies`: an encoder from images in [0, 1] of shape
(batch, *image_shape) to (batch, features), and a decoder from (batch, latent) to pixel logits of
shape (batch, *image_shape).
"""

from math import prod
from typing import NamedTuple

from torch import nn


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


NETWORKS = {"mlp": mlp}
