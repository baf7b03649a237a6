"""The study of the authors' objections: what is frozen, what is fitted, what is scored."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, Uniform, kl_divergence

from rhovae.study import Experiment, decoders, load_images
from rhovae.study.experiments import build_vae
from rhovae.study.lines import read_lines
from rhovae.study.records import load_records

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import audit_decoders  # noqa: E402

pytestmark = pytest.mark.usefixtures("float32")


def test_one_component_is_the_gaussian_of_mean_and_covariance():
    points = torch.randn(300, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 2
    (component,) = decoders.fit_mixture(points, 1).component_distribution.expand((1,)).mean
    torch.testing.assert_close(component, points.mean(0))
    covariance = decoders.fit_mixture(points, 1).component_distribution.covariance_matrix[0]
    expected = points.T.cov(correction=0) + 1e-6 * torch.eye(3)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-9)


def test_each_step_raises_the_likelihood_and_two_heaps_are_found():
    torch.manual_seed(0)
    heaps = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    which = (torch.rand(4000) < 0.25).long()
    points = heaps[which] + torch.randn(4000, 2, dtype=torch.float64) * torch.tensor([1.0, 0.5])
    fits = [decoders.fit_mixture(points, 2, steps) for steps in (0, 1, 2, 5, 20)]
    likelihoods = [mixture.log_prob(points).mean().item() for mixture in fits]
    assert likelihoods == sorted(likelihoods)
    weights = fits[-1].mixture_distribution.probs
    few = int(weights.argmin())
    assert abs(weights[few] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    errors = torch.tensor([1.0, 0.5]) / math.sqrt(900)
    found = fits[-1].component_distribution.mean[few]
    assert ((found - heaps[1]).abs() < 4 * errors).all()
    truth = MultivariateNormal(
        heaps, torch.diag(torch.tensor([1.0, 0.25])).double().expand(2, 2, 2)
    )
    best = torch.logsumexp(
        truth.log_prob(points[:, None]) + torch.tensor([0.75, 0.25]).log(), -1
    ).mean()
    assert likelihoods[-1] >= best - 1e-3, "no less likely than the truth"


def small():
    experiment = Experiment(dataset="mnist", posterior="published-script", latent=3, epochs=2)
    train, test = (load_images("mnist", split)[:512] for split in ("train", "test"))
    return experiment, build_vae(experiment, (1, 28, 28)), train, test


def test_a_refitted_encoder_leaves_the_decoder_as_it_is():
    experiment, vae, train, test = small()
    before = copy.deepcopy(vae.state_dict())
    refitted = decoders.refit(vae, experiment, train, test)
    assert refitted.decoder is vae.decoder
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in vae.parameters())
    start = build_vae(Experiment(dataset="mnist", posterior="diagonal", latent=3), (1, 28, 28))
    assert not torch.equal(start.encoder[1].weight, refitted.encoder[1].weight), "it was trained"


@pytest.mark.parametrize("posterior", ["diagonal", "ar1", "published-script"])
def test_moving_the_prior_is_an_affine_map_before_the_decoder(posterior):
    """Against dense algebra: KL to the Gaussian of the codes, by torch's own MultivariateNormal."""
    _, _, train, test = small()
    vae = build_vae(Experiment(dataset="mnist", posterior=posterior, latent=3), (1, 28, 28))
    found = decoders.judged(vae, train, test, 0, images=10, samples=2)
    q = vae.encode(test / 255)
    covariance = getattr(q, "covariance_matrix", None)
    covariance = q.variance.diag_embed() if covariance is None else covariance
    gaussian = MultivariateNormal(*moments(decoders.codes(vae, train, 0)))
    dense = MultivariateNormal(q.mean.double(), covariance.double())
    kl = kl_divergence(dense, gaussian.expand((len(test),))).mean().item()
    assert found["moved"] - found["reconstruction"] == pytest.approx(kl, rel=1e-4)
    assert found["negative_elbo"] == pytest.approx(found["reconstruction"] + found["kl"])


def moments(points):
    covariance = points.T.cov(correction=0)
    return points.mean(0), covariance + 1e-6 * torch.eye(points.shape[-1]).double()


def test_a_run_has_every_number(monkeypatch):
    def few(name, split, source):
        return load_images(name, split, source)[:300]

    monkeypatch.setattr(decoders, "load_images", few)
    settings = dict(latent=2, source="embedded", epochs=1)
    result = decoders.run("mnist", "published-script", 0, **settings)
    assert set(result) == {"reported", "own", "refitted", "samples"}
    assert set(result["samples"]) == {"prior", "gaussian", "mixture"}
    assert "refitted" not in decoders.run("mnist", "diagonal", 0, **settings)


def test_draws_where_the_codes_are_score_better_than_draws_elsewhere():
    """A decoder that knows one place of the plane, and a law that finds it."""
    _, test = (load_images("mnist", split)[:1000] for split in ("train", "test"))

    class Nearest(torch.nn.Module):
        def forward(self, z):  # the test image of the number that z carries, black beyond them
            known = (z[:, 0] >= 0) & (z[:, 0] < 1000)
            images = test[z[:, 0].clamp(0, 999).long()] / 255
            return torch.logit(images * known[:, None, None, None], eps=1e-6)

    vae = build_vae(Experiment(dataset="mnist", posterior="diagonal", latent=1), (1, 28, 28))
    vae.decoder = Nearest()
    laws = {"where": Uniform(torch.zeros(1), 1000.0), "elsewhere": Uniform(-torch.ones(1), 0.0)}
    scores = decoders.sample_scores("mnist", vae, laws, test, 0)
    assert scores["where"]["precision"] == 1 and scores["where"]["recall"] > 0.8
    assert scores["where"]["frechet_distance"] < scores["elsewhere"]["frechet_distance"] / 10
    assert scores["elsewhere"]["edges"] < 0.1 < 10 < scores["where"]["edges"]


def test_the_committed_lines_are_those_of_the_tool_and_their_models_those_of_the_audit():
    lines = read_lines(audit_decoders.PATH)
    asked = audit_decoders.runs(everything=True)
    assert lines and all(line["settings"] in asked for line in lines)
    for line in lines:
        settings = line["settings"]
        (record,) = load_records(ROOT / "data" / "results" / "audit", **settings)
        assert abs(line["result"]["reported"] - record["test"]["loss"]) < 0.5
