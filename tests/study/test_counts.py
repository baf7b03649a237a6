"""Counts driven by a latent AR(1): bounds and families against dense algebra and Monte Carlo."""

import math

import pytest
import torch
from scipy.optimize import minimize
from torch.distributions import MultivariateNormal, Normal, Poisson, kl_divergence

from rhovae.study import coal
from rhovae.study import counts as study
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import read_lines

every_family = pytest.mark.parametrize("family", study.FAMILIES)


def number(x):
    return torch.tensor(float(x))


def some_belief(family, series=3, steps=8):
    """A family somewhere away from the prior, and that prior."""
    prior = study.ar1_prior(number(1.5), number(0.3), steps)
    first = study.start(family, prior, series)
    free = {name: value + 0.3 * torch.randn_like(value) for name, value in first.items()}
    return free, study.belief(family, free, prior), prior


def dense(q):
    return MultivariateNormal(q.mean, q.covariance())


@every_family
def test_a_belief_has_the_variances_and_the_kl_of_its_covariance(family):
    _, q, prior = some_belief(family)
    torch.testing.assert_close(q.variance, q.covariance().diagonal(dim1=-2, dim2=-1))
    p = MultivariateNormal(torch.zeros(8), prior.covariance_matrix[0])
    torch.testing.assert_close(q.kl, kl_divergence(dense(q), p))


@every_family
def test_the_bound_is_its_monte_carlo_mean(family, draws=50_000):
    _, q, prior = some_belief(family)
    counts, rate = Poisson(torch.full((3, 8), 1.5)).sample(), number(0.2)
    z = dense(q).sample((draws,))
    p = MultivariateNormal(torch.zeros(8), prior.covariance_matrix[0])
    fitted = Poisson((rate + z).exp()).log_prob(counts).sum(-1)
    terms = fitted + p.log_prob(z) - dense(q).log_prob(z)
    bound = study.expected_log_likelihood(counts, rate, q.mean, q.variance) - q.kl
    # exp(z) has long tails, so that the error is itself uncertain.
    assert ((terms.mean(0) - bound).abs() < 6 * terms.std(0) / draws**0.5).all()


def test_what_was_not_observed_does_not_count():
    counts, mean = torch.tensor([[2.0, math.nan, 1.0]]), torch.zeros(1, 3, requires_grad=True)
    found = study.expected_log_likelihood(counts, number(0.1), mean, torch.ones(1, 3))
    parts = study.expected_log_likelihood(
        counts[:, ::2], number(0.1), torch.zeros(1, 2), torch.ones(1, 2)
    )
    torch.testing.assert_close(found, parts)
    found.sum().backward()
    assert mean.grad[0, 1] == 0 and mean.grad.isfinite().all()


@every_family
def test_families_start_at_the_prior_or_beside_it(family):
    prior = study.ar1_prior(number(1.5), number(0.3), 8)
    q = study.belief(family, study.start(family, prior, 2), prior)
    if family in ("diagonal", "sites"):
        assert (0 < q.kl).all() and (family == "diagonal" or (q.kl < 1).all())
    else:
        assert q.kl.abs().max() < 1e-12
        torch.testing.assert_close(q.covariance()[0], prior.covariance_matrix[0])


def test_families_contain_one_another():
    free, q, prior = some_belief("diagonal")
    chain = free | {"fisher_z": torch.zeros(3, 7)}
    torch.testing.assert_close(study.belief("stepped", chain, prior).kl, q.kl)
    free, q, prior = some_belief("ar1")
    wide = {"mean": free["mean"], "log_scale": free["log_scale"].expand(3, 8),
            "fisher_z": free["fisher_z"].expand(3, 7)}  # fmt: skip
    torch.testing.assert_close(study.belief("stepped", wide, prior).kl, q.kl)
    for family in ("stepped", "sites"):
        _, q, prior = some_belief(family)
        factor = torch.linalg.cholesky(q.covariance())
        rows, columns = torch.tril_indices(8, 8, -1)
        any_normal = {"mean": q.mean, "below": factor[:, rows, columns],
                      "log_diagonal": factor.diagonal(dim1=-2, dim2=-1).log()}  # fmt: skip
        torch.testing.assert_close(study.belief("full", any_normal, prior).kl, q.kl)


