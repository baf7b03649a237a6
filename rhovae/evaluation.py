"""How good a trained VAE is: the parts of the test -ELBO, and the importance-weighted NLL."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, kl_divergence

from .data import to_unit_interval
from .objectives import Terms, importance_weighted_nll, rbf_kernel, squared_mmd
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
    return hasattr(q, "rho") and q.event_shape[-1] > 1


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
    """How much of the latent space is used, and how near the aggregated posterior is to the prior.

    The aggregated posterior q(z) is the mean of q(z|x) over the images.

    Returns:
        variance_of_means: Var_x(E_q[z_j]) over images, per dimension.
        mean_variance: E_x(Var_q[z_j]), per dimension; the two add up to Var_q(z)(z_j), which is 1
            where the aggregated posterior matches the prior.
        active_units: dimensions with variance_of_means > 0.01 (Burda et al. 2016, Sec. 5.2).
        abs_rho: mean |rho| over images and steps, None without a rho. The sign of a correlation
            says nothing: flipping every second latent axis flips it.
        aggregate_kl: KL(N(m, C) || N(0, I)) in nats, m and C those of one draw z ~ q(z|x) per
            image: how far the first two moments are from the prior's.
        aggregate_mmd: squared MMD (RBF kernel, unbiased) of the first 2,000 of these draws and as
            many of the prior.
    """
    vae.eval()
    posteriors = [vae.encode(to_unit_interval(batch)) for batch in images.split(batch_size)]
    means = torch.cat([q.mean.cpu() for q in posteriors]).double()
    variances = torch.cat([q.variance.cpu() for q in posteriors]).double()
    draws = torch.cat([q.sample().cpu() for q in posteriors]).double()
    rhos = [q.rho.abs().mean(-1).cpu() for q in posteriors if _has_neighbours(q)]
    variance_of_means = means.var(0, correction=0)
    some = draws[:2000]
    enough = len(some) > draws.shape[-1]  # for a covariance that has an inverse
    return {
        "variance_of_means": variance_of_means.tolist(),
        "mean_variance": variances.mean(0).tolist(),
        "active_units": int((variance_of_means > 0.01).sum()),
        "abs_rho": torch.cat(rhos).double().mean().item() if rhos else None,
        "aggregate_kl": _moments_kl(draws) if enough else None,
        "aggregate_mmd": squared_mmd(some, torch.randn_like(some), rbf_kernel).item()
        if enough
        else None,
    }


def _moments_kl(draws: Tensor) -> float:
    """KL(N(m, C) || N(0, I)) for the mean and covariance of draws (n, latent)."""
    mean, covariance = draws.mean(0), torch.atleast_2d(draws.T.cov(correction=0))
    prior = MultivariateNormal(torch.zeros_like(mean), torch.eye(len(mean), dtype=mean.dtype))
    return kl_divergence(MultivariateNormal(mean, covariance), prior).item()
