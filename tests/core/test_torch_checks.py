"""What torch tests of each of its own distributions (its test/test_distributions.py), for ours.

Statistical tests fail by chance with a probability that each of them states: a normal deviate lies
beyond 5 standard errors with 6e-7. (Seeds are fixed, so they do not fail from run to run.)
"""

import math

import pytest
import torch
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.distributions.kl import _KL_REGISTRY

from rhovae import AR1Normal

EXAMPLES = {
    "shared": lambda: AR1Normal(torch.randn(5), 0.7, rho=torch.tensor([0.6])),
    "numbers": lambda: AR1Normal(torch.randn(5), 0.7, fisher_z=-1.5),
    "batch": lambda: AR1Normal(
        torch.randn(4, 5, requires_grad=True), torch.ones(4, 1, requires_grad=True),
        rho=torch.linspace(-0.9, 0.9, 4).unsqueeze(-1).requires_grad_(),
    ),
    "steps": lambda: AR1Normal(
        torch.randn(2, 1, 5), 0.5 + torch.rand(3, 5), fisher_z=torch.randn(4)
    ),
    "one variable": lambda: AR1Normal(torch.randn(3, 1), 2.0, rho=torch.full((3, 1), 0.5)),
    "posterior": lambda: AR1Normal(torch.randn(3, 5), 0.8, rho=-0.7).condition(
        torch.randn(2, 1, 5), precision=torch.rand(3, 5, requires_grad=True)
    ),
    "float32": lambda: AR1Normal(torch.randn(3, 5).float(), 0.5, rho=0.9),
}  # fmt: skip


@pytest.fixture(params=EXAMPLES)
def q(request):
    return EXAMPLES[request.param]()


def test_repr_and_attributes(q):
    assert repr(q).startswith("AR1Normal(") and q.has_rsample
    assert q.event_shape == q.loc.shape[-1:] and not q.support.is_discrete
    assert q.support.event_dim == len(q.event_shape) == 1


def test_parameters_satisfy_their_constraints(q):
    for name, constraint in q.arg_constraints.items():
        assert constraint.check(getattr(q, name)).all(), name


@pytest.mark.parametrize("sample_shape", [(), (6,), (2, 0), (2, 3)])
def test_sample_and_log_prob_shapes(q, sample_shape):
    for draw in (q.sample, q.rsample):
        z = draw(sample_shape)
        assert z.shape == (*sample_shape, *q.batch_shape, *q.event_shape)
        assert z.dtype == q.loc.dtype
        assert not z.numel() or q.support.check(z).all()  # torch cannot check what is empty
    assert q.log_prob(z).shape == (*sample_shape, *q.batch_shape)


def test_sample_is_detached_and_rsample_is_not(q):
    assert not q.sample().requires_grad
    inputs = (q.loc, q.scale, q.rho)
    assert q.rsample().requires_grad == any(x.requires_grad for x in inputs)


def test_expand(q):
    z = q.sample()
    for shape in (q.batch_shape, (2, *q.batch_shape), (3, 2, *q.batch_shape)):
        wide = q.expand(torch.Size(shape))
        assert wide.batch_shape == shape and wide.event_shape == q.event_shape
        assert wide.sample((4,)).shape == (4, *shape, *q.event_shape)
        torch.testing.assert_close(wide.log_prob(z), q.log_prob(z).expand(shape))
        for name in ("mean", "variance", "stddev", "mode"):
            expected = getattr(q, name).expand(*shape, *q.event_shape)
            torch.testing.assert_close(getattr(wide, name), expected)
        torch.testing.assert_close(wide.entropy(), q.entropy().expand(shape))


