"""AR1Normal, a multivariate normal whose correlations decay along a chain."""

import math
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    SigmoidTransform,
    biject_to,
    constraints,
    transform_to,
)
from torch.distributions.transforms import Transform
from torch.distributions.utils import _standard_normal, lazy_property
from torch.types import _size

from . import ar1, kernels, smoothing

if TYPE_CHECKING:
    from typing import Self  # which Python 3.10 does not have, nor need


class _OpenInterval(constraints.interval):
    """Between two bounds, both excluded (torch has only the closed and half-open ones)."""

    def check(self, value: Tensor) -> Tensor:
        return (self.lower_bound < value) & (value < self.upper_bound)


@biject_to.register(_OpenInterval)
@transform_to.register(_OpenInterval)
def _to_open_interval(constraint: _OpenInterval) -> Transform:
    low, high = constraint.lower_bound, constraint.upper_bound
    return ComposeTransform([SigmoidTransform(), _AffineBetween(low, high - low)])


class _AffineBetween(AffineTransform):
    """From (0, 1) to (loc, loc + scale), where rounding would otherwise reach a bound."""

    def _call(self, x: Tensor) -> Tensor:
        low, high = (x.new_tensor(bound) for bound in (self.loc, self.loc + self.scale))
        inside = low.nextafter(high), high.nextafter(low)
        return super()._call(x).clamp(*inside)


class _lazy_property(lazy_property):
    """torch's, which keeps what it has computed, but not where this would outlive its meaning.

    What a function transform or inference mode computes is of no use to autograd afterwards.
    """

    def __get__(self, instance: Any, obj_type: Any = None) -> Any:
        if instance is None or torch.compiler.is_compiling() or not _transient():
            return super().__get__(instance, obj_type)
        return self.wrapped(instance)


def _transient() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.is_inference_mode_enabled()


