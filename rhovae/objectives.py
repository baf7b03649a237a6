"""What a VAE is trained and judged by: one number per image, in nats, shape (batch,).

No negative ELBO sees the batch size. The mean over the batch is taken once, in the training step,
so splitting a batch changes nothing (2.8), notebooks/02. InfoVAE alone adds a number of the batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits

from .vae import VAE


class Terms(NamedTuple):
    """Per image and in nats: what is minimised, and the two parts of the negative ELBO."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


def standard_normal_like(loc: Tensor) -> Independent:
    """The prior N(0, I) over the last dimension of `loc`."""
    normal = Normal(torch.zeros_like(loc), torch.ones_like(loc), validate_args=False)
    return Independent(normal, 1, validate_args=False)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) summed over pixels, for logits (..., batch, *image_shape) and x in [0, 1].

    With grey pixels this is the cross-entropy everyone reports, not the likelihood of binary data.
    """
    losses = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return losses.flatten(start_dim=logits.dim() - x.dim() + 1).sum(-1)


def _bernoulli_nll_of_many(logits: Tensor, x: Tensor) -> Tensor:
    """The same for many draws an image, logits (draws, batch, *image_shape), and faster.

    sum softplus(l) - l x,    softplus(l) = l / 2 + |l| / 2 - log sigmoid |l|

    The images are not repeated, and there is no log1p, which is slow on a CPU: what it protects
    are small terms, and here they are added to hundreds of others.
    """
    pixels, image = logits.flatten(2), x.flatten(1)
    size = pixels.abs()
    linear: Tensor = size.sum(-1) / 2 - torch.linalg.vecdot(pixels, image - 0.5)
    return linear - size.sigmoid_().log().sum(-1)


def negative_elbo(q: Distribution, z: Tensor, logits: Tensor, x: Tensor) -> Terms:
    """-ELBO = E_q[-log p(x|z)] + KL(q(z|x) || N(0, I)), by one draw z ~ q and a closed-form KL.

    Args:
        q: posterior with batch shape (batch,).
        z: a draw of it, (batch, latent).
        logits: pixel logits given z, (batch, *image_shape).
        x: images in [0, 1], (batch, *image_shape).
    Returns:
        Terms in nats per image, each of shape (batch,).
    """
    reconstruction = bernoulli_nll(logits, x)
    kl = kl_divergence(q, standard_normal_like(q.mean))
    return Terms(reconstruction + kl, reconstruction, kl)


def beta_elbo(q: Distribution, z: Tensor, logits: Tensor, x: Tensor, *, beta: float) -> Terms:
    """Reconstruction + beta KL (Higgins et al. 2017, Eq. 4); beta = 1 is the negative ELBO."""
    terms = negative_elbo(q, z, logits, x)
    return terms._replace(loss=terms.reconstruction + beta * terms.kl)


def info_vae(
    q: Distribution,
    z: Tensor,
    logits: Tensor,
    x: Tensor,
    *,
    alpha: float,
    lambda_: float,
    kernel: str,
) -> Terms:
    """InfoVAE (Zhao et al. 2019), with the MMD between the marginals of z.

    reconstruction + (1 - alpha) KL + (alpha + lambda - 1) MMD^2(q(z), p(z))

    alpha = 0, lambda = 1 is the negative ELBO, alpha = 1, lambda = 1 the MMD autoencoder. The MMD
    belongs to the batch of draws z and is added to each of its images alike.

    Args:
        q, z, logits, x: as in `negative_elbo`.
        alpha, lambda_: weights.
        kernel: a name in KERNELS.
    """
    terms = negative_elbo(q, z, logits, x)
    # The last batch of an epoch may hold a single image, which has no discrepancy to show.
    mmd = squared_mmd(z, torch.randn_like(z), KERNELS[kernel]) if len(z) > 1 else 0.0
    weighted = (1 - alpha) * terms.kl + (alpha + lambda_ - 1) * mmd
    return terms._replace(loss=terms.reconstruction + weighted)


def rbf_kernel(squared_distance: Tensor, latent: int) -> Tensor:
    """exp(-|x - y|^2 / (2 h^2)) with h^2 = latent, half the mean |x - y|^2 of two prior draws."""
    return torch.exp(-squared_distance / (2 * latent))


def inverse_multiquadratic_kernel(squared_distance: Tensor, latent: int) -> Tensor:
    """C / (C + |x - y|^2) with C = 2 latent, as for WAE-MMD (Tolstikhin et al. 2018)."""
    return 2 * latent / (2 * latent + squared_distance)


KERNELS = {"rbf": rbf_kernel, "imq": inverse_multiquadratic_kernel}


def squared_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Squared maximum mean discrepancy of two samples, unbiased (Gretton et al. 2012, Eq. 3).

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Its mean is zero where both samples have one law, so it can be negative.

    Args:
        x, y: (n, latent) and (m, latent), n and m at least 2.
        kernel: of the squared distance and the number of latent variables.
    Returns:
        A scalar.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(
            f"The MMD needs at least 2 draws on each side, but there are {len(x)} and {len(y)}; "
            "use larger batches."
        )

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        # By differences: by products, which is the faster way, small distances lose their digits.
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        values = kernel(distances.square(), a.shape[-1])
        # Within one sample the diagonal, each draw with itself, is left out.
        return (values.sum() - len(a)) / (len(a) * (len(a) - 1)) if a is b else values.mean()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


def importance_weighted_nll(
    vae: VAE,
    x: Tensor,
    samples: int = 500,
    max_pixels: int = 2**22,
    q: Distribution | None = None,
) -> Tensor:
    """-log of the importance-weighted estimate of p(x); an upper bound on -log p(x) in the mean.

    -log (1/K) sum_k p(x|z_k) p(z_k) / q(z_k|x),  z_k ~ q(z|x)     (Burda et al. 2016, Eq. 8)

    It falls from -ELBO at K = 1 to -log p(x) as K grows. The K draws are decoded in chunks whose
    running log-sum-exp is kept, so without gradients (torch.no_grad) memory does not grow with K.

    Args:
        vae: the model.
        x: images in [0, 1], (batch, *image_shape).
        samples: K, draws per image.
        max_pixels: upper limit on the decoded pixels held at once.
        q: what z is drawn from, batch shape (batch,); the encoder's posterior if None.
    Returns:
        Nats per image, shape (batch,).
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; the bound needs at least 1 draw per image.")
    q = vae.encode(x) if q is None else q
    prior = standard_normal_like(q.mean)
    chunk = max(1, max_pixels // max(1, x.numel()))
    log_sum = torch.full(x.shape[:1], -math.inf, device=x.device, dtype=x.dtype)
    for start in range(0, samples, chunk):
        z = q.rsample((min(chunk, samples - start),))
        logits = vae.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_weight = prior.log_prob(z) - q.log_prob(z) - _bernoulli_nll_of_many(logits, x)
        log_sum = torch.logaddexp(log_sum, log_weight.logsumexp(0))
    return math.log(samples) - log_sum


OBJECTIVES: dict[str, Callable[..., Terms]] = {
    "elbo": negative_elbo,
    "beta-elbo": beta_elbo,
    "info-vae": info_vae,
}
