"""The VAE on moving images: data, masks, families, and the estimates it is judged by."""

import importlib
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae import AR1Prior
from rhovae.study import load_images
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import read_lines
from rhovae.study.moving import (
    HEADS,
    SPOT_TIME_CONSTANT,
    STEPS,
    InEigenvectors,
    MovingVAE,
    frame_mask,
    judge,
    kl_to,
    moving_spot,
    rotating_digits,
    sequences,
    train,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
runner = importlib.import_module("time_moving")


# Of seed 0; what else is there comes seed by seed.
WHOLE = [("digits", 0.0), ("digits", 0.3), ("digits", 0.6), ("spot", 0.6)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    frames = moving_spot(4, generator())
    return frames, frame_mask(4, 0.4, generator())


def test_digits_turn_by_the_same_angle_from_frame_to_frame():
    disc = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    disc[..., 12:16, 14:26] = 255  # a bar from the middle to the right
    frames = rotating_digits(disc.expand(20, -1, -1, -1), generator())
    assert frames.shape == (20, STEPS, 196) and set(frames.unique().tolist()) == {0, 1}
    axis = torch.arange(14) - 6.5
    square = frames.view(20, STEPS, 14, 14)
    y, x = ((square * axis.view(shape)).sum((-2, -1)) for shape in ((14, 1), (1, 14)))
    angle = torch.atan2(y, x)
    turned = torch.remainder(angle.diff(dim=-1) + math.pi, 2 * math.pi) - math.pi
    speed = turned.mean(-1) * 180 / math.pi
    assert ((speed.abs() > 9) & (speed.abs() < 31)).all()
    assert (speed > 0).any() and (speed < 0).any()
    assert ((turned * 180 / math.pi - speed.unsqueeze(-1)).abs() < 12).all()  # of a coarse raster


def test_the_spot_moves_with_its_time_constant():
    frames = moving_spot(20_000, generator()).view(-1, STEPS, 14, 14)
    axis = torch.arange(14) - 6.5
    middle = (frames * axis).sum((-2, -1)) / frames.sum((-2, -1)).clamp(min=1)
    # Lags 2 over 1 do not see the noise of a frame, which lag 0 does.
    lagged = [(middle[:, : STEPS - k] * middle[:, k:]).mean() for k in (1, 2, 3)]
    for nearer, farther in pairwise(lagged):
        assert farther / nearer == pytest.approx(math.exp(-1 / SPOT_TIME_CONSTANT), abs=0.03)


def test_frames_are_missing_as_often_as_said_and_never_all():
    mask = frame_mask(20_000, 0.6, generator())
    assert mask.sum(-1).min() == 1 and set(mask.unique().tolist()) == {0, 1}
    expected = 0.4 + 0.6**STEPS / STEPS
    assert abs(mask.mean() - expected) < 4 * math.sqrt(0.24 / mask.numel())
    assert frame_mask(3, 0.0, generator()).all()


@pytest.mark.parametrize("family", HEADS)
def test_missing_frames_tell_the_posterior_nothing(family, batch):
    torch.manual_seed(0)
    frames, mask = batch
    model = MovingVAE(family, 3)
    other = torch.where(mask.unsqueeze(-1) == 1, frames, 1 - frames)
    z = torch.randn(4, 3, STEPS)
    one, another = (model.posterior(x, mask)[0].log_prob(z) for x in (frames, other))
    assert torch.equal(one, another)


@pytest.mark.parametrize("family", HEADS)
def test_divergences_and_densities_are_those_of_the_dense_normal(family):
    torch.manual_seed(0)
    features, prior = torch.randn(4, STEPS, 16), AR1Prior(3, (1.0, 6.0))
    p = prior(STEPS)
    q = HEADS[family](16, 3)(features, p)
    if isinstance(q, InEigenvectors):
        root = q.vectors * q.scale.unsqueeze(-2)
        covariance = root @ root.mT
    else:
        covariance = q.covariance_matrix
    dense = MultivariateNormal(q.loc.double(), covariance.double())
    target = MultivariateNormal(torch.zeros(STEPS).double(), p.covariance_matrix.double())
    expected = kl_divergence(dense, target)
    assert expected.shape == (4, 3)
    torch.testing.assert_close(kl_to(q, p).double(), expected.sum(-1), rtol=1e-4, atol=1e-4)
    z = q.rsample((7,))
    torch.testing.assert_close(
        q.log_prob(z).double(), dense.log_prob(z.double()), rtol=1e-4, atol=1e-4
    )
    if family == "gp-vae":
        assert (q.rho < 0).all()


def test_draws_in_the_eigenvectors_have_their_covariance():
    torch.manual_seed(0)
    prior = AR1Prior(1, 3.0)(STEPS)
    q = InEigenvectors(torch.randn(1, STEPS), torch.randn(1, STEPS), prior)
    z = q.rsample((200_000,))[:, 0] - q.loc
    root = (q.vectors * q.scale.unsqueeze(-2))[0]
    covariance = root @ root.mT
    variance = covariance.diagonal()
    error = ((covariance.square() + variance * variance.unsqueeze(-1)) / len(z)).sqrt()
    assert ((z.T @ z / len(z) - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("family", HEADS)
def test_every_family_reaches_the_prior_and_the_time_constants(family, batch):
    torch.manual_seed(0)
    model = MovingVAE(family, 3)
    model.negative_elbo(*batch).mean().backward()
    gradient = model.prior.log_time_constant.grad
    assert gradient.isfinite().all() and (gradient != 0).all()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_importance_weighting_is_the_evidence_where_the_decoder_says_nothing(batch):
    """A decoder that ignores z: p(seen) is known, and the weights are p(z) / q(z)."""
    torch.manual_seed(0)
    model = MovingVAE("sites", 2)
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        model.head.log_precision.bias.fill_(-20.0)  # the posterior is the prior
        model.head.log_precision.weight.zero_()
        model.head.shift.weight.zero_()
    frames, mask = batch
    result = judge(model, frames, mask, draws=8)
    frame = model.frame_nll(torch.zeros(4, 2, STEPS), frames)
    seen, hidden = (mask * frame).sum(-1).mean().item(), frame[mask == 0].mean().item()
    assert result["iwae"] == pytest.approx(seen, rel=1e-4)
    assert result["negative_elbo"] == pytest.approx(seen, rel=1e-4)
    assert result["predicted"] == pytest.approx(hidden, rel=1e-5)
    assert result["weighted"] == pytest.approx(hidden, rel=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_importance_weighting_tightens_the_bound(family, batch):
    torch.manual_seed(0)
    frames, mask = batch
    result = judge(MovingVAE(family, 3), frames, mask, draws=50)
    assert result["iwae"] < result["negative_elbo"]
    whole = judge(MovingVAE(family, 3), frames, torch.ones_like(mask), draws=5)
    assert set(whole) == {"negative_elbo", "iwae"}


def test_a_run_repeats_to_the_last_bit(float32, monkeypatch):
    few = lambda *which: sequences(*which)[:60]  # noqa: E731
    monkeypatch.setattr("rhovae.study.moving.sequences", few)
    one, other = (train("spot", 0.3, "chain", seed=1, steps=4, batch=4) for _ in range(2))
    assert one == other and len(one["time_constants"]) == 2 and len(one["curve"]) == 4


def test_images_are_those_of_the_package():
    frames = rotating_digits(load_images("mnist", "test")[:3], generator())
    assert frames.shape == (3, STEPS, 196) and 0.05 < frames.mean() < 0.25


def test_the_committed_runs_are_those_of_the_plan():
    runs = read_lines(DATA_FOLDER / "results" / "time" / "moving.jsonl")
    settings = [run["settings"] for run in runs]
    assert all(s in runner.runs() for s in settings)
    assert len({tuple(s.values()) for s in settings}) == len(settings)
    first = [s for s in runner.runs([0]) if (s["data"], s["missing"]) in WHOLE]
    assert all(s in settings for s in first)
    assert not [r for r in runs if (r["environment"]["commit"] or "+").endswith("+")]


def test_the_committed_starts_are_those_of_the_plan():
    runs = read_lines(DATA_FOLDER / "results" / "time" / "moving_starts.jsonl")
    settings = [run["settings"] for run in runs]
    assert len(settings) == len(runner.STARTS) and all(s in settings for s in runner.STARTS)
    assert not [r for r in runs if (r["environment"]["commit"] or "+").endswith("+")]


def test_time_constants_start_where_they_are_told():
    for given, expected in (((1.0, 5.0), [1.0, 5.0]), (20.0, [20.0, 20.0])):
        tau = MovingVAE("sites", 2, given).prior.time_constant
        torch.testing.assert_close(tau, torch.tensor(expected, dtype=tau.dtype))
    assert torch.equal(
        MovingVAE("sites", 2).prior.time_constant,
        MovingVAE("sites", 2, (1.0, 5.0)).prior.time_constant,
    )
