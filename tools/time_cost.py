"""What a draw, its KL and their gradient cost: the chain against the dense construction.

All candidates get the same numbers (a mean, u and w for each step) and stand for the same law, the
posterior of GP-VAE with the logistic sigmoid as in PyPOTS, against the same AR(1) prior:

    chain     rhovae.study.gpvae.banded_normal, and an AR1Normal prior
    loop      the same chain, its draw and its variances step by step in Python
    dense     U as a matrix, a triangular solve against the identity, two MultivariateNormal
    pypots    the class GpvaeEncoder of PyPOTS, its networks replaced by the identity

The candidates take turns, three at least; memory is measured in a fresh process for each. PyPOTS is
taken from the installed package, if there is one, from the one file that defines the class, since
importing the package needs some thirty others. Writes data/results/time/cost.json and prints it.

    python tools/time_cost.py [--threads 1] [--seconds 20] [--save FILE]
    python tools/time_cost.py --names chain loop dense --steps 1000 --save loop.json
"""

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, kl_divergence, register_kl

from rhovae import AR1Normal
from rhovae.study.gpvae import banded_normal
from rhovae.study.provenance import environment
from rhovae.study.records import write_whole

STEPS = (48, 180, 1000)
BATCH, CHANNELS = 4, 4
LENGTH_SCALE = 7.0  # of the "matern" kernel exp(-|i - j| / sqrt(length_scale)), an AR(1)
RHO = float(np.exp(-1 / np.sqrt(LENGTH_SCALE)))


def outputs(steps: int) -> Tensor:
    """What an encoder might put out: (batch, steps, 3 channels)."""
    return torch.randn(BATCH, steps, 3 * CHANNELS)


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, u and w of each channel, (batch, channels, steps); the last w is not used."""
    mean, pairs = x.mT[:, :CHANNELS], x.mT[:, CHANNELS:].sigmoid()
    return mean, 1 + pairs[:, ::2], pairs[:, 1::2, :-1]


def chain_posterior(x: Tensor) -> AR1Normal:
    return banded_normal(*split(x))


def chain_prior(steps: int) -> AR1Normal:
    return AR1Normal(torch.zeros(CHANNELS, steps), 1.0, rho=RHO, validate_args=False)


def dense_posterior(x: Tensor) -> MultivariateNormal:
    mean, diagonal, above = split(x)
    upper = diagonal.diag_embed() + above.diag_embed(1)
    identity = torch.eye(upper.shape[-1]).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    return MultivariateNormal(mean, scale_tril=inverse.mT)


def dense_prior(steps: int) -> MultivariateNormal:
    distance = (torch.arange(steps) - torch.arange(steps).unsqueeze(-1)).abs()
    kernel = torch.exp(-distance / LENGTH_SCALE**0.5)
    return MultivariateNormal(torch.zeros(CHANNELS, steps), kernel.expand(CHANNELS, -1, -1))


class LoopNormal(Distribution):
    """(11.11), notebooks/11, as one writes it down: step by step, without a matrix or a scan."""

    def __init__(self, loc: Tensor, diagonal: Tensor, above: Tensor):
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)
        self.loc, self.innovation = loc, diagonal.reciprocal()
        self.coefficient = -above * self.innovation[..., 1:]

    def each_step(self, first: Tensor, inputs: Tensor, coefficient: Tensor) -> Tensor:
        """y_1 = first, y_{t+1} = coefficient_t y_t + input_{t+1}."""
        values = [first]
        for c, shock in zip(coefficient.unbind(-1), inputs.unbind(-1)[1:], strict=True):
            values.append(c * values[-1] + shock)
        return torch.stack(values, -1)

    def rsample(self, sample_shape=()) -> Tensor:
        shocks = self.innovation * torch.randn(*sample_shape, *self.loc.shape)
        return self.loc + self.each_step(shocks[..., 0], shocks, self.coefficient)


@register_kl(LoopNormal, AR1Normal)
def _kl_loop_ar1(q: LoopNormal, p: AR1Normal) -> Tensor:
    """To the prior of `chain_prior`: stationary, of mean 0 and variance 1."""
    squares = q.innovation.square()
    variance = q.each_step(squares[..., 0], squares, q.coefficient.square())
    new, old, c, m = variance[..., 1:], variance[..., :-1], q.coefficient, q.loc
    shift = (m[..., 1:] - RHO * m[..., :-1]).square()
    change = new - 2 * RHO * c * old + RHO**2 * old + shift
    first = variance[..., 0] + m[..., 0].square()
    rest = (change / (1 - RHO**2) + np.log(1 - RHO**2)).sum(-1)
    return 0.5 * (first + rest - squares.log().sum(-1) - m.shape[-1])


def loop_posterior(x: Tensor) -> LoopNormal:
    return LoopNormal(*split(x))


class Part(nn.Module):
    """Some of the outputs, in place of a layer that would compute them."""

    def __init__(self, *bounds: int):
        super().__init__()
        self.columns = slice(*bounds)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.columns]


def pypots_encoder() -> nn.Module | None:
    """The encoder of PyPOTS without its networks, or None where PyPOTS is not installed."""
    package = find_spec("pypots")
    if package is None:
        return None
    path = Path(package.submodule_search_locations[0]) / "nn/modules/gpvae/layers.py"
    spec = spec_from_file_location("pypots_gpvae_layers", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    encoder = module.GpvaeEncoder(1, CHANNELS, hidden_sizes=(1, 1), window_size=3)
    encoder.net, encoder.mu_layer = nn.Identity(), Part(CHANNELS)
    encoder.logvar_layer = Part(CHANNELS, 3 * CHANNELS)
    return encoder


def candidates() -> dict:
    """Name -> (posterior of the outputs, prior of a number of steps)."""
    found = {
        "chain": (chain_posterior, chain_prior),
        "loop": (loop_posterior, chain_prior),
        "dense": (dense_posterior, dense_prior),
        "pypots": (pypots_encoder(), dense_prior),
    }
    return {name: pair for name, pair in found.items() if pair[0] is not None}


def step(x: Tensor, weights: Tensor, posterior, prior) -> Tensor:
    """A draw, its KL, and the gradient of both with respect to the encoder's outputs."""
    q = posterior(x)
    loss = (weights * q.rsample()).sum() + kl_divergence(q, prior).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def check_that_they_agree(steps: int = 48) -> float:
    """Largest difference of the KLs (nats) and of their gradients, in float64."""
    torch.set_default_dtype(torch.float64)
    x, worst, first = outputs(steps).requires_grad_(), 0.0, None
    for posterior, prior in candidates().values():
        kl = kl_divergence(posterior(x), prior(steps))
        (gradient,) = torch.autograd.grad(kl.sum(), x)
        first = first or (kl, gradient)
        pairs = zip(first, (kl, gradient), strict=True)
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    torch.set_default_dtype(torch.float32)
    if worst > 1e-8:
        raise RuntimeError(f"the candidates are not the same law: they differ by {worst:.2g}")
    return worst


