"""The compiled loops against the scan: the same numbers, where it runs and where it must not."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.distributions import Independent, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from rhovae import AR1Normal, ar1, kernels, smoothing

pytest.importorskip("numba")

LATENTS = (1, 2, 3, 17, 256)
RHOS = (0.0, -0.9, 0.9999)
DRAWS = {torch.float32: 1e-6, torch.float64: 1e-13}
GRADIENTS = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture
def compiled_runs(monkeypatch):
    """The names of the compiled loops that have run."""
    runs, run = [], kernels._run
    monkeypatch.setattr(kernels, "_run", lambda *inputs: runs.append(inputs[0]) or run(*inputs))
    return runs


def numbers(latent, rho, batch, scaled, stepped, fisher_z, dtype=torch.float64):
    """loc, scale and rho or Fisher's z, with |rho| at most the given one."""
    loc = torch.randn(*batch, latent)
    scale = torch.rand(*batch, latent if scaled else 1) + 0.5
    factor = 2 * torch.rand(*batch, latent - 1 if stepped else 1) - 1
    factor[..., :1] = factor[..., :1].sign()
    dependence = rho * factor
    dependence = dependence.atanh() if fisher_z else dependence
    return [t.to(dtype).requires_grad_() for t in (loc, scale, dependence)]


def draw_and_gradients(inputs, name, sample_shape=(), enabled=True):
    """A draw, and the gradients of its entries added up with random weights."""
    torch.manual_seed(5)
    with kernels.use(enabled):
        z = AR1Normal(*inputs[:2], **{name: inputs[2]}, validate_args=False).rsample(sample_shape)
        weights = torch.randn(z.shape, dtype=z.dtype)
        return z.detach(), *torch.autograd.grad(z, inputs, weights)


def sizes(inputs, name, sample_shape):
    """How large a draw and its gradients typically are; a given one may cancel to few digits."""
    torch.manual_seed(5)
    with kernels.use(False):
        z = AR1Normal(*inputs[:2], **{name: inputs[2]}, validate_args=False).rsample(sample_shape)
    weights = torch.randn(8, *z.shape, dtype=z.dtype)
    gradients = torch.autograd.grad(z, inputs, weights, is_grads_batched=True)
    largest = [values.abs().mean(0).flatten() for values in (z.unsqueeze(0), *gradients)]
    return [values.max().item() if values.numel() else 0.0 for values in largest]


def assert_agree(found, expected, tolerances):
    for values, others, tolerance in zip(found, expected, tolerances, strict=True):
        assert values.shape == others.shape
        torch.testing.assert_close(values, others, rtol=0, atol=tolerance)


def assert_agrees_with_scan(inputs, name, sample_shape=()):
    expected = draw_and_gradients(inputs, name, sample_shape, enabled=False)
    found = draw_and_gradients(inputs, name, sample_shape)
    dtype = expected[0].dtype
    tolerances = DRAWS[dtype], *[GRADIENTS[dtype]] * 3
    units = sizes(inputs, name, sample_shape)
    assert_agree(found, expected, [t * u for t, u in zip(tolerances, units, strict=True)])
    return found


