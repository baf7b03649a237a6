"""Ways to write the forward scan for one shared rho, all with the same numbers, and limits."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhovae import ar1

from .clock import Calls
from .draws import parameters


def padded_buffers(u: Tensor, rho: Tensor) -> Tensor:
    """A round is one addcmul from a buffer into another, with zeros in front of the first entry."""
    latent, room = u.shape[-1], 1
    while 2 * room < latent:
        room *= 2
    old, new = u.new_zeros(2, len(u), room + latent)
    old[:, room:], power, shift = u, rho, 1
    while shift < latent:
        earlier = old[:, room - shift : room - shift + latent]
        torch.addcmul(old[:, room:], power, earlier, out=new[:, room:])
        old, new, power, shift = new, old, power * power, 2 * shift
    return old[:, room:]


def row_by_row(u: Tensor, rho: Tensor) -> Tensor:
    """The plain recursion, with the batch in rows of adjacent memory."""
    x, rho = u.mT.contiguous(), rho[:, 0]
    for earlier, later in pairwise(x.unbind(0)):
        later.addcmul_(rho, earlier)
    return x.mT


def blocks(u: Tensor, rho: Tensor, size: int = 16) -> Tensor:
    """Blocks as matrix products, then what each hands to the next, as a scan over blocks."""
    x = pad(u, (0, -u.shape[-1] % size)).unflatten(-1, (-1, size))
    x = x @ ar1.transition(rho, size).mT
    carried = ar1.scan(x[..., -1], rho**size)[:, :-1, None]
    x[:, 1:].addcmul_(carried, rho[:, None] ** torch.arange(1, size + 1))
    return x.flatten(-2)[:, : u.shape[-1]]


SCANS = {
    "ours": ar1._doubling,
    "padded buffers": padded_buffers,
    "row by row": row_by_row,
    "blocks of 16": blocks,
}


def scans(batch: int, latent: int) -> Calls:
    rho, u = parameters(batch, latent)[2].detach(), torch.randn(batch, latent)
    chosen = {name: f for name, f in SCANS.items() if f is not row_by_row or latent <= 1024}
    return {name: partial(function, u, rho) for name, function in chosen.items()}


def limits() -> Calls:
    """What the machine can do: 64 MiB read, and written elsewhere."""
    source, target = torch.randn(2**24), torch.empty(2**24)
    return {"copy of 64 MiB": lambda: target.copy_(source)}
