"""The local precision against a dense Hessian, and the run that compares prices with costs."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rhovae import POSTERIORS
from rhovae.objectives import bernoulli_nll
from rhovae.study import jacobians, prices
from rhovae.study.lines import read_lines
from rhovae.study.records import load_records

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import price_decoders  # noqa: E402


def decoder(latent, pixels=30, hidden=16):
    layers = nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels)
    return nn.Sequential(*layers, nn.Unflatten(-1, (1, 5, pixels // 5)))


def test_the_local_precision_is_the_hessian_of_minus_log_p():
    """Exactly, for linear layers and ReLU; against a dense Hessian by reverse mode."""
    network, x = decoder(4), torch.rand(3, 1, 5, 6)
    z = torch.randn(3, 4)
    found = jacobians.local_precision(network, z, chunk=2)
    for one, image, matrix in zip(z, x, found, strict=True):

        def loss(point, image=image):
            nll = bernoulli_nll(network(point.unsqueeze(0)), image.unsqueeze(0))[0]
            return nll + 0.5 * point.square().sum()

        torch.testing.assert_close(matrix, torch.autograd.functional.hessian(loss, one))


def test_a_turned_decoder_has_the_turned_precision():
    network, z = decoder(3), torch.randn(4, 3)
    rotation = prices.random_rotation(3, torch.Generator().manual_seed(2))
    turned = jacobians.turned_decoder(network, rotation)
    torch.testing.assert_close(turned(z @ rotation), network(z))
    found = jacobians.local_precision(turned, z @ rotation)
    expected = prices.turned(jacobians.local_precision(network, z), rotation)
    torch.testing.assert_close(found, expected)


def test_a_run_has_every_number_and_a_second_one_the_same(monkeypatch, tmp_path, float32):
    """With few steps, on a small decoder; the second finds model and measurements on disk."""
    for name in ("best_posteriors", "optimised"):
        few = functools.partial(getattr(jacobians, name), steps=30)
        monkeypatch.setattr(jacobians, name, few)
    settings = dict(
        images=8, latent=3, source="embedded", epochs=1, checkpoints=tmp_path, draws=2, rotations=3
    )
    result = jacobians.run("mnist", "ar1", **settings)
    assert set(result["measured"]) == {"encoder", *POSTERIORS}
    for place in ("mean", "draws", "posterior"):
        entry = result["predicted"][place]
        assert list(entry) == list(POSTERIORS)
        for name in POSTERIORS:
            excess = result["measured"][name]["excess"][0]
            assert entry[name]["off"][0] == pytest.approx(entry[name]["cost"][0] - excess)
    for entry in result["rotated"].values():
        assert entry["best"] <= entry["trained"]
        assert len(entry["random"]) == 3
    trained = result["predicted"]["mean"]["diagonal"]["cost"][0]
    assert result["rotated"]["diagonal"]["trained"] == pytest.approx(trained)
    best = result["rotated"]["diagonal"]["best"]
    assert result["checked"]["predicted"][0] == pytest.approx(trained - best)
    assert len(result["units"]) == 3
    assert jacobians.run("mnist", "ar1", **settings) == result


def test_the_committed_lines_are_those_of_the_tool_and_their_models_like_those_of_the_grid():
    for line in read_lines(price_decoders.PATH):
        settings, result = line["settings"], line["result"]
        assert settings in price_decoders.runs(settings["images"])
        chosen = dict(dataset=settings["dataset"], posterior=settings["decoder"])
        (record,) = load_records(ROOT / "data" / "results" / "gaps", **chosen)
        assert abs(result["test"] - record["test"]["negative_elbo"]) < 0.5
        assert not line["environment"]["commit"].endswith("+")
