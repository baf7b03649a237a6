"""When AR1Normal takes the compiled loops, and what they are to autograd.

As tensor operations, a draw with its gradient passes over its numbers some forty times, and up to
a few thousand numbers each pass costs its own start and little else. `loops` passes once each way.
It needs numba (pip install rhovae[fast]), is imported when the first draw asks for it, and keeps
what it has compiled on disk. What loops over memory cannot do, as other devices and types, function
transforms, torch.compile and second derivatives, takes the scan of `ar1`, silently and with the
same numbers to rounding. CUDA has kernels of its own, in `gpu`, for those who ask for them: `use`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import pairwise
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ar1

Tensors = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]

_enabled = ContextVar("rhovae.kernels", default=True)
_gpu = ContextVar("rhovae.kernels.gpu", default=False)
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = {torch.float32: "float32", torch.float64: "float64"}
_FEW = 2**11  # numbers
_WORTH_A_THREAD = 2**18  # numbers, some 0.3 ms of work; a thread takes 0.05 ms to start


@contextmanager
def use(enabled: bool, *, gpu: bool = False) -> Iterator[None]:
    """Let draws take the compiled loops where they can (the default), or never.

    For tests and benchmarks. It holds within the block and in the thread that enters it.

    Args:
        enabled: whether they may.
        gpu: whether draws on a CUDA device may likewise take the Triton kernels of `gpu`. These
            were tested in Triton's interpreter, never yet on a GPU: compare before you rely.

    Example::

        >>> from rhovae import kernels
        >>> with kernels.use(False):
        ...     pass  # draws in here take the scan
    """
    tokens = _enabled.set(enabled), _gpu.set(gpu)
    try:
        yield
    finally:
        _enabled.reset(tokens[0])
        _gpu.reset(tokens[1])


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
    inputs = loc, scale, noise, rho, innovation
    # torch.compile decides the first question itself, and never looks at what follows.
    if torch.compiler.is_compiling() or not (
        _enabled.get() and _fit(*inputs) and (noise.is_cuda or _loops())
    ):
        return _by_scan(*inputs)
    if torch.is_grad_enabled():
        return _Draw.apply(*inputs)
    z = _empty_like(noise)
    _forward(inputs, z, z)
    return z


def _by_scan(
    loc: Tensor, scale: Tensor, noise: Tensor, rho: Tensor, innovation: Tensor | None
) -> Tensor:
    # Not addcmul: rounded in two steps, as in Normal, rho = 0 gives its draws to the last bit.
    return loc + scale * ar1.correlate(noise, rho, innovation)


def _fit(loc: Tensor, scale: Tensor, noise: Tensor, rho: Tensor, innovation: Tensor | None) -> bool:
    """Whether the loops can read these numbers: their place, type and shapes."""
    batch, latent = loc.shape[:-1], loc.shape[-1]
    on = noise.device if noise.is_cuda and _gpu.get() else None
    return (
        _readable(loc, scale, noise, rho, on=on)
        and (
            innovation is None
            or (_readable(rho, innovation, on=on) and innovation.shape == rho.shape)
        )
        and not noise.requires_grad
        and latent > 1
        and noise.numel() > 0
        and noise.shape[-loc.dim() :] == loc.shape
        and scale.shape[:-1] == batch
        and rho.shape[:-1] == batch
        and scale.shape[-1] in (1, latent)
        and rho.shape[-1] in (1, latent - 1)
    )


class _Draw(torch.autograd.Function):
    """The compiled draw, whose first derivatives are compiled as well.

    Asked for derivatives that have derivatives, or by a function transform, it hands over to the
    scan, from the inputs on.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        noise = inputs[2]
        z, x = _empty_like(noise), _empty_like(noise)
        _forward(inputs, x, z)
        ctx.save_for_backward(*inputs, x)
        return z

    @staticmethod
    def backward(ctx: Any, of_z: Tensor) -> Gradients:
        *inputs, x = ctx.saved_tensors
        on = x.device if x.is_cuda else None
        if torch.is_grad_enabled() or not _readable(x, of_z, on=on):
            return _backward_by_scan(_by_scan, ctx.needs_input_grad, inputs, (of_z,))
        return _backward(inputs, x, of_z)


def _forward(inputs: Sequence[Any], x: Tensor, z: Tensor) -> None:
    loc, scale, noise, rho, innovation = inputs
    known = innovation is not None
    tensors = loc, scale, rho, innovation if known else rho, noise, x, z
    _run("forward", tensors, noise, _batch(loc), scale.shape[-1], rho.shape[-1], known)


