"""How good a trained VAE is: -ELBO and its parts, importance-weighted NLL, and inference gaps."""

from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, kl_divergence

from ..distribution import AR1Normal
from ..objectives import (
    Terms,
    bernoulli_nll,
    importance_weighted_nll,
    rbf_kernel,
    squared_mmd,
    standard_normal_like,
)
from ..posteriors import POSTERIORS
from ..vae import VAE
from .data import to_unit_interval


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
    return means_per_image(torch.stack(sums), len(images)), rho


def _has_neighbours(q: Distribution) -> TypeGuard[AR1Normal]:
    """Whether a posterior has correlations of neighbours; one latent variable has none."""
    return hasattr(q, "rho") and q.event_shape[-1] > 1


def means_per_image(sums: Tensor, count: int) -> dict[str, float]:
    """Batch sums of Terms -> means per image in nats, with the negative ELBO beside the loss."""
    total = sums.cpu().double().sum(0) / count
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


def inference_gaps(
    vae: VAE,
    images: Tensor,
    *,
    steps: int = 500,
    learning_rate: float = 0.03,
    samples: int = 4,
    judged: int = 1000,
) -> dict[str, dict[str, float]]:
    """What the encoder costs and what each family costs, for a given decoder.

    min_q E_q[-log p(x|z)] + KL(q || N(0, I)) for each image by itself, q in the family, without
    an encoder. Above -log p(x) it is what the family costs; the encoder's -ELBO above it is what
    amortisation costs (Cremer, Li and Duvenaud 2018, Sec. 3). All families start from the means
    and variances that the encoder gives, without correlations.

    Args:
        vae: the model, on the device of the images; left in evaluation mode, not changed.
        images: uint8, (n, channels, height, width); held at once, `samples` times.
        steps, learning_rate: of Adam; the rate falls to zero along a cosine.
        samples: draws per image and step, from torch's global generator.
        judged: fresh draws per image for the results.
    Returns:
        "encoder" and the names in POSTERIORS -> means in nats per image: negative_elbo,
        reconstruction, kl, and the importance-weighted nll with this posterior as proposal. All
        of these nll bound -log p(x) from above in the mean, so the lowest is the best estimate.
    """
    found = {}
    for name, q in best_posteriors(
        vae, images, steps=steps, learning_rate=learning_rate, samples=samples
    ):
        each = judge_posterior(vae, q, images, judged)
        found[name] = {part: nats.double().mean().item() for part, nats in each.items()}
    return found


def best_posteriors(
    vae: VAE, images: Tensor, *, steps: int = 500, learning_rate: float = 0.03, samples: int = 4
) -> Iterator[tuple[str, Distribution]]:
    """What `inference_gaps` judges: "encoder" with its posterior, then each family with its best.

    Args:
        vae, images, steps, learning_rate, samples: as there.
    """
    vae.eval()
    x = to_unit_interval(images)
    with torch.no_grad():
        encoded = vae.encode(x)
    yield "encoder", encoded
    for family in POSTERIORS:
        yield family, optimised(vae, encoded, family, x, steps, learning_rate, samples)


def optimised(vae, encoded, family, x, steps=500, learning_rate=0.03, samples=4) -> Distribution:
    """The best posterior of a family for each image, by stochastic gradients.

    Args:
        vae: the model, in evaluation mode.
        encoded: the posterior to start from, of which mean and variance are taken, (batch,).
        family: a name in POSTERIORS.
        x: images in [0, 1], (batch, *image_shape).
        steps, learning_rate, samples: as in `inference_gaps`.
    """
    # Without biases, a head returns for the rows of an identity matrix its columns of weights:
    # the numbers of each image's posterior are parameters of their own.
    head = POSTERIORS[family](len(x), encoded.event_shape[-1]).to(x)
    identity = torch.eye(len(x)).to(x)
    layers = {name: part for name, part in head.named_children() if isinstance(part, nn.Linear)}
    with torch.no_grad():
        for layer in layers.values():
            layer.bias.zero_()
            layer.weight.mul_(1e-2)  # nearly no correlation, but a slope to leave it by
        log_variance = encoded.variance.log()
        if layers["log_variance"].out_features == 1:
            log_variance = log_variance.mean(-1, keepdim=True)
        layers["log_variance"].weight.copy_(log_variance.T)
        layers["loc"].weight.copy_(encoded.mean.T)
    weights = [layer.weight for layer in layers.values()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        q = head(identity)
        reconstruction = _reconstruction(vae, q, x, samples)
        loss = (reconstruction + kl_divergence(q, standard_normal_like(q.mean))).sum()
        # With respect to these alone: of the decoder no gradient is needed. (A single latent
        # variable has no correlation for its weight to act on.)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return head(identity)


def _reconstruction(vae, q, x, samples: int) -> Tensor:
    """E_q[-log p(x|z)] by the given number of draws, nats, shape (batch,)."""
    z = q.rsample((samples,))
    logits = vae.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    return bernoulli_nll(logits, x).mean(0)


@torch.no_grad()
def judge_posterior(
    vae: VAE, q: Distribution, images: Tensor, samples: int, nll: bool = True
) -> dict[str, Tensor]:
    """What a posterior costs for each image, by fresh draws from torch's global generator.

    Args:
        vae: the model, in evaluation mode.
        q: a posterior of each image, (batch,).
        images: uint8, (batch, channels, height, width).
        samples: draws per image.
        nll: whether to estimate it.
    Returns:
        Nats, each of shape (batch,): negative_elbo, reconstruction, kl, and the importance-weighted
        nll with this posterior as proposal.
    """
    x = to_unit_interval(images)
    rounds = [_reconstruction(vae, q, x, 1) for _ in range(samples)]
    reconstruction = torch.stack(rounds).double().mean(0)
    kl = kl_divergence(q, standard_normal_like(q.mean)).double()
    parts = {"negative_elbo": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
    if nll:
        parts["nll"] = importance_weighted_nll(vae, x, samples, q=q).double()
    return parts


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
