"""Device mistakes, found without a GPU.

A tensor on torch's "meta" device has a shape and no numbers. An operation that meets a tensor made
elsewhere fails there, and so does every question that a GPU would have to be waited for (.item(),
.cpu(), a condition on a value). What it cannot show: numbers, speed, and kernels that are missing.
"""

from dataclasses import replace

import pytest
import torch

from rhovae import POSTERIORS
from rhovae.objectives import importance_weighted_nll, negative_elbo
from rhovae.study import Experiment
from rhovae.study.evaluation import evaluate, inference_gaps, iwae_nll, latent_statistics
from rhovae.study.experiments import (
    ALL_OBJECTIVES,
    ALL_POSTERIORS,
    RELEASED_POSTERIORS,
    build_objective,
    build_vae,
)
from rhovae.study.flows import FLOWS
from rhovae.study.networks import NETWORKS
from rhovae.study.training import batch_loss, train_epoch

# Those of the released code need features of their own networks; they are in test_released.py.
# Pyro's flows cannot be made on the meta device; they are in test_flows.py.
HEADS = [name for name in ALL_POSTERIORS if name not in RELEASED_POSTERIORS | FLOWS]
pytestmark = pytest.mark.usefixtures("float32")
NO_RHO = ("isotropic", "diagonal", "low-rank", "full")
SHAPES = {"beta_cnn": (1, 64, 64), "rows": (1, 10, 4)}


def model(architecture, posterior):
    """A model on the meta device, and images beside it."""
    experiment = Experiment("mnist", architecture=architecture, posterior=posterior, latent=10)
    shape = SHAPES.get(architecture, (1, 8, 8))
    with torch.device("meta"):
        vae = build_vae(experiment, shape)
        images = torch.empty(6, *shape, dtype=torch.uint8)
    return experiment, vae, images


@pytest.mark.parametrize("posterior", HEADS)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_a_training_step_stays_on_its_device(architecture, posterior):
    experiment, vae, images = model(architecture, posterior)
    optimizer = torch.optim.Adam(vae.parameters(), foreach=False)
    for objective in ALL_OBJECTIVES:
        loss_of = batch_loss(vae, build_objective(replace(experiment, objective=objective)))
        sums = train_epoch(vae, images, loss_of, optimizer, len(images), clip_norm=1.0)
        assert sums.shape == (1, 3) and sums.is_meta
    assert all(p.is_meta for p in vae.parameters())
    assert all(p.grad is not None for p in vae.posterior.loc.parameters())


@pytest.mark.parametrize("posterior", HEADS)
def test_the_importance_weighted_bound_stays_on_its_device(posterior):
    _, vae, _ = model("mlp", posterior)
    nll = importance_weighted_nll(vae, torch.rand(3, 1, 8, 8, device="meta"), samples=7)
    assert nll.shape == (3,) and nll.is_meta


@pytest.mark.parametrize("posterior", HEADS)
def test_evaluation_leaves_the_device_only_with_its_results(posterior, monkeypatch):
    """Results come back by .cpu() and .item(); those are answered here."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    experiment, vae, images = model("mlp", posterior)
    means, rho = evaluate(vae, images, build_objective(experiment), batch_size=4)
    assert means["loss"] == 0 and (rho is None) == (posterior in NO_RHO)
    assert iwae_nll(vae, images, samples=3, batch_size=4) == 1
    assert latent_statistics(vae, images, batch_size=4)["aggregate_kl"] is None, "6 draws of 10"
    assert list(inference_gaps(vae, images, steps=2, judged=2)) == ["encoder", *POSTERIORS]


def test_a_mistake_would_be_found():
    """A tensor made on the CPU, and a question: both fail on meta, as these tests rely on."""
    _, vae, images = model("mlp", "ar1")
    optimizer = torch.optim.Adam(vae.parameters(), foreach=False)

    def elsewhere(q, z, logits, x):
        return negative_elbo(q, z + torch.ones(10), logits + torch.ones(64).view(1, 8, 8), x)

    def asks(q, z, logits, x):
        return negative_elbo(q, z * z.sum().item(), logits, x)

    for wrong in (elsewhere, asks):
        with pytest.raises(RuntimeError):
            train_epoch(vae, images, batch_loss(vae, wrong), optimizer, 4)