@pytest.mark.parametrize("family", ["stepped", "sites"])
def test_the_best_gaussian_is_a_chain(family):
    """(10.1): found by ascent among all Gaussians, without help from the theorem."""
    counts, _ = study.simulate(8.0, 0.5, seed=3, series=2, steps=12)
    settings = dict(first=(8.0, 1.0, 0.5), learn=False, tolerance=1e-9)
    full, found = study.fit(counts, "full", **settings), study.fit(counts, family, **settings)
    assert abs(full.bound - found.bound) < 1e-12
    precision = torch.linalg.inv(full.belief.covariance())
    expected_rate = torch.exp(0.5 + full.belief.mean + full.belief.variance / 2)
    expected = full.prior.precision_matrix + expected_rate.diag_embed()
    torch.testing.assert_close(precision, expected, rtol=1e-5, atol=1e-5)


def test_learning_reaches_the_full_gaussian_s_bound():
    counts, _ = study.simulate(5.0, 1.0, seed=0, series=4, steps=30)
    found = {family: study.fit(counts, family, tolerance=1e-5) for family in study.FAMILIES}
    best = found["full"].bound
    for family in ("stepped", "sites"):
        assert abs(found[family].bound - best) < 1e-6
        assert math.isclose(found[family].time_constant, found["full"].time_constant, rel_tol=1e-3)
    assert all(fit.bound <= best + 1e-6 for fit in found.values())
    assert found["ar1"].bound < best - 1e-3 and found["diagonal"].bound < best - 1e-2


def test_counts_are_what_they_are_said_to_be():
    counts, log_rate = study.simulate(9.5, -1.0, seed=1, series=2000, steps=100)
    again, _ = study.simulate(9.5, -1.0, seed=1, series=2000, steps=100)
    assert (counts == again).all()
    z = log_rate + 1
    assert abs(z.var() - 1) < 0.05
    assert abs((z[:, 1:] * z[:, :-1]).mean() / z.square().mean() - math.exp(-1 / 9.5)) < 0.005
    assert abs(counts.mean() / log_rate.exp().mean() - 1) < 0.01


def test_the_filter_is_an_integral_over_all_steps_at_once():
    """Evidence and draws of three steps against the trapezoidal rule in three dimensions."""
    counts = torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    theta = torch.tensor([math.log(2.0), math.log(0.8), 0.4])
    axis = torch.linspace(-5.6, 5.6, 81)
    z = torch.cartesian_prod(axis, axis, axis)
    prior = MultivariateNormal(torch.zeros(3), study.ar1_prior(*theta[:2], 3).covariance_matrix[0])
    fitted = Poisson((theta[2] + z).exp()).log_prob(counts.unsqueeze(1)).sum(-1)
    joint = (fitted + prior.log_prob(z)).exp() * (axis[1] - axis[0]) ** 3
    found = study.forward_filter(counts, *theta)
    torch.testing.assert_close(found.evidence, joint.sum(-1).log(), rtol=0, atol=1e-9)

    drawn, weight = study.paths(found, 20_000, seed=0), joint / joint.sum(-1, keepdim=True)
    for values, exact in (
        (drawn, weight @ z),
        (drawn[..., :-1] * drawn[..., 1:], weight @ (z[:, :-1] * z[:, 1:])),
    ):
        assert ((values.mean(0) - exact).abs() < 5 * values.std(0) / len(values) ** 0.5).all()


@pytest.mark.parametrize("time_constant", [0.01, 9.5, 49.5, 150.0])
def test_a_finer_grid_changes_nothing(time_constant):
    counts, _ = study.simulate(time_constant, 1.0, seed=0, series=4, steps=100)
    theta = torch.tensor([math.log(time_constant), 0.0, 1.0])
    coarse, fine = (study.forward_filter(counts, *theta, points=n).evidence for n in (181, 401))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-8 * 100)


