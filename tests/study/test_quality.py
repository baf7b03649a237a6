"""Scores of samples: against closed forms, and against what they must order."""

import math

import pytest
import torch
from safetensors import safe_open

from rhovae.study.data import DATA_FOLDER, DATASETS, load_images, load_labels, to_unit_interval
from rhovae.study.experiments import Experiment, build_vae
from rhovae.study.quality import (
    FEATURES,
    classifier_file,
    features,
    frechet_distance,
    load_classifier,
    precision_and_recall,
    sample_quality,
)

pytestmark = pytest.mark.usefixtures("float32")


def test_frechet_distance_is_the_formula_for_gaussians():
    """Two sets with exactly known means and covariances: whitened draws, then moved."""
    raw = torch.randn(500, FEATURES, dtype=torch.float64)
    raw -= raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False).T
    shift = torch.linspace(-1, 1, FEATURES, dtype=torch.float64)
    stretch = torch.linspace(0.5, 2, FEATURES, dtype=torch.float64)
    expected = (shift.square() + (1 - stretch).square()).sum().item()
    assert math.isclose(frechet_distance(white, white * stretch + shift), expected, rel_tol=1e-6)
    assert abs(frechet_distance(white, white)) < 1e-6


def test_precision_and_recall_of_known_cases():
    real = torch.randn(300, 8)
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 100) == (0, 0)
    precision, recall = precision_and_recall(real, 0.05 * torch.randn(300, 8))
    assert precision > 0.95 and recall < 0.1, "all in the middle: precise, but one kind"
    precision, recall = precision_and_recall(real, 5 * torch.randn(300, 8))
    assert precision < 0.1 and recall > 0.9, "all over the place"


def test_precision_and_recall_by_definition():
    """One dimension, k = 1, countable by hand: radii of the real points are 1, 1 and 3."""
    real = torch.tensor([[0.0], [1.0], [4.0]])
    generated = torch.tensor([[1.9], [6.9], [-2.0], [20.0]])
    precision, recall = precision_and_recall(real, generated, k=1)
    assert precision == 2 / 4  # 1.9 lies near 1 (and 4), 6.9 near 4
    assert recall == 3 / 3  # radii 3.9, 5, 3.9, 13.1 reach every real point


@pytest.mark.parametrize("dataset, accuracy", [("mnist", 0.99), ("fashion-mnist", 0.9)])
def test_the_classifier_knows_the_classes(dataset, accuracy):
    classifier, _ = load_classifier(dataset)
    x = features(classifier, load_images(dataset, "test"))
    assert x.shape == (2000, FEATURES)
    with torch.no_grad():
        right = classifier["logits"](x).argmax(1) == load_labels(dataset, "test")
    assert right.float().mean() > accuracy


def test_loading_a_classifier_uses_up_no_random_numbers():
    """Else the first run of a process would draw other samples than the second."""
    load_classifier.cache_clear()
    before = torch.get_rng_state()
    load_classifier("mnist")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_readme_of_the_data_states_the_accuracies():
    readme = (DATA_FOLDER / "README.md").read_text()
    for dataset in DATASETS:
        with safe_open(classifier_file(dataset), "pt") as file:
            accuracy = float(file.metadata()["test_accuracy"])
        assert f"{100 * accuracy:.2f} %" in readme


def test_features_of_images_and_of_their_grey_values_agree():
    classifier, _ = load_classifier("mnist")
    images = load_images("mnist", "test")[:40]
    torch.testing.assert_close(
        features(classifier, images), features(classifier, to_unit_interval(images))
    )


def test_larger_images_are_seen_at_the_classifiers_size():
    classifier, _ = load_classifier("fashion-mnist")
    images = load_images("fashion-mnist", "test")[:200]
    doubled = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    small, large = features(classifier, images), features(classifier, doubled)
    # Resizing blurs a little, so features move; but not so far as to be another image's.
    nearest = torch.cdist(large, small).argmin(1)
    assert (nearest == torch.arange(200)).float().mean() > 0.8


class Known(torch.nn.Module):
    """A 'model' whose draws are given images."""

    def __init__(self, images):
        super().__init__()
        self.rest = to_unit_interval(images)

    def generate(self, n):
        draws, self.rest = self.rest[:n], self.rest[n:]
        return draws


@pytest.mark.parametrize("dataset", DATASETS)
def test_real_images_score_well_and_an_untrained_model_badly(dataset):
    test, train = load_images(dataset, "test"), load_images(dataset, "train")
    perfect = sample_quality(dataset, Known(train[: len(test)]), test, train)
    floor = perfect["frechet_distance_of_training_images"]
    assert math.isclose(perfect["frechet_distance"], floor, rel_tol=1e-6)
    assert min(perfect["precision"], perfect["recall"]) > 0.8
    noisy = (train[: len(test)] / 2 + 127 * torch.rand(test.shape)).to(torch.uint8)
    noisy = sample_quality(dataset, Known(noisy), test, train)
    vae = build_vae(Experiment(dataset), (1, 28, 28))
    untrained = sample_quality(dataset, vae, test, train)
    assert untrained["frechet_distance"] > 10 * floor
    assert noisy["frechet_distance"] > 10 * floor and noisy["precision"] < perfect["precision"]


def test_images_without_a_classifier_have_no_score():
    assert sample_quality("squares", None, load_images("mnist", "test"), None) is None
    three_channels = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    assert sample_quality("mnist", None, three_channels, None) is None