def test_expand_of_a_subclass_is_of_the_subclass():
    class Subclass(AR1Normal):
        pass

    class WithItsOwnArguments(AR1Normal):
        def __init__(self, rho):
            super().__init__(torch.zeros(3), 1.0, rho=rho)

    wide = Subclass(torch.zeros(3), 1.0, rho=0.5).expand((4,))
    assert type(wide) is Subclass and wide.sample().shape == (4, 3)
    with pytest.raises(NotImplementedError, match=r"must also define a custom \.expand"):
        WithItsOwnArguments(0.5).expand((4,))


def test_lazy_properties_have_gradients_even_if_first_asked_without():
    for name in ("covariance_matrix", "precision_matrix", "scale_tril"):
        rho = torch.tensor([0.5], requires_grad=True)
        q = AR1Normal(torch.zeros(3), 1.0, rho=rho)
        with torch.no_grad():
            getattr(q, name)
        getattr(q, name).sum().backward()
        assert rho.grad is not None and rho.grad.isfinite().all(), name


def test_draws_have_the_stated_moments_and_entropy(q, draws=40_000):
    """At most 30 means, 30 variances and 6 entropies: fails by chance with 66 x 6e-7 = 4e-5."""
    z = q.sample((draws,)).double()
    mean, variance = q.mean.detach().double(), q.variance.detach().double()
    error = (variance / draws).sqrt()
    assert ((z.mean(0) - mean).abs() < 5 * error).all()
    assert ((z.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / draws)).all()
    surprise = -q.log_prob(z.to(q.loc.dtype)).detach().double()
    error = surprise.std(0) / math.sqrt(draws)
    assert ((surprise.mean(0) - q.entropy().detach()).abs() < 5 * error + 1e-5).all()


def partners(d=4):
    ours = AR1Normal(torch.randn(3, d), 0.5 + torch.rand(d), rho=0.9 * torch.rand(3, d - 1))
    other = AR1Normal(torch.randn(d), 1.5, rho=-0.4)
    diagonal = Independent(Normal(torch.randn(3, d), 0.5 + torch.rand(3, d)), 1)
    dense = MultivariateNormal(torch.randn(d), torch.eye(d) + 0.5 * torch.ones(d, d))
    low_rank = LowRankMultivariateNormal(torch.randn(d), torch.randn(d, 1), 0.5 + torch.rand(d))
    return {
        "AR1Normal": (ours, other), "diagonal": (ours, diagonal), "dense": (ours, dense),
        "low-rank": (ours, low_rank),
    }  # fmt: skip


@pytest.mark.parametrize("pair", ["AR1Normal", "diagonal", "dense", "low-rank"])
@pytest.mark.parametrize("turned", [False, True])
def test_kl_shapes_and_monte_carlo(pair, turned, draws=100_000):
    """Four pairs, three comparisons with 6e-7 each."""
    p, q = partners()[pair][:: -1 if turned else 1]
    kl = kl_divergence(p, q)
    assert kl.shape == torch.broadcast_shapes(p.batch_shape, q.batch_shape) == (3,)
    z = p.expand(kl.shape).sample((draws,))
    log_ratio = p.log_prob(z) - q.log_prob(z)
    error = log_ratio.std(0) / math.sqrt(draws)
    assert ((log_ratio.mean(0) - kl).abs() < 5 * error).all() and (kl > 0).all()


def test_every_kl_with_ours_is_compared_with_monte_carlo():
    registered = {
        pair
        for pair in _KL_REGISTRY
        if any(issubclass(t, AR1Normal) for t in pair)
        # and no other test, in the same process, has registered it for a class of its own
        and all(t.__module__.split(".")[0] in ("rhovae", "torch") for t in pair)
    }
    assert {(p.__name__, q.__name__) for p, q in registered} == {
        ("AR1Normal", "AR1Normal"),
        ("AR1Normal", "Independent"), ("Independent", "AR1Normal"),
        ("AR1Normal", "MultivariateNormal"), ("MultivariateNormal", "AR1Normal"),
        ("AR1Normal", "LowRankMultivariateNormal"), ("LowRankMultivariateNormal", "AR1Normal"),
    }  # fmt: skip
