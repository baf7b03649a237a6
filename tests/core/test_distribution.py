"""AR1Normal against dense MultivariateNormal in float64, and against its own draws."""

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
    kl_divergence,
    transform_to,
)
from torch.distributions.transforms import ExpTransform

from rhovae import AR1Normal

LATENTS = (1, 2, 3, 17, 256)
RHOS = (0.0, 0.5, -0.9, 0.9999, -0.9999)
EXACT = dict(rtol=1e-10, atol=1e-10)


def make(latent, rho, batch=(3,), stepped=False, fisher_z=False):
    """A random AR1Normal with |rho| at most the given one."""
    loc = torch.randn(*batch, latent)
    if stepped:
        scale = torch.rand(*batch, latent) + 0.5
        # Different at each step, so that a step out of place is seen; the extreme comes first.
        factor = 2 * torch.rand(*batch, latent - 1) - 1
        factor[..., :1] = factor[..., :1].sign()
        rho = rho * factor
    else:
        scale, rho = torch.rand(*batch, 1) + 0.5, torch.full((*batch, 1), rho)
    return AR1Normal(loc, scale, **({"fisher_z": rho.atanh()} if fisher_z else {"rho": rho}))


def dense(q):
    """The oracle, built from the definition of the covariance alone."""
    latent = q.event_shape[0]
    steps = q.rho.expand(*q.batch_shape, latent - 1)
    # log|rho| and signs accumulate, so that R_ij is a difference of running sums.
    places = torch.cat((torch.zeros(*q.batch_shape, 1), steps.abs().log().cumsum(-1)), -1)
    signs = torch.cat((torch.ones(*q.batch_shape, 1), steps.sign().cumprod(-1)), -1)
    if (steps == 0).any():
        assert not steps.any()
        correlation = torch.eye(latent).expand(*q.batch_shape, latent, latent)
    else:
        distance = (places.unsqueeze(-1) - places.unsqueeze(-2)).abs()
        correlation = torch.exp(-distance) * signs.unsqueeze(-1) * signs.unsqueeze(-2)
    scale = q.scale.expand(*q.batch_shape, latent)
    covariance = scale.unsqueeze(-1) * correlation * scale.unsqueeze(-2)
    return MultivariateNormal(q.loc, covariance)


ALL_CASES = [
    pytest.param(d, rho, stepped, fisher_z, id=f"d{d}-rho{rho}-stepped{stepped:d}-z{fisher_z:d}")
    for d in LATENTS
    for rho in RHOS
    for stepped in (False, True)
    for fisher_z in (False, True)
]
cases = pytest.mark.parametrize("latent,rho,stepped,fisher_z", ALL_CASES)


@cases
def test_density_entropy_and_matrices_agree_with_the_dense_normal(latent, rho, stepped, fisher_z):
    q = make(latent, rho, (3,), stepped, fisher_z)
    oracle = dense(q)
    value = q.loc + torch.randn(5, 3, latent)
    torch.testing.assert_close(q.covariance_matrix, oracle.covariance_matrix, **EXACT)
    torch.testing.assert_close(q.scale_tril, oracle.scale_tril, **EXACT)
    torch.testing.assert_close(q.entropy(), oracle.entropy(), **EXACT)
    torch.testing.assert_close(q.variance, oracle.variance, **EXACT)
    torch.testing.assert_close(q.stddev, oracle.variance.sqrt(), **EXACT)
    identity = torch.eye(latent).expand(3, latent, latent)
    product = q.precision_matrix @ oracle.covariance_matrix
    torch.testing.assert_close(product, identity, rtol=0, atol=1e-9)
    # At |rho| = 0.9999 the oracle's Cholesky factor costs it digits: the bound is relative.
    torch.testing.assert_close(q.log_prob(value), oracle.log_prob(value), rtol=1e-10, atol=1e-10)


