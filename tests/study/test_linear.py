"""The price of a family in a linear VAE: closed form against direct minimisation."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae import ar1
from rhovae.study import load_images
from rhovae.study.families import lowest
from rhovae.study.linear import (
    ar1_shape,
    best_rho,
    data_spectrum,
    posterior_variances,
    spectral_gap,
    trained_gap,
)


def rotation(skew):
    return torch.matrix_exp(skew - skew.T)


def rotated_kl(shape, variances, log_scale, skew):
    """KL(N(0, s Q C Q^T) || N(0, diag(v))) by torch's dense algebra."""
    q = rotation(skew)
    covariance = log_scale.exp() * q @ shape @ q.T
    p = MultivariateNormal(torch.zeros_like(variances), torch.diag(variances))
    return kl_divergence(MultivariateNormal(torch.zeros_like(variances), covariance), p)


@pytest.mark.parametrize("latent", [2, 3, 5])
def test_the_gap_is_the_minimum_over_rotation_scale_and_rho(latent):
    """Starts from several rotations: all other stationary points are worse orders."""
    variances = torch.rand(latent) + 0.05
    found = []
    for _ in range(8):
        skew = torch.randn(latent, latent).requires_grad_()
        log_scale = torch.zeros(()).requires_grad_()
        fisher_z = torch.tensor([0.5]).requires_grad_()

        def loss(skew=skew, log_scale=log_scale, fisher_z=fisher_z):
            shape = ar1.correlation(fisher_z.tanh(), latent)
            return rotated_kl(shape, variances, log_scale, skew)

        found.append((lowest(loss, [skew, log_scale, fisher_z]), fisher_z.tanh().abs().item()))
    value, rho = min(found)
    expected_rho, expected = best_rho(variances)
    assert abs(value - expected) < 1e-6 and abs(rho - expected_rho) < 1e-3
    assert all(value > expected - 1e-9 for value, _ in found), "nothing lies below the formula"


def test_a_random_rotation_is_never_better_than_sorting():
    variances = torch.rand(6) + 0.05
    shape = torch.diag(torch.rand(6) + 0.05)
    bound = spectral_gap(shape.diagonal(), variances)
    for _ in range(200):
        skew = torch.randn(6, 6)
        q = rotation(skew)
        # The best scale for this rotation makes the trace term d.
        scale = 6 / ((q @ shape @ q.T).diagonal() / variances).sum()
        assert rotated_kl(shape, variances, scale.log(), skew) > bound - 1e-12


def test_properties_of_the_gap():
    variances = torch.rand(7) + 0.05
    assert abs(spectral_gap(3 * variances.flip(0), variances)) < 1e-12
    torch.testing.assert_close(spectral_gap(variances, torch.ones(7)), spectral_gap(
        variances[torch.randperm(7)], torch.full((7,), 5.0)))  # fmt: skip
    rhos = torch.linspace(-0.9, 0.9, 7)
    torch.testing.assert_close(ar1_shape(rhos, 7), ar1_shape(-rhos, 7))
    torch.testing.assert_close(ar1_shape(torch.zeros(2), 7), torch.ones(2, 7))
    ratio = torch.ones(7) / variances
    arithmetic, geometric = ratio.mean(), ratio.log().mean().exp()
    isotropic = spectral_gap(torch.ones(7), variances)
    torch.testing.assert_close(isotropic, 3.5 * (arithmetic / geometric).log())
    for shape in (torch.ones(7), *ar1_shape(rhos, 7)):
        assert 0 <= trained_gap(shape, variances) <= spectral_gap(shape, variances)
    nearly = variances.mean() * (1 + 1e-3 * torch.randn(7))
    half = trained_gap(torch.ones(7), nearly) / spectral_gap(torch.ones(7), nearly)
    torch.testing.assert_close(half, torch.tensor(0.5), rtol=1e-2, atol=0)


def linear_vae_loss(spectrum, w, v, log_noise, covariance):
    """-ELBO of a linear VAE on data of diagonal covariance, all expectations in closed form."""
    noise, pixels, latent = log_noise.exp(), len(spectrum), len(covariance)
    left = torch.eye(pixels) - w @ v
    squares = (left.square() * spectrum).sum() + (w @ covariance @ w.T).trace()
    kl = (v.square() * spectrum).sum() + covariance.trace() - latent - covariance.logdet()
    return (pixels * torch.log(2 * math.pi * noise) + squares / noise + kl) / 2


