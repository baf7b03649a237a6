"""The mathematics of a first-order autoregressive Gaussian, as pure functions on tensors.

A chain x_1, ..., x_d with unit variances and neighbouring correlations rho,

    x_1 = e_1,    x_j = rho_{j-1} x_{j-1} + sqrt(1 - rho_{j-1}^2) e_j,    e ~ N(0, I),      (1.1)

has the correlation matrix R_ij = rho^|i-j|, a Cholesky factor and a determinant in closed form,
and a tridiagonal inverse. The equation numbers are those of notebooks 01 to 03, where the chain is
called y, as x is an image there.

Shapes. `latent` is the length d of the chain. Every `rho` has shape (*batch, 1), one correlation
shared by all neighbours (the paper's case), or (*batch, latent - 1), one per step. The
*innovation scale* is sqrt(1 - rho^2); functions that take it as an argument compute it from `rho`
where it is not given, and a caller who knows Fisher's z passes that of `from_fisher_z`, which
stays exact where rho rounds to 1.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def innovation_scale(rho: Tensor) -> Tensor:
    """Standard deviation sqrt(1 - rho^2) of what a step adds to the chain.

    Written as a product because 1 - rho is exact in floating point near |rho| = 1 and 1 - rho^2
    is not.                                                                    (1.1), notebooks/01

    Args:
        rho: correlations in (-1, 1), any shape.
    Returns:
        Same shape, in (0, 1].
    """
    return ((1 - rho) * (1 + rho)).sqrt()


def log_one_minus_rho_squared(rho: Tensor, innovation: Tensor | None = None) -> Tensor:
    """log(1 - rho^2) from a correlation that is exact as given.               (1.4), notebooks/01

    log1p(-rho) + log1p(rho) near |rho| = 1, where rho^2 would round 1 - rho^2 away, and
    log1p(-rho^2) near 0, where the two terms of the sum would cancel.

    Args:
        rho: correlations in (-1, 1), any shape.
        innovation: sqrt(1 - rho^2) in the shape of rho, if known more precisely than from rho.
    Returns:
        Same shape, at most 0.
    """
    if innovation is None:
        large = torch.log1p(-rho) + torch.log1p(rho)
    else:
        large = 2 * innovation.log()
    small = torch.log1p(-rho.clamp(-0.5, 0.5).square())
    return torch.where(rho.abs() < 0.5, small, large)


class FromFisherZ(NamedTuple):
    """What the chain needs of a correlation that is given by its Fisher z, all in its shape."""

    rho: Tensor
    innovation_scale: Tensor
    log_one_minus_rho_squared: Tensor


def from_fisher_z(fisher_z: Tensor) -> FromFisherZ:
    """rho = tanh(a), and what a rounded rho could no longer tell, to full precision for every a.

    sqrt(1 - rho^2) = sech(a) = 2 exp(-|a|) / (1 + exp(-2 |a|))                (3.8), notebooks/03
    log(1 - rho^2) = -log1p(sinh(m)^2) - 2 |a - m|                             (3.9), notebooks/03

    with m the number next to a in [-M, M], where exp(-2 M) is below the last digit.

    Args:
        fisher_z: Fisher's z of a correlation, a = atanh(rho), any shape.
    Returns:
        rho in [-1, 1]; the innovation scale in (0, 1], 0 only where sech(a) underflows; the
        logarithm, at most 0 and finite for every finite a.
    """
    return FromFisherZ(*_FisherZ.apply(fisher_z))


def _saturation(dtype: torch.dtype) -> int:
    """A whole M such that exp(-2 M) is less than the last digit of 1."""
    return math.ceil(1 - math.log(torch.finfo(dtype).eps) / 2)


class _FisherZ(torch.autograd.Function):
    """tanh, sech and log sech^2 at once, with the derivatives

    sech(a)^2,    -sech(a) tanh(a),    -2 tanh(a).                             (3.10), notebooks/03

    They are a few operations where autograd would record some twenty, and exist at 0, where |a|
    has no derivative.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, ...]:
        decay = torch.exp(-a.abs())  # cosh overflows long before sech underflows
        limit = _saturation(a.dtype)
        near = a.clamp(-limit, limit)
        log = -torch.log1p(near.sinh().square()) - 2 * (a - near).abs()
        return a.tanh(), 2 * decay / (1 + decay.square()), log

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        ctx.save_for_backward(*outputs[:2])

    @staticmethod
    def backward(ctx: Any, of_rho: Tensor, of_innovation: Tensor, of_log: Tensor) -> Tensor:
        rho, innovation = ctx.saved_tensors
        return innovation * (of_rho * innovation - of_innovation * rho) - 2 * of_log * rho


