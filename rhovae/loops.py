"""Draw, conditioning and Fisher's z, with gradients, as loops that numba compiles (rhovae[fast]).

    z_j = loc_j + scale_j x_j,    x_1 = e_1,    x_j = rho_{j-1} x_{j-1} + c_{j-1} e_j        (1.1)

with c^2 = 1 - rho^2, and backwards, a prime for the derivative with respect to,

    u'_j = scale_j z'_j + rho_j u'_{j+1},    scale'_j = z'_j x_j,
    rho'_j = u'_{j+1} x_j,    c'_j = u'_{j+1} e_{j+1}                                        (3.5)

(notebooks 01 and 03; loc' is z'). Each goes over memory once, four chains side by side. `kernels`
decides when they run and imports this module then. A chain is a row; there are `rows` of noise, and
parameters for `batch` of them, which repeat. What is shared along a chain has one column.
"""

from ctypes import CFUNCTYPE, c_int64, c_void_p
from functools import cache
from inspect import signature
from math import exp, isfinite, log1p, sinh, sqrt, tanh
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

ROWS = 4  # swept side by side: each step waits for the one before, but not for other rows'


@njit(fastmath={"contract"})
def multiply_add(x, rho, u):
    """rho x + u, which may be rounded once: the only step that has to wait for the one before."""
    return rho * x + u


@njit
def innovation_scale(rho):
    """sqrt((1 - rho) (1 + rho)), see `ar1`."""
    one = type(rho)(1)
    return type(rho)(sqrt((one - rho) * (one + rho)))


@njit
def slope(rho):
    """The derivative of the innovation scale, -rho / c."""
    return -(rho / innovation_scale(rho))


@njit
def damped(x):
    """1 / (1 + x)"""
    one = type(x)(1)
    return one / (one + x)


@njit
def at(values, rows, j):
    """Column j of these rows."""
    a, b, c, d = rows
    return values[a, j], values[b, j], values[c, j], values[d, j]


@njit
def put(values, rows, j, column):
    a, b, c, d = rows
    values[a, j], values[b, j], values[c, j], values[d, j] = column


@njit
def each_product(x, y):
    return x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3]


@njit
def each_sum(x, y):
    return x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]


@njit
def each_multiply_add(x, rho, u):
    return (
        multiply_add(x[0], rho[0], u[0]),
        multiply_add(x[1], rho[1], u[1]),
        multiply_add(x[2], rho[2], u[2]),
        multiply_add(x[3], rho[3], u[3]),
    )


@njit
def each(function, x):
    return function(x[0]), function(x[1]), function(x[2]), function(x[3])


@njit
def side_by_side(first, stop):
    """Four rows from `first` on. After the last, the last again."""
    last = stop - 1
    return min(first, last), min(first + 1, last), min(first + 2, last), min(first + 3, last)


@njit
def repeating(rows, batch):
    """Where their parameters are."""
    return rows[0] % batch, rows[1] % batch, rows[2] % batch, rows[3] % batch


@njit
def counted_from(above, rows):
    return rows[0] - above, rows[1] - above, rows[2] - above, rows[3] - above


