"""What families of posteriors cost for trained decoders: predicted by the Jacobian, and measured.

At z the decoder has logits f(z) with Jacobian J and pixels p = sigmoid(f). To second order

    -log p(x, z)  has the Hessian  Lambda = I + J^T W J,    W = diag(p (1 - p)),    (12.3)

up to a term in the second derivatives of f, which are zero almost everywhere for a decoder of
linear layers and ReLU. So near z the posterior is N(., Lambda^-1), for which `prices` has what each
family pays.

One line of JSON for each decoder, made by tools/price_decoders.py.
"""

import copy
import dataclasses
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.func import jacfwd, vmap

from ..objectives import importance_weighted_nll
from ..posteriors import POSTERIORS
from ..vae import VAE
from .checkpoint import read_checkpoint
from .data import load_images, to_unit_interval
from .evaluation import best_posteriors, judge_posterior, optimised
from .experiments import Experiment, build_vae, run_experiment
from .prices import (
    ar1_price,
    best_rotation,
    diagonal_price,
    family_prices,
    predicted_members,
    random_rotation,
    turned,
)
from .provenance import environment
from .records import write_whole
from .training import set_seed


def local_precision(decoder: nn.Module, z: Tensor, chunk: int = 100) -> Tensor:
    """Lambda = I + J^T diag(p (1 - p)) J at each z.    (12.3), notebooks/12

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

    with torch.no_grad(), warnings.catch_warnings():
        # Forward mode loads a part of torch that torch itself calls deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        information = vmap(precision, chunk_size=chunk)(z)
    return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) + information


def run(
    dataset: str, decoder: str, *, images: int, seed: int = 0, latent: int = 20,
    source: str = "full", epochs: int = 15, checkpoints: str | Path, draws: int = 16,
    rotations: int = 20,
) -> dict:  # fmt: skip
    """Predict what every family costs for one decoder of the grid `gaps`, beside what was measured.

    Lambda is taken at three places: at the "mean" of the best full posterior of each image (the
    prediction proper); averaged over "draws" of it, as the best Gaussian has the mean Hessian for
    precision (Opper and Archambeau 2009); and as the precision of that "posterior" itself, which
    needs no Jacobian: what is off there is off for another reason.

    Args:
        dataset, decoder, seed, latent, source, epochs: of the Experiment; decoder is the family it
            trained with.
        images: the first of the test set.
        checkpoints: folder of trained models and of what was measured on them.
        draws: of the full posterior.
        rotations: random ones.
    Returns:
        test: the model's own negative ELBO on the whole test set. measured: family -> cost above
        -log p(x), and excess over the full family. predicted: place -> family -> cost, off (cost
        minus measured excess), correlation (of both over images). All as mean and standard error
        over images. placed: family -> cost of its predicted member ("draws") as it is, put at the
        mean of the full posterior: no search, so an upper bound on the best of the family. rotated:
        family -> mean price in the axes as trained, the best axes found, and random ones. checked:
        with the decoder turned to the best axes of the diagonal family, what that family then
        costs as measured, and what that saves, measured and predicted. units: per latent variable,
        KL to the prior of the encoder's posterior, mean over images.
    """
    experiment = Experiment(
        dataset=dataset, source=source, posterior=decoder, latent=latent, seed=seed,
        epochs=epochs, gap_images=images, pictures=False,
    )  # fmt: skip
    vae = trained(experiment, checkpoints)
    found = measured(experiment, checkpoints)
    elbo, full = found["negative_elbo"], found["full"]
    excess = {name: elbo[name] - elbo["full"] for name in POSTERIORS}
    result: dict = {
        "test": found["test"],
        "nll": _mean_and_error(found["nll"]),
        "measured": {
            name: {
                "cost": _mean_and_error(nats - found["nll"]),
                "excess": _mean_and_error(nats - elbo["full"]),
            }
            for name, nats in elbo.items()
        },
        "predicted": {},
        "measured_in": found["environment"],
    }
    wide = copy.deepcopy(vae.decoder).double()
    mean, covariance = full["mean"].double(), full["covariance"].double()
    noise = torch.randn(
        draws, *mean.shape, generator=torch.Generator().manual_seed(seed), dtype=mean.dtype
    )
    at = mean + (torch.linalg.cholesky(covariance) @ noise.unsqueeze(-1)).squeeze(-1)
    places = {
        "mean": local_precision(wide, mean),
        "draws": torch.stack([local_precision(wide, z) for z in at]).mean(0),
        "posterior": torch.cholesky_inverse(torch.linalg.cholesky(covariance)),
    }
    ends, members = None, {}
    for place, precision in places.items():
        prices, ends = family_prices(precision, ends)
        members[place] = predicted_members(precision, ends)
        result["predicted"][place] = {
            name: {
                "cost": _mean_and_error(price),
                "off": _mean_and_error(price - excess[name]),
                "correlation": _correlation(price, excess[name]),
            }
            for name, price in prices.items()
        }
    chosen = load_images(dataset, "test", source)[:images]
    set_seed(seed, 9)
    result["placed"] = {}
    for name, member in members["draws"].items():
        q = MultivariateNormal(full["mean"], member.float())
        nats = judge_posterior(vae, q, chosen, 250, nll=False)["negative_elbo"]
        result["placed"][name] = _mean_and_error(nats - found["nll"])
    exact, generator = places["mean"], torch.Generator().manual_seed(seed)
    random = [random_rotation(latent, generator) for _ in range(rotations)]
    rotation, best, searches = best_rotation(exact)
    chain = best_rotation(exact, ar1_price, starts=2, rounds=1)[1:]
    result["rotated"] = {
        name: {
            "trained": price(exact).mean().item(),
            "best": least,
            "searches": every,
            "random": [price(turned(exact, q)).mean().item() for q in random],
        }
        for name, price, least, every in (
            ("diagonal", diagonal_price, best, searches),
            ("ar1", ar1_price, *chain),
        )
    }
    result["rotated"]["diagonal"]["overlap"] = rotation.square().amax(0).mean().item()
    encoder = found["encoder"]
    set_seed(seed, 8)
    turned_elbo = turned_diagonal(vae, rotation.float(), experiment, **encoder)
    result["checked"] = {
        "cost": _mean_and_error(turned_elbo - found["nll"]),
        "saved": _mean_and_error(elbo["diagonal"] - turned_elbo),
        "predicted": _mean_and_error(
            diagonal_price(exact) - diagonal_price(turned(exact, rotation))
        ),
    }
    variance = encoder["covariance"].diagonal(dim1=-2, dim2=-1)
    units = 0.5 * (encoder["mean"].square() + variance - 1 - variance.log())
    result["units"] = units.double().mean(0).tolist()
    return result


def turned_decoder(decoder: nn.Module, rotation: Tensor) -> nn.Sequential:
    """z -> decoder(Q z), whose local precision at Q^T z is Q^T Lambda Q."""
    first = nn.Linear(len(rotation), len(rotation), bias=False).to(rotation)
    first.weight.requires_grad_(False).copy_(rotation)
    return nn.Sequential(first, decoder)


def turned_diagonal(
    vae: VAE, rotation: Tensor, experiment: Experiment, mean: Tensor, covariance: Tensor,
    judged: int = 250,
) -> Tensor:  # fmt: skip
    """The negative ELBO of each image's best diagonal posterior where the decoder is turned.

    Args:
        vae: the model, which is not changed.
        rotation: Q.
        experiment: names the images.
        mean, covariance: of posteriors to start from, before the turn.
        judged: draws per image.
    """
    images = load_images(experiment.dataset, "test", experiment.source)[: experiment.gap_images]
    model = VAE(vae.encoder, vae.posterior, turned_decoder(vae.decoder, rotation)).eval()
    scale = turned(covariance, rotation).diagonal(dim1=-2, dim2=-1).sqrt()
    start = Independent(Normal(mean @ rotation, scale), 1)
    q = optimised(model, start, "diagonal", to_unit_interval(images))
    return judge_posterior(model, q, images, judged, nll=False)["negative_elbo"]


def _mean_and_error(values: Tensor) -> list[float]:
    """Mean over images and its standard error."""
    return [values.mean().item(), (values.std() / len(values) ** 0.5).item()]


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's, 0 where one of them is constant."""
    both = torch.stack([one, other])
    return torch.corrcoef(both)[0, 1].nan_to_num(0.0).item()


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


