"""What tools/benchmark compares does the same thing, by other means."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from benchmark import clock, conditioning, densities, draws, scans, training


def values_and_gradients(function, inputs):
    torch.manual_seed(5)
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return out, *torch.autograd.grad(out.sin().sum(), wanted, materialize_grads=True)


@pytest.mark.parametrize("name", draws.FUNCTIONS)
@pytest.mark.parametrize("latent", [2, 13])
def test_draws_from_the_same_noise_agree(name, latent):
    loc, scale, rho = draws.parameters(4, latent)
    inputs = (loc, scale, rho * 0 if name == "diagonal" else rho, torch.randn(4, latent))
    expected = values_and_gradients(draws.loop, inputs)
    found = values_and_gradients(draws.FUNCTIONS[name], inputs)
    compared = 3 if name == "diagonal" else 4  # which takes no notice of rho
    torch.testing.assert_close(found[:compared], expected[:compared])


@pytest.mark.parametrize("name", [f for f in draws.FAMILIES if f != "diagonal"])
def test_draws_from_the_same_seed_agree(name):
    inputs = draws.parameters(4, 13)
    expected = values_and_gradients(draws.FAMILIES["loop"], inputs)
    found = values_and_gradients(draws.FAMILIES[name], inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", scans.SCANS)
@pytest.mark.parametrize("latent", [2, 50])
def test_scans_agree(name, latent):
    rho, u = draws.parameters(4, latent)[2].detach(), torch.randn(4, latent)
    expected = [u[:, 0]]
    for j in range(1, latent):
        expected.append(rho[:, 0] * expected[-1] + u[:, j])
    torch.testing.assert_close(scans.SCANS[name](u, rho), torch.stack(expected, -1))


def test_conditioning_by_the_scan_is_conditioning():
    inputs = *draws.parameters(4, 13), torch.randn(4, 13), torch.rand(4, 13)
    expected = values_and_gradients(conditioning.conditioned, inputs)
    found = values_and_gradients(draws.by_the_scan(conditioning.conditioned), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("float32")  # what is timed
@pytest.mark.parametrize(
    ("make", "latent"),
    [
        (draws.functions, 65),
        (draws.families, 5),
        (conditioning.conditioning, 5),
        (scans.scans, 5),
        (lambda batch, latent: densities.densities("log_prob", batch, latent), 5),
        (lambda batch, latent: densities.densities("kl", batch, latent), 5),
    ],
)
def test_every_candidate_is_measured(make, latent):
    calls = make(3, latent)
    times = clock.measure(calls, 0.0)
    assert list(times) == list(calls)
    assert ("dense Cholesky factor" in times) == (make is draws.functions and latent <= 64)
    for t in times.values():
        assert t["turns"] == 7 and 0 < t["best"] <= t["median"]


@pytest.mark.usefixtures("float32")
def test_either_layout_gives_the_same_steps():
    losses = []
    for step in training.layouts("cnn").values():
        torch.manual_seed(6)
        losses.append(torch.cat([step() for _ in range(3)])[:, 0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_sizes_that_suit_an_fft_have_no_other_factors():
    assert [draws.good_size(n) for n in (1, 7, 11, 121, 2047)] == [1, 8, 12, 125, 2048]
