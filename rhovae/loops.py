"""The draw of AR1Normal and its gradient as plain loops, compiled by numba (rhovae[fast]).

    z_j = loc_j + scale_j x_j,    x_1 = e_1,    x_j = rho_{j-1} x_{j-1} + c_{j-1} e_j        (1.1)

with c^2 = 1 - rho^2, and backwards, a prime for the derivative with respect to,

    u'_j = scale_j z'_j + rho_j u'_{j+1},    scale'_j = z'_j x_j,
    rho'_j = u'_{j+1} x_j,    c'_j = u'_{j+1} e_{j+1}                                        (3.5)

(notebooks 01 and 03; loc' is z'). Each goes over the numbers once. `kernels` decides when they run
and imports this module then. A chain is a row; there are `rows` of noise, and parameters for
`batch` of them, which repeat. What is shared along a chain has one column.
"""

from ctypes import CFUNCTYPE, c_int64, c_void_p
from functools import cache
from inspect import signature
from math import sqrt
from typing import Any

from numba import carray, cfunc, njit, types


@njit(fastmath={"contract"})
def multiply_add(x, rho, u):
    """rho x + u, which may be rounded once: the only step that has to wait for the one before."""
    return rho * x + u


@njit
def innovation_scale(rho):
    """sqrt((1 - rho) (1 + rho)), see `ar1`."""
    one = type(rho)(1)
    return type(rho)(sqrt((one - rho) * (one + rho)))


def forward(loc, scale, rho, c, noise, x, z, start, stop, batch, latent, scales, rhos, known):
    """Rows start to stop of x and z. Where c is not `known`, it follows from rho."""
    loc, scale = carray(loc, (batch, latent)), carray(scale, (batch, scales))
    rho, c = carray(rho, (batch, rhos)), carray(c, (batch, rhos))
    noise, x, z = (
        carray(noise, (stop, latent)),
        carray(x, (stop, latent)),
        carray(z, (stop, latent)),
    )
    for i in range(start, stop):
        p = i % batch
        chain = noise[i, 0]
        x[i, 0], z[i, 0] = chain, loc[p, 0] + scale[p, 0] * chain
        r = rho[p, 0]
        innovation = c[p, 0] if known else innovation_scale(r)
        for j in range(1, latent):
            if rhos > 1:
                r = rho[p, j - 1]
                innovation = c[p, j - 1] if known else innovation_scale(r)
            chain = multiply_add(chain, r, innovation * noise[i, j])
            x[i, j], z[i, j] = chain, loc[p, j] + scale[p, j if scales > 1 else 0] * chain


def backward(
    scale, rho, c, noise, x, of_z, of_scale, of_rho, of_c,
    start, stop, batch, latent, scales, rhos, known,
):  # fmt: skip
    """Rows start to stop of the derivatives. Where c is not `known`, c' = -rho / c goes into rho'.

    The sums of what is shared are taken in float64.
    """
    scale, rho, c = (
        carray(scale, (batch, scales)),
        carray(rho, (batch, rhos)),
        carray(c, (batch, rhos)),
    )
    noise, x, of_z = (
        carray(noise, (stop, latent)),
        carray(x, (stop, latent)),
        carray(of_z, (stop, latent)),
    )
    of_scale, of_rho, of_c = (
        carray(of_scale, (stop, scales)),
        carray(of_rho, (stop, rhos)),
        carray(of_c, (stop, rhos)),
    )
    last = latent - 1
    for i in range(start, stop):
        p = i % batch
        r = rho[p, 0]
        sum_scale = sum_rho = sum_c = 0.0
        later = type(r)(0)
        for j in range(last, -1, -1):
            s = scale[p, j if scales > 1 else 0]
            if scales > 1:
                of_scale[i, j] = of_z[i, j] * x[i, j]
            else:
                sum_scale += of_z[i, j] * x[i, j]
            if j < last:
                along, across = later * x[i, j], later * noise[i, j + 1]
                if rhos > 1:
                    r = rho[p, j]
                    if known:
                        of_rho[i, j], of_c[i, j] = along, across
                    else:
                        of_rho[i, j] = along - across * (r / innovation_scale(r))
                else:
                    sum_rho += along
                    sum_c += across
            later = multiply_add(later, r, s * of_z[i, j])
        if scales == 1:
            of_scale[i, 0] = sum_scale
        if rhos == 1:
            if known:
                of_rho[i, 0], of_c[i, 0] = sum_rho, sum_c
            else:
                of_rho[i, 0] = sum_rho - sum_c * (r / innovation_scale(r))


