"""The authors' two best objections to the audit of Figure 1, as a study of its own models.

1. Is the published *decoder* better, and only its posterior to blame? Freeze it, fit a new diagonal
   encoder to it on the true -ELBO for as many epochs, and compare with the baseline.
2. Are its samples better where its codes are? Fit a Gaussian and a mixture of Gaussians to the
   codes of training images (Ghosh et al. 2020, Sec. 4) and decode draws of those, for every model
   alike.

One line of JSON for each model, made by tools/audit_decoders.py.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal

from ..distribution import AR1Normal
from ..objectives import negative_elbo, standard_normal_like
from ..vae import VAE
from .data import load_images, to_unit_interval
from .evaluation import evaluate, iwae_nll
from .experiments import Experiment, build_objective, build_vae
from .quality import features, frechet_distance, load_classifier, precision_and_recall
from .training import fit, set_seed

COMPONENTS = 10  # of the mixture: as many as there are classes
CODES = 10_000  # to which it is fitted


def run(
    dataset: str, posterior: str, seed: int, *, latent: int = 10, initialisation: str = "xavier",
    source: str = "full", epochs: int = 15,
) -> dict:  # fmt: skip
    """Train a model as in the grid `audit`; judge it, its decoder alone, and its samples.

    Args:
        dataset, posterior, seed, latent, initialisation, source, epochs: of the Experiment.
    Returns:
        reported: the test loss as the grid has it. own: what the model costs (see `judged`).
        refitted: what its decoder costs with a new diagonal encoder; the diagonal model has one
        already. samples: scores of draws of the "prior", and of a "gaussian" and a "mixture"
        fitted to the codes of training images.
    """
    experiment = Experiment(
        dataset=dataset, source=source, posterior=posterior, latent=latent, seed=seed,
        initialisation=initialisation, epochs=epochs,
    )  # fmt: skip
    train, test = (load_images(dataset, split, source) for split in ("train", "test"))
    vae = build_vae(experiment, tuple(train.shape[1:]))
    objective = build_objective(experiment)
    history = fit(vae, train, test, objective, epochs=epochs, seed=seed, progress=False)
    result = {"reported": history[-1]["test"]["loss"], "own": judged(vae, train, test, seed)}
    if posterior != "diagonal":
        refitted = refit(vae, experiment, train, test)
        result["refitted"] = judged(refitted, train, test, seed)
    places = codes(vae, train, seed)
    laws = {
        "prior": standard_normal_like(places[0]),
        "gaussian": fit_mixture(places, 1),
        "mixture": fit_mixture(places, COMPONENTS, seed=seed),
    }
    return result | {"samples": sample_scores(dataset, vae, laws, test, seed)}


def refit(vae: VAE, experiment: Experiment, train: Tensor, test: Tensor) -> VAE:
    """A new diagonal encoder for a decoder that is held fixed, trained on the true -ELBO.

    Args:
        vae: whose decoder is used; not changed.
        experiment: of the vae; all its settings but posterior and objective hold again.
        train, test: uint8 images.
    """
    settings = dataclasses.asdict(experiment) | {"posterior": "diagonal", "objective": "elbo"}
    fresh = build_vae(Experiment(**settings), tuple(train.shape[1:]))
    refitted = VAE(fresh.encoder, fresh.posterior, vae.decoder)
    vae.decoder.requires_grad_(False)
    fit(refitted, train, test, negative_elbo, epochs=experiment.epochs, seed=experiment.seed,
        progress=False)  # fmt: skip
    vae.decoder.requires_grad_(True)
    return refitted


@torch.no_grad()
def judged(
    vae: VAE, train: Tensor, test: Tensor, seed: int, images: int = 1000, samples: int = 100
) -> dict[str, float]:
    """Means over test images in nats.

    Returns:
        negative_elbo and its parts, reconstruction and kl; nll, importance-weighted, of the first
        images; and moved, the -ELBO where the prior is not N(0, I) but the Gaussian of the codes
        of training images, as by an affine map in front of the decoder.
    """
    set_seed(seed, 2)
    means, _ = evaluate(vae, test, negative_elbo)
    set_seed(seed, 3)
    means["nll"] = iwae_nll(vae, test[:images], samples)
    gaussian: Any = fit_mixture(codes(vae, train, seed), 1).component_distribution
    precision, total = gaussian.precision_matrix[0], 0.0
    for batch in test.split(1000):
        q: Any = vae.encode(to_unit_interval(batch))
        covariance = q.covariance_matrix if isinstance(q, AR1Normal) else q.variance.diag_embed()
        trace = (precision * covariance.double()).sum((-2, -1))
        cross_entropy = trace / 2 - gaussian.log_prob(q.mean.double())
        total += (cross_entropy - q.entropy().double()).sum().item()
    means["moved"] = means["reconstruction"] + total / len(test)
    return {k: means[k] for k in ("negative_elbo", "reconstruction", "kl", "nll", "moved")}


@torch.no_grad()
def codes(vae: VAE, images: Tensor, seed: int) -> Tensor:
    """One draw z ~ q(z|x) for each of the first images, (n, latent), float64."""
    vae.eval()
    set_seed(seed, 9)
    few = images[:CODES].split(1000)
    draws = [vae.encode(to_unit_interval(batch)).sample() for batch in few]
    return torch.cat(draws).double()


def fit_mixture(
    points: Tensor, components: int, steps: int = 60, seed: int = 0
) -> MixtureSameFamily:
    """A mixture of Gaussians with full covariances, by expectation-maximisation.

    Args:
        points: (n, dimension), float64.
        components: 1 gives the Gaussian of their mean and covariance.
        steps: each of them raises the likelihood.
        seed: of the points at which the components start.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    nearest = torch.cdist(points, points[order[:components]]).argmin(1)
    shares = nn.functional.one_hot(nearest, components).to(points)
    mixture = _most_likely(points, shares)
    for _ in range(steps if components > 1 else 0):
        logits = mixture.mixture_distribution.logits
        shares = (logits + mixture.component_distribution.log_prob(points[:, None])).softmax(-1)
        mixture = _most_likely(points, shares)
    return mixture