def test_the_loss_of_the_linear_vae_is_its_monte_carlo_mean():
    spectrum, n = torch.tensor([3.0, 1.0, 0.5, 0.2]), 400_000
    w, v = torch.randn(4, 2), 0.3 * torch.randn(2, 4)
    factor = torch.tensor([[0.5, 0.0], [0.2, 0.4]])
    x = spectrum.sqrt() * torch.randn(n, 4)
    q = MultivariateNormal(x @ v.T, scale_tril=factor)
    z = q.sample()
    log_noise = torch.tensor(-0.5)
    pixel = torch.distributions.Normal(z @ w.T, (log_noise / 2).exp())
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    losses = q.log_prob(z) - prior.log_prob(z) - pixel.log_prob(x).sum(-1)
    exact = linear_vae_loss(spectrum, w, v, log_noise, factor @ factor.T)
    assert abs(losses.mean() - exact) < 5 * losses.std() / n**0.5


@pytest.mark.parametrize("family", ["diagonal", "isotropic", "ar1"])
def test_the_trained_gap_is_that_of_a_linear_vae_trained_by_gradients(family):
    spectrum = torch.tensor([5.0, 2.5, 1.2, 0.7, 0.3, 0.2, 0.1, 0.06])
    latent, noise = 3, spectrum[3:].mean()
    evidence = 0.5 * (8 * math.log(2 * math.pi) + spectrum[:3].log().sum() + 5 * noise.log() + 8)
    variances = posterior_variances(spectrum, latent)
    rho, expected = {
        "diagonal": lambda: (None, 0.0),
        "isotropic": lambda: (None, trained_gap(torch.ones(3), variances).item()),
        "ar1": lambda: best_rho(variances, trained_gap),
    }[family]()
    found = []
    for _ in range(4):
        w, v = torch.randn(8, latent).requires_grad_(), torch.randn(latent, 8).requires_grad_()
        log_noise, fisher_z = torch.zeros(()).requires_grad_(), torch.ones(1).requires_grad_()
        log_variance = torch.zeros(latent if family == "diagonal" else 1).requires_grad_()

        def loss(w=w, v=v, log_noise=log_noise, fisher_z=fisher_z, log_variance=log_variance):
            correlation = ar1.correlation(fisher_z.tanh() if family == "ar1" else 0 * fisher_z, 3)
            covariance = correlation * log_variance.exp().expand(latent).diag().sum(-1)
            return linear_vae_loss(spectrum, w, v, log_noise, covariance)

        value = lowest(loss, [w, v, log_noise, fisher_z, log_variance])
        found.append((value - evidence.item(), fisher_z.tanh().abs().item()))
    value, found_rho = min(found)
    assert abs(value - expected) < 1e-6
    assert rho is None or abs(found_rho - rho) < 1e-3


def test_best_rho_finds_the_rho_that_made_a_spectrum():
    variances = 0.3 * torch.linalg.eigvalsh(ar1.correlation(torch.tensor([0.62]), 9))
    rho, gap = best_rho(variances)
    assert math.isclose(rho, 0.62, abs_tol=1e-4) and abs(gap) < 1e-9
    assert best_rho(torch.ones(4))[0] < 1e-4


def test_the_posterior_variances_are_those_of_probabilistic_pca():
    """W = U (L - s2)^(1/2); the posterior covariance is s2 (W^T W + s2 I)^-1."""
    images = load_images("mnist", "test")[:400]
    x = images.flatten(1).double() / 255
    covariance = x.T.cov(correction=0)
    values, axes = torch.linalg.eigh(covariance)
    torch.testing.assert_close(data_spectrum(images), values.flip(0), atol=1e-10, rtol=1e-8)
    noise = values[:-6].mean()
    w = axes[:, -6:] * (values[-6:] - noise).sqrt()
    posterior = noise * torch.linalg.inv(w.T @ w + noise * torch.eye(6))
    expected = torch.linalg.eigvalsh(posterior)
    found = posterior_variances(data_spectrum(images), 6)
    torch.testing.assert_close(found.sort().values, expected)
    with pytest.raises(ValueError, match=r"latent is 784; .* between 1 and 783"):
        posterior_variances(data_spectrum(images), 784)