def forward(loc, scale, rho, c, noise, x, z, start, stop, batch, latent, scales, rhos, known):
    """Rows start to stop of x and z. Where c is not `known`, it follows from rho."""
    loc, scale = carray(loc, (batch, latent)), carray(scale, (batch, scales))
    rho, c = carray(rho, (batch, rhos)), carray(c, (batch, rhos))
    noise, x, z = (
        carray(noise, (stop, latent)),
        carray(x, (stop, latent)),
        carray(z, (stop, latent)),
    )
    for above in range(start, stop, ROWS):
        i = side_by_side(above, stop)
        p = repeating(i, batch)
        chain = at(noise, i, 0)
        put(x, i, 0, chain)
        r = at(rho, p, 0)
        innovation = at(c, p, 0) if known else each(innovation_scale, r)
        for j in range(1, latent):
            if rhos > 1:
                r = at(rho, p, j - 1)
                innovation = at(c, p, j - 1) if known else each(innovation_scale, r)
            chain = each_multiply_add(chain, r, each_product(innovation, at(noise, i, j)))
            put(x, i, j, chain)
        for i in range(above, min(above + ROWS, stop)):  # x and z may be one
            p = i % batch
            for j in range(latent):
                z[i, j] = loc[p, j] + scale[p, j if scales > 1 else 0] * x[i, j]


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
    for above in range(start, stop, ROWS):
        i = side_by_side(above, stop)
        p = repeating(i, batch)
        sum_scale = sum_rho = sum_c = (0.0, 0.0, 0.0, 0.0)
        s, r = at(scale, p, 0), at(rho, p, 0)
        later = each_product(s, (0, 0, 0, 0))
        for j in range(last, -1, -1):
            given, chain = at(of_z, i, j), at(x, i, j)
            if scales > 1:
                s = at(scale, p, j)
            else:
                sum_scale = each_sum(sum_scale, each_product(given, chain))
            if j < last:
                if rhos > 1:
                    r = at(rho, p, j)
                    put(of_rho, i, j, later)
                else:
                    sum_rho = each_sum(sum_rho, each_product(later, chain))
                    sum_c = each_sum(sum_c, each_product(later, at(noise, i, j + 1)))
            later = each_multiply_add(later, r, each_product(s, given))
        if scales == 1:
            put(of_scale, i, 0, sum_scale)
        if rhos == 1:
            if known:
                put(of_c, i, 0, sum_c)
            else:
                sum_rho = each_sum(sum_rho, each_product(sum_c, each(slope, r)))
            put(of_rho, i, 0, sum_rho)
        # What has a column for each step waits for nothing but u', which stands in of_rho.
        for i in range(above, min(above + ROWS, stop)):
            if scales > 1:
                for j in range(latent):
                    of_scale[i, j] = of_z[i, j] * x[i, j]
            if rhos > 1:
                if known:
                    for j in range(last):
                        of_c[i, j] = of_rho[i, j] * noise[i, j + 1]
                        of_rho[i, j] *= x[i, j]
                else:
                    for j in range(last):
                        across = slope(rho[i % batch, j]) * noise[i, j + 1]
                        of_rho[i, j] *= x[i, j] + across


def fisher_z(a, rho, c, log, start, stop, batch, latent, limit):
    """Rows start to stop of `ar1.from_fisher_z`: (3.8) and (3.9), with M the `limit`."""
    a, rho = carray(a, (stop, latent)), carray(rho, (stop, latent))
    c, log = carray(c, (stop, latent)), carray(log, (stop, latent))
    one = type(a[0, 0])(1)
    for i in range(start, stop):
        for j in range(latent):
            size = abs(a[i, j])
            near = min(size, type(one)(limit))
            decay, height = exp(-size), sinh(near)
            rho[i, j] = tanh(a[i, j])
            c[i, j] = (decay + decay) / (one + decay * decay)
            beyond = size - near
            log[i, j] = -log1p(height * height) - (beyond + beyond)


def fisher_z_backward(rho, c, of_rho, of_c, of_log, of_a, start, stop, batch, latent):
    """Rows start to stop of the derivative, (3.10)."""
    rho, c = carray(rho, (stop, latent)), carray(c, (stop, latent))
    of_rho, of_c = carray(of_rho, (stop, latent)), carray(of_c, (stop, latent))
    of_log, of_a = carray(of_log, (stop, latent)), carray(of_a, (stop, latent))
    for i in range(start, stop):
        for j in range(latent):
            along = c[i, j] * (of_rho[i, j] * c[i, j] - of_c[i, j] * rho[i, j])
            of_a[i, j] = along - (of_log[i, j] + of_log[i, j]) * rho[i, j]


@njit
def observed(precision, value, loc, scale):
    """An observation's precision and pull on the unit chain. At precision 0 any value will do."""
    deviation = value - loc if precision > 0 or isfinite(value) else type(loc)(0)
    return precision * scale * scale, precision * scale * deviation, deviation


@njit
def repeat(given, to):
    """An entry for each, also where they share one: the loops need not ask."""
    if given.size == 1:
        to[:] = given[0]
    else:
        to[:] = given


