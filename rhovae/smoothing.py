"""Gauss-Markov chains from their parts: by conditioning, from transitions, from a precision.

A chain given by its transitions, x_1 with variance V_1 and

    x_{j+1} = k_j x_j + sqrt(n_j) e_{j+1},    e ~ N(0, I),

has marginal variances V and correlations of neighbours that follow by one more recursion, all of
whose terms are positive. An AR(1) chain that was seen through independent Gaussian noise, and a
chain given by a tridiagonal precision, are brought to this form by a recursion backwards in time,
the only step that is not linear. Everything here runs in O(log latent) parallel steps. The
equation numbers are those of notebook 10.

Shapes are those of `ar1`: (*batch, latent) for what belongs to a variable, (*batch, latent - 1)
for what belongs to a step.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from . import ar1, kernels


class Chain(NamedTuple):
    """Standard deviations, (*batch, latent), correlations and sqrt(1 - rho^2), (*batch, steps)."""

    scale: Tensor
    rho: Tensor
    innovation: Tensor


def condition(
    loc: Tensor,
    scale: Tensor,
    rho: Tensor,
    innovation: Tensor,
    weight: Tensor,
    value: Tensor,
    *,
    natural: bool = False,
) -> tuple[Tensor, Chain]:
    """loc + scale times the unit chain (1.1), given noisy values of it, as a chain again.

    The unit chain is given u_j ~ N(x_j, 1 / w_j), w_j = scale_j^2 / the variance of the noise:

    J_j = w_j + rho_j^2 J_{j+1} / D_j,    D_j = 1 + c_j^2 J_{j+1}             (10.2), notebooks/10
    k_j = rho_j / D_j,    n_j = c_j^2 / D_j,    V_1 = 1 / (1 + J_1)           (10.3), notebooks/10
    H_j = w_j u_j + k_j H_{j+1},    m_{j+1} = k_j m_j + n_j H_{j+1}           (10.4), notebooks/10

    rho_j, c_j, D_j, k_j and n_j belong to the step from j to j+1. J_j and H_j are what the values
    from j on say about x_j: its precision, and the precision times the mean. c is the innovation
    scale. No term is subtracted from another, so nothing is lost near |rho| = 1.

    Args:
        loc, scale: before, (*batch, latent), and (*batch, 1) or (*batch, latent).
        rho: correlations of neighbours before, (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        innovation: sqrt(1 - rho^2), in the shape of rho.
        weight: precision of the values, (*batch, latent), at least 0; 0 is not observed.
        value: what was observed, (*batch, latent), in the units of loc; any number or NaN where the
            weight is 0. Batch shapes broadcast; the mean, which alone depends on the value, may
            have a larger one than the rest.
        natural: whether weight and value are w and w u instead.
    Returns:
        The mean, (*batch, latent), and the chain around it.
    """
    by_scan = partial(_condition, natural=natural)
    inputs = loc, scale, rho, innovation, weight, value
    mean, *chain = kernels.condition(by_scan, *inputs, natural=natural)
    return mean, Chain(*chain)


def _condition(
    loc: Tensor,
    scale: Tensor,
    rho: Tensor,
    innovation: Tensor,
    weight: Tensor,
    value: Tensor,
    natural: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not natural:
        # Before any product: 0 * nan is nan, in the backward pass too.
        deviation = torch.where((weight > 0) | value.isfinite(), value, loc) - loc
        weight = weight * scale.square()
        value = weight * deviation / scale
    mean, sd, after_rho, after_innovation = _condition_unit(rho, innovation, weight, value)
    return loc + scale * mean, scale * sd, after_rho, after_innovation


def _condition_unit(
    rho: Tensor, innovation: Tensor, weight: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fresh = innovation.square()
    known = information(weight, rho.square(), fresh)
    damping = 1 + fresh * known[..., 1:]
    coefficient = rho / damping
    variances = torch.cat((1 / (1 + known[..., :1]), fresh / damping), -1)
    pulled = ar1.scan(shift, coefficient, reverse=True)
    mean = ar1.scan(variances * pulled, coefficient)
    # sqrt(n) without squaring the innovation scale, which would underflow first.
    return mean, *_from_steps(variances, coefficient, innovation * damping.rsqrt())


def from_transitions(first: Tensor, coefficient: Tensor, innovation: Tensor) -> Chain:
    """Marginal scales and correlations of a chain that is given step by step.

    V_1 = first^2,    V_{j+1} = k_j^2 V_j + n_j                               (10.3), notebooks/10

    Args:
        first: standard deviation of the first variable, (*batch, 1), positive.
        coefficient: k, (*batch, 1) or (*batch, steps), any real numbers.
        innovation: sqrt(n), (*batch, steps), positive. Batch shapes broadcast.
    """
    batch = torch.broadcast_shapes(first.shape[:-1], innovation.shape[:-1])
    parts = torch.cat([x.expand(*batch, x.shape[-1]) for x in (first, innovation)], -1)
    # In units in which no square is too large or too small for its type.
    unit = parts.detach().amax(-1, keepdim=True)
    chain = _from_steps((parts / unit).square(), coefficient, innovation / unit)
    return chain._replace(scale=chain.scale * unit)


def _from_steps(variances: Tensor, coefficient: Tensor, innovation: Tensor) -> Chain:
    """(V_1, n_1, n_2, ...), k and sqrt(n)."""
    scale = ar1.scan(variances, coefficient.square()).sqrt()
    before, after = scale[..., :-1], scale[..., 1:]
    # Rounding may leave the quotient beyond 1, where a long chain would grow.
    return Chain(scale, (coefficient * before / after).clamp(-1, 1), innovation / after)


def from_precision(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Chain, Tensor]:
    """Scales and correlations of a chain whose precision is tridiagonal, and its pivots.

    In units in which the diagonal is 1, with b beside it, the pivots from the last variable on are
    S_j = 1 - M_{j+1} with M_j = b_{j-1}^2 / (1 - M_{j+1}), M_{d+1} = 0. It is (10.2) with D_j = S_j
    and (10.5) combines it likewise. Then k_j = -b_j / S_{j+1} and n_j = 1 / S_{j+1}.

    Args:
        diagonal: (*batch, latent), positive.
        off_diagonal: (*batch, latent - 1). Batch shapes broadcast.
    Returns:
        The chain, and the pivots S, (*batch, latent), all of them positive if and
        only if the precision is positive definite.
    """
    root = diagonal.sqrt()
    beside = off_diagonal / root[..., 1:] / root[..., :-1]
    eliminated = information(beside.square(), beside[..., :-1].square(), root.new_full((1,), -1.0))
    pivots = pad(1 - eliminated, (0, 1), value=1.0)
    innovation = pivots.rsqrt()
    transitions = -beside / pivots[..., 1:]
    chain = from_transitions(innovation[..., :1], transitions, innovation[..., 1:])
    return chain._replace(scale=chain.scale / root), pivots


def information(weight: Tensor, gain: Tensor, damping: Tensor) -> Tensor:
    """J_j = w_j + A_j J_{j+1} / (1 + C_j J_{j+1}), backwards from the last J = w, in parallel.

    Two such steps are one: of an earlier i and a later j, with D = 1 + C_i J_j,

    (A_i A_j / D^2,  C_j + A_j C_i / D,  J_i + A_i J_j / D)                   (10.5), notebooks/10

    so neighbours are joined to half as many steps, those solved the same way, and the variables
    left out filled in: O(latent) work at depth O(log latent).

    Args:
        weight: w, (*batch, latent).
        gain: A, (*batch, 1) or (*batch, latent - 1).
        damping: C, likewise. Batch shapes broadcast.
    Returns:
        J, shape (*batch, latent).
    Reference:
        Särkkä and García-Fernández (2021), Temporal parallelization of Bayesian smoothers, arXiv
        1905.13002, for smoothing by an associative operation.
    """
    latent = weight.shape[-1]
    batch = torch.broadcast_shapes(weight.shape[:-1], gain.shape[:-1], damping.shape[:-1])
    weight = weight.expand(*batch, latent)
    if latent < 2:
        return weight
    steps = (*batch, latent - 1)
    return _Information.apply(weight, gain.expand(steps), damping.expand(steps))


class _Information(Function):
    """The recursion, with the derivatives that it has step by step and not those of its joining.

    With J' the derivative with respect to J, g_{j+1} = J'_{j+1} + (A_j / D_j^2) g_j is linear, one
    scan, and w'_j = g_j, A'_j = g_j J_{j+1} / D_j, C'_j = -g_j A_j (J_{j+1} / D_j)^2. They are
    made of functions with derivatives, and so have derivatives themselves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, gain: Tensor, damping: Tensor) -> Tensor:
        # The last variable maps what comes after it, 0, to its own weight.
        return _solve(pad(gain, (0, 1)), pad(damping, (0, 1)), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        gain, damping, known = ctx.saved_tensors
        later = known[..., 1:]
        inverse = (1 + damping * later).reciprocal()
        passed = later * inverse
        of_weight = ar1.scan(gradient, gain * inverse.square())
        of_gain = of_weight[..., :-1] * passed
        return of_weight, of_gain, -of_gain * gain * passed


def _solve(gain: Tensor, damping: Tensor, weight: Tensor) -> Tensor:
    """J_i = w_i + A_i J_{i+1} / (1 + C_i J_{i+1}), with J = 0 after the last."""
    latent = weight.shape[-1]
    if latent == 1:
        return weight
    parts = [gain, damping, weight]
    if latent % 2:
        parts = [pad(part, (0, 1)) for part in parts]
    (a, a_next), (c, c_next), (w, w_next) = ((x[..., ::2], x[..., 1::2]) for x in parts)
    inverse = (1 + c * w_next).reciprocal()
    share = a_next * inverse
    first = _solve(a * inverse * share, c_next + c * share, w + a * w_next * inverse)
    after = pad(first[..., 1:], (0, 1))
    second = w_next + a_next * after / (1 + c_next * after)
    return torch.stack((first, second), -1).flatten(-2)[..., :latent]