def _most_likely(points: Tensor, shares: Tensor) -> MixtureSameFamily:
    """The maximisation, for the share (n, components) that each component has in each point."""
    counts = shares.sum(0)
    loc = shares.T @ points / counts[:, None]
    moments = torch.einsum("nk,ni,nj->kij", shares, points, points) / counts[:, None, None]
    covariance = moments - loc[:, :, None] * loc[:, None, :]
    covariance = covariance + 1e-6 * torch.eye(points.shape[-1]).to(points)
    return MixtureSameFamily(
        Categorical(counts / counts.sum()), MultivariateNormal(loc, covariance)
    )


@torch.no_grad()
def sample_scores(
    dataset: str, vae: VAE, laws: dict[str, Distribution], test: Tensor, seed: int
) -> dict[str, dict[str, float]]:
    """The scores of `quality` for draws of several laws of the codes, decoded.

    Returns:
        Name of the law -> frechet_distance, precision, recall, and edges, the mean absolute
        difference of neighbouring pixels in grey levels.
    """
    vae.eval()
    classifier, _ = load_classifier(dataset)
    real, found = features(classifier, test), {}
    for name, law in laws.items():
        set_seed(seed, 6)
        z = law.sample((len(test),)).to(next(vae.parameters()))
        pictures = torch.cat([vae.decoder(part).sigmoid() for part in z.split(1000)])
        generated = features(classifier, pictures)
        precision, recall = precision_and_recall(real, generated)
        edges = [255 * pictures.diff(dim=dim).abs().mean().item() for dim in (-2, -1)]
        found[name] = {
            "frechet_distance": frechet_distance(real, generated),
            "precision": precision,
            "recall": recall,
            "edges": sum(edges) / 2,
        }
    return found
