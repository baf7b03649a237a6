"""The draw of AR1Normal and its gradient, (1.1) and (3.5), as Triton kernels for CUDA.

Tested in Triton's interpreter, on a CPU, and never yet on a GPU: hence nothing takes them unless
`kernels.use` is told. They do what `forward` and `backward` of `loops` do. A program goes along one
row in blocks. Two stretches of steps x -> a x + u are one again,

    (a_1, u_1) and then (a_2, u_2):    (a_1 a_2, a_2 u_1 + u_2)                (3.4), notebooks/03

so that Triton joins the steps of a block in parallel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LONGEST_BLOCK = 1024


@triton.jit
def _join(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def forward(
    loc, scale, rho, c, noise, x, z,
    batch, latent, scales: tl.constexpr, rhos: tl.constexpr, known: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, place = row % batch, tl.arange(0, BLOCK)
    before = tl.full((), 0, loc.dtype.element_ty)
    for start in range(0, latent, BLOCK):
        j = start + place
        inside, steps = j < latent, (j > 0) & (j < latent)
        step = p * rhos + (j - 1) * (rhos > 1)
        r = tl.load(rho + step, mask=steps, other=0.0)
        if known:
            innovation = tl.load(c + step, mask=steps, other=1.0)
        else:
            innovation = tl.sqrt((1 - r) * (1 + r))
        e = tl.load(noise + row * latent + j, mask=inside, other=0.0)
        a, chain = tl.associative_scan((r, innovation * e), 0, _join)
        chain += a * before
        before = tl.sum(tl.where(place == BLOCK - 1, chain, 0.0))
        centre = tl.load(loc + p * latent + j, mask=inside)
        s = tl.load(scale + p * scales + j * (scales > 1), mask=inside)
        tl.store(x + row * latent + j, chain, mask=inside)
        tl.store(z + row * latent + j, centre + s * chain, mask=inside)


@triton.jit
def backward(
    scale, rho, c, noise, x, of_z, of_scale, of_rho, of_c,
    batch, latent, scales: tl.constexpr, rhos: tl.constexpr, known: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p, place = row % batch, tl.arange(0, BLOCK)
    after = tl.full((), 0, scale.dtype.element_ty)
    sum_scale, sum_rho, sum_c = after, after, after
    for start in range(0, latent, BLOCK):
        j = latent - 1 - start - place
        inside, steps = j >= 0, j > 0
        r = tl.load(rho + p * rhos + j * (rhos > 1), mask=inside & (j < latent - 1), other=0.0)
        s = tl.load(scale + p * scales + j * (scales > 1), mask=inside, other=0.0)
        gradient = tl.load(of_z + row * latent + j, mask=inside, other=0.0)
        of_s = gradient * tl.load(x + row * latent + j, mask=inside, other=0.0)
        a, of_u = tl.associative_scan((r, s * gradient), 0, _join)
        of_u += a * after
        after = tl.sum(tl.where(place == BLOCK - 1, of_u, 0.0))
        along = of_u * tl.load(x + row * latent + j - 1, mask=steps, other=0.0)
        across = of_u * tl.load(noise + row * latent + j, mask=steps, other=0.0)
        if not known:
            own = tl.load(rho + p * rhos + (j - 1) * (rhos > 1), mask=steps, other=0.0)
            along -= across * (own / tl.sqrt((1 - own) * (1 + own)))
        if scales > 1:
            tl.store(of_scale + row * scales + j, of_s, mask=inside)
        else:
            sum_scale += tl.sum(of_s)
        if rhos > 1:
            tl.store(of_rho + row * rhos + j - 1, along, mask=steps)
            if known:
                tl.store(of_c + row * rhos + j - 1, across, mask=steps)
        else:
            sum_rho += tl.sum(along)
            sum_c += tl.sum(across)
    if scales == 1:
        tl.store(of_scale + row, sum_scale)
    if rhos == 1:
        tl.store(of_rho + row, sum_rho)
        if known:
            tl.store(of_c + row, sum_c)


def run(name: str, tensors: Sequence[Tensor], like: Tensor, batch: int, *sizes: int) -> None:
    """One of the two on contiguous tensors; the arguments are those of `kernels._run`."""
    latent = like.shape[-1]
    block = min(_LONGEST_BLOCK, triton.next_power_of_2(latent))
    kernel: Any = {"forward": forward, "backward": backward}[name]
    with torch.cuda.device_of(like):  # Triton launches on the current device
        kernel[(like.numel() // latent,)](*tensors, batch, latent, *sizes, BLOCK=block)
