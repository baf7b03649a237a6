"""The structured formulas against dense algebra in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rhovae import ar1

LATENTS = (1, 2, 3, 17, 256)
RHOS = (0.0, 0.5, -0.5, 0.99, -0.9999, 0.9999)
EXACT = dict(rtol=1e-10, atol=1e-10)


def shared(rho, latent):
    return torch.tensor([rho])


def per_step(rho, latent):
    return rho * torch.linspace(1, 0.5, latent - 1)


def batched(rho, latent):
    return rho * torch.linspace(-1, 1, 4 * (latent - 1)).reshape(4, 1, latent - 1)


CASES = pytest.mark.parametrize("make_rho", [shared, per_step, batched])


def dense_correlation(rho, latent):
    """R from its definition, entry by entry: the product of the correlations between i and j."""
    steps = rho.expand(*rho.shape[:-1], latent - 1)
    matrix = torch.eye(latent).expand(*rho.shape[:-1], latent, latent).clone()
    for i in range(latent):
        for j in range(i):
            matrix[..., i, j] = matrix[..., j, i] = steps[..., j:i].prod(-1)
    return matrix


@CASES
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("latent", LATENTS[:-1])
def test_correlation_is_its_definition(latent, rho, make_rho):
    rho = make_rho(rho, latent)
    torch.testing.assert_close(
        ar1.correlation(rho, latent), dense_correlation(rho, latent), **EXACT
    )


@CASES
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("latent", LATENTS)
def test_factor_inverse_and_determinant(latent, rho, make_rho):
    rho = make_rho(rho, latent)
    dense = ar1.correlation(rho, latent)
    factor = ar1.cholesky(rho, latent)
    torch.testing.assert_close(factor, torch.linalg.cholesky(dense), rtol=1e-10, atol=1e-12)
    inverse = ar1.precision(rho, latent)
    identity = torch.eye(latent).expand_as(dense)
    torch.testing.assert_close(inverse @ dense, identity, rtol=0, atol=1e-10)
    assert torch.equal(inverse.tril(-2) + inverse.triu(2), torch.zeros_like(dense))
    torch.testing.assert_close(ar1.log_det(rho, latent), torch.linalg.slogdet(dense)[1], **EXACT)


@CASES
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("latent", LATENTS)
def test_correlate_is_the_factor_and_whiten_its_inverse(latent, rho, make_rho):
    rho = make_rho(rho, latent)
    noise = torch.randn(3, *rho.shape[:-1], latent)
    x = ar1.correlate(noise, rho)
    product = (ar1.cholesky(rho, latent) @ noise.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(x, product, **EXACT)
    torch.testing.assert_close(ar1.whiten(x, rho), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("latent", (1, 2, 5, 8, 9, 100))
def test_scan_is_the_loop(latent):
    for rho in (torch.tensor([-1.3]), torch.randn(6, 1), torch.randn(6, latent - 1)):
        innovations = torch.randn(2, 6, latent)
        steps = rho.expand(*rho.shape[:-1], latent - 1)
        x = [innovations[..., 0]]
        for j in range(1, latent):
            x.append(steps[..., j - 1] * x[-1] + innovations[..., j])
        torch.testing.assert_close(ar1.scan(innovations, rho), torch.stack(x, -1), **EXACT)


def test_batch_shapes_broadcast():
    x = ar1.correlate(torch.randn(5, 1, 4), torch.rand(3, 1))
    assert x.shape == (5, 3, 4)
    assert ar1.whiten(torch.randn(4), torch.rand(3, 3)).shape == (3, 4)
    assert ar1.correlate(torch.randn(0, 4), torch.rand(1)).shape == (0, 4)


@pytest.mark.parametrize("function", [ar1.correlate, ar1.whiten, ar1.scan])
def test_gradients(function):
    for rho in (torch.tensor([[0.3], [-0.8]]), torch.rand(2, 4) - 0.5, torch.rand(3, 1, 4) - 0.5):
        inputs = (torch.randn(2, 5, requires_grad=True), rho.requires_grad_())
        assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, inputs)
        if function is not ar1.scan:
            inputs += (ar1.innovation_scale(rho.detach()).requires_grad_(),)
            assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(function, inputs)


def test_the_transposed_scan_is_the_scan_read_backwards():
    for rho in (torch.tensor([0.7]), torch.rand(3, 4) - 0.5):
        u = torch.randn(3, 5)
        flipped = ar1.scan(u.flip(-1), rho.flip(-1)).flip(-1)
        torch.testing.assert_close(ar1._Chain.apply(u, rho, None, True), flipped, **EXACT)


def test_the_scan_keeps_nothing_but_its_result():
    """What autograd holds for the backward pass does not grow with the number of rounds."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ar1.scan(torch.randn(2, 4096, requires_grad=True), torch.rand(2, 1, requires_grad=True))
    assert sum(t.numel() for t in kept) == 2 * 4096 + 2


