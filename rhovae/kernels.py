"""When the draw of AR1Normal takes the compiled loops, and what they are to autograd.

As tensor operations, a draw with its gradient passes over its numbers some forty times, and up to
a few thousand numbers each pass costs its own start and little else. `loops` passes once each way.
It needs numba (pip install rhovae[fast]), is imported when the first draw asks for it, and keeps
what it has compiled on disk. What loops over memory cannot do, as other devices and types, function
transforms, torch.compile and second derivatives, takes the scan of `ar1`, silently and with the
same numbers to rounding.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from threading import Thread

import torch
from torch import Tensor

from . import ar1

_enabled = ContextVar("rhovae.kernels", default=True)
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = {torch.float32: "float32", torch.float64: "float64"}
_WORTH_A_THREAD = 2**18  # numbers, some 0.3 ms of work; a thread takes 0.05 ms to start


@contextmanager
def use(enabled: bool):
    """Let draws take the compiled loops where they can (the default), or never.

    For tests and benchmarks. It holds within the block and in the thread that enters it.

    Example::

        >>> from rhovae import kernels
        >>> with kernels.use(False):
        ...     pass  # draws in here take the scan
    """
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def draw(
    loc: Tensor, scale: Tensor, noise: Tensor, rho: Tensor, innovation: Tensor | None = None
) -> Tensor:
    """z = loc + scale * correlate(noise, rho, innovation), compiled where it can be.

                                                                               (3.2), notebooks/03
    Args:
        loc: mean, shape (*batch, latent).
        scale: standard deviation, (*batch, 1) or (*batch, latent).
        noise: e, (*sample_shape, *batch, latent).
        rho: (*batch, 1) or (*batch, latent - 1), in (-1, 1).
        innovation: sqrt(1 - rho^2) in the shape of rho, if known more precisely than from rho.
    Returns:
        z, in the shape of noise.
    """
    # torch.compile decides the first question itself, and never looks at what follows.
    if not torch.compiler.is_compiling() and _enabled.get():
        if _fit(loc, scale, noise, rho, innovation) and _loops():
            if torch.is_grad_enabled():
                return _Draw.apply(loc, scale, noise, rho, innovation)
            z = _empty_like(noise)
            _forward(loc, scale, noise, rho, innovation, z, z)
            return z
    return _by_scan(loc, scale, noise, rho, innovation)


def _by_scan(loc, scale, noise, rho, innovation):
    # Not addcmul: rounded in two steps, as in Normal, rho = 0 gives its draws to the last bit.
    return loc + scale * ar1.correlate(noise, rho, innovation)


class _Draw(torch.autograd.Function):
    """The compiled draw, whose first derivatives are compiled as well.

    Asked for derivatives that have derivatives, or by a function transform, it hands over to the
    scan, from the inputs on.
    """

    @staticmethod
    def forward(ctx, loc, scale, noise, rho, innovation):
        z, x = _empty_like(noise), _empty_like(noise)
        _forward(loc, scale, noise, rho, innovation, x, z)
        ctx.save_for_backward(loc, scale, noise, rho, innovation, x)
        return z

    @staticmethod
    def backward(ctx, of_z):
        *inputs, x = ctx.saved_tensors
        if torch.is_grad_enabled() or not _readable(of_z, x.dtype) or _watched():
            return _backward_by_scan(ctx.needs_input_grad, inputs, of_z)
        return _backward(*inputs, x, of_z)


def _backward_by_scan(needed, inputs, of_z):
    chosen = [t for t, need in zip(inputs, needed, strict=True) if need]
    with torch.enable_grad():
        z = _by_scan(*inputs)
        found = iter(torch.autograd.grad(z, chosen, of_z, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _forward(loc, scale, noise, rho, innovation, x, z):
    known = innovation is not None
    tensors = (loc, scale, rho, innovation if known else rho, noise, x, z)
    _run(_loops().forward, tensors, loc, scale, noise, rho, known)


def _backward(loc, scale, noise, rho, innovation, x, of_z):
    known = innovation is not None
    c = innovation if known else rho
    of_scale, of_rho = _for_each_row(noise, scale), _for_each_row(noise, rho)
    of_c = _empty_like(of_rho) if known else of_rho
    tensors = (scale, rho, c, noise, x, of_z, of_scale, of_rho, of_c)
    _run(_loops().backward, tensors, loc, scale, noise, rho, known)
    return (
        ar1._sum_to(loc.shape, of_z),
        ar1._sum_to(scale.shape, of_scale),
        None,
        ar1._sum_to(rho.shape, of_rho),
        ar1._sum_to(rho.shape, of_c) if known else None,
    )


def _empty_like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _for_each_row(noise, parameter):
    if noise.dim() == parameter.dim():
        return _empty_like(parameter)
    return noise.new_empty((*noise.shape[:-1], parameter.shape[-1]))


def _run(loop, tensors, loc, scale, noise, rho, known):
    """Call a loop on the memory of the tensors, by parts in several threads if they are large."""
    function = _loops().compiled(loop, _NUMBERS[noise.dtype])
    tensors = [t.contiguous() for t in tensors]
    numbers, latent = noise.numel(), loc.shape[-1]
    rows, batch = numbers // latent, loc.numel() // latent
    sizes = batch, latent, scale.shape[-1], rho.shape[-1], known

    def run(start, stop):
        function(*[t.data_ptr() for t in tensors], start, stop, *sizes)

    if numbers < 2 * _WORTH_A_THREAD:
        run(0, rows)
        return
    parts = min(torch.get_num_threads(), rows, numbers // _WORTH_A_THREAD)
    bounds = [rows * part // parts for part in range(parts + 1)]
    # Started for this call: threads that wait in a pool are lost in a fork, and whoever waits there
    # for them waits forever.
    threads = [Thread(target=run, args=part) for part in pairwise(bounds[1:])]
    for thread in threads:
        thread.start()
    run(*bounds[:2])
    for thread in threads:
        thread.join()


def _fit(loc, scale, noise, rho, innovation) -> bool:
    """Whether these are numbers in memory, and nobody follows what happens to them."""
    dtype, batch, latent = loc.dtype, loc.shape[:-1], loc.shape[-1]
    return (
        dtype in _NUMBERS
        and _readable(loc, dtype)
        and _readable(scale, dtype)
        and _readable(noise, dtype)
        and _readable(rho, dtype)
        and (innovation is None or (_readable(innovation, dtype) and innovation.shape == rho.shape))
        and not noise.requires_grad
        and latent > 1
        and noise.numel() > 0
        and noise.shape[-loc.dim() :] == loc.shape
        and scale.shape[:-1] == batch
        and rho.shape[:-1] == batch
        and scale.shape[-1] in (1, latent)
        and rho.shape[-1] in (1, latent - 1)
        and not _watched()
    )


def _readable(t: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(t) in _PLAIN
        and t.dtype is dtype
        and t.is_cpu
        and t.layout is torch.strided
        and not t.is_neg()
        and torch._C._has_storage(t)
    )


def _watched() -> bool:
    """Whether operations, and not only their results, matter to a transform, mode or tracer."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


@cache
def _loops():
    """The module of compiled loops; None without numba, or where numba is told not to compile."""
    try:
        from numba import config

        from . import loops
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return None
    return None if config.DISABLE_JIT else loops