@njit(fastmath={"reassoc"})
def total(found, to):
    """The other way: the sum, in float64, where they share one."""
    if to.size > 1:
        to[:] = found
        return
    total = 0.0
    for j in range(found.size):
        total += found[j]
    to[0] = total


@njit
def passed(w, r, c):
    """What is known of the next variable and beyond, of this one."""
    one = type(w)(1)
    return r * r * w / multiply_add(w, c * c, one)


@njit
def each_passed(w, r, c):
    return (
        passed(w[0], r[0], c[0]),
        passed(w[1], r[1], c[1]),
        passed(w[2], r[2], c[2]),
        passed(w[3], r[3], c[3]),
    )


def condition(
    loc, scale, rho, c, weight, value, inverse, known, pulled, mean, after, sd, after_rho, after_c,
    start, stop, batch, latent, scales, rhos, natural,
):  # fmt: skip
    """`smoothing.condition`, (10.2) to (10.4), with 1 / D, J, H and m beside its results.

    What does not wait for the step before stands in loops of its own, row by row, of which the
    compiler takes several steps at once. J waits longest, for a division: eight rows side by side.
    """
    last = latent - 1
    loc, given_scale = carray(loc, (batch, latent)), carray(scale, (batch, scales))
    given_rho, given_c = carray(rho, (batch, rhos)), carray(c, (batch, rhos))
    weight, value = carray(weight, (stop, latent)), carray(value, (stop, latent))
    known, pulled = carray(known, (stop, latent)), carray(pulled, (stop, latent))
    mean, after, sd = (
        carray(mean, (stop, latent)),
        carray(after, (stop, latent)),
        carray(sd, (stop, latent)),
    )
    inverse = carray(inverse, (stop, last))
    after_rho, after_c = carray(after_rho, (stop, last)), carray(after_c, (stop, last))
    one = type(loc[0, 0])(1)
    scale, own = np.empty((2 * ROWS, latent), loc.dtype), np.empty((2 * ROWS, latent), loc.dtype)
    rho, c = np.empty((2 * ROWS, last), loc.dtype), np.empty((2 * ROWS, last), loc.dtype)
    for above in range(start, stop, 2 * ROWS):
        below = min(above + 2 * ROWS, stop)
        for i in range(above, below):
            p, here = i % batch, i - above
            repeat(given_scale[p], scale[here])
            repeat(given_rho[p], rho[here])
            repeat(given_c[p], c[here])
            for j in range(latent):
                w, h = weight[i, j], value[i, j]
                if not natural:
                    w, h, _ = observed(w, h, loc[p, j], scale[here, j])
                own[here, j], pulled[i, j] = w, h
        rows, others = side_by_side(above, below), side_by_side(above + ROWS, below)
        where, there = counted_from(above, rows), counted_from(above, others)
        w, v = at(own, where, last), at(own, there, last)
        put(known, rows, last, w)
        put(known, others, last, v)
        for j in range(last - 1, -1, -1):
            w = each_sum(at(own, where, j), each_passed(w, at(rho, where, j), at(c, where, j)))
            v = each_sum(at(own, there, j), each_passed(v, at(rho, there, j), at(c, there, j)))
            put(known, rows, j, w)
            put(known, others, j, v)
        # What follows from J: 1 / D, and k and n, kept where the results will be.
        for i in range(above, below):
            for j in range(last):
                fresh = c[i - above, j] * c[i - above, j]
                inverse[i, j] = one / (one + fresh * known[i, j + 1])
                after_rho[i, j] = rho[i - above, j] * inverse[i, j]
                sd[i, j + 1] = fresh * inverse[i, j]
        for first in range(above, below, ROWS):
            rows = side_by_side(first, below)
            h = at(pulled, rows, last)
            for j in range(last - 1, -1, -1):
                h = each_multiply_add(h, at(after_rho, rows, j), at(pulled, rows, j))
                put(pulled, rows, j, h)
            variance = each(damped, at(known, rows, 0))
            centre = each_product(variance, h)
            put(mean, rows, 0, centre)
            put(sd, rows, 0, variance)
            for j in range(last):
                k, n = at(after_rho, rows, j), at(sd, rows, j + 1)
                variance = each_multiply_add(variance, each_product(k, k), n)
                centre = each_multiply_add(centre, k, each_product(n, at(pulled, rows, j + 1)))
                put(mean, rows, j + 1, centre)
                put(sd, rows, j + 1, variance)
        for i in range(above, below):
            p, here = i % batch, i - above
            for j in range(latent):
                sd[i, j] = sqrt(sd[i, j])
            for j in range(last):
                over = one / sd[i, j + 1]
                # Rounding may leave the quotient beyond 1, where a long chain would grow.
                after_rho[i, j] = max(-one, min(one, after_rho[i, j] * sd[i, j] * over))
                after_c[i, j] = c[here, j] * sqrt(inverse[i, j]) * over
            for j in range(latent):
                s = scale[here, j]
                after[i, j], sd[i, j] = loc[p, j] + s * mean[i, j], s * sd[i, j]