def test_function_transforms():
    noise, rho = torch.randn(7, 5), torch.rand(7, 1) - 0.5
    for axes in ((0, 0), (None, 0), (0, None)):
        inputs = [x if axis == 0 else x[0] for x, axis in zip((noise, rho), axes, strict=True)]
        mapped = torch.func.vmap(ar1.correlate, axes)(*inputs)
        torch.testing.assert_close(mapped, ar1.correlate(*inputs), **EXACT)

    def loss(rho, noise):
        return ar1.correlate(noise, rho).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss))(rho, noise)
    rho.requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(loss(rho, noise), rho)[0], **EXACT)
    with torch.no_grad():  # which the transforms do not heed
        again = torch.func.vmap(torch.func.jacrev(loss))(rho.detach(), noise)
        rows = torch.func.vmap(torch.func.jacrev(lambda r: ar1.correlate(noise[0], r)))(rho)
    torch.testing.assert_close(again, each, **EXACT)
    assert rows.shape == (7, 5, 1)
    curvature = torch.func.jacrev(torch.func.jacrev(loss))(rho[0].detach(), noise[0])
    expected = torch.autograd.functional.hessian(lambda r: loss(r, noise[0]), rho[0].detach())
    torch.testing.assert_close(curvature, expected, **EXACT)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_it_is_the_same():
    compiled = torch.compile(ar1.correlate, fullgraph=True, backend="aot_eager")
    for rho in (torch.rand(3, 1) - 0.5, torch.rand(3, 6) - 0.5):
        inputs = torch.randn(3, 7).requires_grad_(), rho.requires_grad_()
        values, gradients = [], []
        for function in (compiled, ar1.correlate):
            values.append(function(*inputs))
            gradients.append(torch.autograd.grad(values[-1].sin().sum(), inputs))
        torch.testing.assert_close(*values, **EXACT)
        torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("bad", [torch.tensor(0.5), torch.zeros(3), torch.zeros(2, 5)])
def test_a_rho_of_the_wrong_shape_is_refused(bad):
    with pytest.raises(ValueError, match=r"last dimension must be 1 .* or 4 \(one per step\)"):
        ar1.correlate(torch.randn(5), bad)


@given(st.floats(-40, 40))
@settings(deadline=None)
def test_fisher_z_forms_lose_nothing(a):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        exact_scale = mpmath.sech(mpmath.mpf(a))
        exact_log = -mpmath.log1p(mpmath.sinh(mpmath.mpf(a)) ** 2)
        scale, log = (value.item() for value in ar1.from_fisher_z(torch.tensor(a))[1:])
        assert abs(scale / exact_scale - 1) < 1e-14
        # The last term: where a^2 itself underflows.
        assert abs(log - exact_log) < 1e-14 * abs(exact_log) + 1e-300


def test_fisher_z_forms_agree_with_rho_and_are_smooth():
    a = torch.linspace(-6, 6, 49, requires_grad=True)
    rho = a.detach().tanh()
    torch.testing.assert_close(
        ar1.from_fisher_z(a.detach()).innovation_scale, ar1.innovation_scale(rho), rtol=1e-9, atol=0
    )
    assert torch.autograd.gradcheck(ar1.from_fisher_z, a)
    assert torch.autograd.gradgradcheck(ar1.from_fisher_z, a)


@given(st.floats(-1, 1, exclude_min=True, exclude_max=True))
@settings(deadline=None)
def test_log_determinant_loses_nothing_that_rho_holds(rho):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        exact = mpmath.log1p(-(mpmath.mpf(rho) ** 2))
    log = ar1.log_one_minus_rho_squared(torch.tensor(rho)).item()
    assert abs(log - exact) < 1e-14 * abs(exact) + 1e-300


def test_half_precision_keeps_what_it_can_hold():
    a = torch.tensor([-12.0, -0.5, 0.0, 3.0, 8.0]).to(torch.float16).requires_grad_()
    _, scale, log = ar1.from_fisher_z(a)
    exact = 1 / a.detach().double().cosh()
    torch.testing.assert_close(scale.detach().double(), exact, rtol=2e-3, atol=6e-8)
    torch.testing.assert_close(log.detach().double(), 2 * exact.log(), rtol=2e-3, atol=0)
    (gradient,) = torch.autograd.grad(scale.sum(), a)
    assert gradient.isfinite().all()
