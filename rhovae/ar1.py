"""The mathematics of a first-order autoregressive Gaussian, as pure functions on tensors.

A chain x_1, ..., x_d with unit variances and neighbouring correlations rho,

    x_1 = e_1,    x_j = rho_{j-1} x_{j-1} + sqrt(1 - rho_{j-1}^2) e_j,    e ~ N(0, I),      (1.1)

has the correlation matrix R_ij = rho^|i-j|, a Cholesky factor and a determinant in closed form,
and a tridiagonal inverse. The equation numbers are those of notebooks 01 to 03.

Shapes. `latent` is the length d of the chain. Every `rho` has shape (*batch, 1), one correlation
shared by all neighbours (the paper's case), or (*batch, latent - 1), one per step. The
*innovation scale* is sqrt(1 - rho^2); functions that take it as an argument compute it from `rho`
where it is not given, and a caller who knows Fisher's z passes `innovation_scale_from_fisher_z`,
which stays exact where rho rounds to 1.
"""

import math

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


def innovation_scale_from_fisher_z(fisher_z: Tensor) -> Tensor:
    """sqrt(1 - rho^2) = sech(a) for rho = tanh(a), to full precision for every a.

                                                                               (3.8), notebooks/03
    Args:
        fisher_z: Fisher's z of a correlation, a = atanh(rho), any shape.
    Returns:
        Same shape, in (0, 1]; 0 only where sech(a) underflows.
    """
    return _sech(fisher_z)


def log_one_minus_rho_squared(rho: Tensor) -> Tensor:
    """log(1 - rho^2) from a correlation that is exact as given.               (1.4), notebooks/01

    log1p(-rho) + log1p(rho) near |rho| = 1, where rho^2 would round 1 - rho^2 away, and
    log1p(-rho^2) near 0, where the two terms of the sum would cancel.

    Args:
        rho: correlations in (-1, 1), any shape.
    Returns:
        Same shape, at most 0.
    """
    large = torch.log1p(-rho) + torch.log1p(rho)
    small = torch.log1p(-rho.clamp(-0.5, 0.5).square())
    return torch.where(rho.abs() < 0.5, small, large)


def log_one_minus_rho_squared_from_fisher_z(fisher_z: Tensor) -> Tensor:
    """log(1 - rho^2) = log sech(a)^2 for rho = tanh(a), without cancellation anywhere.

    log sech(a)^2 = 2 (log 2 - |a| - log1p(exp(-2 |a|)))      for |a| >= 1
                  = -log1p(sinh(a)^2)                         for |a| <  1     (3.9), notebooks/03

    The second form serves near a = 0, where the first subtracts nearly equal numbers.

    Args:
        fisher_z: Fisher's z of a correlation, a = atanh(rho), any shape.
    Returns:
        Same shape, at most 0; finite for every finite a.
    """
    return _log_sech_squared(fisher_z)


def _with_derivative(value, derivative):
    """A function of one tensor whose derivative is given: derivative(a, value(a)).

    It is a few operations where autograd would record some twenty, and has all its derivatives at
    0, where |a| has not.
    """

    class WithDerivative(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(a):
            return value(a)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs, output)
            ctx.save_for_forward(*inputs, output)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * derivative(*ctx.saved_tensors)

        jvp = backward

    # A compiler refuses what has a forward mode, and does not need it.
    return lambda a: value(a) if torch.compiler.is_compiling() else WithDerivative.apply(a)


def _sech_value(a):
    decay = torch.exp(-a.abs())  # cosh overflows long before sech underflows
    return 2 * decay / (1 + decay.square())


def _log_sech_squared_value(a):
    magnitude = a.abs()
    large = 2 * (math.log(2) - magnitude - torch.log1p(torch.exp(-2 * magnitude)))
    small = -torch.log1p(a.clamp(-1, 1).sinh().square())
    return torch.where(magnitude < 1, small, large)


_sech = _with_derivative(_sech_value, lambda a, sech: -sech * a.tanh())
_log_sech_squared = _with_derivative(_log_sech_squared_value, lambda a, _: -2 * a.tanh())


