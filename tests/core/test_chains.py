"""Chains over time: what conditioning gives, against dense algebra in float64 and by identities."""

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from rhovae import AR1Normal, AR1Prior, Sites, ar1, smoothing

LATENTS = (1, 2, 3, 17, 64, 512)
EXACT = dict(rtol=1e-10, atol=1e-10)


def parameters(latent, batch=(3,), shared=False):
    """loc, scale and rho of a chain whose steps all differ, of both signs."""
    scale = 0.5 + 2 * torch.rand(*batch, 1 if shared else latent)
    rho = 1.98 * torch.rand(*batch, 1 if shared else latent - 1) - 0.99
    return torch.randn(*batch, latent), scale, rho


def observations(latent, batch=(3,), missing=0.3):
    """Values and precisions over four orders of magnitude; NaN and 0 where one is missing."""
    precision = 10 ** (4 * torch.rand(*batch, latent) - 2)
    gone = torch.rand(*batch, latent) < missing
    value = 3 * torch.randn(*batch, latent)
    return value.masked_fill(gone, math.nan), precision.masked_fill(gone, 0.0)


def inverse(matrix):
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def dense_covariance(scale, rho, latent):
    """From its definition: products of correlations, entry by entry."""
    steps, one = rho.expand(*rho.shape[:-1], latent - 1), torch.ones(*rho.shape[:-1], 1)
    rows = [one]
    for i in range(latent - 1):
        rows.append(torch.cat((rows[-1] * steps[..., i : i + 1], one), -1))
    below = torch.stack([pad(row, (0, latent - row.shape[-1])) for row in rows], -2)
    correlation = below + below.tril(-1).mT
    scale = scale.expand(*scale.shape[:-1], latent)
    return scale.unsqueeze(-1) * correlation * scale.unsqueeze(-2)


def dense_posterior(loc, scale, rho, value, precision):
    """Mean, covariance and log evidence, by the algebra of dense normals."""
    covariance = dense_covariance(scale, rho, loc.shape[-1])
    prior = inverse(covariance)
    seen = precision > 0
    value = torch.where(seen, value, 0.0)
    posterior = inverse(prior + torch.diag_embed(precision))
    pull = torch.einsum("...ij,...j->...i", prior, loc) + precision * value
    mean = torch.einsum("...ij,...j->...i", posterior, pull)
    evidence = []
    for row in range(len(loc)):
        index = seen[row].nonzero().squeeze(-1)
        noisy = covariance[row][index][:, index] + torch.diag(1 / precision[row][index])
        if len(index):
            normal = MultivariateNormal(loc[row][index], noisy)
            evidence.append(normal.log_prob(value[row][index]))
        else:
            evidence.append(loc.new_zeros(()))
    return mean, posterior, torch.stack(evidence)


