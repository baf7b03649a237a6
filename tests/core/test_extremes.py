"""AR1Normal at the ends of the number formats, against mpmath with 50 digits."""

import math
import os

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from rhovae import AR1Normal

EXAMPLES = int(os.environ.get("RHOVAE_EXAMPLES", "100"))  # make test-long sets more
# In units of the parts that are added up; the largest errors seen are 9e-16, 5e-7 and 9e-3.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.bfloat16: 5e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
LATENTS = st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 1023, 4095, 4096]))
BATCHES = st.sampled_from([(), (1,), (3,), (0,), (2, 0), (2, 1, 3)])


def chain(batch, latent, dtype, mean, log10_scale, fisher_z):
    parameters = (
        torch.full((*batch, latent), mean, dtype=dtype),
        torch.full((*batch, 1), 10.0**log10_scale, dtype=dtype),
        torch.full((1,), fisher_z, dtype=dtype),
    )
    loc, scale, a = (value.requires_grad_() for value in parameters)
    return AR1Normal(loc, scale, fisher_z=a), (loc, scale, a)


def first(tensor):
    return tensor.detach().double().flatten()[0].item()


def exact(parameters, latent):
    """Parts that add up to the entropy and to the KL to N(0, I), of the numbers as rounded."""
    mean, scale, a = (mpmath.mpf(first(p)) for p in parameters)
    log_sech = -mpmath.log(mpmath.cosh(a))
    half_log_det = [latent * mpmath.log(scale), (latent - 1) * log_sech]
    entropy = [latent * (1 + mpmath.log(2 * mpmath.pi)) / 2, *half_log_det]
    kl = [latent * mean**2 / 2, latent * scale**2 / 2, -mpmath.mpf(latent) / 2]
    return entropy, [*kl, *(-part for part in half_log_det)]


@given(BATCHES, LATENTS, DTYPES, st.floats(-1e4, 1e4), st.floats(-20, 20), st.floats(-40, 40))
@settings(deadline=None, max_examples=EXAMPLES)
def test_entropy_and_kl(batch, latent, dtype, mean, log10_scale, fisher_z):
    q, parameters = chain(batch, latent, dtype, mean, log10_scale, fisher_z)
    prior = Independent(Normal(torch.zeros(latent, dtype=dtype), torch.ones((), dtype=dtype)), 1)
    values = q.entropy(), kl_divergence(q, prior)
    if 0 in batch:
        assert all(value.shape == batch for value in values)
        return
    with mpmath.workdps(50):
        for value, parts in zip(values, exact(parameters, latent), strict=True):
            total, size = mpmath.fsum(parts), mpmath.fsum(map(abs, parts))
            assert value.shape == batch
            if size > torch.finfo(dtype).max / 4:
                continue  # no number of this format
            assert value.isfinite().all()
            error = abs(mpmath.mpf(first(value)) - total)
            assert error <= TOLERANCE[dtype] * size


@given(BATCHES, LATENTS, DTYPES, st.floats(-1e4, 1e4), st.floats(-18, 18), st.floats(-40, 40))
@settings(deadline=None, max_examples=EXAMPLES)
def test_draws_are_finite_and_so_are_their_gradients(
    batch, latent, dtype, mean, log10_scale, fisher_z
):
    q, parameters = chain(batch, latent, dtype, mean, log10_scale, fisher_z)
    z = q.rsample((2,))
    assert z.shape == (2, *batch, latent) and z.isfinite().all()
    for gradient in torch.autograd.grad(z.sum(), parameters):
        assert gradient.isfinite().all()


@given(BATCHES, LATENTS, DTYPES, st.floats(-1e4, 1e4), st.floats(-9, 9), st.floats(-40, 40))
@settings(deadline=None, max_examples=EXAMPLES)
def test_the_density_at_the_mode_and_the_gradient_of_the_kl(
    batch, latent, dtype, mean, log10_scale, fisher_z
):
    """log p = -1/2 log det 2 pi Cov at the mode; KL' = m, d (s - 1 / s), (d - 1) tanh(a)."""
    if 0 in batch:
        return
    q, parameters = chain(batch, latent, dtype, mean, log10_scale, fisher_z)
    (_, *half_log_det), _ = exact(parameters, latent)
    with mpmath.workdps(50):
        parts = [-latent * mpmath.log(2 * mpmath.pi) / 2, *(-part for part in half_log_det)]
        error = abs(mpmath.mpf(first(q.log_prob(q.loc))) - mpmath.fsum(parts))
        assert error <= TOLERANCE[dtype] * mpmath.fsum(map(abs, parts))

    prior = Independent(Normal(torch.zeros(latent, dtype=dtype), torch.ones((), dtype=dtype)), 1)
    total = kl_divergence(q, prior).sum()
    found = torch.autograd.grad(total, parameters)
    m, s, a = map(first, parameters)
    images = math.prod(batch)
    expected = (m, latent * (s - 1 / s), images * (latent - 1) * math.tanh(a))
    parts = (abs(m), latent * (s + 1 / s), images * latent)
    for gradient, value, size in zip(found, expected, parts, strict=True):
        assert abs(first(gradient) - value) <= 4 * TOLERANCE[dtype] * size


@pytest.mark.parametrize("latent", (2, 20, 4096))
@pytest.mark.parametrize("sign", (-1, 1))
def test_kl_in_float32_where_rho_is_one_but_for_a_millionth_of_a_millionth(latent, sign):
    """|rho| = 1 - 1e-12 is 1 in float32; as Fisher's z its KL has an error below 1e-5."""
    with mpmath.workdps(50):
        a = sign * float(mpmath.atanh(1 - mpmath.mpf("1e-12")))
        q, parameters = chain((), latent, torch.float32, 0.3, -0.2, a)
        assert q.rho.abs() == 1
        prior = Independent(Normal(torch.zeros(latent, dtype=torch.float32), 1.0), 1)
        true = mpmath.fsum(exact(parameters, latent)[1])
        assert abs(kl_divergence(q, prior).item() / true - 1) < 1e-5