@pytest.mark.parametrize("dtype", list(DRAWS), ids=str)
@pytest.mark.parametrize("fisher_z", [False, True])
@pytest.mark.parametrize("scaled,stepped", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("latent", LATENTS)
def test_it_draws_what_the_scan_draws(latent, rho, scaled, stepped, fisher_z, dtype, compiled_runs):
    name = "fisher_z" if fisher_z else "rho"
    for batch, sample_shape in [((3,), ()), ((2, 1, 3), (5,)), ((), (2, 4)), ((0,), (2,))]:
        inputs = numbers(latent, rho, batch, scaled, stepped, fisher_z, dtype)
        compiled_runs.clear()
        assert_agrees_with_scan(inputs, name, sample_shape)
        draws = [run for run in compiled_runs if "fisher_z" not in run]
        assert len(draws) == (0 if latent == 1 or 0 in batch else 2)


@pytest.mark.parametrize("dtype", list(DRAWS), ids=str)
@pytest.mark.parametrize("fisher_z", [-60.0, -20.0, 20.0, 400.0])
def test_where_rho_rounds_to_one(fisher_z, dtype):
    inputs = numbers(17, 0.5, (3,), False, False, True, dtype)
    inputs[2] = torch.full((3, 1), fisher_z, dtype=dtype, requires_grad=True)
    assert all(t.isfinite().all() for t in assert_agrees_with_scan(inputs, "fisher_z", (2,)))


@pytest.mark.parametrize("dtype", list(DRAWS), ids=str)
def test_fisher_z_is_that_of_single_operations(dtype, compiled_runs):
    size = torch.logspace(-30, 2.5, 400, dtype=dtype)
    a = torch.cat([-size, size.new_tensor([0.0, -0.0, 8.5, 9.0, 9.5, 19.5, 20.5]), size])
    # Beyond them sech and its products are subnormal numbers, of few digits.
    a = a[a.abs() < -math.log(torch.finfo(dtype).tiny) - 3].unsqueeze(-1).requires_grad_()
    weights = torch.randn(3, *a.shape, dtype=dtype)
    found, expected = kernels.from_fisher_z(a), ar1.from_fisher_z(a)
    assert compiled_runs == ["fisher_z"]
    digits, tiny = 8 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for value, other, weight in zip(found, expected, weights, strict=True):
        torch.testing.assert_close(value, other, rtol=digits, atol=tiny)
        gradients = (torch.autograd.grad(v, a, weight, retain_graph=True) for v in (value, other))
        torch.testing.assert_close(*gradients, rtol=digits, atol=tiny)
    assert compiled_runs == ["fisher_z", *["fisher_z_backward"] * 3]


def test_derivatives_of_fisher_z_and_their_derivatives(compiled_runs):
    a = torch.linspace(-6, 6, 49).unsqueeze(-1).requires_grad_()
    assert torch.autograd.gradcheck(kernels.from_fisher_z, a)
    assert "fisher_z_backward" in compiled_runs
    assert torch.autograd.gradgradcheck(kernels.from_fisher_z, a)


def test_many_fisher_z_take_single_operations(compiled_runs):
    kernels.from_fisher_z(torch.zeros(kernels._FEW + 1, 1))
    kernels.from_fisher_z(torch.zeros(3, 1, dtype=torch.float16))
    torch.func.jacrev(lambda a: kernels.from_fisher_z(a).rho)(torch.zeros(3, 1))
    assert not compiled_runs


def test_it_is_the_recursion():
    """(1.1), entry by entry in float64, and its derivatives as autograd finds them."""
    for name in ("rho", "fisher_z"):
        inputs = numbers(9, 0.8, (3,), True, True, name == "fisher_z")
        loc, scale, dependence = inputs
        rho = dependence.tanh() if name == "fisher_z" else dependence
        torch.manual_seed(5)
        noise = torch.randn(4, 3, 9)
        chain = [noise[..., 0]]
        for j in range(1, 9):
            r = rho[:, j - 1]
            chain.append(r * chain[-1] + (1 - r**2).sqrt() * noise[..., j])
        z = loc + scale * torch.stack(chain, -1)
        expected = z.detach(), *torch.autograd.grad(z, inputs, torch.randn(4, 3, 9))
        assert_agree(draw_and_gradients(inputs, name, (4,)), expected, [1e-12] * 4)


def test_without_correlation_it_draws_what_normal_draws(compiled_runs):
    loc, scale = torch.randn(2, 64, 20, dtype=torch.float32)
    torch.manual_seed(5)
    expected = Independent(Normal(loc, scale.exp()), 1).rsample()
    torch.manual_seed(5)
    assert torch.equal(AR1Normal(loc, scale.exp(), rho=0.0).rsample(), expected)
    assert compiled_runs


def test_parameters_that_broadcast_or_lie_scattered_in_memory(compiled_runs):
    loc = torch.randn(6, 4).mT.requires_grad_()
    scale = torch.rand(3, 4, 12)[:, :, ::12].requires_grad_()
    rho = torch.full((5,), 0.3).requires_grad_()
    assert_agrees_with_scan((loc, scale, rho), "rho", (2,))
    assert len(compiled_runs) == 2


def test_gradients_in_finite_differences(compiled_runs):
    for name in ("rho", "fisher_z"):
        for scaled, stepped in [(0, 0), (1, 1)]:
            inputs = numbers(5, 0.7, (2,), scaled, stepped, name == "fisher_z")

            def draw(loc, scale, dependence, name=name):
                torch.manual_seed(3)
                return AR1Normal(loc, scale, **{name: dependence}).rsample((2,))

            assert torch.autograd.gradcheck(draw, inputs, check_batched_grad=True)
            assert compiled_runs
            assert torch.autograd.gradgradcheck(draw, inputs)


def test_only_what_is_asked_for_has_a_gradient():
    loc, scale, rho = numbers(5, 0.7, (2,), False, False, False)
    for wanted in ((loc,), (scale, rho), (rho,)):
        frozen = [t if any(t is w for w in wanted) else t.detach() for t in (loc, scale, rho)]
        for create_graph in (False, True):
            z = AR1Normal(*frozen).rsample()
            found = torch.autograd.grad(z.sin().sum(), wanted, create_graph=create_graph)
            assert all(f.shape == w.shape for f, w in zip(found, wanted, strict=True))
    assert not AR1Normal(loc, scale, rho).sample().requires_grad
    assert not AR1Normal(loc.detach(), 1.0, 0.5).rsample().requires_grad


def test_a_draw_may_be_changed_in_place():
    inputs = numbers(5, 0.7, (2,), False, False, False)
    q = AR1Normal(*inputs)
    torch.manual_seed(5)
    z = q.rsample()
    weights = torch.randn(z.shape, dtype=z.dtype)
    z.mul_(2).backward(weights / 2)
    expected = draw_and_gradients(inputs, "rho", enabled=False)[1:]
    assert_agree([t.grad for t in inputs], expected, [1e-13] * 3)


def test_threads_change_nothing(compiled_runs):
    inputs = numbers(2000, 0.9, (300,), False, True, False, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(draw_and_gradients(inputs, "rho"))
    finally:
        torch.set_num_threads(before)
    assert inputs[0].numel() > 2 * kernels._WORTH_A_THREAD
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_everything_else_takes_the_scan(compiled_runs):
    loc, rho = torch.randn(4, 5), torch.tensor([0.5])

    def draw(loc, rho=rho, scale=1.0):
        return AR1Normal(loc, scale, rho, validate_args=False).rsample()

    assert draw(loc.to("meta"), rho.to("meta")).shape == (4, 5)
    assert draw(loc.half(), rho.half()).dtype == torch.float16
    draw(loc.float(), rho)
    assert draw(loc[:, :1]).shape == (4, 1) and draw(loc[:0]).shape == (0, 5)
    torch.func.grad(lambda loc: draw(loc).sum())(loc)
    mapped = torch.func.vmap(lambda loc: kernels.draw(loc, rho, loc, rho))
    assert mapped(loc).shape == (4, 5)
    with Watching():
        draw(loc)
    noise = torch.randn(4, 5, requires_grad=True)
    z = kernels.draw(loc, torch.ones(4, 1), noise, rho.expand(4, 1))
    assert torch.autograd.grad(z.sum(), noise)[0].shape == (4, 5)
    assert not compiled_runs
    draw(loc)
    assert len(compiled_runs) == 1


def test_per_sample_gradients_and_second_derivatives_are_those_of_the_scan():
    inputs = numbers(5, 0.7, (3,), True, True, True)
    weights = torch.randn(6, 3, 5)

    def results(enabled):
        with kernels.use(enabled):
            torch.manual_seed(5)
            # One parameter made from another must not be counted twice.
            loc, scale, fisher_z = inputs
            z = AR1Normal(loc * scale, scale, fisher_z=fisher_z + loc[:, 1:] / 9).rsample()
            rows = torch.autograd.grad(z, inputs, weights, is_grads_batched=True, retain_graph=True)
            first = torch.autograd.grad(z.sin().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return *rows, *first, *second

    assert_agree(results(True), results(False), [1e-12] * 9)


def test_the_switch_holds_for_a_block_and_a_thread(compiled_runs):
    q = AR1Normal(torch.zeros(3), 1.0, 0.5)
    with pytest.raises(KeyError), kernels.use(False):
        q.sample()
        with kernels.use(True):
            q.sample()
            assert len(compiled_runs) == 1
        q.sample()
        elsewhere = threading.Thread(target=q.sample)
        elsewhere.start()
        elsewhere.join()
        assert len(compiled_runs) == 2
        raise KeyError
    q.sample()
    assert len(compiled_runs) == 3


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile_sees_the_scan_alone(compiled_runs):
    def draw(loc, scale, fisher_z):
        return AR1Normal(loc, scale, fisher_z=fisher_z, validate_args=False).rsample().sin()

    inputs = numbers(5, 0.7, (3,), False, False, True)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    torch.autograd.grad(compiled(*inputs).sum(), inputs)
    assert not compiled_runs


def in_a_process(code, **variables):
    program = "import sys, warnings\nwarnings.simplefilter('error')\n" + code
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


DRAW = """
import torch
from rhovae import AR1Normal, ar1, kernels, smoothing
torch.manual_seed(0)
before = "numba" in sys.modules
z = AR1Normal(torch.zeros(4, 3), torch.ones(4, 1, requires_grad=True), rho=0.5).rsample()
z.sum().backward()
print(before, "numba" in sys.modules, z.double().sum().item())
"""


def test_numba_is_imported_by_the_first_draw_and_is_not_needed():
    with_numba = in_a_process(DRAW).split()
    without = in_a_process("sys.modules['numba'] = None\n" + DRAW).split()
    switched_off = in_a_process(DRAW, NUMBA_DISABLE_JIT="1").split()
    assert with_numba[:2] == ["False", "True"]
    for other in (without, switched_off):
        assert float(other[2]) == pytest.approx(float(with_numba[2]), rel=1e-6)


def test_where_nothing_can_be_kept_on_disk_it_compiles_each_time(monkeypatch):
    """numba refuses to keep what it compiles where it finds no folder that can be written."""
    loops = kernels._loops()
    cfunc = loops.cfunc

    def no_folder(signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(signature, **options)

    monkeypatch.setattr(loops, "cfunc", no_folder)
    loops.compiled.cache_clear()
    assert_agrees_with_scan(numbers(5, 0.7, (3,), False, False, False), "rho")
    loops.compiled.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_it_survives_a_fork():
    """As in the workers of a DataLoader, after a draw by several threads in the parent."""
    code = (
        DRAW
        + """
import os
torch.set_num_threads(2)
q = AR1Normal(torch.zeros(1000, 1000), 1.0, rho=0.5)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    q.sample()
    child = os.fork()
if child == 0:
    q.sample()
    os._exit(0)
print("child", os.waitpid(child, 0)[1])
"""
    )
    assert in_a_process(code).split()[-1] == "0"


def chain_and_sites(latent, batch, prior_batch, shared, dtype):
    """A chain, loc, scale, correlations and innovation scales, and observations with gaps."""
    loc = torch.randn(*prior_batch, latent)
    scale = torch.rand(*prior_batch, 1 if shared else latent) + 0.5
    rho = 1.9 * torch.rand(*prior_batch, 1 if shared else latent - 1) - 0.95
    weight = 3 * torch.rand(*batch, latent) * (torch.rand(*batch, latent) < 0.7)
    value = torch.randn(*batch, latent)
    inputs = (loc, scale, rho, (1 - rho.square()).sqrt(), weight, value)
    return [t.to(dtype).requires_grad_() for t in inputs]


def conditioned(inputs, enabled, natural=False, seed=5):
    with kernels.use(enabled):
        mean, chain = smoothing.condition(*inputs, natural=natural)
        results = mean, *chain
        torch.manual_seed(seed)
        weights = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in results]
        found = torch.autograd.grad(results, inputs, weights)
    return *(t.detach() for t in results), *found


@pytest.mark.parametrize("dtype", list(DRAWS), ids=str)
@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("latent", LATENTS[1:])
@pytest.mark.parametrize("batch,prior_batch", [((), ()), ((4,), (4,)), ((5, 3), (3,)), ((5,), ())])
def test_it_conditions_as_the_scans_do(
    latent, batch, prior_batch, shared, natural, dtype, compiled_runs
):
    inputs = chain_and_sites(latent, batch, prior_batch, shared, dtype)
    expected = conditioned(inputs, False, natural)
    assert not compiled_runs
    found = conditioned(inputs, True, natural)
    assert len(compiled_runs) == 2
    relative = [DRAWS[dtype]] * 4 + [GRADIENTS[dtype]] * 6
    # A gradient that is a sum of many may cancel to few digits, hence its size over some of them.
    several = zip(*(conditioned(inputs, False, natural, seed) for seed in range(8)), strict=True)
    units = [torch.stack(values).abs().mean(0).max().item() for values in several]
    assert_agree(found, expected, [r * u for r, u in zip(relative, units, strict=True)])


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), 7.0])
def test_what_was_not_observed_does_not_matter(missing, compiled_runs):
    """Nor do its derivatives differ from those of the scans: where it is a number, the first
    little precision would pull towards it."""
    inputs = chain_and_sites(17, (5, 3), (3,), False, torch.float64)
    value = inputs[-1].detach()
    value[inputs[-2] == 0] = missing
    inputs[-1] = value.requires_grad_()
    expected = conditioned(inputs, enabled=False)
    found = conditioned(inputs, enabled=True)
    assert len(compiled_runs) == 2
    assert all(t.isfinite().all() for t in found)
    assert not found[-1][inputs[-2] == 0].any()
    assert_agree(found, expected, [1e-11] * 10)