def scan(innovations: Tensor, rho: Tensor) -> Tensor:
    """Run the recursion x_1 = u_1, x_j = rho_{j-1} x_{j-1} + u_j in parallel.

    x = (I - rho S)^-1 u = ... (I + rho^4 S^4) (I + rho^2 S^2) (I + rho S) u    (3.3), notebooks/03

    with S the shift by one place: ceil(log2 latent) shifted multiply-adds instead of a loop over
    latent steps. With one rho per step the powers become running products, (3.4).

    Args:
        innovations: u, shape (*batch, latent); batch shapes of u and rho broadcast.
        rho: (*batch, 1) or (*batch, latent - 1), any real numbers.
    Returns:
        x, shape (*batch, latent).
    """
    _check_rho_shape(rho, innovations.shape[-1])
    return _differentiable_scan(innovations, rho)


def _differentiable_scan(u: Tensor, rho: Tensor, transposed: bool = False) -> Tensor:
    # A compiler refuses what has a forward mode.
    function = _Scan if torch.compiler.is_compiling() else _ScanWithForwardMode
    return function.apply(u, rho, transposed)


class _Scan(torch.autograd.Function):
    """x = P u, or P^T u where it is transposed, with derivatives that are scans themselves.

    u' = P^T x',    rho'_j = u'_{j+1} x_j     (a prime: derivative with respect to)
                                                                (3.5), (3.6), notebooks/03
    The backward pass costs one scan the other way, whose derivative is a scan again. Of the
    forward pass nothing is kept but rho and the result.
    """

    @staticmethod
    def forward(innovations, rho, transposed):
        return _doubling(innovations, rho, transposed)

    @staticmethod
    def setup_context(ctx, inputs, x):
        innovations, rho, ctx.transposed = inputs
        ctx.shape = innovations.shape
        ctx.save_for_backward(rho, x)

    @staticmethod
    def backward(ctx, gradient):
        rho, x = ctx.saved_tensors
        run = _differentiable_scan if torch.is_grad_enabled() else _doubling
        back = run(gradient, rho, not ctx.transposed)
        later, earlier = (x, back) if ctx.transposed else (back, x)
        steps = later[..., 1:] * earlier[..., :-1]
        return _sum_to(ctx.shape, back), _sum_to(rho.shape, steps), None

    @staticmethod
    def vmap(info, dims, innovations, rho, transposed):
        # Batch dimensions broadcast anyway: put the mapped one before all others.
        pairs = [(innovations, dims[0]), (rho, dims[1])]
        inner = max(t.dim() - (dim is not None) for t, dim in pairs)
        mapped = [
            t if dim is None else t.movedim(dim, 0)[(slice(None), *[None] * (inner - t.dim() + 1))]
            for t, dim in pairs
        ]
        return _differentiable_scan(*mapped, transposed), 0


class _ScanWithForwardMode(_Scan):
    """Beside the gradient, how x moves with u and rho: dx = P (du + drho S x), or P^T and S^T."""

    @staticmethod
    def setup_context(ctx, inputs, x):
        _Scan.setup_context(ctx, inputs, x)
        ctx.save_for_forward(inputs[1], x)

    @staticmethod
    def jvp(ctx, innovations, rho, _):
        values, x = ctx.saved_tensors
        t = ctx.transposed
        carried = pad(rho * (x[..., 1:] if t else x[..., :-1]), (0, 1) if t else (1, 0))
        return _differentiable_scan(innovations + carried, values, t)


def _doubling(u: Tensor, rho: Tensor, transposed: bool = False) -> Tensor:
    """The rounds (3.4) in place: the product is complete before anything is added to."""
    latent, shared = u.shape[-1], rho.shape[-1] == 1
    batch = u.shape[:-1]
    if rho.shape[:-1] != batch:
        batch = torch.broadcast_shapes(batch, rho.shape[:-1])
    x, power, shift = u.expand(*batch, latent).clone(), rho, 1
    while shift < latent:
        early, late = x[..., :-shift], x[..., shift:]
        if transposed:
            early += power * late
        else:
            late += power * early
        power = power * power if shared else power[..., shift:] * power[..., :-shift]
        shift *= 2
    return x


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
    return scan(noise * _innovation_scales(rho, noise.shape[-1], innovation), rho)


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
    return pad(innovation.expand(*innovation.shape[:-1], latent - 1), (1, 0), value=1.0)


def _check_rho_shape(rho: Tensor, latent: int) -> None:
    if rho.dim() == 0 or rho.shape[-1] not in (1, latent - 1):
        raise ValueError(
            f"rho has shape {tuple(rho.shape)}; for {latent} latent variables its last dimension "
            f"must be 1 (one correlation for all neighbours) or {latent - 1} (one per step)."
        )