def scan(innovations: Tensor, rho: Tensor, *, reverse: bool = False) -> Tensor:
    """Run the recursion x_1 = u_1, x_j = rho_{j-1} x_{j-1} + u_j in parallel.

    x = (I - rho S)^-1 u = ... (I + rho^4 S^4) (I + rho^2 S^2) (I + rho S) u    (3.3), notebooks/03

    with S the shift by one place: ceil(log2 latent) shifted multiply-adds instead of a loop over
    latent steps. With one rho per step the powers become running products, (3.4).

    Args:
        innovations: u, shape (*batch, latent); batch shapes of u and rho broadcast.
        rho: (*batch, 1) or (*batch, latent - 1), any real numbers.
        reverse: run from the other end, x_d = u_d, x_j = rho_j x_{j+1} + u_j: the transpose, (3.5).
    Returns:
        x, shape (*batch, latent).
    """
    _check_rho_shape(rho, innovations.shape[-1])
    return _Chain.apply(innovations, rho, None, reverse)


class _Chain(torch.autograd.Function):
    """x = P u, or P^T u where it is transposed, with derivatives that are scans themselves.

    u' = P^T x',    rho'_j = u'_{j+1} x_j     (a prime: derivative with respect to)
                                                                (3.5), (3.6), notebooks/03
    With an innovation scale c, u is the noise e times (1, c), and e' = (1, c) u', c' = u' e.
    The backward pass costs one scan the other way, whose derivative is a scan again. (There is no
    forward mode: torch would nest it wrongly and silently, pytorch/pytorch#197867.)
    """

    @staticmethod
    def forward(u: Tensor, rho: Tensor, innovation: Tensor | None, transposed: bool) -> Tensor:
        return _doubling(u, rho, innovation, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], x: Tensor) -> None:
        u, rho, innovation, ctx.transposed = inputs
        noise = () if innovation is None else (u, innovation)
        ctx.shape = u.shape
        ctx.save_for_backward(rho, x, *noise)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rho, x, *noise = ctx.saved_tensors
        back = _Chain.apply(gradient, rho, None, not ctx.transposed)
        later, earlier = (x, back) if ctx.transposed else (back, x)
        of_rho = _sum_to(rho.shape, later[..., 1:] * earlier[..., :-1])
        of_innovation = None
        if noise:
            u, innovation = noise
            if ctx.needs_input_grad[2]:
                of_innovation = _sum_to(innovation.shape, back[..., 1:] * u[..., 1:])
            if ctx.needs_input_grad[0]:
                back = back * _after_one(innovation, x.shape[-1])
        return _sum_to(ctx.shape, back), of_rho, of_innovation, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        # Batch dimensions broadcast anyway: put the mapped one before all others.
        *tensors, transposed = inputs
        given = [(t, dim) for t, dim in zip(tensors, dims, strict=False) if t is not None]
        inner = max(t.dim() - (dim is not None) for t, dim in given)
        mapped = [
            t if dim is None else t.movedim(dim, 0)[(slice(None), *[None] * (inner - t.dim() + 1))]
            for t, dim in given
        ]
        innovation = mapped[2] if len(mapped) == 3 else None
        return _Chain.apply(*mapped[:2], innovation, transposed), 0