def test_gradients_of_conditioning_in_finite_differences(compiled_runs):
    for natural in (False, True):
        inputs = chain_and_sites(5, (3, 2), (2,), False, torch.float64)
        inputs[-2] = (inputs[-2].detach() + 0.1).requires_grad_()

        def results(*inputs, natural=natural):
            mean, chain = smoothing.condition(*inputs, natural=natural)
            return mean, *chain

        assert torch.autograd.gradcheck(results, inputs, check_batched_grad=True)
        assert compiled_runs
        assert torch.autograd.gradgradcheck(results, inputs)


@pytest.mark.parametrize("fisher_z", [3.0, 20.0])
def test_conditioning_where_rho_is_near_one(fisher_z):
    """In float32, each against float64 from the same rounded inputs; the loops are no worse."""
    rho, c, _ = ar1.from_fisher_z(torch.full((1,), fisher_z))
    weight, value = 0.1 * torch.rand(3, 200), torch.randn(3, 200)
    inputs = torch.zeros(200), torch.ones(1), rho, c, weight, value
    inputs = [t.float().requires_grad_() for t in inputs]
    exact = conditioned([t.detach().double().requires_grad_() for t in inputs], enabled=False)
    errors = [
        [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]
        for found in (conditioned(inputs, enabled) for enabled in (True, False))
    ]
    for loop, scan in zip(*errors, strict=True):
        assert loop < 2 * scan + 1e-6


