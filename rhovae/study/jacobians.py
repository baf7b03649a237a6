"""What a family of posteriors costs, from the decoder's Jacobian.          notebooks/12, Section 12.3

At z the decoder has logits f(z) with Jacobian J and pixels p = sigmoid(f). To second order

    -log p(x, z)  has the Hessian  Lambda = I + J^T W J,    W = diag(p (1 - p)),

up to a term in the second derivatives of f, which are zero almost everywhere for a decoder of
linear layers and ReLU. So near z the posterior is N(., Lambda^-1), and a family pays, per image,

    min over its S of KL(N(0, S) || N(0, Lambda^-1)) = 1/2 (tr Lambda S - d - log det Lambda S).

One rotation Q of the latent space for all images, which any decoder may choose, turns every Lambda
into Q^T Lambda Q. What the diagonal family then pays is the criterion by which Pham (2001)
diagonalises jointly; over orthogonal Q it is that of Flury's (1984) common principal components.

One line of JSON for each decoder, made by tools/price_decoders.py.
"""

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, vmap

from .. import ar1
from ..posteriors import POSTERIORS
from ..vae import VAE
from .checkpoint import read_checkpoint
from .data import load_images
from .evaluation import best_posteriors, judge_posterior
from .experiments import Experiment, build_vae, run_experiment
from .provenance import environment
from .records import write_whole
from .training import set_seed

RANK = POSTERIORS["low-rank"].rank


def local_precision(decoder: nn.Module, z: Tensor, chunk: int = 100) -> Tensor:
    """Lambda = I + J^T diag(p (1 - p)) J at each z.

    Args:
        decoder: (batch, latent) -> logits (batch, *image_shape), of the dtype of z.
        z: (n, latent).
        chunk: rows whose Jacobians are held at once.
    Returns:
        (n, latent, latent).
    """

    def logits(one: Tensor) -> Tensor:
        return decoder(one.unsqueeze(0)).flatten()

    def precision(one: Tensor) -> Tensor:
        p = logits(one).sigmoid()
        jacobian = jacfwd(logits)(one)
        return jacobian.mT @ ((p * (1 - p)).unsqueeze(-1) * jacobian)

    with torch.no_grad():
        information = vmap(precision, chunk_size=chunk)(z)
    return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) + information


def log_det(precision: Tensor) -> Tensor:
    """log det of positive definite matrices (..., d, d), by Cholesky."""
    return 2 * torch.linalg.cholesky(precision).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def kl_to_precision(covariance: Tensor, precision: Tensor) -> Tensor:
    """KL(N(0, S) || N(0, Lambda^-1)) = 1/2 (tr Lambda S - d - log det S - log det Lambda), nats."""
    trace = (precision * covariance).sum((-2, -1))
    return 0.5 * (trace - precision.shape[-1] - log_det(covariance) - log_det(precision))


def isotropic_price(precision: Tensor) -> Tensor:
    """1/2 (d log(tr Lambda / d) - log det Lambda): the best S is I d / tr Lambda. Nats, (...,)."""
    latent = precision.shape[-1]
    trace = precision.diagonal(dim1=-2, dim2=-1).sum(-1)
    return 0.5 * (latent * (trace / latent).log() - log_det(precision))


def diagonal_price(precision: Tensor) -> Tensor:
    """1/2 (sum_j log Lambda_jj - log det Lambda): the best S_jj is 1 / Lambda_jj. Nats, (...,)."""
    return 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - log_det(precision))


def ar1_price(precision: Tensor, points: int = 161, steps: int = 4) -> Tensor:
    """The price of s R(rho), the best s = d / tr(Lambda R) inserted, at its best rho:

        1/2 min over rho of  d log(tr(Lambda R(rho)) / d) - (d - 1) log(1 - rho^2) - log det Lambda

    The best rho is looked for on a grid of Fisher z, and then by Newton steps. It is held fixed for
    the gradient with respect to Lambda, where to first order it does not matter.

    Args:
        precision: (n, d, d).
        points: of the grid, over |rho| < 0.9999.
        steps: of Newton; one that does not lower the price is not taken.
    Returns:
        Nats, (n,).
    """
    latent = precision.shape[-1]
    # tr(Lambda R) is a polynomial of rho, with the sums along the diagonals for coefficients.
    lags = [precision.diagonal(k, -2, -1).sum(-1) for k in range(latent)]
    lag = torch.stack([lags[0], *(2 * sums for sums in lags[1:])], -1)
    powers = torch.arange(latent, dtype=lag.dtype, device=lag.device)

    def price(fisher_z: Tensor, lag: Tensor) -> Tensor:
        rho = fisher_z.tanh()
        trace = (lag * rho.unsqueeze(-1) ** powers).sum(-1)
        log_one_minus = 2 * (math.log(2) - fisher_z.abs() - torch.log1p(torch.exp(-2 * fisher_z.abs())))
        return 0.5 * (latent * (trace / latent).log() - (latent - 1) * log_one_minus)

    with torch.no_grad():
        fixed = lag.detach()
        grid = torch.linspace(-5, 5, points, dtype=lag.dtype, device=lag.device)
        found = grid[price(grid, fixed.unsqueeze(1)).argmin(-1)]
        slope = vmap(grad(price))
        curvature = vmap(grad(grad(price)))
        for _ in range(steps):
            better = found - slope(found, fixed) / curvature(found, fixed).abs().clamp_min(1e-12)
            found = torch.where(price(better, fixed) < price(found, fixed), better, found)
    return price(found, lag) - 0.5 * log_det(precision)


