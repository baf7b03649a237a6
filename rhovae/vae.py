"""A variational autoencoder is an encoder body, a posterior head and a decoder body."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


class VAE(nn.Module):
    """p(x|z) p(z) with Bernoulli pixels and a standard normal prior, and its encoder q(z|x).

    Args:
        encoder: images (batch, *image_shape) in [0, 1] -> features (batch, features).
        posterior: features -> a Distribution over (batch, latent); see `POSTERIORS`.
        decoder: latents (batch, latent) -> pixel logits (batch, *image_shape).
    """

    def __init__(self, encoder: nn.Module, posterior: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.posterior = posterior
        self.decoder = decoder

    def encode(self, x: Tensor) -> Distribution:
        """q(z|x), batch shape (batch,), event shape (latent,)."""
        return self.posterior(self.encoder(x))

    def forward(self, x: Tensor) -> tuple[Distribution, Tensor, Tensor]:
        """q(z|x), one reparametrised draw z (batch, latent), and the pixel logits given z."""
        q = self.encode(x)
        z = q.rsample()
        return q, z, self.decoder(z)

    @torch.no_grad()
    def generate(self, n: int) -> Tensor:
        """Mean pixels in [0, 1] of n images decoded from the prior, (n, *image_shape)."""
        like = next(self.parameters())
        latent: Any = self.posterior.latent
        z = torch.randn(n, latent, device=like.device, dtype=like.dtype)
        return self.decoder(z).sigmoid()
