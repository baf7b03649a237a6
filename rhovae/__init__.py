"""rho-VAE: variational autoencoders with first-order autoregressive Gaussian posteriors."""

from .data import as_images, load_images
from .distribution import AR1Normal
from .experiments import Experiment, run_experiment
from .posteriors import POSTERIORS
from .vae import VAE

__all__ = [
    "POSTERIORS",
    "VAE",
    "AR1Normal",
    "Experiment",
    "as_images",
    "load_images",
    "run_experiment",
]