def seconds(steps: int, budget: float, names: list[str]) -> dict[str, list[float]]:
    """The candidates take turns, so that a slow moment of the machine meets all of them."""
    x, weights = outputs(steps).requires_grad_(), torch.randn(BATCH, CHANNELS, steps)
    every = candidates()
    chosen = {name: (every[name][0], every[name][1](steps)) for name in names}
    times = {name: [] for name in chosen}
    end = time.perf_counter() + budget
    while len(times[names[0]]) < 3 or time.perf_counter() < end:
        for name, (posterior, prior) in chosen.items():
            start = time.perf_counter()
            step(x, weights, posterior, prior)
            times[name].append(time.perf_counter() - start)
    return times


def kept_bytes(steps: int, name: str) -> int:
    """What autograd keeps between the forward and the backward pass, each storage once."""
    kept = {}

    def keep(tensor):
        parts = [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    posterior, prior = candidates()[name]
    x, prior = outputs(steps).requires_grad_(), prior(steps)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        q = posterior(x)
        _ = q.rsample().sum() + kl_divergence(q, prior).sum()
    return sum(kept.values())


def peak_bytes(steps: int, name: str) -> int:
    """By how much one step raises the memory of this process at its peak (Linux only)."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split(f"{field}:")[1].split()[0])

    posterior, prior = candidates()[name]
    for length in (8, steps):  # the first loads what is loaded late
        x, weights = outputs(length).requires_grad_(), torch.ones(())
        prior_of_length = prior(length)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = status("VmRSS")
        step(x, weights, posterior, prior_of_length)
    return status("VmHWM") - before


def in_a_process(steps: int, name: str, threads: int) -> int:
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", name, str(steps)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="for each number of steps")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--names", nargs="+", default=list(candidates()), help="of the candidates")
    parser.add_argument("--save", type=Path, default=Path("data/results/time/cost.json"))
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.peak:
        print(peak_bytes(int(arguments.peak[1]), arguments.peak[0]))
        return
    record = {
        "what": "draw + KL + gradient of GP-VAE's posterior against an AR(1) prior, float32",
        "batch": BATCH,
        "channels": CHANNELS,
        "environment": environment(torch.device("cpu")),
        "pypots": version("pypots") if "pypots" in arguments.names else None,
        "largest_difference_float64": check_that_they_agree(),
        "results": [],
    }
    for steps in arguments.steps:
        for name, times in seconds(steps, arguments.seconds, arguments.names).items():
            row = {
                "steps": steps,
                "candidate": name,
                "seconds": times,
                "kept_bytes": kept_bytes(steps, name),
                "peak_bytes": in_a_process(steps, name, arguments.threads),
            }
            record["results"].append(row)
            print(
                f"{steps:5d} steps  {name:7s} {1e3 * min(times):9.2f} ms at best, "
                f"{1e3 * float(np.median(times)):9.2f} in the median; "
                f"kept {row['kept_bytes'] / 2**20:7.1f} MiB, peak {row['peak_bytes'] / 2**20:7.1f}"
            )
    write_whole(arguments.save, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