def condition(
    rho, c, weight, shift, inverse, known, pulled, mean, scale, after_rho, after_c,
    start, stop, batch, latent, rhos,
):  # fmt: skip
    """`smoothing.condition`, (10.2) to (10.4), with 1 / D, J and H beside its results."""
    rho, c = carray(rho, (batch, rhos)), carray(c, (batch, rhos))
    weight, shift = carray(weight, (stop, latent)), carray(shift, (stop, latent))
    known, pulled = carray(known, (stop, latent)), carray(pulled, (stop, latent))
    mean, scale = carray(mean, (stop, latent)), carray(scale, (stop, latent))
    last = latent - 1
    inverse = carray(inverse, (stop, last))
    after_rho, after_c = carray(after_rho, (stop, last)), carray(after_c, (stop, last))
    one = type(rho[0, 0])(1)
    for i in range(start, stop):
        p = i % batch
        r, innovation = rho[p, 0], c[p, 0]
        information, pull = weight[i, last], shift[i, last]
        known[i, last], pulled[i, last] = information, pull
        for j in range(last - 1, -1, -1):
            if rhos > 1:
                r, innovation = rho[p, j], c[p, j]
            share = one / multiply_add(information, innovation * innovation, one)
            information = multiply_add(information * share, r * r, weight[i, j])
            pull = multiply_add(pull, r * share, shift[i, j])
            inverse[i, j], known[i, j], pulled[i, j] = share, information, pull
        variance = one / (one + information)
        centre = variance * pull
        mean[i, 0], scale[i, 0] = centre, variance
        for j in range(last):
            if rhos > 1:
                r, innovation = rho[p, j], c[p, j]
            k, q = r * inverse[i, j], innovation * innovation * inverse[i, j]
            variance = multiply_add(variance, k * k, q)
            centre = multiply_add(centre, k, q * pulled[i, j + 1])
            mean[i, j + 1], scale[i, j + 1] = centre, variance
        for j in range(latent):
            scale[i, j] = sqrt(scale[i, j])
        for j in range(last):
            if rhos > 1:
                r, innovation = rho[p, j], c[p, j]
            k = r * inverse[i, j]
            # Rounding may leave the quotient beyond 1, where a long chain would grow.
            after_rho[i, j] = max(-one, min(one, k * scale[i, j] / scale[i, j + 1]))
            after_c[i, j] = innovation * sqrt(inverse[i, j]) / scale[i, j + 1]