def _backward(inputs: Sequence[Any], x: Tensor, of_z: Tensor) -> Gradients:
    loc, scale, noise, rho, innovation = inputs
    known = innovation is not None
    of_scale, of_rho = _for_each_row(noise, scale), _for_each_row(noise, rho)
    of_c = _empty_like(of_rho) if known else of_rho
    tensors = scale, rho, innovation if known else rho, noise, x, of_z, of_scale, of_rho, of_c
    _run("backward", tensors, noise, _batch(loc), scale.shape[-1], rho.shape[-1], known)
    return (
        ar1._sum_to(loc.shape, of_z),
        ar1._sum_to(scale.shape, of_scale),
        None,
        ar1._sum_to(rho.shape, of_rho),
        ar1._sum_to(rho.shape, of_c) if known else None,
    )


def from_fisher_z(fisher_z: Tensor) -> ar1.FromFisherZ:
    """`ar1.from_fisher_z`, compiled where it can be.                  (3.8) to (3.10), notebooks/03

    Only for a few numbers, as a shared rho has, where single operations cost their own start and
    little else; of many, torch takes several logarithms at once.
    """
    if torch.compiler.is_compiling() or not (
        _enabled.get() and 0 < fisher_z.numel() <= _FEW and _readable(fisher_z) and _loops()
    ):
        return ar1.from_fisher_z(fisher_z)
    return ar1.FromFisherZ(*_FisherZ.apply(fisher_z))


