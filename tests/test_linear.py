"""The price of a family in a linear VAE: closed form against direct minimisation."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae import ar1, load_images
from rhovae.linear import (
    ar1_gap,
    best_rho,
    data_spectrum,
    isotropic_gap,
    posterior_variances,
    spectral_gap,
)


def minimise(loss, parameters, steps=200):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


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

        found.append((minimise(loss, [skew, log_scale, fisher_z]), fisher_z.tanh().abs().item()))
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
    torch.testing.assert_close(ar1_gap(variances, torch.zeros(1)), isotropic_gap(variances)[None])
    rhos = torch.linspace(-0.9, 0.9, 7)
    torch.testing.assert_close(ar1_gap(variances, rhos), ar1_gap(variances, -rhos))
    ratio = torch.ones(7) / variances
    arithmetic, geometric = ratio.mean(), ratio.log().mean().exp()
    torch.testing.assert_close(isotropic_gap(variances), 3.5 * (arithmetic / geometric).log())


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
