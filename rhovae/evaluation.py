"""How good a trained VAE is: the parts of the test -ELBO, and the importance-weighted NLL."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from .data import to_unit_interval
from .objectives import Terms, importance_weighted_nll
from .vae import VAE


@torch.no_grad()
def evaluate(
    vae: VAE, images: Tensor, objective: Callable[..., Terms], batch_size: int = 1000
) -> tuple[dict[str, float], float | None]:
    """Mean objective over images, with one posterior draw each from torch's global generator.

    Args:
        vae: the model, on the device of the images; left in evaluation mode.
        images: uint8, (n, channels, height, width).
        objective: (q, z, logits, x) -> Terms, per image.
        batch_size: images held at once. It decides which draw meets which image, and with the
            published loss what is charged; of the KL it changes nothing.
    Returns:
        Means in nats per image (loss, negative_elbo, reconstruction, kl), and the mean of rho over
        images and steps, None where the posterior has no rho.
    """
    vae.eval()
    sums, rhos = [], []
    for batch in images.split(batch_size):
        x = to_unit_interval(batch)
        q, z, logits = vae(x)
        sums.append(torch.stack(objective(q, z, logits, x)).sum(1))
        if _has_neighbours(q):
            rhos.append(q.rho.mean(-1).sum())
    rho = (torch.stack(rhos).cpu().double().sum() / len(images)).item() if rhos else None
    return means_per_image(sums, len(images)), rho


def _has_neighbours(q: Distribution) -> bool:
    """Whether a posterior has correlations of neighbours; one latent variable has none."""
    return hasattr(q, "rho") and q.rho.shape[-1] > 0


def means_per_image(sums: list[Tensor], count: int) -> dict[str, float]:
    """Batch sums of Terms -> means per image in nats, with the negative ELBO beside the loss."""
    total = torch.stack(sums).cpu().double().sum(0) / count
    loss, reconstruction, kl = total.tolist()
    return {
        "loss": loss,
        "negative_elbo": reconstruction + kl,
        "reconstruction": reconstruction,
        "kl": kl,
    }


@torch.no_grad()
def iwae_nll(vae: VAE, images: Tensor, samples: int = 500, batch_size: int = 100) -> float:
    """Importance-weighted NLL in nats per image: -log p(x) from above, tighter than -ELBO.

    Args:
        vae: the model, on the device of the images; left in evaluation mode.
        images: uint8, (n, channels, height, width).
        samples: posterior draws per image, from torch's global generator.
        batch_size: images taken together.
    """
    vae.eval()
    batches = (to_unit_interval(batch) for batch in images.split(batch_size))
    sums = [importance_weighted_nll(vae, x, samples).cpu().double().sum() for x in batches]
    return (torch.stack(sums).sum() / len(images)).item()


@torch.no_grad()
def latent_statistics(vae: VAE, images: Tensor, batch_size: int = 1000) -> dict:
    """How much of the latent space is used: per dimension, and counted.

    Returns:
        variance_of_means: Var_x(E_q[z_j]) over images, per dimension.
        mean_variance: E_x(Var_q[z_j]), per dimension; the two add up to about 1 where the
            aggregated posterior matches the prior.
        active_units: dimensions with variance_of_means > 0.01 (Burda et al. 2016, Sec. 5.2).
        abs_rho: mean |rho| over images and steps, None without a rho. The sign of a correlation
            says nothing: flipping every second latent axis flips it.
    """
    vae.eval()
    posteriors = [vae.encode(to_unit_interval(batch)) for batch in images.split(batch_size)]
    means = torch.cat([q.mean.cpu() for q in posteriors]).double()
    variances = torch.cat([q.variance.cpu() for q in posteriors]).double()
    rhos = [q.rho.abs().mean(-1).cpu() for q in posteriors if _has_neighbours(q)]
    variance_of_means = means.var(0, correction=0)
    return {
        "variance_of_means": variance_of_means.tolist(),
        "mean_variance": variances.mean(0).tolist(),
        "active_units": int((variance_of_means > 0.01).sum()),
        "abs_rho": torch.cat(rhos).double().mean().item() if rhos else None,
    }
