"""The paper's released code: our reading of it against a literal transcription."""

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae.objectives import standard_normal_like
from rhovae.study.published import PublishedNormal, divided_loss, published_loss

VARIANTS = {"published-notebook": (False, 1e-7), "published-script": (True, 0.0)}


def make(variant, latent, batch=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(batch, latent, generator=generator)
    log_s = torch.randn(batch, 1, generator=generator)
    fisher_z = torch.randn(batch, 1, generator=generator)
    return PublishedNormal(loc, log_s, fisher_z, *VARIANTS[variant])


def published_map(q, noise, variant):
    """The recursion of the released code, written step by step."""
    r = 1.0 if variant == "published-script" else q.charged_rho
    root_s = q.log_s.exp().sqrt()
    columns = [noise[..., :1] * root_s]
    for j in range(1, noise.shape[-1]):
        columns.append(r * columns[-1] + noise[..., j : j + 1] * root_s)
    return torch.cat(columns, -1) + q.loc


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("latent", [1, 2, 5, 10])
def test_draws_what_the_code_draws(variant, latent):
    q = make(variant, latent)
    torch.manual_seed(1)
    noise = torch.randn(7, latent)
    torch.manual_seed(1)
    torch.testing.assert_close(q.rsample(), published_map(q, noise, variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("latent", [1, 2, 5, 10, 64])
def test_true_density_and_kl_agree_with_dense_algebra(variant, latent):
    q = make(variant, latent)
    # The dense oracle knows only the map from noise to sample.
    jacobian = published_map(q, torch.eye(latent).unsqueeze(1), variant) - q.loc
    covariance = torch.einsum("kbi,kbj->bij", jacobian, jacobian)
    dense = MultivariateNormal(q.loc, covariance)
    prior = MultivariateNormal(torch.zeros(latent), torch.eye(latent))
    z = torch.randn(5, 7, latent)
    exact = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(q.covariance_matrix, covariance, **exact)
    torch.testing.assert_close(q.log_prob(z), dense.log_prob(z), **exact)
    torch.testing.assert_close(q.entropy(), dense.entropy(), **exact)
    kl = kl_divergence(q, standard_normal_like(q.loc))
    torch.testing.assert_close(kl, kl_divergence(dense, prior), **exact)
    # (4.2): determinant s^d, trace s sum_j v_j
    log_det = latent * q.log_s.squeeze(-1)
    torch.testing.assert_close(2 * q._half_log_det, log_det, **exact)


@pytest.mark.parametrize("variant", VARIANTS)
def test_true_kl_agrees_with_monte_carlo(variant, draws=200_000):
    q = make(variant, 5, batch=3)
    prior = standard_normal_like(q.loc)
    torch.manual_seed(2)
    z = q.sample((draws,))
    log_ratio = q.log_prob(z) - prior.log_prob(z)
    standard_error = log_ratio.std(0) / draws**0.5
    difference = (log_ratio.mean(0) - kl_divergence(q, prior)).abs()
    assert (difference < 4 * standard_error).all(), (difference, standard_error)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 16, 128])
def test_charges_what_the_code_charges(variant, batch, latent=5):
    q = make(variant, latent, batch)
    epsilon = VARIANTS[variant][1]
    # README and utils.py: a sum over the batch inside, a mean over the batch outside.
    inside = (
        torch.sum(q.loc**2)
        - latent * q.log_s
        - (latent - 1) * torch.log(1 - q.charged_rho**2 + epsilon)
        + latent * (q.log_s.exp() - 1)
    )
    published_total = 0.5 * inside.mean()
    x, logits = torch.rand(batch, 1, 4, 4), torch.randn(batch, 1, 4, 4)
    terms = published_loss(q, q.sample(), logits, x)
    total = (terms.loss - terms.reconstruction).sum()
    torch.testing.assert_close(total, published_total, rtol=1e-12, atol=1e-12)


def test_the_divided_loss_is_the_published_one_where_sampler_and_kl_agree(latent=5, batch=16):
    # With rho = 0 the notebooks' sampler is the isotropic normal that its KL formula is about.
    loc, log_s = torch.randn(batch, latent), torch.randn(batch, 1)
    q = PublishedNormal(loc, log_s, torch.zeros(batch, 1), False, 0.0)
    x, logits = torch.rand(batch, 1, 4, 4), torch.randn(batch, 1, 4, 4)
    z = q.sample()
    divided, published = divided_loss(q, z, logits, x), published_loss(q, z, logits, x)
    torch.testing.assert_close(divided.loss, published.loss, rtol=1e-12, atol=0)
    full = divided.reconstruction + divided.kl
    assert (divided.loss < full).all() and torch.equal(divided.kl, published.kl)


def test_the_published_loss_depends_on_the_batch_size():
    q = make("published-notebook", 5, batch=8)
    assert not torch.allclose(q.charged_kl(8), q.charged_kl(4))
    torch.testing.assert_close(q.charged_kl(1), q.formula_kl, rtol=1e-12, atol=0)


def test_expands_to_the_same_law():
    q = make("published-notebook", 4, batch=3)
    wide, z = q.expand((2, 3)), torch.randn(2, 3, 4)
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))