@cases
def test_kl_agrees_with_the_dense_normal(latent, rho, stepped, fisher_z):
    q = make(latent, rho, (3,), stepped, fisher_z)
    p = make(latent, -rho, (2, 1), not stepped, fisher_z)
    n = Independent(Normal(torch.randn(latent), torch.rand(latent) + 0.5), 1)
    dense_n = MultivariateNormal(n.mean, scale_tril=torch.diag(n.stddev))
    for left, right, dense_left, dense_right in (
        (q, p, dense(q), dense(p)),
        (p, q, dense(p), dense(q)),
        (q, n, dense(q), dense_n),
        (n, q, dense_n, dense(q)),
        (q, dense(p), dense(q), dense(p)),
        (dense(p), q, dense(p), dense(q)),
    ):
        expected = kl_divergence(dense_left, dense_right)
        torch.testing.assert_close(kl_divergence(left, right), expected, **EXACT)


def test_kl_of_a_distribution_with_itself_is_zero():
    for stepped in (False, True):
        q = make(17, 0.9999, stepped=stepped)
        assert (kl_divergence(q, q).abs() < 1e-12).all()


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("rho", [-0.999, -0.5, 0.0, 0.5, 0.999])
def test_sampler_has_the_covariance_it_states(rho, stepped, latent=6, draws=200_000):
    q = make(latent, rho, (), stepped)
    z = q.sample((draws,)) - q.loc
    covariance = q.covariance_matrix
    # Isserlis: Var(z_i z_j) = C_ii C_jj + C_ij^2 for a zero-mean Gaussian.
    variances = covariance.diagonal()
    standard_error = ((variances[:, None] * variances + covariance**2) / draws).sqrt()
    deviation = (z.T @ z / draws - covariance).abs() / standard_error
    # 21 different entries: P(any beyond 5) < 21 * 6e-7.
    assert deviation.max() < 5, f"largest deviation {deviation.max():.2f} standard errors"


@pytest.mark.parametrize("rho", [-0.9, 0.0, 0.7])
def test_kl_agrees_with_monte_carlo(rho, draws=200_000):
    q, p = make(5, rho, ()), make(5, 0.3, (), stepped=True)
    z = q.sample((draws,))
    log_ratio = q.log_prob(z) - p.log_prob(z)
    estimate, standard_error = log_ratio.mean(), log_ratio.std() / math.sqrt(draws)
    assert (estimate - kl_divergence(q, p)).abs() < 4 * standard_error


@pytest.mark.parametrize("name", ["rho", "fisher_z"])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 4)])
def test_gradients_of_draws_and_kl_in_every_argument(name, sizes):
    loc = torch.randn(2, 5, requires_grad=True)
    scale = (torch.rand(2, sizes[0]) + 0.5).requires_grad_()
    rho = (torch.rand(2, sizes[1]) - 0.5).requires_grad_()
    other = make(5, 0.4, (2,), stepped=True)
    normal = Independent(Normal(torch.randn(2, 5), torch.rand(2, 5) + 0.5), 1)
    matrix = dense(other)

    def draw(*parameters):
        torch.manual_seed(3)
        return AR1Normal(parameters[0], parameters[1], **{name: parameters[2]}).rsample((2,))

    def kls(*parameters):
        q = AR1Normal(parameters[0], parameters[1], **{name: parameters[2]})
        pairs = [(q, other), (other, q), (q, normal), (normal, q), (q, matrix), (matrix, q)]
        return torch.stack([kl_divergence(*pair) for pair in pairs])

    for function in (draw, kls):
        assert torch.autograd.gradcheck(function, (loc, scale, rho))


def test_log_prob_integrates_to_one():
    q = make(2, -0.8, ())
    axis = torch.linspace(-12, 12, 801)
    grid = torch.cartesian_prod(axis, axis)
    total = q.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=0, atol=1e-9)