def with_gradients(function, tensors, seed=0):
    """What it returns, and the derivatives of a random combination of it."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    total = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in outputs)
    return outputs, torch.autograd.grad(total, leaves, materialize_grads=True)


def relative_to_largest(found, expected, tolerance=1e-10):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        if theirs.numel():
            error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-300)
            assert error < tolerance, f"{error:.1e} of the largest entry"


@pytest.mark.parametrize("name", ["rho", "fisher_z"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
def test_condition_and_evidence_agree_with_dense_algebra(latent, shared, name):
    tensors = (*parameters(latent, shared=shared), *observations(latent))

    def ours(loc, scale, rho, value, precision):
        p = AR1Normal(loc, scale, **{name: rho if name == "rho" else rho.atanh()})
        q = p.condition(value, precision=precision)
        evidence = p.log_evidence(value, precision=precision, posterior=q)
        return q.mean, q.covariance_matrix, evidence

    # The gradient in what is missing: the precision has one there, and the value none.
    found, of_ours = with_gradients(ours, tensors)
    expected, of_dense = with_gradients(dense_posterior, tensors)
    relative_to_largest(found, expected)
    seen = tensors[-1] > 0
    relative_to_largest(of_ours[:4], of_dense[:4])
    relative_to_largest([of_ours[4] * seen], [of_dense[4] * seen])
    assert of_ours[4].isfinite().all()


@pytest.mark.parametrize("latent", LATENTS)
def test_from_precision_agrees_with_dense_algebra(latent):
    # Rows that are not diagonally dominant, too: their like come from large scales beside small.
    loc, scale, _ = parameters(latent)
    rho = 1.8 * torch.rand(3, latent - 1) - 0.9
    matrix = AR1Normal(loc, scale, rho=rho).precision_matrix
    tensors = (matrix.diagonal(0, -2, -1), matrix.diagonal(1, -2, -1))

    def ours(diagonal, beside):
        q = AR1Normal.from_precision(loc, diagonal, beside)
        return q.covariance_matrix, q.entropy()

    def theirs(diagonal, beside):
        precision = diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)
        normal = MultivariateNormal(loc, precision_matrix=precision)
        return inverse(precision), normal.entropy()

    found, of_ours = with_gradients(ours, tensors)
    expected, of_dense = with_gradients(theirs, tensors)
    relative_to_largest(found, expected)
    relative_to_largest(of_ours, of_dense)
    assert torch.equal(AR1Normal.from_precision(loc, *tensors).mean, loc)


@pytest.mark.parametrize("latent", LATENTS)
def test_from_transitions_is_the_chain_it_says(latent):
    loc, _, _ = parameters(latent)
    first = 0.5 + torch.rand(3, 1)
    coefficient = (2.2 * torch.rand(3, latent - 1) - 1.1).clamp(-1.05, 1.05)
    innovation = 0.5 + torch.rand(3, latent - 1)
    q = AR1Normal.from_transitions(loc, first, coefficient, innovation)
    # z - loc = (I - K)^-1 diag(scales) e
    below = torch.eye(latent) - torch.diag_embed(coefficient, -1)
    scales = torch.cat((first, innovation), -1).diag_embed()
    factor = torch.linalg.solve_triangular(below, scales, upper=False)
    relative_to_largest([q.covariance_matrix], [factor @ factor.mT])
    torch.testing.assert_close(q.coefficient, coefficient, **EXACT)
    torch.testing.assert_close(q.innovation_scale, innovation, **EXACT)
    assert latent < 17 or (coefficient.abs() > 1).any()
    shared = AR1Normal.from_transitions(loc, 2.0, 0.5, 0.1)
    torch.testing.assert_close(shared.coefficient, torch.full((3, latent - 1), 0.5), **EXACT)
    torch.testing.assert_close(shared.stddev[..., 0], torch.full((3,), 2.0), **EXACT)


@pytest.mark.parametrize("latent", LATENTS)
def test_time_reversed_it_is_the_reversed_posterior(latent):
    loc, scale, rho = parameters(latent)
    value, precision = observations(latent)
    p = AR1Normal(loc, scale, rho=rho)
    r = AR1Normal(loc.flip(-1), scale.flip(-1), rho=rho.flip(-1))
    q = p.condition(value, precision=precision)
    back = r.condition(value.flip(-1), precision=precision.flip(-1))
    torch.testing.assert_close(back.mean.flip(-1), q.mean, **EXACT)
    torch.testing.assert_close(back.stddev.flip(-1), q.stddev, **EXACT)
    torch.testing.assert_close(back.fisher_z.flip(-1), q.fisher_z, **EXACT)
    evidences = [
        p.log_evidence(value, precision=precision),
        r.log_evidence(value.flip(-1), precision=precision.flip(-1)),
    ]
    torch.testing.assert_close(*evidences, **EXACT)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
def test_without_observations_nothing_changes(latent, shared):
    loc, scale, rho = parameters(latent, shared=shared)
    p = AR1Normal(loc, scale, rho=rho)
    nothing = torch.full((latent,), math.nan)
    q = p.condition(nothing, precision=0.0)
    torch.testing.assert_close(q.mean, p.mean, rtol=0, atol=0)
    torch.testing.assert_close(q.stddev, p.stddev, rtol=1e-12, atol=0)
    steps = p.fisher_z.expand(3, latent - 1)
    torch.testing.assert_close(q.fisher_z, steps, rtol=1e-11, atol=1e-12)
    assert (p.log_evidence(nothing, precision=0.0).abs() < 1e-11).all()


@pytest.mark.parametrize("latent, site", [(1, 0), (2, 1), (5, 0), (5, 3)])
def test_one_observation_is_scalar_bayes(latent, site):
    loc, scale, rho = parameters(latent, ())
    p = AR1Normal(loc, scale, rho=rho)
    value, precision = torch.full((latent,), math.nan), torch.zeros(latent)
    value[site], precision[site] = 1.7, 0.6
    q = p.condition(value, precision=precision)
    variance = 1 / (1 / p.variance[site] + 0.6)
    mean = variance * (loc[site] / p.variance[site] + 0.6 * 1.7)
    torch.testing.assert_close(q.variance[site], variance, **EXACT)
    torch.testing.assert_close(q.mean[site], mean, **EXACT)
    noisy = Normal(loc[site], (p.variance[site] + 1 / 0.6).sqrt())
    evidence = p.log_evidence(value, precision=precision)
    torch.testing.assert_close(evidence, noisy.log_prob(torch.tensor(1.7)), **EXACT)


def test_in_two_parts_it_is_the_same_as_at_once(latent=23):
    p = AR1Normal(*parameters(latent)[:2], rho=parameters(latent)[2])
    value, precision = observations(latent)
    early = torch.rand(latent) < 0.5
    first, second = precision * early, precision * ~early
    q = p.condition(value, precision=first)
    both = q.condition(value, precision=second)
    at_once = p.condition(value, precision=precision)
    torch.testing.assert_close(both.mean, at_once.mean, **EXACT)
    torch.testing.assert_close(both.covariance_matrix, at_once.covariance_matrix, **EXACT)
    sum_of_parts = p.log_evidence(value, precision=first) + q.log_evidence(value, precision=second)
    torch.testing.assert_close(sum_of_parts, p.log_evidence(value, precision=precision), **EXACT)


def kalman_filter(p, value, precision):
    """Log evidence by the innovations form, one step after the other."""
    mean, variance, total = p.mean[..., 0], p.variance[..., 0], 0.0
    for t in range(value.shape[-1]):
        w = precision[..., t]
        seen = w > 0
        noise = torch.where(seen, 1 / w, 1.0)
        surprise = Normal(mean, (variance + noise).sqrt()).log_prob(value[..., t].nan_to_num())
        total = total + torch.where(seen, surprise, 0.0)
        gain = torch.where(seen, variance / (variance + noise), 0.0)
        mean = mean + gain * (value[..., t].nan_to_num() - mean)
        variance = (1 - gain) * variance
        if t < value.shape[-1] - 1:
            k = p.coefficient[..., t]
            mean = p.mean[..., t + 1] + k * (mean - p.mean[..., t])
            variance = k.square() * variance + p.innovation_scale[..., t].square()
    return total


@pytest.mark.parametrize("latent", LATENTS[:-1])
def test_evidence_is_the_innovations_form_and_the_same_for_every_z(latent):
    loc, scale, rho = parameters(latent)
    p, (value, precision) = AR1Normal(loc, scale, rho=rho), observations(latent)
    evidence = p.log_evidence(value, precision=precision)
    torch.testing.assert_close(evidence, kalman_filter(p, value, precision), **EXACT)
    q = p.condition(value, precision=precision)
    z = q.sample((4,))
    seen = precision > 0
    noise = torch.where(seen, precision, 1.0).rsqrt()
    fit = Normal(z, noise).log_prob(value.nan_to_num())
    joint = p.log_prob(z) + torch.where(seen, fit, 0.0).sum(-1)
    torch.testing.assert_close((joint - q.log_prob(z)), evidence.expand(4, 3), rtol=1e-9, atol=1e-9)


def test_what_is_missing_has_no_influence_and_no_nan_in_any_gradient(latent=9):
    tensors = [x.requires_grad_() for x in parameters(latent)]
    value, precision = observations(latent)
    assert value.isnan().any()
    results = []
    for filler in (math.nan, math.inf, -1e300, 7.0):
        filled = torch.where(precision > 0, value, filler).requires_grad_()
        w = precision.clone().requires_grad_()
        p = AR1Normal(*tensors[:2], rho=tensors[2])
        q = p.condition(filled, precision=w)
        evidence = p.log_evidence(filled, precision=w)
        total = q.rsample().sum() + evidence.sum() + kl_divergence(q, p).sum()
        torch.manual_seed(0)
        gradients = torch.autograd.grad(total, (*tensors, filled, w))
        if filler != -1e300:  # by which the derivative in the precision is multiplied
            assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[3][precision == 0].any()
        results.append((q.mean, q.stddev, q.fisher_z, evidence, *gradients[1:3]))
    for other in results[1:]:
        for one, two in zip(results[0][:4], other[:4], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_derivative_in_a_precision_of_zero_is_that_of_a_new_observation(latent=6):
    """So that a learned mask can open: what a finite value there would change is counted."""
    p = AR1Normal(*parameters(latent, ())[:2], rho=parameters(latent, ())[2])
    value, precision = torch.randn(latent), torch.zeros(latent, requires_grad=True)
    (gradient,) = torch.autograd.grad(p.condition(value, precision=precision).mean.sum(), precision)
    step = 1e-6
    for t in range(latent):
        more = torch.zeros(latent)
        more[t] = step
        change = (p.condition(value, precision=more).mean - p.mean).sum() / step
        assert gradient[t].item() == pytest.approx(change.item(), rel=1e-4, abs=1e-6)


def test_padding_changes_nothing():
    """Series of several lengths in one batch: precision 0 behind the end of each."""
    lengths, longest = (4, 7, 11), 11
    loc, scale, rho = parameters(longest)
    p, (value, precision) = AR1Normal(loc, scale, rho=rho), observations(longest, missing=0.1)
    inside = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
    padded = torch.where(inside, value, math.nan), precision * inside
    q = p.condition(padded[0], precision=padded[1])
    evidence = p.log_evidence(padded[0], precision=padded[1])
    for row, length in enumerate(lengths):
        alone = AR1Normal(loc[row], scale[row], rho=rho[row]).window(0, length)
        y, w = value[row, :length], precision[row, :length]
        short, part = alone.condition(y, precision=w), q.window(0, length)
        torch.testing.assert_close(part.mean[row], short.mean, **EXACT)
        torch.testing.assert_close(part.covariance_matrix[row], short.covariance_matrix, **EXACT)
        torch.testing.assert_close(evidence[row], alone.log_evidence(y, precision=w), **EXACT)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("start, stop", [(0, 5), (2, 5), (3, 4), (-2, None), (None, 1)])
def test_a_window_is_the_marginal(start, stop, shared):
    loc, scale, rho = parameters(5, shared=shared)
    for chain in ({"rho": rho}, {"fisher_z": rho.atanh()}):
        q = AR1Normal(loc, scale, **chain)
        part = q.window(start, stop)
        torch.testing.assert_close(part.mean, q.mean[:, start:stop])
        covariance = q.covariance_matrix[:, start:stop, start:stop]
        torch.testing.assert_close(part.covariance_matrix, covariance, **EXACT)
    with pytest.raises(ValueError, match="window from 3 to 3 of 5 variables is empty"):
        q.window(3, 3)


def test_batch_shapes_broadcast_and_each_series_is_its_own():
    prior = AR1Prior(3, (2.0, 20.0), scale=[0.5, 1.0, 2.0])
    p = prior(8)
    value, precision = observations(8, (5, 3))
    q = p.condition(value, precision=precision)
    assert q.batch_shape == (5, 3) and kl_divergence(q, p).shape == (5, 3)
    assert p.log_evidence(value, precision=precision).shape == (5, 3)
    # Here a sum or a broadcast over the wrong dimension would fit.
    value, precision = observations(8, (3, 3))
    q = p.condition(value, precision=precision)
    kl, evidence = kl_divergence(q, p), p.log_evidence(value, precision=precision)
    for i in range(3):
        for c in range(3):
            one = AR1Normal(p.loc[c], p.scale[c], fisher_z=p.fisher_z[c])
            y, w = value[i, c], precision[i, c]
            own = one.condition(y, precision=w)
            torch.testing.assert_close(own.mean, q.mean[i, c], **EXACT)
            torch.testing.assert_close(kl[i, c], kl_divergence(own, one), **EXACT)
            torch.testing.assert_close(evidence[i, c], one.log_evidence(y, precision=w), **EXACT)


def test_the_draws_of_a_posterior_have_its_moments(latent=6, draws=200_000):
    p = AR1Normal(*parameters(latent, ())[:2], rho=parameters(latent, ())[2])
    value, precision = observations(latent, ())
    mean, covariance, _ = dense_posterior(
        *(x.unsqueeze(0) for x in (p.loc, p.scale, p.rho, value, precision))
    )
    mean, covariance = mean[0], covariance[0]
    z = p.condition(value, precision=precision).sample((draws,)) - mean
    error = (covariance.diagonal() / draws).sqrt()
    # Six means and 21 second moments beyond 5 standard errors: below 2e-5.
    assert (z.mean(0).abs() < 5 * error).all()
    variances = covariance.diagonal()
    error = ((variances[:, None] * variances + covariance**2) / draws).sqrt()
    assert ((z.T @ z / draws - covariance).abs() < 5 * error).all()


def test_float32_at_a_time_constant_of_10000_steps(steps=1000):
    """Against float64 on the same numbers; the data are a draw of the prior with noise 0.5."""
    a = AR1Prior(1, 1e4)._fisher_z(torch.ones(1)).detach().float()
    p = AR1Normal(torch.zeros(steps, dtype=torch.float32), 1.5, fisher_z=a.squeeze(0))
    wide = AR1Normal(p.loc.double(), p.scale.double(), fisher_z=p.fisher_z.double())
    precision = torch.full((8, steps), 4.0).masked_fill(torch.rand(8, steps) < 0.4, 0.0).float()
    value = (wide.sample((8,)) + 0.5 * torch.randn(8, steps)).float()
    results = []
    for chain in (p, wide):
        y, w = value.to(chain.loc), precision.to(chain.loc).requires_grad_()
        q = chain.condition(y, precision=w)
        kl, evidence = kl_divergence(q, chain), chain.log_evidence(y, precision=w)
        (gradient,) = torch.autograd.grad(kl.sum(), w)
        results.append([x.detach().double() for x in (q.mean, q.stddev, kl, evidence, gradient)])
    (mean, stddev, kl, evidence, gradient), exact = results
    assert ((mean - exact[0]).abs() / exact[1]).max() < 1e-3
    torch.testing.assert_close(stddev, exact[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(kl, exact[2], rtol=1e-4, atol=0)
    torch.testing.assert_close(evidence, exact[3], rtol=1e-5, atol=0)
    assert (gradient - exact[4]).abs().max() < 1e-3 * exact[4].abs().max()


@pytest.mark.parametrize("a", [12.0, -20.0, 40.0])
def test_float32_keeps_a_chain_whose_rho_is_one(a):
    p = AR1Normal(torch.zeros(6).float(), 1.0, fisher_z=a)
    assert p.rho.abs() == 1
    q = p.condition(torch.ones(6).float(), precision=0.0)
    torch.testing.assert_close(q.fisher_z, torch.full((5,), a).float(), rtol=1e-6, atol=0)
    assert kl_divergence(q, p).abs() < 1e-4 and q.expand((2,)).entropy().isfinite().all()
    # Seen once, or at every step by as much in all, is the same for what cannot move.
    value = p.rho.sign() ** torch.arange(6)
    for precision in (torch.eye(6)[2].float(), 1 / 6):
        seen = p.condition(value, precision=precision)
        torch.testing.assert_close(seen.stddev, torch.full((6,), 0.5**0.5).float())
        torch.testing.assert_close(seen.mean, value / 2)


def test_rounding_takes_no_correlation_beyond_one(latent=4096):
    """Where it would be 1.0000001 at every step, a draw of a long chain would grow."""
    p = AR1Normal(torch.zeros(latent).float(), 1.0, fisher_z=8 + 8 * torch.rand(latent - 1).float())
    q = p.condition(torch.zeros(latent).float(), precision=1e-3 * torch.rand(latent).float())
    assert (q.rho <= 1).all() and (q.rho == 1).any()


@pytest.mark.parametrize("latent", [2, 3, 5, 8])
def test_derivatives_and_derivatives_of_derivatives(latent):
    _, _, rho = parameters(latent, (2,))
    weight = torch.rand(2, latent)
    shift = torch.randn(2, latent)
    inputs = [x.requires_grad_() for x in (0.9 * rho, weight, shift)]

    def posterior(rho, weight, shift):
        inputs = torch.zeros(latent), torch.ones(latent), rho, ar1.innovation_scale(rho)
        mean, chain = smoothing.condition(*inputs, weight, shift, natural=True)
        return mean, *chain

    assert torch.autograd.gradcheck(posterior, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(posterior, inputs, atol=1e-4, rtol=1e-4)
    steps = torch.rand(2, latent - 1)
    inputs = [x.detach().requires_grad_() for x in (weight, steps, steps.flip(0))]
    assert torch.autograd.gradcheck(smoothing.information, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(smoothing.information, inputs)


@pytest.mark.parametrize("latent", [1, 2, 3, 4, 7, 100])
def test_information_is_the_loop(latent):
    for steps in (latent - 1, 1):
        weight, gain, damping = torch.rand(2, latent), torch.rand(2, steps), torch.rand(steps)
        a, c = (x.expand(2, latent - 1) for x in (gain, damping))
        known = [weight[:, -1]]
        for j in reversed(range(latent - 1)):
            known.append(weight[:, j] + a[:, j] * known[-1] / (1 + c[:, j] * known[-1]))
        expected = torch.stack(known[::-1], -1)
        torch.testing.assert_close(smoothing.information(weight, gain, damping), expected, **EXACT)


def test_function_transforms(latent=6):
    loc, scale, rho = parameters(latent, (4,))
    value, precision = observations(latent, (4,), missing=0.0)

    def loss(rho, value, precision):
        p = AR1Normal(loc[0], scale[0], rho=rho, validate_args=False)
        q = p.condition(value, precision=precision)
        return q.mean.sin().sum(-1) + kl_divergence(q, p)

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(rho, value, precision)
    leaves = [x.clone().requires_grad_() for x in (rho, value, precision)]
    expected = torch.autograd.grad(loss(*leaves).sum(), leaves)
    for one, two in zip(each, expected, strict=True):
        torch.testing.assert_close(one, two, **EXACT)
    mapped = torch.func.vmap(loss, (0, None, None))(rho, value[0], precision[0])
    torch.testing.assert_close(mapped, loss(rho, value[0], precision[0]), **EXACT)
    curvature = torch.func.jacrev(torch.func.jacrev(loss, 2), 2)(rho[0], value[0], precision[0])
    hessian = torch.autograd.functional.hessian(lambda w: loss(rho[0], value[0], w), precision[0])
    torch.testing.assert_close(curvature, hessian, **EXACT)


def test_the_depth_grows_with_the_logarithm_of_the_length():
    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for latent in (256, 512, 1024, 2048):
        precision = torch.rand(latent, requires_grad=True)
        with Operations() as operations:
            q = AR1Normal(torch.zeros(latent), 1.0, rho=0.9).condition(
                torch.zeros(latent), precision=precision
            )
            q.rsample().sum().backward()
        counts.append(operations.count)
    assert counts[3] - counts[2] == counts[2] - counts[1] == counts[1] - counts[0] > 0
    assert counts[3] < 2 * counts[0]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_it_is_the_same(latent=4):
    _, _, rho = parameters(latent)
    inputs = [x.requires_grad_() for x in (rho, torch.rand(3, latent), torch.randn(3, latent))]

    def posterior(rho, weight, shift):
        inputs = torch.zeros(latent), torch.ones(latent), rho, ar1.innovation_scale(rho)
        mean, chain = smoothing.condition(*inputs, weight, shift, natural=True)
        return mean.sin().sum() + sum(x.cos().sum() for x in chain)

    values, gradients = [], []
    compiled = torch.compile(posterior, fullgraph=True, backend="aot_eager")
    for function in (compiled, posterior):
        values.append(function(*inputs))
        gradients.append(torch.autograd.grad(values[-1], inputs))
    torch.testing.assert_close(*values, **EXACT)
    torch.testing.assert_close(*gradients, **EXACT)


def test_a_posterior_is_a_distribution_like_any_other(latent=5):
    loc, scale, rho = parameters(latent)
    value, precision = observations(latent)
    p = AR1Normal(loc, scale, fisher_z=rho.atanh())
    for q in (p.condition(value, precision=precision), p):
        wide, z = q.expand((2, 3)), q.sample()
        torch.testing.assert_close(wide.log_prob(z), q.log_prob(z).expand(2, 3))
        torch.testing.assert_close(wide.fisher_z, q.fisher_z.expand(2, 3, -1))
        for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            assert torch.equal(twin.log_prob(z), q.log_prob(z))
        before = q.entropy(), q.log_prob(z)
        again = AR1Normal(q.loc, q.scale, fisher_z=q.fisher_z)
        torch.testing.assert_close((again.entropy(), again.log_prob(z)), before, **EXACT)
        assert repr(q).startswith("AR1Normal(")


def test_methods_keep_the_class():
    class Subclass(AR1Normal):
        pass

    p = Subclass(torch.zeros(4), 1.0, rho=0.5)
    q = p.condition(torch.ones(4), precision=1.0)
    more = AR1Prior(1, 5.0).extend(q.expand((1,)), 3)
    built = Subclass.from_transitions(p.loc, 1.0, 0.5, 1.0)
    precise = Subclass.from_precision(p.loc, torch.ones(4), torch.full((3,), 0.3))
    for chain in (q, p.window(1, 3), q.window(1, 3), more, built, precise):
        assert type(chain) is Subclass


def refused(match, call, *arguments, **named):
    with pytest.raises(ValueError, match=match):
        call(*arguments, **named)


def test_what_does_not_fit_is_refused_in_words():
    # Explicitly, as torch.compile turns the checks off for the rest of a process.
    checked = {"validate_args": True}
    p, y = AR1Normal(torch.zeros(3, 4), 1.0, rho=0.5, **checked), torch.zeros(4)
    refused(r"value has shape \(3,\).*must be 4\.", p.condition, torch.zeros(3), precision=1.0)
    refused(r"precision has shape \(3,\).*1 \(shared\) or 4", p.condition, y, precision=y[:3] + 1)
    refused("do not broadcast", p.condition, torch.zeros(2, 4), precision=1.0)
    refused("precision must be finite and not negative", p.condition, y, precision=-1.0)
    refused("precision must be finite and not neg", p.log_evidence, y, precision=math.inf)
    refused("4 values are not finite .* give precision 0", p.condition, y + math.nan, precision=1.0)
    refused("value must be", p.condition, "y", precision=1.0)
    refused("3 and 4 variables", p.log_evidence, y, precision=1.0, posterior=p.window(0, 3))
    one, step = torch.ones(3, 4), torch.full((3, 3), 0.9)
    build, steps = AR1Normal.from_precision, AR1Normal.from_transitions
    refused("positive definite, but of 3 .* 3 are not", build, one, one, step, **checked)
    refused("positive definite", build, one, -one, 0.1 * step, **checked)
    refused(r"off_diagonal .* must be 3\.", build, one, one, one)
    refused("scale_first must be positive", steps, one, 0.0, 0.5, 1.0, **checked)
    refused("innovation_scale must be positive", steps, one, 1.0, 0.5, -1.0, **checked)
    refused("loc must be a floating", steps, 1.0, 1.0, 0.5, 1.0)
    # Unchecked where checks are off.
    AR1Normal.from_precision(one, one, step, validate_args=False)


TIMES = torch.tensor([0.0, 0.5, 2.0, 2.25, 9.0])


@pytest.mark.parametrize("times", [TIMES, torch.stack((TIMES, 3 * TIMES))])
def test_the_prior_has_the_covariance_it_states(times):
    prior = AR1Prior(3, [1.0, 4.0, 30.0], scale=[0.5, 1.0, 2.0])
    p = prior(times=times)
    assert p.batch_shape == (*times.shape[:-1], 3) and p.event_shape == (5,)
    distance = (times.unsqueeze(-1) - times.unsqueeze(-2)).abs().unsqueeze(-3)
    tau, scale = (x.view(3, 1, 1) for x in (prior.time_constant, prior.scale))
    expected = scale.square() * (-distance / tau).exp()
    torch.testing.assert_close(p.covariance_matrix, expected, **EXACT)
    regular = prior(5).covariance_matrix
    torch.testing.assert_close(regular, prior(times=torch.arange(5)).covariance_matrix, **EXACT)


def test_a_split_step_with_its_middle_marginalised_is_the_same_law():
    prior = AR1Prior(2, [3.0, 40.0])
    fine = torch.tensor([0.0, 1.0, 1.3, 2.0, 5.0])
    kept = torch.tensor([0, 1, 3, 4])
    value, w = observations(4, (2,), missing=0.0)
    coarse = prior(times=fine[kept])
    value_fine, w_fine = torch.full((2, 5), math.nan), torch.zeros(2, 5)
    value_fine[:, kept], w_fine[:, kept] = value, w
    q, q_fine = coarse.condition(value, precision=w), prior(times=fine).condition(
        value_fine, precision=w_fine
    )  # fmt: skip
    torch.testing.assert_close(q_fine.mean[:, kept], q.mean, **EXACT)
    covariance = q_fine.covariance_matrix[:, kept][:, :, kept]
    torch.testing.assert_close(covariance, q.covariance_matrix, **EXACT)
    evidences = [
        coarse.log_evidence(value, precision=w),
        prior(times=fine).log_evidence(value_fine, precision=w_fine),
    ]
    torch.testing.assert_close(*evidences, **EXACT)


def test_extend_is_conditioning_on_the_longer_grid():
    prior = AR1Prior(2, [3.0, 40.0], scale=[0.7, 2.0])
    value, w = observations(6, (4, 2))
    longer = torch.cat((value, torch.full((4, 2, 3), math.nan)), -1)
    w_longer = torch.cat((w, torch.zeros(4, 2, 3)), -1)
    q = prior(6).condition(value, precision=w)
    times = torch.tensor([0.0, 1.0, 2.5, 3.0, 7.0, 7.5, 8.0, 11.0, 12.0])
    irregular = prior(times=times[:6]).condition(value, precision=w)
    for found, grid in (
        (prior.extend(q, 3), prior(9)),
        (prior.extend(q, times=torch.tensor([1.0, 2.0, 3.0])), prior(9)),
        (prior.extend(irregular, times=times[6:] - times[5]), prior(times=times)),
    ):
        expected = grid.condition(longer, precision=w_longer)
        assert found.batch_shape == (4, 2) and found.event_shape == (9,)
        torch.testing.assert_close(found.mean, expected.mean, **EXACT)
        torch.testing.assert_close(found.covariance_matrix, expected.covariance_matrix, **EXACT)
    # Of a prior with shared scale and correlation, too.
    more = prior.extend(prior(6), 3)
    torch.testing.assert_close(more.covariance_matrix, prior(9).covariance_matrix, **EXACT)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_fisher_z_of_a_time_constant_keeps_its_digits(dtype, tolerance):
    mpmath = pytest.importorskip("mpmath")
    prior = AR1Prior(1, 1.0).to(dtype)
    for x in (1e-12, 1e-6, 1e-4, 0.01, 0.3, 1.0, 3.0, 8.0):
        elapsed = torch.tensor([x], dtype=dtype, requires_grad=True)
        a = prior._fisher_z(elapsed)
        (slope,) = torch.autograd.grad(a.sum(), elapsed)
        with mpmath.workdps(40):
            exact = mpmath.atanh(mpmath.exp(-mpmath.mpf(elapsed.item())))
            of_exact = -1 / (2 * mpmath.sinh(mpmath.mpf(elapsed.item())))
        # Relative to 1 where a is small: as much as the correlation itself can show.
        assert abs(a.item() - exact) < tolerance * max(1, abs(exact))
        assert abs(slope.item() / of_exact - 1) < 1e3 * tolerance


def test_the_gradient_reaches_the_time_constant_through_posterior_and_prior():
    prior = AR1Prior(2, [5.0, 12.0], learn_scale=True)
    value, w = observations(20, (2,))

    def loss(log_tau_q, log_tau_p):
        chains = []
        for log_tau in (log_tau_q, log_tau_p):
            x = (-log_tau).exp().unsqueeze(-1)
            z = torch.atanh((-x).exp())
            chains.append(AR1Normal(torch.zeros(20), 1.0, fisher_z=z))
        return kl_divergence(chains[0].condition(value, precision=w), chains[1]).sum()

    start = prior.log_time_constant.detach()
    of_q, of_p = torch.autograd.grad(
        loss(*(leaves := [start.clone().requires_grad_() for _ in range(2)])), leaves
    )
    assert (of_q.abs() > 1e-3).all() and (of_p.abs() > 1e-3).all()
    p = prior(20)
    total = kl_divergence(p.condition(value, precision=w), p).sum()
    of_both, of_scale = torch.autograd.grad(total, [prior.log_time_constant, prior.log_scale])
    torch.testing.assert_close(of_both, of_q + of_p, **EXACT)
    assert (of_scale.abs() > 1e-3).all()


def test_the_start_of_a_prior_and_what_it_refuses():
    fixed, free = AR1Prior(2, 3, learn_time_constant=False), AR1Prior(2, 3.0, learn_scale=True)
    assert [name for name, _ in AR1Prior(2, 3.0).named_parameters()] == ["log_time_constant"]
    assert not list(fixed.parameters()) and len(list(free.parameters())) == 2
    assert set(fixed.state_dict()) == set(free.state_dict()) == {"log_time_constant", "log_scale"}
    torch.testing.assert_close(AR1Prior(1, (1.0, 4.0)).time_constant, torch.tensor([2.0]))
    torch.testing.assert_close(AR1Prior(2, (1.0, 4.0)).time_constant, torch.tensor([1.0, 4.0]))
    spread = AR1Prior(3, (1.0, 4.0)).time_constant
    torch.testing.assert_close(spread, torch.tensor([1.0, 2.0, 4.0]))
    prior = AR1Prior(3, torch.tensor([1.0, 5.0, 2.0]))
    torch.testing.assert_close(prior.time_constant, torch.tensor([1.0, 5.0, 2.0]))
    refused("channels is 0", AR1Prior, 0, 1.0)
    refused("time_constant is None", AR1Prior, 3, None)
    refused(r"one per channel \(3\), or a pair", AR1Prior, 3, [1.0, 2.0, 3.0, 4.0])
    refused(r"scale is .* one per channel \(3\)\.", AR1Prior, 3, 1.0, [1.0, 2.0])
    refused("time_constant is -1.* positive", AR1Prior, 3, -1.0)
    refused("either steps or times", prior)
    refused("either steps or times", prior, 3, times=TIMES)
    refused("steps is 2.5", prior, 2.5)
    refused("times must be a tensor", prior, times=[0.0, 1.0])
    refused("times must be increasing, but of 4 intervals 1", prior, times=TIMES[[0, 2, 1, 3, 4]])
    refused("times must be increasing", prior, times=torch.tensor([0.0, math.nan]))
    q = prior(4)
    refused("times must be positive and increasing", prior.extend, q, times=TIMES)
    refused("times must be a tensor", prior.extend, q, times=[1.0])
    refused("either steps or times", prior.extend, q)
    refused("either steps or times", prior.extend, q, 1, times=TIMES[1:])
    refused("steps is 0", prior.extend, q, 0)
    refused("must be the 3 channels", prior.extend, AR1Normal(torch.zeros(2, 4), 1.0, 0.5), 2)


def test_large_times_keep_their_differences():
    """Seconds since 1970 differ by less than float32 can tell."""
    prior = AR1Prior(1, 1000.0).float()
    times = 1.7e9 + torch.tensor([0.0, 10.0, 60.0], dtype=torch.float64)
    torch.testing.assert_close(prior(times=times).rho, prior(times=times - 1.7e9).rho)
    assert prior(times=times).rho.dtype == torch.float32


def test_sites_are_pseudo_observations_of_the_prior():
    prior, head = AR1Prior(3, [2.0, 9.0, 30.0], scale=[0.5, 1.0, 2.0]), Sites(4, 3)
    features, p = torch.randn(5, 3, 10, 4), prior(10)
    q = head(features, p)
    assert q.batch_shape == (5, 3, 3) and q.event_shape == (10,)
    # In the units of the prior's scale, (10.8).
    w = head.log_precision(features).exp().mT / p.scale.square()
    value = head.shift(features).mT / (w * p.scale)
    expected = p.condition(value, precision=w)
    torch.testing.assert_close(q.mean, expected.mean, **EXACT)
    torch.testing.assert_close(q.covariance_matrix, expected.covariance_matrix, **EXACT)
    start = head(torch.zeros(10, 4), p)
    weak = p.condition(torch.zeros(10), precision=0.1 / p.scale.square())
    torch.testing.assert_close(start.stddev, weak.stddev, **EXACT)
    assert not start.mean.any()
    refused(r"features have shape \(5, 10, 3\).* \(10, 4\)", head, torch.zeros(5, 10, 3), p)
    refused(r"features have shape \(5, 9, 4\)", head, torch.zeros(5, 9, 4), p)
    refused(r"prior has batch shape \(2,\)", head, features, AR1Prior(2, 1.0)(10))
    (kl_divergence(q, p).sum() + q.rsample().sum()).backward()
    for name, parameter in (*head.named_parameters(), *prior.named_parameters()):
        assert parameter.grad.isfinite().all(), name


def test_the_best_normal_posterior_of_counts_is_a_chain(latent=5):
    """(10.1): with 2 numbers a step as good as with a full covariance, and its optimum."""
    rate, counts = 0.3, torch.tensor([0.0, 3.0, 1.0, 6.0, 2.0])
    p = AR1Normal(torch.zeros(latent), 1.2, rho=0.8)
    dense = MultivariateNormal(p.loc, p.covariance_matrix)

    def bound(q, prior):
        mean_rate = (rate + q.mean + q.variance / 2).exp()
        return (counts * (rate + q.mean) - mean_rate).sum() - kl_divergence(q, prior)

    def best(make, *sizes):
        leaves = [torch.zeros(size, requires_grad=True) for size in sizes]
        optimizer = torch.optim.LBFGS(
            leaves, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure():
            optimizer.zero_grad()
            loss = -bound(*make(*leaves))
            loss.backward()
            return loss

        optimizer.step(closure)
        return bound(*make(*leaves)).item(), make(*leaves)[0]

    def full(mean, log_diagonal, below):
        rows, columns = torch.tril_indices(latent, latent, -1)
        factor = torch.zeros(latent, latent).index_put((rows, columns), below)
        return MultivariateNormal(mean, scale_tril=factor + log_diagonal.exp().diag()), dense

    def sites(shift, log_weight):
        return p._observed(log_weight.exp(), shift, natural=True), p

    def diagonal(mean, log_scale):
        return Independent(Normal(mean, log_scale.exp()), 1), p

    best_full, normal = best(full, latent, latent, latent * (latent - 1) // 2)
    best_sites, chain = best(sites, latent, latent)
    best_diagonal, _ = best(diagonal, latent, latent)
    assert best_sites == pytest.approx(best_full, abs=1e-9)
    torch.testing.assert_close(
        chain.covariance_matrix, normal.covariance_matrix, rtol=1e-4, atol=1e-5
    )
    assert best_diagonal < best_full - 0.1
    # The optimal precision of a site is minus the mean second derivative of its log-likelihood.
    added = torch.linalg.inv(normal.covariance_matrix) - p.precision_matrix
    expected = (rate + normal.mean + normal.variance / 2).exp().diag()
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)