def condition_backward(
    loc, scale, rho, c, weight, value, inverse, known, pulled, mean, sd, after_rho, after_c,
    of_after, of_sd, of_after_rho, of_after_c,
    of_loc, of_scale, of_rho, of_c, of_weight, of_value,
    start, stop, batch, latent, scales, rhos, natural,
):  # fmt: skip
    """Back through (10.4) and (10.3), from the last variable on, then through (10.2).

    What one loop leaves for the next is kept where the last puts its results.
    """
    last = latent - 1
    loc, given_scale = carray(loc, (batch, latent)), carray(scale, (batch, scales))
    given_rho, given_c = carray(rho, (batch, rhos)), carray(c, (batch, rhos))
    weight, value = carray(weight, (stop, latent)), carray(value, (stop, latent))
    known, pulled = carray(known, (stop, latent)), carray(pulled, (stop, latent))
    mean, sd = carray(mean, (stop, latent)), carray(sd, (stop, latent))
    of_after, of_sd = carray(of_after, (stop, latent)), carray(of_sd, (stop, latent))
    of_loc, of_given_scale = carray(of_loc, (stop, latent)), carray(of_scale, (stop, scales))
    of_weight, of_value = carray(of_weight, (stop, latent)), carray(of_value, (stop, latent))
    inverse = carray(inverse, (stop, last))
    after_rho, after_c = carray(after_rho, (stop, last)), carray(after_c, (stop, last))
    of_after_rho = carray(of_after_rho, (stop, last))
    of_after_c = carray(of_after_c, (stop, last))
    of_given_rho, of_given_c = carray(of_rho, (stop, rhos)), carray(of_c, (stop, rhos))
    one = type(loc[0, 0])(1)
    scale, of_scale = np.empty((ROWS, latent), loc.dtype), np.empty((ROWS, latent), loc.dtype)
    rho, of_rho = np.empty((ROWS, last), loc.dtype), np.empty((ROWS, last), loc.dtype)
    c, of_c = np.empty((ROWS, last), loc.dtype), np.empty((ROWS, last), loc.dtype)
    k, lost = np.empty((ROWS, last), loc.dtype), np.empty((ROWS, last), loc.dtype)
    half, two = one / type(one)(2), type(one)(2)
    for above in range(start, stop, ROWS):
        for i in range(above, min(above + ROWS, stop)):
            p, here = i % batch, i - above
            repeat(given_scale[p], scale[here])
            repeat(given_rho[p], rho[here])
            repeat(given_c[p], c[here])
            # The standard deviation in units of the scale is kept in of_scale.
            for j in range(latent):
                of_scale[here, j] = sd[i, j] / scale[here, j]
                of_value[i, j] = scale[here, j] * of_after[i, j]
                of_weight[i, j] = half * of_sd[i, j] * scale[here, j] / of_scale[here, j]
            for j in range(last):
                k[here, j], over = rho[here, j] * inverse[i, j], one / of_scale[here, j + 1]
                of_weight[i, j] += half * of_after_rho[i, j] * k[here, j] * over / of_scale[here, j]
                change = of_after_rho[i, j] * after_rho[i, j] + of_after_c[i, j] * after_c[i, j]
                of_rho[here, j] = half * change * over * over
            for j in range(last):
                of_weight[i, j + 1] -= of_rho[here, j]
        rows = side_by_side(above, stop)
        where = counted_from(above, rows)
        variance, centre = at(of_weight, rows, last), at(of_value, rows, last)
        for j in range(last - 1, -1, -1):
            step = at(k, where, j)
            variance = each_multiply_add(variance, each_product(step, step), at(of_weight, rows, j))
            centre = each_multiply_add(centre, step, at(of_value, rows, j))
            put(of_weight, rows, j, variance)
            put(of_value, rows, j, centre)
        for i in range(above, min(above + ROWS, stop)):
            here = i - above
            first = of_scale[here, 0] * of_scale[here, 0]
            pull = first * of_value[i, 0]
            information = -first * (first * of_weight[i, 0] + pull * pulled[i, 0])
            of_weight[i, 0], of_value[i, 0] = information, pull
            # Of 1 / D: what is known so far in of_scale. What it passes on to J in of_loc, and, to
            # be multiplied by the pull, in lost.
            for j in range(last):
                r, innovation, share = rho[here, j], c[here, j], inverse[i, j]
                unit, over, root = of_scale[here, j], one / of_scale[here, j + 1], sqrt(share)
                variance, centre = of_weight[i, j + 1], of_value[i, j + 1]
                of_k = of_after_rho[i, j] * over * unit + mean[i, j] * centre
                of_k += two * r * share * unit * unit * variance
                of_n = variance + pulled[i, j + 1] * centre
                of_root_n = of_after_c[i, j] * over
                damping = one + innovation * innovation * known[i, j + 1]
                of_share = innovation * (half * of_root_n * root * damping + of_n * innovation)
                of_rho[here, j] = of_k
                of_c[here, j] = of_root_n * root + two * of_n * innovation * share
                of_scale[here, j] = of_share + of_k * r
                spread = innovation * share * innovation * share
                of_loc[i, j] = -spread * of_scale[here, j]
                lost[here, j] = -spread * pulled[i, j + 1] * r
                of_value[i, j + 1] = innovation * innovation * share * centre
        information, pull = at(of_weight, rows, 0), at(of_value, rows, 0)
        for j in range(last):
            step = at(k, where, j)
            passed_on = each_multiply_add(pull, at(lost, where, j), at(of_loc, rows, j))
            information = each_multiply_add(information, each_product(step, step), passed_on)
            pull = each_multiply_add(pull, step, at(of_value, rows, j + 1))
            put(of_weight, rows, j + 1, information)
            put(of_value, rows, j + 1, pull)
        for i in range(above, min(above + ROWS, stop)):
            p, here = i % batch, i - above
            for j in range(last):
                r, share, later = rho[here, j], inverse[i, j], known[i, j + 1]
                information, pull = of_weight[i, j], of_value[i, j]
                of_rho[here, j] = share * (
                    of_rho[here, j] + pull * pulled[i, j + 1] + two * r * later * information
                )
                of_all = of_scale[here, j] + r * (pull * pulled[i, j + 1] + information * r * later)
                of_c[here, j] -= two * c[here, j] * share * share * later * of_all
            for j in range(latent):
                s = scale[here, j]
                of_loc[i, j] = of_after[i, j]
                of_s = of_after[i, j] * mean[i, j] + of_sd[i, j] * (sd[i, j] / s)
                if not natural:
                    _, _, deviation = observed(weight[i, j], value[i, j], loc[p, j], s)
                    of_w, of_h = of_weight[i, j], of_value[i, j]
                    of_weight[i, j] = s * (of_w * s + of_h * deviation)
                    of_value[i, j] = of_h * weight[i, j] * s
                    of_loc[i, j] -= of_h * weight[i, j] * s
                    of_s += weight[i, j] * (two * of_w * s + of_h * deviation)
                of_scale[here, j] = of_s
            total(of_scale[here], of_given_scale[i])
            total(of_rho[here], of_given_rho[i])
            total(of_c[here], of_given_c[i])


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