def test_maximum_likelihood_ends_where_another_optimiser_does():
    counts, log_rate = study.simulate(9.5, 1.0, seed=0, series=8, steps=100)
    found = study.maximum_likelihood(counts, log_rate, draws=20)

    def loss(theta):
        return -study.forward_filter(counts, *torch.tensor(theta)).evidence.sum().item()

    best = minimize(loss, [2.0, 0.1, 0.8], method="Nelder-Mead", options={"xatol": 1e-5}).x
    expected = math.exp(best[0]), math.exp(best[1]), best[2]
    for name, value in zip(("time_constant", "scale", "rate"), expected, strict=True):
        assert math.isclose(found[name], value, rel_tol=1e-3), name


def test_coverage_of_the_right_posterior_is_ninety_per_cent():
    """Intervals of the prior, for what was drawn from it."""
    _, log_rate = study.simulate(9.5, 0.5, seed=2, series=2000, steps=100)
    prior = study.ar1_prior(number(math.log(9.5)), number(0.0), 100)
    q = study.Belief(torch.zeros(2000, 100), None, None, lambda: prior.covariance_matrix)
    share, width = study.coverage(q, 0.5, log_rate)
    assert abs(share - 0.9) < 5 * math.sqrt(0.09 / 4000)
    average = torch.ones(50) / 50
    sd = (average @ prior.covariance_matrix[0, :50, :50] @ average).sqrt()
    assert math.isclose(width, 2 * 1.6448536 * sd, rel_tol=1e-6)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="There is no family 'banded'; choose from diagonal, whit"):
        study.fit(torch.ones(2, 10), "banded")


def test_the_committed_runs_are_those_of_the_study():
    runs = read_lines(DATA_FOLDER / "results" / "time" / "counts.jsonl")
    planned = study.settings()
    found = [run["settings"] for run in runs]
    assert len(found) == len(planned) and all(chosen in found for chosen in planned)


@pytest.mark.parametrize("family", coal.FAMILIES)
def test_the_fixed_point_is_where_ascent_ends(family):
    counts = coal.load_disasters()[2]
    theta = (30.0, 0.8, 0.3)
    # Not the sites: for the years without a count their best precision is 0, infinitely far away.
    name = {"chain": "stepped"}.get(family, family)
    expected = study.fit(counts.unsqueeze(0), name, theta, learn=False, tolerance=1e-8)
    bound, mean, variance, change = coal.best_posteriors(
        counts, family, number(math.log(30)), number(math.log(0.8)).reshape(1, 1),
        number(0.3).reshape(1, 1),
    )  # fmt: skip
    assert abs(bound.item() - expected.bound * 112) < 1e-8 and change.item() < 1e-10
    torch.testing.assert_close(mean, 0.3 + expected.belief.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(variance, expected.belief.variance, rtol=1e-5, atol=0)


def test_the_sampler_has_the_density_of_the_model():
    counts = torch.tensor([2.0, math.nan, 0.0, 1.0, 3.0])
    sampler, seen = coal.Sampler(counts), ~counts.isnan()
    differences = []
    for _ in range(5):
        theta, u = torch.tensor([2.5, -0.2, 0.3]) + 0.3 * torch.randn(3), torch.randn(5)
        value, log_rate = sampler.log_joint(theta, u)
        prior = study.ar1_prior(theta[0], theta[1], 5)
        jacobian = torch.autograd.functional.jacobian(
            lambda at, theta=theta: sampler.log_joint(theta, at)[1], u
        )
        expected = prior.log_prob(log_rate - theta[2]).squeeze() + jacobian.det().abs().log()
        expected = expected + Poisson(log_rate[seen].exp()).log_prob(counts[seen]).sum()
        expected = expected + sum(
            Normal(*p).log_prob(x) for p, x in zip(coal.PRIORS.values(), theta, strict=True)
        )
        differences.append(value - expected)
    torch.testing.assert_close(torch.stack(differences), differences[0].expand(5))


def test_the_disasters_are_jarrett_s():
    year, counts, seen = coal.load_disasters()
    assert year.tolist() == list(range(1851, 1963)) and counts.sum() == 191
    assert year[seen.isnan()].tolist() == [1890, 1934]
    assert (counts[~seen.isnan()] == seen[~seen.isnan()]).all()