class _FisherZ(torch.autograd.Function):
    """The compiled tanh, sech and log sech^2; else as in _Draw."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensors:
        given = a.contiguous()
        rho, c, log = (_empty_like(given) for _ in range(3))
        limit = ar1._saturation(a.dtype)
        _run("fisher_z", (given, rho, c, log), given, _batch(given), limit)
        ctx.save_for_backward(a, rho, c)
        return rho, c, log

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor | None:
        a, rho, c = ctx.saved_tensors
        if torch.is_grad_enabled() or not _readable(rho, *gradients):
            by_scan = ar1.from_fisher_z
            return _backward_by_scan(by_scan, ctx.needs_input_grad, (a,), gradients)[0]
        of_a = _empty_like(rho)
        _run("fisher_z_backward", (rho, c, *gradients, of_a), rho, _batch(rho))
        return of_a


def condition(by_scan: Callable[..., Tensors], *inputs: Tensor, natural: bool) -> Tensors:
    """`smoothing.condition`, compiled where it can be.               (10.2) to (10.4), notebooks/10

    Args:
        by_scan: does it from the inputs, as tensor operations.
        inputs: loc, scale, rho, innovation, weight and value, as there.
        natural: as there.
    Returns:
        Mean and standard deviations, (*batch, latent), correlations and their innovation scales,
        (*batch, latent - 1).
    """
    if torch.compiler.is_compiling() or not (
        _enabled.get() and _fit_to_condition(*inputs) and _loops()
    ):
        return by_scan(*inputs)
    if torch.is_grad_enabled():
        return _Condition.apply(by_scan, natural, *inputs)
    return _condition(inputs, natural)[1]


def _fit_to_condition(
    loc: Tensor, scale: Tensor, rho: Tensor, innovation: Tensor, weight: Tensor, value: Tensor
) -> bool:
    batch, latent = loc.shape[:-1], loc.shape[-1]
    return (
        _readable(loc, scale, rho, innovation, weight, value)
        and latent > 1
        and weight.numel() > 0
        and weight.shape == value.shape
        and weight.shape[-loc.dim() :] == loc.shape
        and scale.shape[:-1] == batch
        and rho.shape[:-1] == batch
        and scale.shape[-1] in (1, latent)
        and rho.shape[-1] in (1, latent - 1)
        and innovation.shape == rho.shape
    )


class _Condition(torch.autograd.Function):
    """The compiled conditioning, with compiled first derivatives; else as in _Draw."""

    @staticmethod
    def forward(ctx: Any, by_scan: Callable[..., Tensors], natural: bool, *inputs: Any) -> Tensors:
        ctx.by_scan, ctx.natural = by_scan, natural
        inner, outer = _condition(inputs, natural)
        if not any(ctx.needs_input_grad[3:7]):  # the covariance follows neither loc nor value
            ctx.mark_non_differentiable(*outer[1:])
        ctx.save_for_backward(*inputs, *inner, *outer[1:])
        return outer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        inputs, held = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        if torch.is_grad_enabled() or not _readable(held[0], *gradients):
            needed = ctx.needs_input_grad[2:]
            return None, None, *_backward_by_scan(ctx.by_scan, needed, inputs, gradients)
        mean = gradients[0]
        of_loc, of_weight, of_value = (_empty_like(mean) for _ in range(3))
        of_scale, of_rho, of_c = (_for_each_row(mean, t) for t in inputs[1:4])
        found = of_loc, of_scale, of_rho, of_c, of_weight, of_value
        tensors = *inputs, *held, *gradients, *found
        _run("condition_backward", tensors, of_loc, _batch(inputs[0]), *_sizes(inputs), ctx.natural)
        return None, None, *(ar1._sum_to(t.shape, f) for t, f in zip(inputs, found, strict=True))


def _condition(inputs: Sequence[Tensor], natural: bool) -> tuple[Tensors, Tensors]:
    """What only the gradient needs, and the four results."""
    loc, *_, value = inputs
    known, pulled, unit_mean, mean, sd = (_empty_like(value) for _ in range(5))
    inverse, after_rho, after_c = (_empty_like(value[..., 1:]) for _ in range(3))
    inner, outer = (inverse, known, pulled, unit_mean), (mean, sd, after_rho, after_c)
    _run("condition", (*inputs, *inner, *outer), value, _batch(loc), *_sizes(inputs), natural)
    return inner, outer


def _sizes(inputs: Sequence[Tensor]) -> tuple[int, int]:
    """The columns of scale and of rho: 1 where the steps of a chain share one."""
    return inputs[1].shape[-1], inputs[2].shape[-1]


def _backward_by_scan(
    function: Callable[..., Any], needed: Sequence[bool], inputs: Sequence[Any], gradients: Tensors
) -> Gradients:
    with torch.enable_grad():
        # Views, because an input that was made from another must not lead back to it from here.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        chosen = [t for t, need in zip(inputs, needed, strict=True) if need]
        results = function(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = zip(results, gradients, strict=True)
        outputs, seeds = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        found = iter(torch.autograd.grad(outputs, chosen, seeds, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _batch(parameter: Tensor) -> int:
    return parameter.numel() // parameter.shape[-1]


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _for_each_row(noise: Tensor, parameter: Tensor) -> Tensor:
    if noise.dim() == parameter.dim():
        return _empty_like(parameter)
    return noise.new_empty((*noise.shape[:-1], parameter.shape[-1]))


def _run(name: str, tensors: Tensors, like: Tensor, batch: int, *sizes: int) -> None:
    """Call a loop on the memory of the tensors, by rows in several threads if there is much to do.

    Args:
        name: of the loop.
        tensors: its tensors, in their order.
        like: of the full shape, (*sample_shape, *batch, latent).
        batch: number of rows of the parameters, which repeat.
        sizes: what else the loop wants to know.
    """
    held = [t.contiguous() for t in tensors]
    if like.is_cuda:
        from . import gpu

        gpu.run(name, held, like, batch, *sizes)
        return
    function = _loops().compiled(name, _NUMBERS[like.dtype])
    addresses = [t.data_ptr() for t in held]
    numbers, latent = like.numel(), like.shape[-1]
    rows = numbers // latent
    if numbers < 2 * _WORTH_A_THREAD:
        function(*addresses, 0, rows, batch, latent, *sizes)
        return

    # What is held must outlive a caller who is interrupted.
    def run(start: int, stop: int, held: Any = held) -> None:
        function(*addresses, start, stop, batch, latent, *sizes)

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


def _readable(*tensors: Tensor, on: torch.device | None = None) -> bool:
    """Whether these are numbers of one type in the memory of the CPU, or on that device, and nobody
    follows what becomes of them.

    Function transforms, modes that watch operations, and tracers do. It is asked in each draw.
    """
    dtype = tensors[0].dtype
    if dtype not in _NUMBERS:
        return False
    for t in tensors:
        if type(t) not in _PLAIN or t.dtype is not dtype or t.is_neg():
            return False
        if t.device != on if on else not t.is_cpu:
            return False
        if not torch._C._has_storage(t):  # a sparse one has none, nor one that stands for a batch
            return False
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
    )


@cache
def _loops() -> Any:
    """The module of compiled loops; None without numba, or where numba is told not to compile."""
    try:
        import numba
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(
                f"numba is installed but cannot be imported, so draws take the scan: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    if vars(numba.config)["DISABLE_JIT"]:
        return None
    from . import loops

    return loops
