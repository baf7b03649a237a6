"""What users do with distributions beside the obvious, and what they may then rely on."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributions import (
    Distribution,
    LowRankMultivariateNormal,
    MultivariateNormal,
    biject_to,
    kl_divergence,
)

from rhovae import AR1Normal, AR1Prior, kernels


@pytest.fixture(autouse=True)
def validated(monkeypatch):
    """As it is at first; torch turns validation off for good when it compiles anything."""
    monkeypatch.setattr(Distribution, "_validate_args", True)


VALUE = torch.tensor([1.0, -1.0, 2.0, 0.0])


def learned(**more):
    """A chain and the leaf that it was made from."""
    a = torch.tensor([0.5], requires_grad=True)
    return AR1Normal(torch.zeros(4), 1.0, fisher_z=a, **more), a


def posterior():
    chain, a = learned()
    return chain.condition(VALUE, precision=2.0), a


def gradient_of(q, a):
    """Of something that needs the draw, the density and the entropy, with noise that is fixed."""
    torch.manual_seed(1)
    loss = q.rsample().sin().sum() + q.log_prob(VALUE.to(q.loc)) + q.entropy()
    return torch.autograd.grad(loss, a, retain_graph=True)[0]


@pytest.mark.parametrize("make", [learned, posterior])
def test_neither_transforms_nor_inference_mode_leave_anything_behind(make):
    """What torch.func or inference mode computed must not be kept: it outlives them as a corpse."""
    expected = gradient_of(*make())
    q, a = make()
    torch.func.jacrev(torch.func.jacrev(q.log_prob))(VALUE.clone())
    torch.testing.assert_close(gradient_of(q, a), expected)
    q, a = make()
    with torch.inference_mode():
        q.sample()
        q.log_prob(VALUE)
        q.entropy()
    torch.testing.assert_close(gradient_of(q, a), expected)


def test_a_copy_is_the_same_whether_the_original_was_used_or_not():
    q, a = learned()
    expected = gradient_of(q, a)
    q.covariance_matrix, q.coefficient  # noqa: B018
    for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert again.fisher_z is not a and again.fisher_z.requires_grad
        torch.testing.assert_close(gradient_of(again, again.fisher_z), expected)


def test_a_copy_of_a_posterior_has_its_numbers_and_its_digits():
    with torch.no_grad():
        q = posterior()[0]
        expected = q.covariance_matrix, q.log_prob(VALUE), q.fisher_z
        for again in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.expand((2,))):
            found = again.covariance_matrix, again.log_prob(VALUE), again.fisher_z
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other.expand_as(one))


def test_a_question_changes_no_later_answer():
    """Where rho rounds to 1, a posterior's log-determinant comes from its innovation scales."""
    a = torch.tensor([20.0], dtype=torch.float32, requires_grad=True)
    chain = AR1Normal(torch.zeros(4, dtype=torch.float32), 1.0, fisher_z=a)
    plain, asked = (chain.condition(torch.zeros_like(chain.loc), precision=1e-3) for _ in range(2))
    asked.fisher_z  # noqa: B018
    values = [q.entropy() for q in (plain, asked, plain.expand((1,)), asked.expand((1,)))]
    assert len({value.item() for value in values}) == 1
    windows = [q.window(1, 3).entropy().item() for q in (plain, asked)]
    assert windows[0] == windows[1]


@pytest.mark.parametrize("dtype, a", [(torch.float32, 60.0), (torch.float16, 7.0)])
def test_the_gradient_of_a_posterior_s_fisher_z_is_finite_where_its_square_is_not(dtype, a):
    given = torch.tensor([a], dtype=dtype, requires_grad=True)
    chain = AR1Normal(torch.zeros(4, dtype=dtype), 1.0, fisher_z=given)
    with kernels.use(False):
        q = chain.condition(torch.zeros_like(chain.loc), precision=0.0)
    torch.testing.assert_close(q.fisher_z, given.detach().expand(3), rtol=2e-3, atol=0)
    (gradient,) = torch.autograd.grad(q.fisher_z.sum(), given)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 3.0), rtol=1e-2, atol=0)