def measured(experiment: Experiment, checkpoints: str | Path, *, judged: int = 250) -> dict:
    """The costs that the grid `gaps` records, image by image, kept beside the model's checkpoint.

    As `inference_gaps`, but with fewer draws for the results, and with the importance-weighted nll
    of one proposal alone, the best full posterior (by 1,000 draws).

    Args:
        experiment: with gap_images.
        checkpoints: folder of the model and of what was measured on it.
        judged: draws per image for each negative ELBO.
    Returns:
        negative_elbo: "encoder" and the names in POSTERIORS -> nats of each image. nll: of each
        image. encoder, full: mean and covariance of these posteriors. test: the model's negative
        ELBO on the whole test set. environment: where measured.
    """
    path = Path(checkpoints) / f"{experiment.name}.measured.pt"
    vae = trained(experiment, checkpoints)
    history = read_checkpoint(Path(checkpoints) / f"{experiment.run_name}.pt")["history"]
    test = history[-1]["test"]["negative_elbo"]
    if path.is_file():
        return torch.load(path, weights_only=True) | {"test": test}
    images = load_images(experiment.dataset, "test", experiment.source)[: experiment.gap_images]
    set_seed(experiment.seed, 7)
    found: dict = {"negative_elbo": {}, "environment": environment(torch.device("cpu"))}
    for name, q in best_posteriors(vae, images):
        found["negative_elbo"][name] = judge_posterior(vae, q, images, judged, nll=False)[
            "negative_elbo"
        ]
        if name in ("encoder", "full"):
            found[name] = {"mean": q.mean.detach(), "covariance": covariance_of(q).detach()}
    x = to_unit_interval(images)
    with torch.no_grad():  # the last posterior is the full one
        found["nll"] = importance_weighted_nll(vae, x, 1000, q=q).double()
    buffer = io.BytesIO()
    torch.save(found, buffer)
    write_whole(path, buffer.getbuffer())
    return found | {"test": test}


def covariance_of(q: Distribution) -> Tensor:
    """(*batch, d, d), of a normal of any kind."""
    matrix = getattr(q, "covariance_matrix", None)
    return q.variance.diag_embed() if matrix is None else matrix
