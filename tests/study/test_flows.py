"""Pyro's flows as posteriors: densities, moments, and the ELBO that takes its KL by a draw."""

import sys

import pytest
import torch
from torch.distributions import MultivariateNormal

from rhovae import POSTERIORS, VAE
from rhovae.objectives import importance_weighted_nll, negative_elbo
from rhovae.study import Experiment, run_experiment
from rhovae.study.flows import FLOWS, sampled_elbo
from rhovae.study.networks import NETWORKS

pytest.importorskip("pyro")
SHAPE = (1, 6, 5)


def posterior(name, latent=4, images=3):
    return FLOWS[name](8, latent)(2 * torch.randn(images, 8))


@pytest.mark.parametrize("name", FLOWS)
def test_the_density_is_that_of_the_transformed_noise(name):
    """By the Jacobian of the draw, from autograd; for a draw and for a point that was not drawn."""
    q = posterior(name)
    base = q.base_dist.sample()

    def drawn(z):
        for step in q.transforms:
            z = step._call(z)
        return z

    z = drawn(base)
    jacobian = torch.autograd.functional.jacobian(lambda b: drawn(b).sum(0), base)
    expected = q.base_dist.log_prob(base) - jacobian.transpose(0, 1).det().abs().log()
    torch.testing.assert_close(q.log_prob(z), expected)
    torch.manual_seed(3)
    draws = q.rsample((2,))
    torch.testing.assert_close(q.log_prob(draws), q.log_prob(draws.clone()))
    assert q.log_prob(draws).shape == (2, 3)
    if name == "iaf":
        assert jacobian.all(), "in two orders each variable reaches every other"
        for step, order in zip(q.transforms, 2 * (range(4), (3, 2, 1, 0)), strict=True):
            rows = torch.autograd.functional.jacobian(lambda b: step._call(b).sum(0), base)  # noqa: B023
            ordered = rows.transpose(0, 1)[:, list(order)][..., list(order)]
            assert not ordered.triu(1).any() and ordered.tril(-1).any()


def test_the_householder_flow_is_a_turned_diagonal_normal():
    q = posterior("householder", latent=5)
    (step,) = q.transforms
    assert step.u().shape == (3, 5, 5), "a reflection for each variable"
    turn = torch.stack([step._call(unit.expand(3, 5)) for unit in torch.eye(5)], -1)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(5).expand(3, 5, 5))
    assert (turn - torch.diag_embed(turn.diagonal(dim1=-2, dim2=-1))).abs().max() > 0.1
    covariance = turn @ torch.diag_embed(q.base_dist.variance) @ turn.mT
    dense = MultivariateNormal((turn @ q.base_dist.mean.unsqueeze(-1)).squeeze(-1), covariance)
    z = torch.randn(7, 3, 5)
    torch.testing.assert_close(q.log_prob(z), dense.log_prob(z))


@pytest.mark.parametrize("name", FLOWS)
def test_moments_are_those_of_draws(name):
    q = posterior(name)
    n = 5000
    draws = q.sample((n,))
    error = (draws.var(0) * (1 / 256 + 1 / n)).sqrt()
    assert ((q.mean - draws.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(q.variance, draws.var(0), rtol=0.4, atol=0)
    assert q.mean is not q.base_dist.mean and not q.mean.requires_grad


@pytest.mark.parametrize("name", ["diagonal", "ar1", "full"])
def test_the_sampled_elbo_is_the_elbo_in_the_mean(name):
    x, decoder = torch.rand(2, *SHAPE), NETWORKS["mlp"](SHAPE, 3).decoder
    q = POSTERIORS[name](4, 3)(torch.randn(2, 4))
    n = 60_000
    z = q.sample((n,))
    logits = decoder(q.mean).expand(n, 2, *SHAPE)
    terms = sampled_elbo(q, z, logits, x)
    exact = negative_elbo(q, q.mean, logits[0], x)
    torch.testing.assert_close(terms.reconstruction[0], exact.reconstruction)
    torch.testing.assert_close(terms.loss, terms.reconstruction + terms.kl)
    error = terms.kl.std(0) / n**0.5
    assert ((terms.kl.mean(0) - exact.kl).abs() < 4 * error).all() and (error < 0.05).all()


@pytest.mark.parametrize("name", FLOWS)
def test_importance_weights_with_a_flow_give_the_same_likelihood(name):
    """Two proposals, one decoder: both estimate log p(x), with far more draws than they need."""
    bodies = NETWORKS["mlp"](SHAPE, 2, hidden=8)
    vae = VAE(bodies.encoder, POSTERIORS["diagonal"](8, 2), bodies.decoder)
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():
        flow = FLOWS[name](8, 2)(vae.encoder(x))
        expected, found = (importance_weighted_nll(vae, x, 20_000, q=q) for q in (None, flow))
    assert (found - expected).abs().max() < 0.02


def test_a_flow_trains_by_the_sampled_elbo_and_by_nothing_else(float32):
    images = torch.randint(0, 256, (60, 4, 4), generator=torch.Generator().manual_seed(0))
    train, test = images[:40].to(torch.uint8), images[40:].to(torch.uint8)
    settings = dict(latent=3, epochs=8, batch_size=10, learning_rate=0.01)
    experiment = Experiment("noise", source="own", posterior="iaf", iwae_samples=20, **settings)
    assert experiment.objective == "sampled-elbo" and "-sampled-elbo-iaf-" in experiment.name
    record = run_experiment(experiment, train=train, test=test, device="cpu", progress=False)
    losses = [entry["train"]["negative_elbo"] for entry in record["history"]]
    assert losses[-1] < losses[0] - 0.5
    assert record["iwae"]["nll"] < record["iwae"]["negative_elbo"]
    sentence = "The KL of iaf has no closed form, .* choose objective='sampled-elbo' and gap_im"
    for changes in (dict(objective="elbo"), dict(gap_images=10)):
        with pytest.raises(ValueError, match=sentence):
            Experiment("mnist", posterior="iaf", **changes)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_stays_on_its_device(name):
    """On torch's meta device (test_devices.py); to be made, Pyro's need one with numbers."""
    q = FLOWS[name](8, 10).to("meta")(torch.randn(3, 8, device="meta"))
    z = q.rsample((2,))
    assert z.is_meta and q.log_prob(z).is_meta and q.mean.is_meta


def test_without_pyro_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyro", None)
    monkeypatch.setitem(sys.modules, "pyro.distributions", None)
    with pytest.raises(ModuleNotFoundError, match=r"need Pyro, which .*install rhovae\[pyro\]"):
        FLOWS["iaf"](8, 2)
