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
from math import sqrt

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


@cache
def compiled(loop, number: str):
    """A loop as a C function for float32 or float64: addresses, then sizes."""
    tensors = 7 if loop is forward else 9
    pointer = types.CPointer(getattr(types, number))
    signature = types.void(*[pointer] * tensors, *[types.int64] * 7)
    options = {"error_model": "numpy"}
    try:
        entry = cfunc(signature, cache=True, **options)(loop)
    except RuntimeError:  # no folder to keep it in can be written
        entry = cfunc(signature, **options)(loop)
    return CFUNCTYPE(None, *[c_void_p] * tensors, *[c_int64] * 7)(entry.address)
