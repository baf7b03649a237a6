"""AR1Normal, a multivariate normal whose correlations decay along a chain, and its KLs."""

import math
from numbers import Number

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    biject_to,
    constraints,
    transform_to,
)
from torch.distributions.kl import kl_divergence, register_kl
from torch.distributions.utils import _standard_normal, lazy_property

from . import ar1


class _OpenInterval(constraints.interval):
    """Between two bounds, both excluded (torch has only the closed and half-open ones)."""

    def check(self, value):
        return (self.lower_bound < value) & (value < self.upper_bound)


@biject_to.register(_OpenInterval)
@transform_to.register(_OpenInterval)
def _to_open_interval(constraint):
    return biject_to(constraints.interval(constraint.lower_bound, constraint.upper_bound))


class AR1Normal(Distribution):
    r"""Multivariate normal distribution with first-order autoregressive correlations.

    z = loc + scale * x with the unit-variance chain

        x_1 = e_1,    x_j = rho_{j-1} x_{j-1} + sqrt(1 - rho_{j-1}^2) e_j,     (1.1), notebooks/01

    so that Cov(z_i, z_j) = scale_i scale_j rho^|i-j|. One shared `scale` and one shared `rho` give
    the posterior of rho-VAE, with s = scale^2; per-dimension scales and per-step correlations give
    the general Gauss-Markov chain; rho = 0 the diagonal normal. Sampling costs O(d log d) at depth
    O(log d), everything else O(d), except the dense matrices, which are formed only when asked for.
    What follows from the parameters is computed once and kept, with its graph, as in torch's own:
    after a parameter has changed in place (a step of an optimiser), make a new instance.

    Args:
        loc: mean, shape (*batch, latent).
        scale: standard deviation > 0, shape (*batch, 1) or (*batch, latent), or a number.
        rho: correlation of neighbours in (-1, 1), shape (*batch, 1) or (*batch, latent - 1), or a
            number.
        fisher_z: instead of rho, its Fisher z with rho = tanh(fisher_z), any real number. The
            entropy, the log-determinant, and the KL to a diagonal normal keep their precision
            where rho rounds to 1. The density of a draw cannot: there the draw itself no longer
            holds the innovations (in float32 from about |fisher_z| = 14 on).
    Raises:
        ValueError: shapes that do not fit, and, with validate_args, values out of range.
    Reference:
        Ferdowsi et al. (2019), rho-VAE, arXiv 1909.06236, Eqs. 4 to 7.

    Example::

        >>> import torch
        >>> from torch.distributions import Independent, Normal, kl_divergence
        >>> from rhovae import AR1Normal
        >>> q = AR1Normal(torch.zeros(3), scale=2.0, rho=0.5)
        >>> q.covariance_matrix
        tensor([[4., 2., 1.],
                [2., 4., 2.],
                [1., 2., 4.]])
        >>> p = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
        >>> round(kl_divergence(q, p).item(), 4)
        2.7082
    """

    arg_constraints = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "rho": constraints.independent(_OpenInterval(-1, 1), 1),
        "fisher_z": constraints.real_vector,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc, scale, rho=None, *, fisher_z=None, validate_args=None):
        if (rho is None) == (fisher_z is None):
            raise ValueError("AR1Normal needs either rho or fisher_z, and not both.")
        if not isinstance(loc, Tensor) or not loc.is_floating_point() or loc.dim() < 1:
            raise ValueError(
                "AR1Normal: loc must be a floating-point tensor of shape (*batch, latent) with at "
                f"least one dimension, but it is {_describe(loc)}."
            )
        latent = loc.shape[-1]
        if latent < 1:
            raise ValueError(
                f"AR1Normal: loc has shape {tuple(loc.shape)}; it needs at least 1 latent variable."
            )
        name, dependence = ("rho", rho) if fisher_z is None else ("fisher_z", fisher_z)
        scale = _as_parameter("scale", scale, loc, (1, latent))
        dependence = _as_parameter(name, dependence, loc, (1, latent - 1))
        parameters = {"loc": loc, "scale": scale, name: dependence}
        batch_shape = loc.shape[:-1]
        # In a training step they agree; then neither the question nor three views are needed.
        if any(value.shape[:-1] != batch_shape for value in parameters.values()):
            try:
                batch_shape = torch.broadcast_shapes(*(v.shape[:-1] for v in parameters.values()))
            except RuntimeError:
                raise ValueError(
                    f"AR1Normal: the batch shapes of loc {tuple(loc.shape)}, scale "
                    f"{tuple(scale.shape)} and {name} {tuple(dependence.shape)} do not broadcast; "
                    "they are all dimensions but the last."
                ) from None
            parameters = {k: value.expand(*batch_shape, -1) for k, value in parameters.items()}
        self.__dict__.update(parameters)
        self._given = name
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)
        self._validate_args = (
            Distribution._validate_args if validate_args is None else validate_args
        )
        if self._validate_args:
            self._validate_parameters()

    def _validate_parameters(self):
        remedies = {
            "loc": "must be finite numbers",
            "scale": "must be positive standard deviations (for a log-variance v, exp(v / 2))",
            "rho": "must lie strictly between -1 and 1 (for an unbounded value a, pass fisher_z=a)",
            "fisher_z": "must be finite numbers",
        }
        for name, remedy in remedies.items():
            if name not in self.__dict__:
                continue
            value = self.__dict__[name]
            constraint = self.arg_constraints[name].base_constraint
            valid = constraint.check(value) & value.isfinite()
            if not valid.all():
                raise ValueError(
                    f"AR1Normal: the entries of {name} {remedy}, but of {value.numel()} in shape "
                    f"{tuple(value.shape)}, {(~valid).sum().item()} are not; the first is "
                    f"{value[~valid][0].item():.6g}."
                )

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(AR1Normal, _instance)
        batch_shape = torch.Size(batch_shape)
        new._given = self._given
        for name in ("loc", "scale", self._given):
            new.__dict__[name] = getattr(self, name).expand(*batch_shape, -1)
        super(AR1Normal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def _from_fisher_z(self) -> ar1.FromFisherZ:
        return ar1.from_fisher_z(self.fisher_z)

    @lazy_property
    def rho(self) -> Tensor:
        return self._from_fisher_z.rho

    @lazy_property
    def fisher_z(self) -> Tensor:
        return self.rho.atanh()

    @lazy_property
    def _innovation(self) -> Tensor:
        if self._given == "fisher_z":
            return self._from_fisher_z.innovation_scale
        return ar1.innovation_scale(self.rho)

    @lazy_property
    def _log_det_correlation(self) -> Tensor:
        if self._given == "fisher_z":
            values = self._from_fisher_z.log_one_minus_rho_squared
            return ar1.sum_steps(values, self._latent - 1)
        return ar1.log_det(self.rho, self._latent)

    @lazy_property
    def _half_log_det(self) -> Tensor:
        """Half the log-determinant of the covariance, shape batch_shape.    (1.4), notebooks/01"""
        return ar1.sum_steps(self.scale.log(), self._latent) + self._log_det_correlation / 2

    @property
    def _latent(self) -> int:
        return self._event_shape[0]

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        return self.stddev.square()

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the covariance, (*batch, latent, latent).      (1.5), notebooks/01"""
        return self.stddev.unsqueeze(-1) * ar1.cholesky(self.rho, self._latent, self._innovation)

    @property
    def covariance_matrix(self) -> Tensor:
        """scale_i scale_j R_ij, (*batch, latent, latent).                   (1.3), notebooks/01"""
        stddev = self.stddev
        correlation = ar1.correlation(self.rho, self._latent)
        return stddev.unsqueeze(-1) * correlation * stddev.unsqueeze(-2)

    @property
    def precision_matrix(self) -> Tensor:
        """Inverse covariance, tridiagonal, (*batch, latent, latent).        (1.7), notebooks/01"""
        stddev = self.stddev
        precision = ar1.precision(self.rho, self._latent, self._innovation)
        return precision / stddev.unsqueeze(-1) / stddev.unsqueeze(-2)

    def rsample(self, sample_shape=torch.Size()) -> Tensor:
        """Reparametrised draws, shape (*sample_shape, *batch, latent).      (3.2), notebooks/03"""
        shape = self._extended_shape(sample_shape)
        noise = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        if self._given == "fisher_z":
            rho, innovation, _ = self._from_fisher_z
        else:
            rho, innovation = self.rho, self._innovation
        # Not addcmul: rounded in two steps, as in Normal, rho = 0 gives its draws to the last bit.
        return self.loc + self.scale * ar1.correlate(noise, rho, innovation)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, from the whitened value in O(d).             (2.2), notebooks/02"""
        # torch's check cannot reshape an empty sample.
        if self._validate_args and not (isinstance(value, Tensor) and value.numel() == 0):
            self._validate_sample(value)
        noise = self._whiten((value - self.loc) / self.scale)
        constant = self._latent * math.log(2 * math.pi)
        return -0.5 * (noise.square().sum(-1) + constant) - self._half_log_det

    def entropy(self) -> Tensor:
        """d/2 (1 + log 2 pi) + 1/2 log det, in nats, shape batch_shape.     (2.6), notebooks/02"""
        return 0.5 * self._latent * (1 + math.log(2 * math.pi)) + self._half_log_det

    def _whiten(self, x: Tensor) -> Tensor:
        return ar1.whiten(x, self.rho, self._innovation)


def _as_parameter(name: str, value, loc: Tensor, sizes: tuple[int, int]) -> Tensor:
    """`value` as a tensor beside `loc` whose last dimension has one of two sizes."""
    if isinstance(value, Number):
        value = loc.new_tensor(value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(
            f"AR1Normal: {name} must be a number or a floating-point tensor, but it is "
            f"{_describe(value)}."
        )
    value = value.reshape(1) if value.dim() == 0 else value
    if value.shape[-1] not in sizes:
        raise ValueError(
            f"AR1Normal: {name} has shape {tuple(value.shape)}; beside loc of shape "
            f"{tuple(loc.shape)} its last dimension must be {sizes[0]} (shared) or {sizes[1]}."
        )
    return value


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


@register_kl(AR1Normal, AR1Normal)
def _kl_ar1normal_ar1normal(q: AR1Normal, p: AR1Normal) -> Tensor:
    """KL(q || p) in O(d): p's innovations, seen through q.                    (2.5), notebooks/02

    In p's units, q is the chain y_j = w_j x_j with w = q.scale / p.scale, and p whitens y_j to
    (y_j - r_p y_{j-1}) / c_p. Its second moment under q, a sum of squares, is what the trace adds.
    """
    _check_same_event(q, p)
    w = q.stddev / p.stddev
    carried = (w[..., 1:] * q.rho - w[..., :-1] * p.rho) / p._innovation
    fresh = w[..., 1:] * q._innovation / p._innovation
    trace = w[..., 0].square() + (carried.square() + fresh.square()).sum(-1)
    shift = p._whiten((q.loc - p.loc) / p.scale).square().sum(-1)
    return 0.5 * (trace + shift - q._latent) + p._half_log_det - q._half_log_det


@register_kl(AR1Normal, Independent)
def _kl_ar1normal_independent(q: AR1Normal, p: Independent) -> Tensor:
    """KL(q || p) for p = Independent(Normal, 1), the prior of a VAE.         (2.4), notebooks/02"""
    loc, scale = _diagonal_parameters(p)
    _check_same_event(q, p)
    shift = (q.loc - loc) / scale
    ratio = q.scale / scale
    terms = torch.sub(shift.square() + ratio.square(), ratio.log(), alpha=2)
    return 0.5 * (terms.sum(-1) - (q._log_det_correlation + q._latent))


@register_kl(Independent, AR1Normal)
def _kl_independent_ar1normal(q: Independent, p: AR1Normal) -> Tensor:
    loc, scale = _diagonal_parameters(q)
    return kl_divergence(AR1Normal(loc, scale, rho=loc.new_zeros(1), validate_args=False), p)


@register_kl(AR1Normal, MultivariateNormal)
def _kl_ar1normal_multivariatenormal(q: AR1Normal, p: MultivariateNormal) -> Tensor:
    _check_same_event(q, p)
    dense = MultivariateNormal(q.loc, scale_tril=q.scale_tril, validate_args=False)
    return kl_divergence(dense, p)


@register_kl(MultivariateNormal, AR1Normal)
def _kl_multivariatenormal_ar1normal(q: MultivariateNormal, p: AR1Normal) -> Tensor:
    """KL(q || p) in O(d^2): the trace is the squared norm of q's whitened Cholesky factor."""
    _check_same_event(q, p)
    columns = (q.scale_tril / p.stddev.unsqueeze(-1)).mT
    whitened = ar1.whiten(columns, p.rho.unsqueeze(-2), p._innovation.unsqueeze(-2))
    trace = whitened.square().sum((-2, -1))
    shift = p._whiten((q.loc - p.loc) / p.scale).square().sum(-1)
    half_log_det = q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (trace + shift - p._latent) + p._half_log_det - half_log_det


@register_kl(MultivariateNormal, Independent)
@register_kl(LowRankMultivariateNormal, Independent)
def _kl_dense_independent(q: Distribution, p: Independent) -> Tensor:
    """KL(q || p) for any normal q and diagonal p, which torch does not have.  (2.3), notebooks/02

    -H(q) + 1/2 sum_j [log(2 pi s_j) + (Var_q(z_j) + (E_q z_j - m_j)^2) / s_j], s and m those of p.
    """
    loc, scale = _diagonal_parameters(p)
    _check_same_event(q, p)
    second_moment = (q.variance + (q.mean - loc).square()) / scale.square()
    constant = 2 * scale.log() + math.log(2 * math.pi)
    return 0.5 * (constant + second_moment).sum(-1) - q.entropy()


def _diagonal_parameters(distribution: Independent) -> tuple[Tensor, Tensor]:
    """loc and scale of a diagonal normal over one event dimension."""
    base = distribution.base_dist
    if not isinstance(base, Normal) or distribution.reinterpreted_batch_ndims != 1:
        raise NotImplementedError(
            "This KL divergence is known for Independent(Normal(...), 1), but the other "
            f"distribution is {distribution}."
        )
    return base.loc, base.scale


def _check_same_event(q: Distribution, p: Distribution) -> None:
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"KL divergence between distributions over {q.event_shape[0]} and {p.event_shape[0]} "
            "variables is not defined; give both the same latent dimension."
        )
