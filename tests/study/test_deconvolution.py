"""The learned deconvolution: bound, evidence and prices against dense algebra and draws."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from rhovae import POSTERIORS, AR1Normal
from rhovae.study.data import DATA_FOLDER
from rhovae.study.deconvolution import (
    DECODERS,
    FAMILIES,
    LENGTH,
    NOISE,
    TAPS,
    Decoder,
    Encoder,
    Measurements,
    blur,
    decoder_price,
    exact_posterior,
    expected_excess,
    measure,
    negative_elbo,
    negative_log_evidence,
    posterior_precision,
    train,
)
from rhovae.study.lines import read_lines
from rhovae.study.prices import diagonal_price

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
runner = importlib.import_module("time_deconvolution")
DOUBLE = torch.float64


@pytest.fixture
def data():
    return measure(5, 0.4, torch.Generator().manual_seed(0), dtype=DOUBLE)


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(LENGTH, LENGTH, generator=generator, dtype=DOUBLE) / math.sqrt(LENGTH)


def members(n):
    """One normal of each family, float64, with covariances of no particular form."""
    torch.manual_seed(2)
    loc, spread = torch.randn(2, n, LENGTH, dtype=DOUBLE)
    scale = (0.3 * spread).exp() / 3
    lower = torch.randn(n, LENGTH, LENGTH, dtype=DOUBLE).tril(-1) / 20 + scale.diag_embed()
    yield Independent(Normal(loc, scale), 1)
    yield AR1Normal(loc, scale, fisher_z=torch.randn(n, LENGTH - 1, dtype=DOUBLE))
    yield MultivariateNormal(loc, scale_tril=lower)


def dense_evidence(weight, data, index):
    seen = data.mask[index] == 1
    rows = weight[seen]
    covariance = rows @ rows.T + NOISE * torch.eye(len(rows), dtype=DOUBLE)
    return MultivariateNormal(rows[:, 0] * 0, covariance).log_prob(data.values[index][seen])


def test_missing_samples_are_zero_and_as_many_as_said():
    data = measure(4000, 0.4, torch.Generator().manual_seed(0))
    assert (data.values[data.mask == 0] == 0).all() and set(data.mask.unique().tolist()) == {0, 1}
    count = data.mask.numel()
    error = math.sqrt(0.24 / count)
    assert abs(data.mask.mean() - 0.6) < 4 * error
    assert measure(3, 0.0, torch.Generator()).mask.all()


def test_measurements_have_the_covariance_of_the_model():
    data = measure(100_000, 0.0, torch.Generator().manual_seed(0), dtype=DOUBLE)
    truth = blur(torch.tensor(TAPS, dtype=DOUBLE))
    covariance = truth @ truth.T + NOISE * torch.eye(LENGTH, dtype=DOUBLE)
    found = data.values.T @ data.values / len(data.values)
    variance = covariance.diagonal()
    error = ((covariance.square() + variance * variance.unsqueeze(-1)) / len(data.values)).sqrt()
    assert ((found - covariance).abs() < 5 * error).all()


def test_the_blur_is_a_causal_filter():
    signal = torch.randn(LENGTH)
    expected = 0.6 * signal + 0.4 * torch.cat([torch.zeros(1), signal[:-1]])
    torch.testing.assert_close(blur(torch.tensor(TAPS)) @ signal, expected)


def test_evidence_is_that_of_the_dense_normal_over_what_was_measured(weight, data):
    expected = torch.stack([-dense_evidence(weight, data, i) for i in range(5)])
    torch.testing.assert_close(negative_log_evidence(weight, data), expected, rtol=1e-10, atol=0)


def test_the_bound_of_the_exact_posterior_is_the_evidence(weight, data):
    bound = negative_elbo(exact_posterior(weight, data), weight, data)
    torch.testing.assert_close(bound, negative_log_evidence(weight, data), rtol=1e-10, atol=0)


def test_the_bound_is_the_evidence_plus_the_divergence(weight, data):
    for q in members(5):
        gap = negative_elbo(q, weight, data) - negative_log_evidence(weight, data)
        dense = MultivariateNormal(q.mean, q.variance.diag_embed())
        dense = dense if isinstance(q, Independent) else MultivariateNormal(
            q.mean, scale_tril=q.scale_tril
        )  # fmt: skip
        expected = kl_divergence(dense, exact_posterior(weight, data))
        torch.testing.assert_close(gap, expected, rtol=1e-9, atol=0)


def test_the_bound_is_the_mean_over_draws(weight, data):
    torch.manual_seed(3)
    for q in members(5):
        z = q.rsample((20_000,))
        residual = data.values - data.mask * (z @ weight.T)
        constant = data.mask.sum(-1) * math.log(2 * math.pi * NOISE)
        nll = 0.5 * (residual.square().sum(-1) / NOISE + constant)
        prior = Independent(Normal(torch.zeros_like(q.mean), 1.0), 1)
        terms = nll + q.log_prob(z) - prior.log_prob(z)
        error = terms.std(0) / math.sqrt(len(z))
        assert ((terms.mean(0) - negative_elbo(q, weight, data)).abs() < 4.5 * error).all()


def test_what_is_missing_changes_nothing(weight, data):
    q = next(members(5))
    other = weight.clone()
    other[data.mask[0] == 0] = 7.0  # decoder rows of the samples that measurement 0 misses
    for bound in (negative_log_evidence, lambda w, d: negative_elbo(q, w, d)):
        assert bound(other, data)[0].item() == pytest.approx(bound(weight, data)[0].item())


def test_the_exact_posterior_of_two_taps_is_a_stepped_chain(data):
    truth = blur(torch.tensor(TAPS, dtype=DOUBLE))
    precision = posterior_precision(truth, data.mask)
    assert precision.triu(2).abs().max() == 0
    covariance = exact_posterior(truth, data).covariance_matrix
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    rho = covariance.diagonal(1, -2, -1) / scale[..., 1:] / scale[..., :-1]
    chain = AR1Normal(exact_posterior(truth, data).mean, scale, rho=rho)
    torch.testing.assert_close(chain.covariance_matrix, covariance, rtol=1e-9, atol=1e-13)
    bound = negative_elbo(chain, truth, data)
    torch.testing.assert_close(bound, negative_log_evidence(truth, data), rtol=1e-9, atol=0)


def test_the_price_is_the_divergence_of_the_best_diagonal(weight, data):
    exact = exact_posterior(weight, data)
    precision = posterior_precision(weight, data.mask)
    variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
    best = MultivariateNormal(exact.mean, variance.diag_embed())
    torch.testing.assert_close(kl_divergence(best, exact), diagonal_price(precision))
    for factor in (0.9, 1.1):
        worse = MultivariateNormal(exact.mean, (factor * variance).diag_embed())
        assert (kl_divergence(worse, exact) > diagonal_price(precision)).all()


def test_expected_excess_is_the_mean_over_measurements(weight):
    data = measure(4000, 0.4, torch.Generator().manual_seed(4), dtype=DOUBLE)
    truth = blur(torch.tensor(TAPS, dtype=DOUBLE))
    likelihood, price = expected_excess(weight, data.mask)
    found = negative_log_evidence(weight, data) - negative_log_evidence(truth, data)
    assert abs(found.mean() - likelihood) < 4 * found.std() / math.sqrt(len(found))
    precision = posterior_precision(weight, data.mask)
    torch.testing.assert_close(price, diagonal_price(precision).mean())
    assert expected_excess(truth, data.mask)[0] == 0


def test_without_missing_samples_a_dense_decoder_pays_nothing():
    assert decoder_price("dense", 0.0, "principal axes")["total"] < 1e-6
    fixed, taps = decoder_price("fixed", 0.0), decoder_price("convolution", 0.0)
    assert fixed["total"] == fixed["held"] and taps["total"] < fixed["total"]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_run_trains_and_reports_finite_numbers(decoder, family):
    result = train(decoder, 0.4, family, seed=0, steps=10, batch=4)
    assert all(math.isfinite(v) for v in result.values() if isinstance(v, float))
    assert result["negative_elbo"] > result["nll"] and len(result["curve"]) == 5
    assert ("taps" in result) == (decoder == "convolution")
    if decoder == "fixed":
        assert result["nll"] == pytest.approx(result["true_nll"], rel=1e-6)


def test_a_run_repeats_to_the_last_bit():
    one, other = (train("dense", 0.4, "full", seed=1, steps=10, batch=4) for _ in range(2))
    assert one == other


def test_the_encoder_sees_values_mask_and_ends():
    encoder = Encoder()
    values, mask = torch.ones(1, LENGTH), torch.ones(1, LENGTH)
    base = encoder(Measurements(values, mask)).unflatten(-1, (LENGTH, -1))
    assert not torch.allclose(base[0, 0], base[0, 16])  # an end
    torch.testing.assert_close(base[0, 15], base[0, 16])  # the middle
    for changed in (mask, values):
        changed[0, 16] = 0
        moved = encoder(Measurements(values, mask)).unflatten(-1, (LENGTH, -1)) != base
        assert moved[0].any(-1).nonzero().squeeze(-1).tolist() == list(range(10, 23))
        changed[0, 16] = 1


def test_decoders_and_families_have_names():
    with pytest.raises(ValueError, match="Unknown decoder 'wide'"):
        Decoder("wide")
    with pytest.raises(ValueError, match="Unknown start 'elsewhere'"):
        decoder_price("dense", 0.0, "elsewhere")
    assert set(FAMILIES) <= set(POSTERIORS)


def test_the_committed_prices_are_complete_and_of_this_code():
    path = DATA_FOLDER / "results" / "time" / "deconvolution_prices.jsonl"
    found = {tuple(run["settings"].values()): run["result"] for run in read_lines(path)}
    assert set(found) == {tuple(settings.values()) for settings in runner.PRICES}
    for decoder in ("fixed", "convolution"):
        again = decoder_price(decoder, 0.4)
        assert again["total"] == pytest.approx(found[decoder, 0.4, "truth"]["total"], rel=1e-3)


def test_the_committed_runs_are_those_of_the_plan_and_judged_on_the_same_measurements():
    runs = read_lines(DATA_FOLDER / "results" / "time" / "deconvolution.jsonl")
    settings = [run["settings"] for run in runs]
    assert all(s in runner.runs() for s in settings)
    assert len({tuple(s.values()) for s in settings}) == len(settings)
    assert all(s in settings for s in runner.runs([0]))
    for missing in {s["missing"] for s in settings}:
        same = [r["result"]["true_nll"] for r in runs if r["settings"]["missing"] == missing]
        assert max(same) - min(same) < 1e-4
    assert not [r for r in runs if (r["environment"]["commit"] or "+").endswith("+")]
