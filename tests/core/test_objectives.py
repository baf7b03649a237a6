"""The objectives of a VAE, its importance-weighted bound, and the MMD."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

from rhovae import POSTERIORS, VAE
from rhovae.objectives import (
    KERNELS,
    _bernoulli_nll_of_many,
    bernoulli_nll,
    beta_elbo,
    importance_weighted_nll,
    info_vae,
    negative_elbo,
    squared_mmd,
    standard_normal_like,
)

SHAPE = (1, 6, 5)


def small_vae(posterior="ar1", latent=3):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.ReLU())
    decoder = (nn.Linear(latent, 8), nn.ReLU(), nn.Linear(8, 30), nn.Unflatten(-1, SHAPE))
    return VAE(encoder, POSTERIORS[posterior](8, latent), nn.Sequential(*decoder))


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_the_objective_does_not_change_when_the_batch_is_split(posterior):
    vae = small_vae(posterior)
    x = torch.rand(12, *SHAPE)
    q, z, logits = vae(x)
    whole = negative_elbo(q, z, logits, x)
    parts = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
        q_part = vae.encode(x[rows])
        parts.append(negative_elbo(q_part, z[rows], vae.decoder(z[rows]), x[rows]))
    for together, split in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(split), together, rtol=1e-12, atol=1e-12)
    kl = kl_divergence(q, standard_normal_like(q.mean))
    torch.testing.assert_close(whole.kl, kl)
    torch.testing.assert_close(whole.loss, whole.reconstruction + kl)


def test_bernoulli_nll_is_the_binary_likelihood():
    x, logits = torch.randint(0, 2, (3, *SHAPE)).double(), torch.randn(3, *SHAPE)
    expected = -torch.distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(logits, x), expected)
    torch.testing.assert_close(bernoulli_nll(logits.expand(4, *logits.shape), x)[2], expected)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", [0.0, 1e-3, 4.0, 200.0])
def test_bernoulli_nll_of_many_draws_is_that_of_each(size, dtype, rtol):
    """Against the cross-entropy in float64, with gradients, also where the logits are zero."""
    x = torch.cat((torch.rand(3, 1, 28, 28), torch.randint(0, 2, (2, 1, 28, 28)).double()))
    logits = (size * torch.randn(7, *x.shape)).to(dtype).double().requires_grad_()
    x = x.to(dtype).double()
    exact = bernoulli_nll(logits, x)
    weights = torch.rand_like(exact)
    (exact_gradient,) = torch.autograd.grad(exact, logits, weights)
    given = logits.detach().to(dtype).requires_grad_()
    found = _bernoulli_nll_of_many(given, x.to(dtype))
    (gradient,) = torch.autograd.grad(found, given, weights.to(dtype))
    # Relative to what is added up: terms of |logits| cancel where an image is predicted well.
    scale = (logits.abs().flatten(2).sum(-1) + exact).detach()
    assert ((found - exact).abs() <= rtol * scale).all()
    torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=10 * rtol, atol=rtol)
    with torch.no_grad():
        assert torch.equal(_bernoulli_nll_of_many(given, x.to(dtype)), found)
        torch.testing.assert_close(given.double(), logits, rtol=0, atol=0)


def test_importance_weighted_nll_does_not_depend_on_the_chunks():
    vae, x = small_vae(), torch.rand(5, *SHAPE)
    estimates = []
    for pixels in (1, 400, 10**9):
        torch.manual_seed(7)
        estimates.append(importance_weighted_nll(vae, x, samples=4000, max_pixels=pixels))
    assert estimates[0].shape == (5,)
    # The chunks draw in another order only where a chunk holds several draws of several images.
    for estimate in estimates[1:]:
        torch.testing.assert_close(estimate, estimates[0], rtol=0, atol=0.05)


def test_importance_weighted_nll_is_the_evidence_of_a_model_we_can_integrate():
    vae = small_vae(latent=2)
    x = torch.rand(3, *SHAPE)
    axis = torch.linspace(-8, 8, 321)
    z = torch.cartesian_prod(axis, axis)
    log_joint = standard_normal_like(z).log_prob(z)[:, None] - torch.stack(
        [bernoulli_nll(vae.decoder(z), row.expand(len(z), *SHAPE)) for row in x], dim=1
    )
    exact = -(log_joint.logsumexp(0) + 2 * math.log(axis[1] - axis[0]))
    estimate = importance_weighted_nll(vae, x, samples=20_000)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)
    q, z, logits = vae(x.repeat(500, 1, 1, 1))
    assert (negative_elbo(q, z, logits, x.repeat(500, 1, 1, 1)).loss.mean() > exact.mean()).all()


def test_importance_weighted_nll_needs_a_sample():
    with pytest.raises(ValueError, match="samples is 0; the bound needs at least 1"):
        importance_weighted_nll(small_vae(), torch.rand(1, *SHAPE), samples=0)


def test_beta_weighs_the_kl_alone():
    vae, x = small_vae(), torch.rand(4, *SHAPE)
    drawn = vae(x)
    terms = negative_elbo(*drawn, x)
    torch.testing.assert_close(beta_elbo(*drawn, x, beta=1.0).loss, terms.loss)
    heavy = beta_elbo(*drawn, x, beta=4.0)
    torch.testing.assert_close(heavy.loss, terms.reconstruction + 4 * terms.kl)
    torch.testing.assert_close(heavy.kl, terms.kl)


@pytest.mark.parametrize("kernel", KERNELS)
def test_info_vae_contains_the_elbo_and_the_mmd_autoencoder(kernel):
    vae, x = small_vae(), torch.rand(6, *SHAPE)
    drawn = vae(x)
    terms = negative_elbo(*drawn, x)
    elbo = info_vae(*drawn, x, alpha=0.0, lambda_=1.0, kernel=kernel)
    torch.testing.assert_close(elbo.loss, terms.loss)
    torch.manual_seed(5)
    mmd = squared_mmd(drawn[1], torch.randn_like(drawn[1]), KERNELS[kernel])
    torch.manual_seed(5)
    autoencoder = info_vae(*drawn, x, alpha=1.0, lambda_=1.0, kernel=kernel)
    torch.testing.assert_close(autoencoder.loss, terms.reconstruction + mmd)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("latent", [2, 10])
def test_mmd_is_zero_in_the_mean_for_draws_of_the_prior_and_not_for_others(kernel, latent):
    def values(scale, repeats=400, n=64):
        pairs = ((scale * torch.randn(n, latent), torch.randn(n, latent)) for _ in range(repeats))
        return torch.stack([squared_mmd(x, y, KERNELS[kernel]) for x, y in pairs])

    same, other = values(1.0), values(0.5)
    assert same.mean().abs() < 4 * same.std() / len(same) ** 0.5
    assert (same < 0).any(), "an unbiased estimate of zero is negative at times"
    assert other.mean() > 10 * other.std() / len(other) ** 0.5


def test_mmd_is_its_definition():
    x, y = torch.randn(5, 3), torch.randn(4, 3)

    def k(a, b):
        return math.exp(-((a - b) ** 2).sum() / (2 * 3))

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(a, b) for a in x for b in y) / 20
    expected = torch.tensor(within_x + within_y - 2 * across)
    torch.testing.assert_close(squared_mmd(x, y, KERNELS["rbf"]), expected)
    with pytest.raises(ValueError, match="at least 2 draws on each side, but there are 1 and 4"):
        squared_mmd(x[:1], y, KERNELS["rbf"])