class AR1Normal(Distribution):
    r"""Multivariate normal distribution with first-order autoregressive correlations.

    z = loc + scale * x with the unit-variance chain

        x_1 = e_1,    x_j = rho_{j-1} x_{j-1} + sqrt(1 - rho_{j-1}^2) e_j,     (1.1), notebooks/01

    so that Cov(z_i, z_j) = scale_i scale_j rho^|i-j|. One shared `scale` and one shared `rho` give
    the posterior of rho-VAE, with s = scale^2; per-dimension scales and per-step correlations give
    the general Gauss-Markov chain; rho = 0 the diagonal normal. Sampling and conditioning cost
    O(d log d) at depth O(log d), or O(d) where they are compiled (`kernels`), everything else O(d),
    except the dense matrices, which are formed only when asked for. Derivatives are those of
    reverse mode, of any order; forward mode is refused.
    What follows from the parameters is computed once and kept, with its graph, as in torch's own:
    after a parameter has changed in place (a step of an optimiser), make a new instance. Copies
    hold the parameters alone.

    Along time, note that `scale` is the marginal standard deviation of each variable, not that of
    an innovation, and rho a correlation, not the coefficient of a transition:

        z_{j+1} - loc_{j+1} = coefficient_j (z_j - loc_j) + innovation_scale_j e_{j+1}
        coefficient_j = rho_j scale_{j+1} / scale_j

    which may exceed 1 in size where the scale grows. `from_transitions` takes these, and
    `condition` gives the chain after it was observed.

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

    loc: Tensor
    scale: Tensor
    _given: tuple[str, ...]  # what all but loc and scale follows from; a posterior has two of them

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float,
        rho: Tensor | float | None = None,
        *,
        fisher_z: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (rho is None) == (fisher_z is None):
            raise ValueError("AR1Normal needs either rho or fisher_z, and not both.")
        latent = _latent_of(loc)
        name, dependence = ("rho", rho) if fisher_z is None else ("fisher_z", fisher_z)
        scale = _as_parameter("scale", scale, loc, (1, latent))
        dependence = _as_parameter(name, dependence, loc, (1, latent - 1))
        parameters = {"loc": loc, "scale": scale, name: dependence}
        batch_shape = loc.shape[:-1]
        # In a training step they agree; then neither the question nor three views are needed.
        if any(value.shape[:-1] != batch_shape for value in parameters.values()):
            batch_shape = _check_batches(**parameters)
            parameters = {k: value.expand(*batch_shape, -1) for k, value in parameters.items()}
        self.__dict__.update(parameters)
        self._given = (name,)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)
        self._validate_args = (
            Distribution._validate_args if validate_args is None else validate_args
        )
        if self._validate_args:
            self._validate_parameters()

    @classmethod
    def from_precision(
        cls,
        loc: Tensor,
        diagonal: Tensor,
        off_diagonal: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> "Self":
        """The chain whose inverse covariance is tridiagonal.               (10.3), notebooks/10

        The pivots of the precision are differences; near |rho| = 1 they lose digits, all of them
        where 1 - rho^2 is below the last digit. After observations prefer `condition`, which
        subtracts nothing.

        Args:
            loc: mean, (*batch, latent).
            diagonal: of the precision, (*batch, latent).
            off_diagonal: the entries beside it, (*batch, latent - 1). Batch shapes broadcast.
        Raises:
            ValueError: shapes that do not fit, and, with validate_args, a precision that is not
                positive definite.
        """
        latent = _latent_of(loc)
        diagonal = _as_parameter("diagonal", diagonal, loc, (latent,))
        off_diagonal = _as_parameter("off_diagonal", off_diagonal, loc, (latent - 1,))
        _check_batches(loc=loc, diagonal=diagonal, off_diagonal=off_diagonal)
        chain, pivots = smoothing.from_precision(diagonal, off_diagonal)
        if Distribution._validate_args if validate_args is None else validate_args:
            for name, value in (("diagonal", diagonal), ("off_diagonal", off_diagonal)):
                _check_entries(name, value, value.isfinite(), "must be finite numbers")
            valid = (pivots > 0).all(-1)
            if not valid.all():
                raise ValueError(
                    "AR1Normal: the tridiagonal precision must be positive definite, but of "
                    f"{valid.numel()} in the batch, {(~valid).sum().item()} are not. A negative "
                    "pivot of rounding size means |rho| near 1: use condition or from_transitions."
                )
        return cls(loc, 1.0, rho=0.0, validate_args=validate_args)._with_chain(loc, chain)

    @classmethod
    def from_transitions(
        cls,
        loc: Tensor,
        scale_first: Tensor | float,
        coefficient: Tensor | float,
        innovation_scale: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> "Self":
        """The chain z_{j+1} - loc_{j+1} = coefficient_j (z_j - loc_j) + innovation_scale_j e.

                                                                            (10.3), notebooks/10
        Args:
            loc: mean, (*batch, latent).
            scale_first: standard deviation of the first variable, (*batch, 1), or a number.
            coefficient: (*batch, 1) or (*batch, latent - 1), or a number; of any size.
            innovation_scale: likewise, positive. Batch shapes broadcast.
        Raises:
            ValueError: shapes that do not fit, and, with validate_args, values out of range.
        """
        steps = _latent_of(loc) - 1
        first = _as_parameter("scale_first", scale_first, loc, (1,))
        coefficient = _as_parameter("coefficient", coefficient, loc, (1, steps))
        innovation = _as_parameter("innovation_scale", innovation_scale, loc, (1, steps))
        _check_batches(
            loc=loc, scale_first=first, coefficient=coefficient, innovation_scale=innovation
        )
        if Distribution._validate_args if validate_args is None else validate_args:
            for name, value in (("scale_first", first), ("innovation_scale", innovation)):
                _check_entries(name, value, value > 0, "must be positive standard deviations")
            finite = coefficient.isfinite()
            _check_entries("coefficient", coefficient, finite, "must be finite numbers")
        innovation = innovation.expand(*innovation.shape[:-1], steps)
        chain = smoothing.from_transitions(first, coefficient, innovation)
        return cls(loc, 1.0, rho=0.0, validate_args=validate_args)._with_chain(loc, chain)

    def _validate_parameters(self) -> None:
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
            entries: Any = self.arg_constraints[name]
            each = getattr(entries, "base_constraint", entries)  # which a subclass may change
            _check_entries(name, value, each.check(value), remedy)

    def expand(self, batch_shape: _size, _instance: Any = None) -> "Self":
        return self._remade(batch_shape, _instance, **self._parameters())

    def _parameters(self) -> dict[str, Tensor]:
        return {name: self.__dict__[name] for name in ("loc", "scale", *self._given)}

    def __getstate__(self) -> dict[str, Any]:
        # What follows from the parameters would be cut off from those of the copy.
        return {
            name: value
            for name, value in self.__dict__.items()
            if name in self._given
            or not isinstance(getattr_static(type(self), name, None), _lazy_property)
        }

    def _remade(self, batch_shape: _size, _instance: Any = None, **known: Tensor) -> "Self":
        """One of this class with these parameters: loc, scale, and either rho, fisher_z, or rho and
        the _innovation of a posterior, which holds the digits that a rho near 1 has lost."""
        new: Self = self._get_checked_instance(AR1Normal, _instance)
        batch_shape = torch.Size(batch_shape)
        new._given = tuple(name for name in known if name not in ("loc", "scale"))
        for name, value in known.items():
            same = value.shape[:-1] == batch_shape
            new.__dict__[name] = value if same else value.expand(*batch_shape, -1)
        event_shape = known["loc"].shape[-1:]
        super(AR1Normal, new).__init__(batch_shape, event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @_lazy_property
    def _from_fisher_z(self) -> ar1.FromFisherZ:
        return kernels.from_fisher_z(self.fisher_z)

    @_lazy_property
    def rho(self) -> Tensor:
        return self._from_fisher_z.rho

    @_lazy_property
    def fisher_z(self) -> Tensor:
        if self._given == ("rho",):
            return self.rho.atanh()
        # Not asinh(rho / c), whose derivative squares what may be as large as its type can hold.
        size = self.rho.abs()
        far = (size.log1p() - self._innovation.log()) * self.rho.sign()
        return torch.where(size < 0.5, self.rho.clamp(-0.5, 0.5).atanh(), far)

    @_lazy_property
    def _innovation(self) -> Tensor:
        if self._given == ("rho",):
            return ar1.innovation_scale(self.rho)
        return self._from_fisher_z.innovation_scale

    @_lazy_property
    def _log_steps(self) -> Tensor:
        """log(1 - rho^2), shared or per step."""
        if self._given == ("fisher_z",):
            return self._from_fisher_z.log_one_minus_rho_squared
        known = None if self._given == ("rho",) else self._innovation
        return ar1.log_one_minus_rho_squared(self.rho, known)

    @_lazy_property
    def _log_det_correlation(self) -> Tensor:
        return ar1.sum_steps(self._log_steps, self._latent - 1)

    @_lazy_property
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

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:
        """Reparametrised draws, shape (*sample_shape, *batch, latent).      (3.2), notebooks/03"""
        shape = self._extended_shape(sample_shape)
        noise = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        innovation = None if self._given == ("rho",) else self._innovation
        return kernels.draw(self.loc, self.scale, noise, self.rho, innovation)

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

    @property
    def coefficient(self) -> Tensor:
        """rho_j scale_{j+1} / scale_j, what a step carries over of the deviation before it.

        Shape (*batch, latent - 1); beyond 1 where the scale grows.          (1.1), notebooks/01
        """
        stddev = self.stddev
        return self.rho * stddev[..., 1:] / stddev[..., :-1]

    @property
    def innovation_scale(self) -> Tensor:
        """scale_{j+1} sqrt(1 - rho_j^2), the standard deviation of what a step adds.

        Shape (*batch, latent - 1).                                          (1.1), notebooks/01
        """
        return self.stddev[..., 1:] * self._innovation

    def window(self, start: int | None, stop: int | None) -> "Self":
        """Marginal distribution of the variables start, ..., stop - 1, counted as in a slice."""
        start, stop, _ = slice(start, stop).indices(self._latent)
        if stop <= start:
            raise ValueError(
                f"AR1Normal: the window from {start} to {stop} of {self._latent} variables is "
                "empty; stop is excluded, as in a slice."
            )
        variables, steps = slice(start, stop), slice(start, stop - 1)
        part = {
            name: value if name != "loc" and value.shape[-1] == 1
            else value[..., variables if name in ("loc", "scale") else steps]
            for name, value in self._parameters().items()
        }  # fmt: skip
        return self._remade(self.batch_shape, **part)

    def condition(self, value: Tensor, *, precision: Tensor | float) -> "Self":
        """The exact posterior of this chain after independent Gaussian observations of it.

        To forecast, to fill gaps, or to interpolate: make the chain on the longer or finer grid,
        and give precision 0 to the steps without an observation::

            >>> import torch
            >>> from rhovae import AR1Normal
            >>> p = AR1Normal(torch.zeros(5), scale=1.0, rho=0.5)
            >>> value = torch.tensor([float("nan"), 2.0, 0.0, 0.0, 0.0])
            >>> precision = torch.tensor([0.0, 1e9, 0.0, 0.0, 0.0])  # one observation, exact
            >>> q = p.condition(value, precision=precision)
            >>> q.mean
            tensor([1.0000, 2.0000, 1.0000, 0.5000, 0.2500])
            >>> q.stddev
            tensor([8.6603e-01, 3.1623e-05, 8.6603e-01, 9.6825e-01, 9.9216e-01])

        It is p(z) prod_t N(value_t; z_t, 1 / precision_t), normalised: a Kalman smoother, and an
        AR1Normal again, because observations add only to the diagonal of the precision (10.1).
        Computed without a subtraction at depth O(log latent), by (10.2) to (10.4), notebooks/10.
        Everything is differentiable, in value, precision and the parameters of the chain. This is
        not pyro.condition, which fixes the value of a sample site.

        Args:
            value: what was observed, (*batch, latent), in the units of loc. Where the precision is
                0 it does not matter and may be NaN.
            precision: inverse variance of the noise, at least 0 and finite, (*batch, 1) or
                (*batch, latent), or a number; 0 is not observed. Batch shapes broadcast.
        Returns:
            The posterior, of the same class.
        Raises:
            ValueError: shapes that do not fit, and, with validate_args, a precision that is
                negative or not finite, or a value that is not finite where it was observed.
        """
        value, precision = self._observations(value, precision)
        shape = self.loc.shape
        if not precision.shape == value.shape == shape:
            precision, value = (
                x.expand(torch.broadcast_shapes(x.shape, shape)) for x in (precision, value)
            )
        return self._observed(precision, value)

    def log_evidence(
        self, value: Tensor, *, precision: Tensor | float, posterior: "AR1Normal | None" = None
    ) -> Tensor:
        """log p(value): how probable the observations are with the chain integrated out.

        log p(z) + log p(value | z) - log q(z), for every z the same; at the mean of q it needs no
        determinant but the ratio of q's and p's.                           (10.6), notebooks/10

        The density of real observations, whose noise has this precision; it is not an ELBO, and
        not meaningful for pseudo-observations that a network made up.

        Args:
            value, precision: as in `condition`; steps with precision 0 do not count.
            posterior: what `condition` returned for them, if it is there already.
        Returns:
            Nats, shape batch_shape (that of the observations, where it is larger).
        Raises:
            ValueError: as in `condition`.
        """
        q = self.condition(value, precision=precision) if posterior is None else posterior
        _check_same_event(q, self)
        value, precision = self._observations(value, precision)
        observed = precision > 0
        log_precision = torch.where(observed, precision, 1).log() - math.log(2 * math.pi)
        residual = torch.where(observed, value - q.loc, 0)
        fit = torch.where(observed, log_precision, 0) - precision * residual.square()
        whitened = self._whiten((q.loc - self.loc) / self.scale).square()
        # Step by step: the determinants themselves are large, and their difference is not.
        ratio = (q.stddev / self.scale).log().sum(-1)
        ratio = ratio + ar1.sum_steps(q._log_steps - self._log_steps, self._latent - 1) / 2
        return (fit - whitened).sum(-1) / 2 + ratio

    def _observations(self, value: Tensor, precision: Tensor | float) -> tuple[Tensor, Tensor]:
        """Both checked and (*batch, latent)."""
        latent = self._latent
        value = _as_parameter("value", value, self.loc, (latent,))
        precision = _as_parameter("precision", precision, self.loc, (1, latent))
        if not self.loc.shape[:-1] == value.shape[:-1] == precision.shape[:-1]:
            _check_batches(loc=self.loc, value=value, precision=precision)
        if self._validate_args:
            remedy = "must be finite and not negative (0 where there is no observation)"
            _check_entries("precision", precision, precision >= 0, remedy)
            valid = (precision <= 0) | value.isfinite()
            if not torch._is_all_true(valid):
                raise ValueError(
                    f"AR1Normal: {(~valid).sum().item()} values are not finite numbers but have a "
                    "positive precision; give precision 0 where there is no observation."
                )
        return value, precision.expand(*precision.shape[:-1], latent)

    def _observed(self, weight: Tensor, value: Tensor, natural: bool = False) -> "Self":
        """The posterior; weight, value and natural as in `smoothing.condition`."""
        prior = self.loc, self.scale, self.rho, self._innovation
        return self._with_chain(*smoothing.condition(*prior, weight, value, natural=natural))

    def _with_chain(self, loc: Tensor, chain: smoothing.Chain) -> "Self":
        """One of this class, unchecked; its fisher_z follows when it is asked for."""
        batch_shape = loc.shape[:-1]
        if any(part.shape[:-1] != batch_shape for part in chain):
            batch_shape = torch.broadcast_shapes(batch_shape, *(part.shape[:-1] for part in chain))
        known = {"scale": chain.scale, "rho": chain.rho, "_innovation": chain.innovation}
        return self._remade(batch_shape, loc=loc, **known)

    def _whiten(self, x: Tensor) -> Tensor:
        return ar1.whiten(x, self.rho, self._innovation)


def _latent_of(loc: Any) -> int:
    """Number of variables, of a loc that can be one."""
    if not isinstance(loc, Tensor) or not loc.is_floating_point() or loc.dim() < 1:
        raise ValueError(
            "AR1Normal: loc must be a floating-point tensor of shape (*batch, latent) with at "
            f"least one dimension, but it is {_describe(loc)}."
        )
    if loc.shape[-1] < 1:
        raise ValueError(
            f"AR1Normal: loc has shape {tuple(loc.shape)}; it needs at least 1 latent variable."
        )
    return loc.shape[-1]


def _check_batches(**tensors: Tensor) -> torch.Size:
    """The batch shape that these broadcast to."""
    try:
        return torch.broadcast_shapes(*(value.shape[:-1] for value in tensors.values()))
    except RuntimeError:
        *shapes, last = (f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(
            f"AR1Normal: the batch shapes of {', '.join(shapes)} and {last} do not broadcast; "
            "they are all dimensions but the last."
        ) from None


def _check_entries(name: str, value: Tensor, valid: Tensor, remedy: str) -> None:
    # torch's own way to ask, which vmap can follow.
    if not torch._is_all_true(valid) or not _all_finite(value):
        valid = valid & value.isfinite()
        raise ValueError(
            f"AR1Normal: the entries of {name} {remedy}, but of {value.numel()} in shape "
            f"{tuple(value.shape)}, {(~valid).sum().item()} are not; the first is "
            f"{value[~valid][0].item():.6g}."
        )


def _all_finite(value: Tensor) -> bool:
    """Asked in one pass where it can be: what has a finite sum is finite."""
    finite = torch._is_all_true(value.detach().sum().isfinite())
    return bool(finite) or bool(torch._is_all_true(value.isfinite()))


def _as_parameter(name: str, value: Any, loc: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """`value` as a tensor beside `loc` whose last dimension has one of these sizes."""
    if isinstance(value, int | float):
        value = loc.new_tensor(value)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(
            f"AR1Normal: {name} must be a number or a floating-point tensor, but it is "
            f"{_describe(value)}."
        )
    value = value.reshape(1) if value.dim() == 0 else value
    if value.shape[-1] not in sizes:
        shared = len(sizes) == 2 and sizes[0] != sizes[1]
        expected = f"{sizes[0]} (shared) or {sizes[1]}" if shared else f"{sizes[0]}"
        raise ValueError(
            f"AR1Normal: {name} has shape {tuple(value.shape)}; beside loc of shape "
            f"{tuple(loc.shape)} its last dimension must be {expected}."
        )
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _check_same_event(q: Distribution, p: Distribution) -> None:
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"KL divergence between distributions over {q.event_shape[0]} and {p.event_shape[0]} "
            "variables is not defined; give both the same latent dimension."
        )