def family_prices(precision: Tensor) -> dict[str, Tensor]:
    """What each family pays for each Lambda, nats.

    In closed form for `isotropic`, `diagonal` and `full` (which pays nothing), by a search in one
    number for `ar1`; for the others by Newton's method from several starts, the best of which
    counts (they are not convex).

    Args:
        precision: Lambda, (n, d, d), float64.
    Returns:
        The names in POSTERIORS -> (n,).
    """
    none = torch.zeros(len(precision), dtype=precision.dtype, device=precision.device)
    return {
        "isotropic": isotropic_price(precision),
        "diagonal": diagonal_price(precision),
        "ar1": ar1_price(precision),
        "ar1-scaled": _best_of(precision, _chain, _scaled_starts(precision)),
        "ar1-stepped": _best_of(precision, _chain, _stepped_starts(precision)),
        "low-rank": _best_of(precision, _low_rank, _low_rank_starts(precision)),
        "full": none,
    }


Member = Callable[[Tensor, Tensor], Tensor]


def _chain(numbers: Tensor, precision: Tensor) -> Tensor:
    """1/2 (tr Lambda S - log det S) for the log-scales and Fisher z of a chain."""
    latent = len(precision)
    log_scale, fisher_z = numbers[:latent], numbers[latent:]
    scale = log_scale.exp()
    covariance = scale.outer(scale) * ar1.correlation(fisher_z.tanh(), latent)
    size = fisher_z.abs()
    log_one_minus = 2 * (math.log(2) - size - torch.log1p(torch.exp(-2 * size)))
    each = (latent - 1) / len(fisher_z) if len(fisher_z) else 0
    log_determinant = 2 * log_scale.sum() + each * log_one_minus.sum()
    return 0.5 * ((precision * covariance).sum() - log_determinant)


def _low_rank(numbers: Tensor, precision: Tensor) -> Tensor:
    """The same for diag(s) + F F^T: log-variances, then F."""
    latent = len(precision)
    variance, factor = numbers[:latent].exp(), numbers[latent:].reshape(latent, RANK)
    trace = (precision.diagonal() * variance).sum() + (factor * (precision @ factor)).sum()
    inner = factor.mT @ (factor / variance.unsqueeze(-1))
    (a, b), (_, c) = inner  # of rank 2
    log_determinant = numbers[:latent].sum() + torch.log((1 + a) * (1 + c) - b * b)
    return 0.5 * (trace - log_determinant)


def trained(experiment: Experiment, checkpoints: str | Path) -> VAE:
    """The model of an experiment, trained if its checkpoint is not there; on the CPU.

    Args:
        experiment: of a named data set.
        checkpoints: folder where it is kept.
    """
    short = dataclasses.replace(experiment, gap_images=0, iwae_images=1, iwae_samples=1)
    run_experiment(short, checkpoints=checkpoints, device="cpu", progress=False)
    state = read_checkpoint(Path(checkpoints) / f"{experiment.run_name}.pt")
    shape = load_images(experiment.dataset, "test", experiment.source).shape[1:]
    vae = build_vae(experiment, tuple(shape))
    vae.load_state_dict(state["vae"])
    return vae.eval()


def measured(experiment: Experiment, checkpoints: str | Path, **settings) -> dict:
    """The costs that the grid `gaps` records, image by image, kept beside the model's checkpoint.

    The random numbers are those of the grid, so for the same model the means are the same.

    Args:
        experiment: with gap_images.
        checkpoints: folder of the model and of what was measured on it.
        settings: of `best_posteriors` and, as judged, of `judge_posterior`.
    Returns:
        costs: "encoder" and the names in POSTERIORS -> part -> nats of each image. encoder, full:
        mean and covariance of these posteriors. environment: where it was measured.
    """
    path = Path(checkpoints) / f"{experiment.name}.measured.pt"
    vae = trained(experiment, checkpoints)
    if path.is_file():
        return torch.load(path, weights_only=True)
    images = load_images(experiment.dataset, "test", experiment.source)[: experiment.gap_images]
    judged = settings.pop("judged", 1000)
    set_seed(experiment.seed, 7)
    found: dict = {"costs": {}, "environment": environment(torch.device("cpu"))}
    for name, q in best_posteriors(vae, images, **settings):
        found["costs"][name] = judge_posterior(vae, q, images, judged)
        if name in ("encoder", "full"):
            matrix = getattr(q, "covariance_matrix", None)
            matrix = q.variance.diag_embed() if matrix is None else matrix
            found[name] = {"mean": q.mean.detach(), "covariance": matrix.detach()}
    buffer = io.BytesIO()
    torch.save(found, buffer)
    write_whole(path, buffer.getbuffer())
    return found