def test_shapes_follow_torch():
    q = AR1Normal(torch.zeros(4, 1, 3), torch.ones(5, 1), rho=torch.zeros(2))
    assert q.batch_shape == (4, 5) and q.event_shape == (3,)
    assert q.rsample((7, 2)).shape == (7, 2, 4, 5, 3)
    assert q.log_prob(torch.zeros(3)).shape == q.entropy().shape == (4, 5)
    assert q.mean.shape == q.mode.shape == q.variance.shape == (4, 5, 3)
    assert q.covariance_matrix.shape == q.precision_matrix.shape == (4, 5, 3, 3)


@pytest.mark.parametrize("name", ["rho", "fisher_z"])
def test_expand(name):
    q = AR1Normal(torch.randn(3, 4), 0.5, **{name: 0.7})
    wide = q.expand((2, 3))
    assert type(wide) is AR1Normal and wide.batch_shape == (2, 3)
    assert wide.sample((6,)).shape == (6, 2, 3, 4)
    z = torch.randn(2, 3, 4)
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))
    with pytest.raises(RuntimeError):
        q.expand((4,))


def test_rho_and_fisher_z_are_two_names_for_one_thing():
    by_rho = AR1Normal(torch.zeros(4), 1.0, rho=0.5)
    by_fisher_z = AR1Normal(torch.zeros(4), 1.0, fisher_z=math.atanh(0.5))
    torch.testing.assert_close(by_rho.fisher_z, by_fisher_z.fisher_z)
    torch.testing.assert_close(by_rho.rho, by_fisher_z.rho)
    torch.testing.assert_close(by_rho.covariance_matrix, by_fisher_z.covariance_matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fisher_z_where_rho_rounds_to_one(dtype):
    a = torch.tensor([20.0], dtype=dtype, requires_grad=True)
    q = AR1Normal(torch.zeros(8, dtype=dtype), 1.0, fisher_z=a)
    prior = Independent(Normal(torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)), 1)
    kl = kl_divergence(q, prior)
    expected = -7 * (math.log(2) - 20 - math.log1p(math.exp(-40)))
    torch.testing.assert_close(kl.item(), expected, rtol=1e-6, atol=0)
    kl.backward()
    torch.testing.assert_close(a.grad.item(), 7.0, rtol=1e-6, atol=0)
    assert q.log_prob(q.sample()).isfinite()


def test_works_inside_torch_distributions():
    q = AR1Normal(torch.randn(3, 4), 0.5, rho=0.7)
    assert Independent(q, 1).log_prob(torch.randn(3, 4)).shape == ()
    positive = TransformedDistribution(q, ExpTransform())
    z = q.sample()
    expected = q.log_prob(z) - z.sum(-1)
    torch.testing.assert_close(positive.log_prob(z.exp()), expected)
    again = pickle.loads(pickle.dumps(q))
    torch.testing.assert_close(again.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(copy.deepcopy(q).entropy(), q.entropy())
    assert "rho" in repr(q)


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (dict(scale=1.0), "needs either rho or fisher_z, and not both"),
        (dict(scale=1.0, rho=0.5, fisher_z=0.5), "needs either rho or fisher_z, and not both"),
        (dict(scale=1.0, rho=1.0), "rho must lie strictly between -1 and 1 .* the first is 1"),
        (dict(scale=1.0, rho=-1.5), "pass fisher_z=a.*the first is -1.5"),
        (dict(scale=1.0, rho=math.nan), "rho must lie strictly .* the first is nan"),
        (dict(scale=0.0, rho=0.5), "scale must be positive standard deviations .* first is 0"),
        (dict(scale=-1.0, rho=0.5), "scale must be positive .* the first is -1"),
        (dict(scale=math.inf, rho=0.5), "scale must be positive .* the first is inf"),
        (dict(scale=1.0, fisher_z=math.inf), "fisher_z must be finite"),
        (dict(loc=[0.0], scale=1.0, rho=0.5), "loc must be a floating-point tensor .* a list"),
        (dict(loc=torch.zeros(()), scale=1.0, rho=0.5), "at least one dimension"),
        (dict(loc=torch.zeros(3, dtype=torch.int64), scale=1.0, rho=0.5), "torch.int64"),
        (dict(loc=torch.zeros(2, 0), scale=1.0, rho=0.5), "at least 1 latent"),
        (dict(loc=torch.full((3,), math.nan), scale=1.0, rho=0.5), "loc must be finite"),
        (dict(scale=torch.ones(2), rho=0.5), r"last dimension must be 1 \(shared\) or 3"),
        (dict(scale=1.0, rho=torch.zeros(3)), r"last dimension must be 1 \(shared\) or 2"),
        (dict(scale="1", rho=0.5), "scale must be a number or a floating-point tensor"),
        (
            dict(loc=torch.zeros(2, 3), scale=torch.ones(5, 1), rho=0.5),
            r"batch shapes of loc \(2, 3\), scale \(5, 1\) and rho \(1,\) do not broadcast",
        ),
    ],
)
def test_bad_arguments_get_one_clear_sentence(arguments, sentence):
    arguments = {"loc": torch.zeros(3), **arguments}
    with pytest.raises(ValueError, match=sentence) as error:
        AR1Normal(arguments.pop("loc"), arguments.pop("scale"), validate_args=True, **arguments)
    assert "\n" not in str(error.value) and error.value.__cause__ is None


