"""How good samples are, measured in the feature space of a small classifier of the same images.

The classifiers lie in data/classifiers/ (tools/train_classifier.py made them from the full training
sets), so the scale is the same for every run, as it is for scores that rest on Inception's weights.
"""

import functools
import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..vae import VAE
from .data import DATA_FOLDER, DATASETS, fingerprint, resized, to_unit_interval

FEATURES, SIZE = 64, 28


def build_classifier() -> nn.ModuleDict:
    """Untrained: `features` maps images (n, 1, 28, 28) in [0, 1] to (n, 64), `logits` those to 10.

    Three 3x3 convolutions (32, 64, 64 filters) with batch norm and pooling, and a dense layer.
    """
    features = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 3 * 3, FEATURES), nn.ReLU()),
    )
    return nn.ModuleDict({"features": features, "logits": nn.Linear(FEATURES, 10)})


def classifier_file(dataset: str) -> Path:
    return DATA_FOLDER / "classifiers" / f"{dataset}.safetensors"


@functools.cache
def load_classifier(dataset: str) -> tuple[nn.ModuleDict, str]:
    """The trained classifier of a set, and the first digits of its file's SHA-256."""
    path = classifier_file(dataset)
    with torch.device("meta"):  # without drawing initial weights: no random number is used up
        classifier = build_classifier()
    classifier.load_state_dict(load_file(path), assign=True)
    return classifier.eval(), hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@torch.no_grad()
def features(classifier: nn.ModuleDict, images: Tensor, batch_size: int = 500) -> Tensor:
    """Features (n, 64) of images (n, 1, height, width), uint8 or in [0, 1]; resized to 28x28.

    They are computed where the classifier is and returned on the CPU, where the scores are taken.
    """
    parts = []
    device = next(classifier.parameters()).device
    for batch in images.split(batch_size):
        x = batch if batch.is_floating_point() else to_unit_interval(batch)
        parts.append(classifier["features"](resized(x, SIZE).to(device)))
    return torch.cat(parts).cpu()


_REAL: dict[tuple, Tensor] = {}


def _features_of_real(classifier: nn.ModuleDict, digest: str, images: Tensor) -> Tensor:
    """`features`, kept: models that are compared in one process are judged by the same images."""
    key = digest, fingerprint(images), images.shape, images.device
    if key not in _REAL:
        _REAL[key] = features(classifier, images)
    return _REAL[key]


class _Given(nn.Module):
    """What torchmetrics takes for a network: here the features are there already."""

    num_features = FEATURES

    def forward(self, given: Tensor) -> Tensor:
        return given


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets of features (Heusel et al. 2017).

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), zero for equal means and covariances. Like every such
    score it has a bias that falls with the number of images: compare equal numbers only.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # it takes a second or two

    distance = FrechetInceptionDistance(feature=_Given()).set_dtype(torch.float64)
    distance.update(real.double(), real=True)
    distance.update(generated.double(), real=False)
    return distance.compute().item()


def precision_and_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of generated images that are near real ones, and the reverse.

    Near: within the distance of a point to its k-th neighbour in its own set (Kynkaanniemi et al.
    2019, Eq. 1). Precision falls with broken samples, recall with missing kinds.
    """

    def radii(points: Tensor) -> Tensor:
        rows = [torch.cdist(part, points).topk(k + 1, largest=False) for part in points.split(1000)]
        return torch.cat([row.values[:, -1] for row in rows])

    def covered(points: Tensor, by: Tensor) -> float:
        reach = radii(by)
        near = [(torch.cdist(part, by) <= reach).any(1) for part in points.split(1000)]
        return torch.cat(near).double().mean().item()

    return covered(generated, real), covered(real, generated)


@torch.no_grad()
def sample_quality(dataset: str, vae: VAE, test: Tensor, train: Tensor) -> dict | None:
    """Scores of as many draws of the model as there are test images, against those.

    All images are seen at 28x28. Larger ones are blurred a little on the way there, real ones as
    well as draws, so compare models of one image size only.

    Args:
        dataset: decides the classifier; None is returned for images that have none.
        vae: the model; its draws come from torch's global generator.
        test, train: uint8 images.
    Returns:
        frechet_distance, precision, recall; the frechet_distance of equally many training images,
        which is what perfect samples would get; the number of images; the classifier's digest.
    """
    if dataset not in DATASETS or test.shape[1] != 1 or not classifier_file(dataset).is_file():
        return None
    vae.eval()
    classifier, digest = load_classifier(dataset)
    classifier = classifier.to(test.device)
    sizes = [len(part) for part in test.split(500)]
    generated = torch.cat([features(classifier, vae.generate(size)) for size in sizes])
    real, seen = (
        _features_of_real(classifier, digest, images) for images in (test, train[: len(test)])
    )
    precision, recall = precision_and_recall(real, generated)
    return {
        "frechet_distance": frechet_distance(real, generated),
        "frechet_distance_of_training_images": frechet_distance(real, seen),
        "precision": precision,
        "recall": recall,
        "images": len(test),
        "classifier": digest,
    }