def condition_backward(
    rho, c, inverse, known, pulled, mean, scale, after_rho, after_c,
    of_mean, of_scale, of_after_rho, of_after_c, of_rho, of_c, of_weight, of_shift,
    start, stop, batch, latent, rhos,
):  # fmt: skip
    """Back through (10.4) and (10.3), from the last variable on, then through (10.2).

    What the first sweep leaves for the second is kept where the second puts its results.
    """
    rho, c = carray(rho, (batch, rhos)), carray(c, (batch, rhos))
    known, pulled = carray(known, (stop, latent)), carray(pulled, (stop, latent))
    mean, scale = carray(mean, (stop, latent)), carray(scale, (stop, latent))
    of_mean, of_scale = carray(of_mean, (stop, latent)), carray(of_scale, (stop, latent))
    of_weight, of_shift = carray(of_weight, (stop, latent)), carray(of_shift, (stop, latent))
    last = latent - 1
    inverse = carray(inverse, (stop, last))
    after_rho, after_c = carray(after_rho, (stop, last)), carray(after_c, (stop, last))
    of_after_rho = carray(of_after_rho, (stop, last))
    of_after_c = carray(of_after_c, (stop, last))
    of_rho, of_c = carray(of_rho, (stop, last)), carray(of_c, (stop, last))
    one = type(rho[0, 0])(1)
    half, two = one / type(one)(2), type(one)(2)
    for i in range(start, stop):
        p = i % batch
        r, innovation = rho[p, 0], c[p, 0]
        over = one / scale[i, last]
        lost = of_after_rho[i, last - 1] * after_rho[i, last - 1]
        lost += of_after_c[i, last - 1] * after_c[i, last - 1]
        variance = (of_scale[i, last] - lost * over) * half * over
        centre = of_mean[i, last]
        for j in range(last - 1, -1, -1):
            if rhos > 1:
                r, innovation = rho[p, j], c[p, j]
            share, deviation = inverse[i, j], scale[i, j]
            root = sqrt(share)
            k = r * share
            of_k = of_after_rho[i, j] * over * deviation + mean[i, j] * centre
            of_k += two * k * deviation * deviation * variance
            of_q = variance + pulled[i, j + 1] * centre
            of_root_q = of_after_c[i, j] * over
            damping = one + innovation * innovation * known[i, j + 1]
            of_rho[i, j] = of_k
            of_c[i, j] = of_root_q * root + two * of_q * innovation * share
            of_weight[i, j + 1] = innovation * (
                half * of_root_q * root * damping + of_q * innovation
            )
            of_shift[i, j + 1] = innovation * innovation * share * centre
            own = of_scale[i, j] + of_after_rho[i, j] * k * over
            over = one / deviation
            if j > 0:
                lost = of_after_rho[i, j - 1] * after_rho[i, j - 1]
                lost += of_after_c[i, j - 1] * after_c[i, j - 1]
                own -= lost * over
            variance = multiply_add(variance, k * k, half * own * over)
            centre = multiply_add(centre, k, of_mean[i, j])
        first = scale[i, 0] * scale[i, 0]
        pull = first * centre
        information = -first * (first * variance + pull * pulled[i, 0])
        of_weight[i, 0], of_shift[i, 0] = information, pull
        for j in range(last):
            if rhos > 1:
                r, innovation = rho[p, j], c[p, j]
            share, later = inverse[i, j], known[i, j + 1]
            of_k = of_rho[i, j] + pull * pulled[i, j + 1]
            of_share = of_weight[i, j + 1] + of_k * r
            of_rho[i, j] = share * (of_k + two * r * later * information)
            spread = innovation * share
            of_all = of_share + information * r * r * later
            of_c[i, j] -= two * spread * share * later * of_all
            pull = multiply_add(pull, r * share, of_shift[i, j + 1])
            carried = r * share
            information = multiply_add(information, carried * carried, -spread * spread * of_share)
            of_weight[i, j + 1], of_shift[i, j + 1] = information, pull


@cache
def compiled(name: str, number: str) -> Any:
    """A loop as a C function for float32 or float64: addresses, then sizes."""
    loop = globals()[name]
    names = list(signature(loop).parameters)
    tensors, sizes = names[: names.index("start")], names[names.index("start") :]
    pointer = types.CPointer(getattr(types, number))
    kind = types.void(*[pointer] * len(tensors), *[types.int64] * len(sizes))
    options = {"error_model": "numpy"}
    try:
        entry = cfunc(kind, cache=True, **options)(loop)
    except RuntimeError:  # no folder to keep it in can be written
        entry = cfunc(kind, **options)(loop)
    return CFUNCTYPE(None, *[c_void_p] * len(tensors), *[c_int64] * len(sizes))(entry.address)
