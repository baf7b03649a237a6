"""GP-VAE's posterior family as a chain, against the dense U U^T."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from rhovae import AR1Normal
from rhovae.study.gpvae import BandedHead, banded_normal

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import time_cost


def dense(loc, diagonal, above):
    """N(loc, (U U^T)^-1), from U as a matrix."""
    upper = diagonal.diag_embed() + above.diag_embed(1)
    return MultivariateNormal(loc, precision_matrix=upper @ upper.mT)


def parameters(*shape):
    loc, diagonal, above = torch.randn(3, *shape)
    return loc, 1 + diagonal.exp(), above[..., :-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 48])
def test_is_the_law_with_precision_u_u_transposed(steps):
    given = [value.requires_grad_() for value in parameters(4, 3, steps)]
    q, oracle = banded_normal(*given), dense(*given)
    assert q.batch_shape == (4, 3) and q.event_shape == (steps,)
    assert torch.allclose(q.covariance_matrix, oracle.covariance_matrix, rtol=1e-10, atol=1e-12)
    assert torch.allclose(q.precision_matrix, oracle.precision_matrix, rtol=1e-10, atol=1e-10)
    z = torch.randn(4, 3, steps)
    assert torch.allclose(q.log_prob(z), oracle.log_prob(z), rtol=1e-10)
    prior = AR1Normal(torch.zeros(steps), 1.3, rho=0.8)
    kl, expected = kl_divergence(q, prior), kl_divergence(oracle, prior)
    assert kl.shape == (4, 3) and torch.allclose(kl, expected, rtol=1e-10)
    gradients = (torch.autograd.grad(v.sum(), given, allow_unused=steps == 1)
                 for v in (kl, expected))  # fmt: skip
    for ours, theirs in zip(*gradients, strict=True):
        if ours is not None:
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_draw_whitens_to_standard_noise():
    loc, diagonal, above = parameters(5)
    z = banded_normal(loc, diagonal, above).sample((100_000,))
    upper = diagonal.diag_embed() + above.diag_embed(1)
    noise = (z - loc) @ upper  # U^T (z - loc), a row per draw
    errors = (noise.T @ noise / len(z) - torch.eye(5)).abs()
    # Second moments of standard noise: variance 2 on the diagonal, 1 beside it.
    assert (errors < 5 * (1 + torch.eye(5)).sqrt() / len(z) ** 0.5).all()


@pytest.mark.parametrize("link", [torch.nn.functional.softplus, torch.sigmoid])
def test_the_head_has_alternating_correlations_and_small_innovations(link):
    head = BandedHead(6, 3, link=link)
    for factor in (0.1, 1.0, 30.0):  # up to saturated outputs
        q = head(factor * torch.randn(20, 9, 6))
        assert q.batch_shape == (20, 3) and q.event_shape == (9,)
        assert (q.rho <= 0).all() and (q.scale[..., 0] <= 1).all()
        assert (q.scale[..., 1:] * q._innovation <= 1).all()
        signs = (-1.0) ** (torch.arange(9)[:, None] - torch.arange(9))
        assert (q.covariance_matrix * signs >= 0).all()


def test_the_head_is_the_dense_construction_on_its_own_outputs():
    head, features = BandedHead(6, 3), torch.randn(2, 9, 6)
    q = head(features)
    layers = (head.loc, head.diagonal, head.above)
    loc, diagonal, above = (layer(features).transpose(1, 2) for layer in layers)
    positive = torch.nn.functional.softplus
    oracle = dense(loc, 1 + positive(diagonal), positive(above[..., :-1]))
    assert torch.allclose(q.mean, loc)
    assert torch.allclose(q.covariance_matrix, oracle.covariance_matrix, rtol=1e-10, atol=1e-12)
    q.rsample().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_float32_loses_no_more_than_its_inputs_do(steps=1000):
    diagonal, above = torch.full((steps,), 1.01).float(), torch.full((steps - 1,), 1.0099).float()
    q = banded_normal(torch.zeros(steps).float(), diagonal, above)
    exact = banded_normal(torch.zeros(steps), diagonal.double(), above.double())
    assert exact.rho.min() < -0.999 and q.scale.dtype == torch.float32
    # One rounding of a coefficient near 1 comes back in each of the steps.
    tolerance = steps * torch.finfo(torch.float32).eps
    assert torch.allclose(q.scale.double(), exact.scale, rtol=tolerance)
    assert torch.allclose(q.fisher_z.double(), exact.fisher_z, rtol=tolerance)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one entry less"):
        banded_normal(torch.zeros(4), torch.ones(4), torch.ones(4))


def test_what_time_cost_compares_is_one_law():
    assert {"chain", "loop", "dense"} <= set(time_cost.candidates())
    assert time_cost.check_that_they_agree(steps=7) < 1e-10