for _function in (_FisherZ, _Chain):
    # Function.apply asks for the signature at every call; to find it out takes 20 microseconds.
    vars(_function.forward)["__signature__"] = inspect.signature(_function.forward)


def _doubling(
    u: Tensor, rho: Tensor, innovation: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """The rounds (3.4), each of which copies x and adds to the copy what the old x carries over."""
    latent, shared = u.shape[-1], rho.shape[-1] == 1
    batch = u.shape[:-1]
    if rho.shape[:-1] != batch:
        batch = torch.broadcast_shapes(batch, rho.shape[:-1])
    x, power, shift = u.expand(*batch, latent), rho, 1
    if innovation is not None:
        x = x.clone()
        x[..., 1:] *= innovation
    while shift < latent:
        result = x.clone()
        if transposed:
            result[..., :-shift].addcmul_(power, x[..., shift:])
        else:
            result[..., shift:].addcmul_(power, x[..., :-shift])
        x = result
        power = power * power if shared else power[..., shift:] * power[..., :-shift]
        shift *= 2
    return x if latent > 1 or innovation is not None else x.clone()


def _sum_to(shape: torch.Size, gradient: Tensor) -> Tensor:
    """Sum over what was broadcast, or shared along the chain."""
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def correlate(noise: Tensor, rho: Tensor, innovation: Tensor | None = None) -> Tensor:
    """Turn independent standard noise into the AR(1) chain: x = L(rho) noise.

    L is the Cholesky factor (1.5); it is never formed. Work O(d log d), depth O(log d).

                                                                       (1.1), (3.2), notebooks/03
    Args:
        noise: e, shape (*batch, latent); batch shapes of noise and rho broadcast.
        rho: (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        innovation: sqrt(1 - rho^2) in the shape of rho, if known more precisely than from rho.
    Returns:
        x, shape (*batch, latent), unit variances.
    Raises:
        ValueError: if rho has neither 1 nor latent - 1 entries.
    """
    _check_rho_shape(rho, noise.shape[-1])
    innovation = innovation_scale(rho) if innovation is None else innovation
    return _Chain.apply(noise, rho, innovation, False)


def whiten(x: Tensor, rho: Tensor, innovation: Tensor | None = None) -> Tensor:
    """Undo `correlate`: the noise that the recursion (1.1) turns into x, in O(d).

    e_1 = x_1,    e_j = (x_j - rho_{j-1} x_{j-1}) / sqrt(1 - rho_{j-1}^2)      (1.6), notebooks/01

    Args:
        x: (*batch, latent); batch shapes of x and rho broadcast.
        rho: (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        innovation: sqrt(1 - rho^2) in the shape of rho, if known more precisely than from rho.
    Returns:
        e = L(rho)^-1 x, shape (*batch, latent).
    Raises:
        ValueError: if rho has neither 1 nor latent - 1 entries.
    """
    scales = _innovation_scales(rho, x.shape[-1], innovation)
    return (x - pad(rho * x[..., :-1], (1, 0))) / scales


def transition(rho: Tensor, latent: int) -> Tensor:
    """What is left of x_j in x_i: the unit lower-triangular P_ij = rho_j ... rho_{i-1}, i >= j.

    P = (I - rho S)^-1, rho^(i-j) where rho is shared.                         (3.1), notebooks/03

    Args:
        rho: (*batch, 1) or (*batch, latent - 1).
        latent: number of variables d.
    Returns:
        P, shape (*batch, latent, latent).
    """
    identity = torch.eye(latent, dtype=rho.dtype, device=rho.device)
    return scan(identity, rho.unsqueeze(-2)).mT


def correlation(rho: Tensor, latent: int) -> Tensor:
    """Correlation matrix R_ij = rho^|i-j| (a running product where rho is per step).

                                                                               (1.2), notebooks/01
    Args:
        rho: (*batch, 1) or (*batch, latent - 1).
        latent: number of variables d.
    Returns:
        R, shape (*batch, latent, latent).
    """
    lower = transition(rho, latent)
    return lower + lower.tril(-1).mT


def cholesky(rho: Tensor, latent: int, innovation: Tensor | None = None) -> Tensor:
    """Cholesky factor of R: column 1 is rho^(i-1), column j is sqrt(1 - rho^2) rho^(i-j).

    Eq. 7 of the paper without its misprints.                                  (1.5), notebooks/01

    Args:
        rho: (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        latent: number of variables d.
        innovation: sqrt(1 - rho^2) in the shape of rho, if known more precisely than from rho.
    Returns:
        L with L L^T = R, lower triangular, shape (*batch, latent, latent).
    """
    return transition(rho, latent) * _innovation_scales(rho, latent, innovation).unsqueeze(-2)


def precision(rho: Tensor, latent: int, innovation: Tensor | None = None) -> Tensor:
    """Inverse of R: tridiagonal, because given its neighbours x_j depends on nothing else.

    diagonal 1 / (1 - rho^2) at both ends and (1 + rho^2) / (1 - rho^2) between them, and
    -rho / (1 - rho^2) beside it.                                              (1.7), notebooks/01

    Args:
        rho: (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        latent: number of variables d.
        innovation: sqrt(1 - rho^2) in the shape of rho, if known more precisely than from rho.
    Returns:
        R^-1, shape (*batch, latent, latent).
    """
    _check_rho_shape(rho, latent)
    innovation = innovation_scale(rho) if innovation is None else innovation
    steps = (*rho.shape[:-1], latent - 1)
    # 1 / (1 - rho^2) = 1 + rho^2 / (1 - rho^2), and each x_j belongs to the step before and after.
    odds = (rho / innovation).square().expand(steps)
    beside = (-rho / innovation.square()).expand(steps)
    diagonal = 1 + pad(odds, (1, 0)) + pad(odds, (0, 1))
    return diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)


