"""Posterior heads: what each family is, and which contains which."""

import pytest
import torch
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal, kl_divergence

from rhovae import POSTERIORS, AR1Normal
from rhovae.objectives import standard_normal_like


def test_parameters_of_the_heads():
    features, latent = 400, 5
    numbers = {"isotropic": 6, "diagonal": 10, "ar1": 7, "ar1-scaled": 11, "ar1-stepped": 14,
               "low-rank": 20, "full": 20}  # fmt: skip
    assert set(numbers) == set(POSTERIORS)
    for name, expected in numbers.items():
        head = POSTERIORS[name](features, latent)
        assert head.numbers_per_image == expected
        parameters = sum(p.numel() for p in head.parameters())
        assert parameters == (features + 1) * expected


def test_the_ar1_head_is_an_ar1_normal():
    head = POSTERIORS["ar1"](4, 6)
    features = torch.randn(2, 4)
    q = head(features)
    assert type(q) is AR1Normal
    torch.testing.assert_close(q.rho, torch.tanh(head.fisher_z(features)))
    torch.testing.assert_close(q.scale**2, torch.exp(head.log_variance(features)))


def same_normal(one, other):
    for property in ("mean", "variance", "stddev"):
        torch.testing.assert_close(getattr(one, property), getattr(other, property))
    z = torch.randn(5, *one.mean.shape)
    torch.testing.assert_close(one.log_prob(z), other.log_prob(z))
    torch.testing.assert_close(one.entropy(), other.entropy())
    prior = standard_normal_like(one.mean)
    torch.testing.assert_close(kl_divergence(one, prior), kl_divergence(other, prior))


def take(head, other, *layers):
    """Give a head some of another's layers; one output stands for all where the sizes differ."""
    for layer in layers:
        for one, source in zip(
            getattr(head, layer).parameters(), getattr(other, layer).parameters(), strict=True
        ):
            one.data = source.data.expand_as(one).clone()


@pytest.mark.parametrize("name", ["ar1-scaled", "ar1-stepped"])
def test_the_chains_contain_the_diagonal_and_the_ar1_posterior(name):
    features, h = 4, torch.randn(3, 4)
    diagonal, ar1 = POSTERIORS["diagonal"](features, 6), POSTERIORS["ar1"](features, 6)
    chain = POSTERIORS[name](features, 6)
    take(chain, diagonal, "loc", "log_variance")
    for parameter in chain.fisher_z.parameters():
        parameter.data.zero_()
    same_normal(chain(h), diagonal(h))
    torch.manual_seed(0)
    drawn = chain(h).rsample()
    torch.manual_seed(0)
    assert torch.equal(drawn, diagonal(h).rsample()), "exactly, draws as well"
    take(chain, ar1, "loc", "log_variance", "fisher_z")
    same_normal(chain(h), ar1(h))
    torch.manual_seed(0)
    drawn = chain(h).rsample()
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, ar1(h).rsample())


def test_the_other_containments():
    """Isotropic in AR(1), AR(1)-scaled in stepped, diagonal in low-rank and in full."""
    features, h = 4, torch.randn(3, 4)
    heads = {name: head(features, 6) for name, head in POSTERIORS.items()}
    for larger, smaller, layers, silent in (
        ("ar1", "isotropic", ("loc", "log_variance"), "fisher_z"),
        ("ar1-stepped", "ar1-scaled", ("loc", "log_variance", "fisher_z"), None),
        ("low-rank", "diagonal", ("loc", "log_variance"), "factor"),
        ("full", "diagonal", ("loc", "log_variance"), "below"),
    ):
        take(heads[larger], heads[smaller], *layers)
        for parameter in getattr(heads[larger], silent).parameters() if silent else ():
            parameter.data.zero_()
        same_normal(heads[larger](h), heads[smaller](h))


def test_every_tridiagonal_precision_is_a_stepped_chain():
    below = torch.randn(7)
    precision = torch.diag(below, -1) + torch.diag(below, 1)
    precision += torch.diag(precision.abs().sum(-1) + torch.rand(8))
    covariance = torch.linalg.inv(precision)
    scale = covariance.diagonal().sqrt()
    rho = covariance.diagonal(1) / scale[1:] / scale[:-1]
    q = AR1Normal(torch.zeros(8), scale, rho=rho)
    torch.testing.assert_close(q.covariance_matrix, covariance)
    torch.testing.assert_close(q.precision_matrix, precision)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_family_is_the_dense_normal_of_its_moments(name):
    """Density, entropy and KL to the prior by dense algebra; mean and covariance by its draws."""
    q = POSTERIORS[name](4, 5)(2 * torch.randn(3, 4))
    n = 200_000
    draws = q.sample((n,))
    centred = draws - q.mean
    covariance = torch.einsum("nbi,nbj->bij", centred, centred) / n
    exact = covariance_of(q)
    # 4.9 standard errors: 75 entries, a false alarm in some 10,000 seeds.
    variances = exact.diagonal(dim1=-2, dim2=-1)
    error = ((exact.square() + variances.unsqueeze(-1) * variances.unsqueeze(-2)) / n).sqrt()
    assert ((covariance - exact).abs() < 4.9 * error).all()
    same_normal(q, MultivariateNormal(q.mean, exact))
    if name not in ("isotropic", "diagonal"):
        assert (exact - torch.diag_embed(variances)).abs().max() > 1e-3


def covariance_of(q):
    if isinstance(q, Independent):
        return torch.diag_embed(q.variance)
    return q.covariance_matrix


def test_the_kl_of_dense_normals_to_a_diagonal_one_is_torchs():
    loc, scale = torch.randn(5), torch.rand(5) + 0.5
    p = Independent(Normal(loc, scale), 1)
    dense = MultivariateNormal(loc, torch.diag(scale.square()))
    for name in ("low-rank", "full"):
        q = POSTERIORS[name](4, 5)(torch.randn(3, 4))
        torch.testing.assert_close(
            kl_divergence(q, p),
            kl_divergence(MultivariateNormal(q.mean, q.covariance_matrix), dense),
        )
    with pytest.raises(NotImplementedError):
        kl_divergence(q, Independent(Laplace(loc, scale), 1))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_head_needs_a_latent_variable(posterior):
    with pytest.raises(ValueError, match="latent is 0; a posterior needs at least 1"):
        POSTERIORS[posterior](4, 0)
