"""rho-VAE: variational autoencoders with first-order autoregressive Gaussian posteriors.

What is imported here needs torch alone. The experiments that it was studied by are `rhovae.study`.
"""

from . import kl  # noqa: F401  (registers the divergences)
from .chains import AR1Prior, Sites
from .distribution import AR1Normal
from .posteriors import POSTERIORS
from .vae import VAE

__all__ = ["POSTERIORS", "VAE", "AR1Normal", "AR1Prior", "Sites"]