def log_det(rho: Tensor, latent: int) -> Tensor:
    """log det R = (d - 1) log(1 - rho^2), the sum over the steps.             (1.4), notebooks/01

    Args:
        rho: (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        latent: number of variables d.
    Returns:
        Shape (*batch,), at most 0.
    """
    _check_rho_shape(rho, latent)
    return sum_steps(log_one_minus_rho_squared(rho), latent - 1)


def sum_steps(values: Tensor, steps: int) -> Tensor:
    """Sum over the last dimension, counting a single shared value `steps` times.

    Args:
        values: (*batch, 1) or (*batch, steps).
        steps: how many values there would be, were they not shared.
    Returns:
        Shape (*batch,).
    """
    return values.squeeze(-1) * steps if values.shape[-1] == 1 else values.sum(-1)


def _innovation_scales(rho: Tensor, latent: int, innovation: Tensor | None) -> Tensor:
    """(1, sqrt(1 - rho_1^2), ..., sqrt(1 - rho_{d-1}^2)), shape (*batch, latent)."""
    _check_rho_shape(rho, latent)
    innovation = innovation_scale(rho) if innovation is None else innovation
    return _after_one(innovation, latent)


def _after_one(innovation: Tensor, latent: int) -> Tensor:
    return pad(innovation.expand(*innovation.shape[:-1], latent - 1), (1, 0), value=1.0)


def _check_rho_shape(rho: Tensor, latent: int) -> None:
    if rho.dim() == 0 or rho.shape[-1] not in (1, latent - 1):
        raise ValueError(
            f"rho has shape {tuple(rho.shape)}; for {latent} latent variables its last dimension "
            f"must be 1 (one correlation for all neighbours) or {latent - 1} (one per step)."
        )