BROKEN = """
import sys, warnings
class Broken:
    def find_spec(self, name, path, target=None):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.3.")
sys.meta_path.insert(0, Broken())
import torch
from rhovae import AR1Normal
q = AR1Normal(torch.zeros(3), 1.0, rho=0.5)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    q.sample(), q.sample()
(only,) = found
print(only.category.__name__, only.message)
"""


def test_a_broken_numba_is_told_once_and_stops_nothing():
    run = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("RuntimeWarning numba is installed but cannot be imported")
    assert "Got NumPy 2.3." in run.stdout


@pytest.mark.parametrize("name", ["value", "loc", "precision", "scale"])
@pytest.mark.parametrize("batched", [False, True])
def test_second_derivatives_of_conditioning_in_one_argument_alone(name, batched):
    numbers = {
        "loc": torch.randn(4), "scale": torch.rand(1) + 0.5, "value": torch.randn(4),
        "precision": torch.rand(4) + 0.5,
    }  # fmt: skip
    found = []
    for compiled in (True, False):
        given = {k: v.clone().requires_grad_(k == name) for k, v in numbers.items()}
        with kernels.use(compiled):
            chain = AR1Normal(given["loc"], given["scale"], rho=0.6)
            q = chain.condition(given["value"], precision=given["precision"])
            more = {} if name in ("value", "loc") else {"covariance": q.stddev.prod()}
            assert q.stddev.requires_grad == bool(more)
            outputs = q.mean.pow(3).sum() + sum(more.values())
            if batched:
                seeds = torch.eye(4)
                options = dict(is_grads_batched=True)
                found.append(torch.autograd.grad(q.mean, given[name], seeds, **options)[0])
                continue
            (first,) = torch.autograd.grad(outputs, given[name], create_graph=True)
            found.append(torch.autograd.grad(first.sum(), given[name])[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "steps, q_constant, p_constant, precision",
    [
        (1000, 50.0, 50.0, 1e-4),
        (1000, 1e4, 1e4, 1e-4),
        (10_000, 1e4, 1e4, 0.0),
        (50, 5.0, 9.0, 1.0),
    ],
)
def test_a_small_kl_between_chains_keeps_its_digits_in_float32(
    steps, q_constant, p_constant, precision
):
    """As of a channel that is not used: the large determinants of both must not be subtracted."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        loc = torch.zeros(steps, dtype=dtype)
        z = [AR1Prior(1, constant).double()(2).fisher_z.to(dtype)[0] for constant in
             (q_constant, p_constant)]  # fmt: skip
        q, p = (AR1Normal(loc, 1.0, fisher_z=a) for a in z)
        q = q.condition(torch.ones_like(loc), precision=precision)
        found[dtype] = kl_divergence(q, p).double().item()
    single, double = found.values()
    assert single >= -1e-6 and math.isclose(single, double, rel_tol=0.02, abs_tol=1e-5)


def test_kl_between_chains_is_finite_where_innovation_scales_underflow():
    loc = torch.zeros(4, dtype=torch.float32)
    a = torch.tensor([200.0, 300.0, -200.0], dtype=torch.float32, requires_grad=True)
    q, p = AR1Normal(loc, 1.0, fisher_z=a), AR1Normal(loc, 1.0, rho=0.5)
    divergence = kl_divergence(q, p)
    # -log c = |a| - log 2 beyond float32, whose logarithm this is.
    carried = ((q.rho - 0.5) / math.sqrt(0.75)).square().sum()
    expected = 0.5 * (carried - 3) + 700 - 3 * math.log(2) + 1.5 * math.log(0.75)
    torch.testing.assert_close(divergence, expected.float())
    assert torch.autograd.grad(divergence, a)[0].isfinite().all()


def test_the_prior_of_a_time_series_checks_what_was_observed():
    prior = AR1Prior(2, 10.0)
    with pytest.raises(ValueError, match="precision 0 where there is no observation"):
        prior(5).condition(torch.full((5,), math.nan), precision=1.0)
    with pytest.raises(ValueError, match="precision must be finite and not negative"):
        prior(5).condition(torch.zeros(5), precision=-3.0)
    unchecked = AR1Normal(torch.zeros(2, 5), 1.0, rho=0.5, validate_args=False)
    assert not prior.extend(unchecked, 2)._validate_args
    assert prior.extend(prior(5), 2)._validate_args


def test_vmap_with_validation_as_torch_s_own_classes():
    locs = torch.randn(3, 4)
    try:
        torch.vmap(lambda loc: MultivariateNormal(loc, torch.eye(4)).log_prob(loc))(locs)
    except RuntimeError:
        pytest.skip("in this torch no distribution checks a value under vmap")
    functions = (
        lambda loc: AR1Normal(loc, 1.0, rho=0.5, validate_args=True).log_prob(loc + 1),
        lambda loc: (
            AR1Normal(loc, 1.0, rho=0.5, validate_args=True).condition(loc + 1, precision=1.0).mean
        ),
    )
    for function in functions:
        expected = torch.stack([function(loc) for loc in locs])
        torch.testing.assert_close(torch.vmap(function)(locs), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what torch imports for it
def test_forward_mode_is_refused_and_never_silently_zero():
    with forward_ad.dual_level(), torch.no_grad():
        loc = forward_ad.make_dual(torch.zeros(4), torch.ones(4))
        q = AR1Normal(loc, torch.ones(1), rho=torch.tensor([0.5]))
        with pytest.raises(RuntimeError, match="jvp"):
            q.condition(VALUE, precision=torch.ones(4)).loc.sum()
        assert forward_ad.unpack_dual(q.rsample()).tangent is not None


def test_transitions_and_precisions_that_are_no_numbers_are_refused():
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match="coefficient must be finite"):
        AR1Normal.from_transitions(zeros, 1.0, math.nan, 1.0)
    with pytest.raises(ValueError, match="scale_first must be positive"):
        AR1Normal.from_transitions(zeros, math.nan, 0.5, 1.0)
    with pytest.raises(ValueError, match="diagonal must be finite"):
        AR1Normal.from_precision(zeros, torch.full((4,), math.inf), torch.zeros(3))


@pytest.mark.parametrize("unit", [1e-25, 1e-10, 1.0, 1e10, 1e25])
def test_transitions_in_any_unit(unit):
    loc = torch.zeros(4, dtype=torch.float32)
    found = AR1Normal.from_transitions(loc, unit, 0.5, 2 * unit).stddev.double()
    expected = torch.tensor([1.0, 4.25, 5.0625, 5.265625]).sqrt()
    torch.testing.assert_close(found / unit, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_transform_into_an_open_interval_stays_inside(dtype):
    constraint = AR1Normal.arg_constraints["rho"].base_constraint
    values = biject_to(constraint)(torch.tensor([-1e3, -20.0, 0.0, 20.0, 1e3], dtype=dtype))
    assert constraint.check(values).all() and values[2] == 0
    AR1Normal(torch.zeros(2, dtype=dtype), 1.0, rho=values[:1])


def test_kl_with_a_low_rank_normal():
    chain = AR1Normal(torch.randn(4), torch.rand(4) + 0.5, rho=torch.tensor([0.5, -0.3, 0.9]))
    low_rank = LowRankMultivariateNormal(torch.randn(4), torch.randn(4, 2), torch.rand(4) + 0.5)
    dense = MultivariateNormal(low_rank.loc, low_rank.covariance_matrix)
    for q, p, expected in ((chain, low_rank, (chain, dense)), (low_rank, chain, (dense, chain))):
        torch.testing.assert_close(kl_divergence(q, p), kl_divergence(*expected))


def test_a_subclass_may_name_simpler_constraints():
    class Positive(AR1Normal):
        arg_constraints = AR1Normal.arg_constraints | {
            "scale": torch.distributions.constraints.positive
        }

    Positive(torch.zeros(3), 1.0, rho=0.5, validate_args=True)


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    prior = AR1Prior(numpy.int64(2), 10.0)
    assert prior(numpy.int64(5)).event_shape == (5,)
    with pytest.raises(ValueError, match=r"steps is 5\.0"):
        prior(5.0)


def test_a_single_variable_has_no_step_to_give():
    with pytest.raises(ValueError, match=r"its last dimension must be 1 \(shared\) or 0"):
        AR1Normal(torch.zeros(1), 1.0, rho=torch.zeros(2))
    with pytest.raises(ValueError, match=r"its last dimension must be 1\."):
        AR1Normal(torch.zeros(1), torch.ones(2), rho=0.0)
