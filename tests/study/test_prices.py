"""What a family pays for a precision, against dense algebra and brute force."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae import POSTERIORS, ar1
from rhovae.study import prices as priced
from rhovae.study.linear import best_rho, spectral_gap


def precisions(count, latent):
    """Far from diagonal, and from one another."""
    factor = torch.randn(count, latent, latent + 2)
    return torch.eye(latent) + torch.rand(count, 1, 1) * 4 * factor @ factor.mT


def best_of_a_head(name, exact, starts=6):
    """min over a family of the dense KL, the family being what its head in POSTERIORS makes."""
    latent, found = len(exact), []
    target = MultivariateNormal(torch.zeros(latent), precision_matrix=exact)
    for _ in range(starts):
        head = POSTERIORS[name](1, latent)
        weights = [p for n, p in head.named_parameters() if "loc" not in n and "bias" in n]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
            for weight in weights:
                weight.normal_(0, 0.7)
        optimizer = torch.optim.LBFGS(
            weights, max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(head=head, weights=weights, optimizer=optimizer):
            optimizer.zero_grad()
            q = head(torch.zeros(1, 1))
            dense = MultivariateNormal(torch.zeros(latent), covariance(q)[0])
            loss = kl_divergence(dense, target)
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(closure().item())
    return min(found)


def covariance(q):
    matrix = getattr(q, "covariance_matrix", None)
    return q.variance.diag_embed() if matrix is None else matrix


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("latent", [2, 3, 5])
def test_the_price_of_each_family_is_the_least_dense_kl_of_its_head(name, latent):
    exact = precisions(3, latent)
    prices, _ = priced.family_prices(exact)
    assert list(prices) == list(POSTERIORS)
    for one, price in zip(exact, prices[name], strict=True):
        assert price.item() == pytest.approx(best_of_a_head(name, one), abs=2e-6)


def test_the_prices_respect_what_contains_what():
    exact = precisions(20, 7)
    prices, ends = priced.family_prices(exact)
    for name, member in priced.predicted_members(exact, ends).items():
        torch.testing.assert_close(priced.kl_to_precision(member, exact), prices[name])
    order = [("isotropic", "diagonal"), ("isotropic", "ar1"), ("diagonal", "ar1-scaled"),
             ("ar1", "ar1-scaled"), ("ar1-scaled", "ar1-stepped"), ("diagonal", "low-rank"),
             ("ar1-stepped", "full"), ("low-rank", "full")]  # fmt: skip
    for small, large in order:
        assert (prices[small] > prices[large] - 1e-9).all(), (small, large)


def test_from_the_ends_of_a_neighbour_the_search_ends_at_the_same_prices():
    exact = precisions(6, 5)
    _, ends = priced.family_prices(exact)
    near = exact * (1 + 0.01 * torch.rand(6, 1, 1))
    warm, _ = priced.family_prices(near, ends)
    cold, _ = priced.family_prices(near)
    for name in POSTERIORS:
        torch.testing.assert_close(warm[name], cold[name], rtol=1e-6, atol=1e-6)


def test_a_member_of_a_family_costs_it_nothing():
    latent, rho = 6, torch.tensor([0.7])
    scale = torch.rand(latent) + 0.5
    steps = torch.linspace(-0.9, 0.95, latent - 1)
    factor = torch.randn(latent, 2)
    members = {
        "isotropic": torch.eye(latent) * 0.3,
        "diagonal": torch.diag(scale),
        "ar1": 0.4 * ar1.correlation(rho, latent),
        "ar1-scaled": scale.outer(scale) * ar1.correlation(rho, latent),
        "ar1-stepped": scale.outer(scale) * ar1.correlation(steps, latent),
        "low-rank": torch.diag(scale) + factor @ factor.mT,
    }
    for name, member in members.items():
        exact = torch.cholesky_inverse(torch.linalg.cholesky(member)).unsqueeze(0)
        prices, _ = priced.family_prices(exact)
        assert abs(prices[name].item()) < 1e-9, name
        assert prices["diagonal"].item() > (0.05 if name not in ("isotropic", "diagonal") else -1)


def test_in_its_best_axes_a_linear_vae_costs_what_theorem_1_says():
    """A linear decoder with Gaussian noise: all images share one Lambda, 1 / v_i in its axes."""
    variances = torch.tensor([0.9, 0.4, 0.1])
    turn = priced.random_rotation(3, torch.Generator().manual_seed(1))
    exact = (turn @ torch.diag(1 / variances) @ turn.mT).unsqueeze(0)
    flat = spectral_gap(torch.ones(3), variances)
    assert priced.isotropic_price(exact).item() == pytest.approx(flat.item())
    _, price, _ = priced.best_rotation(exact)
    assert abs(price) < 1e-9, "diagonal: nothing"
    _, price, _ = priced.best_rotation(exact, priced.ar1_price, starts=6, rounds=2)
    rho, expected = best_rho(variances)
    assert rho > 0.3 and expected > 0.01
    assert price == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fisher_z", [-3.0, -0.4, 0.0, 0.9, 3.0])
def test_the_log_determinant_of_a_chain_is_that_of_its_matrix(fisher_z, latent=5):
    exact, scale = precisions(1, latent)[0], torch.rand(latent) + 0.5
    for count in (1, latent - 1):
        z = torch.full((count,), fisher_z)
        member = scale.outer(scale) * ar1.correlation(z.tanh(), latent)
        value = priced._chain(torch.cat([scale.log(), z]), exact)
        dense = 0.5 * ((exact * member).sum() - torch.logdet(member))
        torch.testing.assert_close(value, dense)
        full = priced.kl_to_precision(member, exact)
        torch.testing.assert_close(full, dense - 0.5 * (latent + torch.logdet(exact)))


def test_common_axes_are_found_and_cost_nothing():
    turn = priced.random_rotation(6, torch.Generator().manual_seed(3))
    exact = turn @ torch.diag_embed(torch.rand(40, 6) * 9 + 1) @ turn.mT
    rotation, price, _ = priced.best_rotation(exact)
    assert abs(price) < 1e-9 < priced.diagonal_price(exact).mean()
    overlap = (turn.mT @ rotation).abs()
    torch.testing.assert_close(overlap.sort(-1).values[:, -1], torch.ones(6), atol=1e-4, rtol=0)


def test_the_best_rotation_of_the_plane_is_that_of_a_fine_grid():
    exact = precisions(15, 2)
    angles = torch.linspace(0, math.pi / 2, 4001)
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1)
    prices = [
        priced.diagonal_price(priced.turned(exact, q)).mean().item()
        for q in turns.unflatten(-1, (2, 2))
    ]
    _, price, _ = priced.best_rotation(exact)
    assert price == pytest.approx(min(prices), abs=1e-6) and price < prices[0] - 1e-3


def test_at_the_best_rotation_flury_s_equations_hold_and_no_random_one_is_better():
    exact = precisions(30, 5)
    rotation, price, ends = priced.best_rotation(exact)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(5))
    assert priced.stationarity(exact, rotation).abs().max() < 1e-5
    assert priced.stationarity(exact, torch.eye(5)).abs().max() > 1e-2
    assert price == min(ends) and price < priced.diagonal_price(exact).mean()
    generator = torch.Generator().manual_seed(5)
    for _ in range(100):
        turned = priced.turned(exact, priced.random_rotation(5, generator))
        assert priced.diagonal_price(turned).mean() > price
        same = priced.isotropic_price(turned).mean()
        torch.testing.assert_close(same, priced.isotropic_price(exact).mean())


def test_the_search_for_a_chain_s_axes_keeps_their_signs():
    """A flipped axis changes the price of a chain: a search must not end above where it began."""
    exact = precisions(12, 4)
    (turn, price, ends) = priced.best_rotation(exact, priced.ar1_price, starts=2, rounds=1)
    assert ends[0] < priced.ar1_price(exact).mean() - 1e-3
    found = priced.ar1_price(priced.turned(exact, turn)).mean()
    assert found.item() == pytest.approx(price)
    near = torch.matrix_exp(0.001 * (turn - turn.T))
    again = priced._rotation_search(exact, priced.ar1_price, turn @ near)
    assert priced.ar1_price(priced.turned(exact, again)).mean() < price + 1e-6


def test_random_rotations_are_orthogonal_and_have_no_preferred_axis():
    generator = torch.Generator().manual_seed(0)
    many = torch.stack([priced.random_rotation(3, generator) for _ in range(4000)])
    torch.testing.assert_close(many @ many.mT, torch.eye(3).expand(4000, 3, 3))
    # An entry has mean 0 and mean square 1/3 with variance 4/45.
    assert (many.mean(0).abs() < 5 * math.sqrt(1 / 3 / 4000)).all()
    assert ((many.square().mean(0) - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / 4000)).all()


def test_the_gradient_of_the_ar1_price_is_that_of_its_minimum():
    def price(factor):
        return priced.ar1_price(torch.eye(4) + factor @ factor.mT)

    factor = torch.randn(3, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(price, (factor,), atol=1e-5)