@pytest.mark.parametrize("grad", [True, False])
def test_conditioning_is_the_same_with_and_without_gradients(grad):
    p = AR1Normal(torch.zeros(2, 6), torch.ones(2, 1), rho=torch.full((2, 1), 0.5))
    value, weight = torch.randn(2, 6), torch.rand(2, 6)
    with torch.set_grad_enabled(grad), kernels.use(False):
        expected = p.condition(value, precision=weight)
    with torch.set_grad_enabled(grad):
        q = p.condition(value, precision=weight)
    for name in ("mean", "stddev", "rho", "innovation_scale"):
        torch.testing.assert_close(getattr(q, name), getattr(expected, name))


TRITON = """
import torch
from rhovae import AR1Normal, gpu, kernels

def draw(inputs, name, sample_shape, enabled):
    torch.manual_seed(5)
    with kernels.use(enabled):
        z = AR1Normal(*inputs[:2], **{name: inputs[2]}).rsample(sample_shape)
    return z, *torch.autograd.grad(z, inputs, torch.randn(z.shape, dtype=z.dtype))

kernels._loops = lambda: True
kernels._FEW = 0  # of Fisher's z there is no kernel
runs = []
kernels._run = lambda name, tensors, *rest: (
    runs.append(name) or gpu.run(name, [t.contiguous() for t in tensors], *rest)
)
gpu._LONGEST_BLOCK = 8  # three blocks, and then one
for dtype, tolerance in (torch.float32, 1e-5), (torch.float64, 1e-13):
    for latent, scaled, stepped in (17, 0, 0), (17, 1, 0), (17, 0, 1), (17, 1, 1), (2, 0, 0):
        for name in "rho", "fisher_z":
            shapes = (3, latent), (3, latent if scaled else 1), (3, latent - 1 if stepped else 1)
            inputs = [(1.8 * torch.rand(shape) - 0.9).to(dtype) for shape in shapes]
            inputs = [inputs[0], inputs[1].exp(), inputs[2]]
            inputs = [t.requires_grad_() for t in inputs]
            expected = draw(inputs, name, (2,), False)
            runs.clear()
            for a, b in zip(draw(inputs, name, (2,), True), expected):
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance * latent)
            assert runs == ["forward", "backward"]
print("agrees")
"""


def test_the_triton_kernels_draw_what_the_scan_draws_in_triton_s_interpreter():
    pytest.importorskip("triton")
    assert in_a_process(TRITON, TRITON_INTERPRET="1").split()[-1] == "agrees"


def test_the_triton_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    pytest.importorskip("triton")
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from rhovae import gpu
for kernel in gpu.forward, gpu.backward:
    for number in "*fp32", "*fp64":
        for shared in True, False:
            fixed = {"BLOCK": 64, "known": shared}
            fixed |= {"scales": 1 if shared else 50, "rhos": 1 if shared else 49}
            kinds = {name: number for name in kernel.arg_names} | {"batch": "i32", "latent": "i32"}
            kinds |= dict.fromkeys(fixed, "constexpr")
            target = GPUTarget("cuda", 80, 32)
            print("ptx" in triton.compile(ASTSource(kernel, kinds, fixed), target).asm)
"""
    assert in_a_process(code, TRITON_CACHE_DIR=str(tmp_path)).split() == ["True"] * 8