def test_values_are_not_checked_when_told_so():
    q = AR1Normal(torch.zeros(3), 1.0, rho=1.5, validate_args=False)
    assert q.log_prob(torch.full((3,), math.nan)).isnan()


def test_kl_with_something_else_says_what_is_known():
    q = AR1Normal(torch.zeros(3), 1.0, rho=0.5)
    with pytest.raises(NotImplementedError, match=r"known for Independent\(Normal"):
        kl_divergence(q, Independent(Normal(torch.zeros(2, 3), 1.0), 2))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, Categorical(torch.ones(3)))
    with pytest.raises(ValueError, match="over 3 and 4 variables"):
        kl_divergence(q, AR1Normal(torch.zeros(4), 1.0, rho=0.5))


def test_draws_have_the_type_of_the_parameters():
    for dtype in (torch.float32, torch.float64):
        q = AR1Normal(torch.zeros(3, dtype=dtype), 1.0, rho=0.5)
        assert q.sample((2,)).dtype == q.entropy().dtype == q.covariance_matrix.dtype == dtype


def test_values_are_checked_unless_told_otherwise():
    q = AR1Normal(torch.zeros(2, 3), 1.0, rho=0.5, validate_args=True)
    for checked in (q, q.expand((4, 2))):
        with pytest.raises(ValueError, match="within the support"):
            checked.log_prob(torch.full((3,), math.nan))
        with pytest.raises(ValueError):
            checked.log_prob(torch.zeros(4))
    free = AR1Normal(torch.zeros(2, 3), 1.0, rho=0.5, validate_args=False).expand((4, 2))
    assert free.log_prob(torch.full((3,), math.nan)).isnan().all()


def test_the_constraint_of_rho_has_transforms():
    constraint = AR1Normal.arg_constraints["rho"].base_constraint
    for registry in (biject_to, transform_to):
        rho = registry(constraint)(torch.linspace(-5, 5, 11))
        assert constraint.check(rho).all() and rho.min() < -0.9 < 0.9 < rho.max()
    assert not constraint.check(torch.tensor([-1.0, 1.0])).any()


@pytest.mark.parametrize("fisher_z", [0.5, 5.0, 9.0])
def test_float32_density_and_entropy_agree_on_draws(fisher_z, draws=20_000):
    q = AR1Normal(torch.zeros(8).float(), 1.0, fisher_z=fisher_z)
    log_prob = q.log_prob(q.sample((draws,))).double()
    error = log_prob.std() / math.sqrt(draws)
    assert (-log_prob.mean() - q.entropy()).abs() < 4 * error + 1e-3
