"""Time the sampler, the densities and the training step against what else one could use.

One process. Within a comparison the candidates take turns, so that a slow moment of the machine
meets all of them; each is warmed up, and reported as median and quartiles over its turns. Only
ratios within one run mean anything. Writes data/results/speed.json and prints the ratios.

    python tools/benchmark.py [--threads 2] [--seconds 4] [--save speed.json] [--only training]
"""

import argparse
import inspect
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.nn.functional import binary_cross_entropy, pad
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from rhovae import VAE, AR1Normal, ar1
from rhovae.objectives import negative_elbo, standard_normal_like
from rhovae.study import Experiment
from rhovae.study.experiments import build_vae
from rhovae.study.provenance import environment
from rhovae.study.records import write_whole
from rhovae.study.training import batch_loss, train_epoch

SHAPES = [(128, 5), (128, 20), (128, 64), (128, 256), (128, 1024)]
BATCHES = [(8, 20), (32, 20), (512, 20), (2048, 20)]
LONG = [(16, 1_000), (16, 3_162), (16, 10_000), (16, 31_623), (16, 100_000)]


def published_loop(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """As the released code does: one tensor, grown by a column in each of d steps."""
    x = noise[:, :1]
    for j in range(1, noise.shape[-1]):
        x = torch.cat((x, rho * x[:, -1:] + (1 - rho**2).sqrt() * noise[:, j : j + 1]), -1)
    return loc + scale * x


def dense_cholesky(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """The closed-form factor as a matrix, times the noise: (1.5), notebooks/01."""
    return loc + scale * (ar1.cholesky(rho, noise.shape[-1]) @ noise.unsqueeze(-1)).squeeze(-1)


def fft(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """A shared rho makes the recursion a convolution with 1, rho, rho^2, ..."""
    latent = noise.shape[-1]
    innovations = torch.cat((noise[:, :1], (1 - rho**2).sqrt() * noise[:, 1:]), -1)
    powers = rho ** torch.arange(latent, device=rho.device)
    size = good_size(2 * latent - 1)
    spectrum = torch.fft.rfft(innovations, size) * torch.fft.rfft(powers, size)
    return loc + scale * torch.fft.irfft(spectrum, size)[:, :latent]


def good_size(least: int) -> int:
    """The next number without prime factors above 5, for which an FFT is fast."""
    size = least
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def recorded_scan(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """The rounds (3.4) as autograd records them, without a backward pass of their own."""
    x, power, shift = torch.cat((noise[:, :1], (1 - rho**2).sqrt() * noise[:, 1:]), -1), rho, 1
    while shift < noise.shape[-1]:
        x = torch.cat((x[:, :shift], x[:, shift:] + power * x[:, :-shift]), -1)
        power, shift = power * power, 2 * shift
    return loc + scale * x


def ours(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    return loc + scale * ar1.correlate(noise, rho)


class WholeDraw(torch.autograd.Function):
    """Innovation scale, scan, scale and location in one, without second derivatives."""

    @staticmethod
    def forward(noise, loc, scale, rho):
        innovation = ar1.innovation_scale(rho)
        x = ar1._doubling(noise, rho, innovation)
        return loc + scale * x, x, innovation

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        noise, _, scale, rho = inputs
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(noise, scale, rho, *outputs[1:])

    @staticmethod
    def backward(ctx, gradient, *_):
        noise, scale, rho, x, innovation = ctx.saved_tensors
        back = ar1._doubling(gradient * scale, rho, transposed=True)[:, 1:]
        of_innovation = (back * noise[:, 1:]).sum(-1, keepdim=True)
        of_rho = (back * x[:, :-1]).sum(-1, keepdim=True) - of_innovation * rho / innovation
        return None, gradient, (gradient * x).sum(-1, keepdim=True), of_rho


WholeDraw.forward.__signature__ = inspect.signature(WholeDraw.forward)  # as in ar1.py


def one_function(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    return WholeDraw.apply(noise, loc, scale, rho)[0]


def diagonal(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    return loc + scale * noise


def multivariate_normal(loc: Tensor, scale: Tensor, rho: Tensor, noise: Tensor) -> Tensor:
    """torch's, from the covariance matrix; it draws its own noise."""
    covariance = scale.square().unsqueeze(-1) * ar1.correlation(rho, loc.shape[-1])
    return MultivariateNormal(loc, covariance, validate_args=False).rsample()


SAMPLERS = {
    "published loop": published_loop,
    "dense Cholesky factor": dense_cholesky,
    "MultivariateNormal": multivariate_normal,
    "FFT": fft,
    "recorded scan": recorded_scan,
    "ours": ours,
    "one function": one_function,
    "diagonal": diagonal,
}


def parameters(batch: int, latent: int) -> tuple[Tensor, ...]:
    """loc, scale and rho, as an encoder would give them, and noise."""
    loc = torch.randn(batch, latent, requires_grad=True)
    scale = (0.5 + torch.rand(batch, 1)).requires_grad_()
    rho = (1.8 * torch.rand(batch, 1) - 0.9).requires_grad_()
    return loc, scale, rho, torch.randn(batch, latent)


def forward_and_backward(function: Callable, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    weights = torch.ones_like(function(*inputs))

    def call():
        function(*inputs).backward(weights)
        for x in inputs:
            x.grad = None

    return call


def is_dense(name: str) -> bool:
    """Whether a candidate forms a (latent, latent) matrix for each image."""
    return name in ("dense Cholesky factor", "MultivariateNormal")


def samplers(batch: int, latent: int) -> dict[str, Callable[[], None]]:
    inputs = parameters(batch, latent)
    expected, found = (
        torch.autograd.grad(function(*inputs).sin().sum(), inputs[:3])
        for function in (ours, one_function)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * latent)
    left_out = {name for name in SAMPLERS if is_dense(name) and latent > 256}
    left_out |= {"published loop"} if latent > 1024 else set()
    return {
        name: forward_and_backward(function, inputs)
        for name, function in SAMPLERS.items()
        if name not in left_out
    }


def in_place(u: Tensor, rho: Tensor) -> Tensor:
    """A round multiplies into new memory and adds to x in place."""
    x, power, shift = u.clone(), rho, 1
    while shift < u.shape[-1]:
        x[:, shift:] += power * x[:, :-shift]
        power, shift = power * power, 2 * shift
    return x


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
    rows = x.unbind(0)
    for earlier, later in pairwise(rows):
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
    "copy and addcmul (ours)": ar1._doubling,
    "in place, two operations": in_place,
    "padded buffers": padded_buffers,
    "row by row": row_by_row,
    "blocks of 16": blocks,
}


@torch.no_grad()
def scans(batch: int, latent: int) -> dict[str, Callable[[], None]]:
    """Ways to write the forward scan for one shared rho; all give the same numbers."""
    _, _, rho, u = parameters(batch, latent)
    rho = rho.detach()
    for function in SCANS.values():
        torch.testing.assert_close(function(u, rho), ar1.scan(u, rho), rtol=1e-3, atol=1e-4)
    chosen = {name: f for name, f in SCANS.items() if f is not row_by_row or latent <= 1024}
    return {name: partial(function, u, rho) for name, function in chosen.items()}


def roofline() -> dict[str, Callable[[], None]]:
    """What the machine can do: 64 MiB copied, and a product of two 1024 x 1024 matrices."""
    source, target = torch.randn(2**24), torch.empty(2**24)
    a, b, c = torch.randn(3, 1024, 1024)
    return {
        "copy of 64 MiB": lambda: target.copy_(source),
        "product": lambda: torch.mm(a, b, out=c),
    }


GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "Adam": ("aten::_fused_adam_", "Optimizer.step", "Optimizer.zero_grad"),
    "cross-entropy": ("aten::log_sigmoid", "aten::sigmoid", "aten::binary_cross", "aten::sub"),
    "images": ("aten::index_select", "aten::randperm", "aten::div_"),
}


def step_profile(posterior: str, latent: int = 20) -> dict[str, float]:
    """Where a training step spends its time, by torch.profiler: milliseconds by group."""
    steps = our_steps(posterior, latent)
    for _ in range(3):
        steps()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        steps()
    shares = dict.fromkeys((*GROUPS, "everything else"), 0.0)
    for event in profiled.key_averages():
        fits = [group for group, names in GROUPS.items() if event.key.startswith(names)]
        shares[fits[0] if fits else "everything else"] += event.self_cpu_time_total / 1e3 / STEPS
    return shares


def densities(quantity: str, batch: int, latent: int) -> dict[str, Callable[[], None]]:
    """log_prob of given values, or the KL to the prior, with the making of the distribution."""
    loc, scale, rho, _ = parameters(batch, latent)
    factor = torch.randn(batch, latent, 2, requires_grad=True)
    value = torch.randn(batch, latent)
    prior = standard_normal_like(value)
    dense_prior = MultivariateNormal(torch.zeros(latent), torch.eye(latent), validate_args=False)

    def ar1normal(loc, scale, rho):
        return AR1Normal(loc, scale, rho, validate_args=False)

    def dense(loc, scale, rho):
        covariance = scale.square().unsqueeze(-1) * ar1.correlation(rho, latent)
        return MultivariateNormal(loc, covariance, validate_args=False)

    def low_rank(loc, scale, factor):
        variance = scale.square().expand(-1, latent)
        return LowRankMultivariateNormal(loc, factor, variance, validate_args=False)

    def independent(loc, scale):
        normal = Normal(loc, scale.expand(-1, latent), validate_args=False)
        return Independent(normal, 1, validate_args=False)

    families = {
        "ours": (ar1normal, prior, (loc, scale, rho)),
        "MultivariateNormal": (dense, dense_prior, (loc, scale, rho)),
        "LowRankMultivariateNormal": (low_rank, dense_prior, (loc, scale, factor)),
        "diagonal": (independent, prior, (loc, scale)),
    }
    calls = {}
    for name, (family, p, inputs) in families.items():
        if is_dense(name) and latent > 256:
            continue
        if quantity == "log_prob":
            function = lambda *inputs, family=family: family(*inputs).log_prob(value)  # noqa: E731
        else:
            function = lambda *inputs, family=family, p=p: kl_divergence(family(*inputs), p)  # noqa: E731
        calls[name] = forward_and_backward(function, inputs)
    return calls


STEPS = 20  # of 128 images, in one timed call


def pixels() -> Tensor:
    return torch.randint(0, 256, (128 * STEPS, 1, 28, 28), dtype=torch.uint8)


def new_vae(posterior: str, latent: int) -> VAE:
    return build_vae(Experiment("mnist", posterior=posterior, latent=latent), (1, 28, 28))


def our_steps(posterior: str, latent: int, compiled: bool = False) -> Callable[[], None]:
    vae, images = new_vae(posterior, latent), pixels()
    loss = batch_loss(vae, negative_elbo, compiled)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    return lambda: train_epoch(vae, images, loss, optimizer, 128)


def published_steps(latent: int) -> Callable[[], None]:
    """Images one by one through PIL and ToTensor, sigmoid and cross-entropy, .item() each step."""

    class Images(MNIST):
        """torchvision's, around images that are in memory."""

        def __init__(self, data):
            self.data, self.targets = data[:, 0], torch.zeros(len(data), dtype=torch.long)
            self.transform, self.target_transform = ToTensor(), None

    vae = new_vae("diagonal", latent)
    loader = DataLoader(Images(pixels()), batch_size=128, shuffle=True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)

    def epoch():
        total = 0.0
        for x, _ in loader:
            optimizer.zero_grad()
            q, _, logits = vae(x)
            loss = binary_cross_entropy(logits.sigmoid(), x, reduction="sum")
            loss = loss + kl_divergence(q, standard_normal_like(q.mean)).sum()
            loss.backward()
            total += loss.item()
            optimizer.step()

    return epoch


def pythae_steps(latent: int, folder: str) -> Callable[[], None]:
    """Pythae's VAE, data set and trainer, with its defaults for a multilayer perceptron."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as PythaeVAE
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU())
            self.loc, self.log_variance = nn.Linear(400, latent), nn.Linear(400, latent)

        def forward(self, x):
            h = self.body(x)
            return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(latent, 400), nn.ReLU(), nn.Linear(400, 784))

        def forward(self, z):
            image = self.body(z).sigmoid().reshape(-1, 1, 28, 28)
            return ModelOutput(reconstruction=image)

    logging.getLogger("pythae").setLevel(logging.ERROR)
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent, reconstruction_loss="bce")
    images = pixels().float() / 255
    trainer = BaseTrainer(
        PythaeVAE(config, encoder=Encoder(), decoder=Decoder()),
        BaseDataset(images, torch.zeros(len(images))),
        training_config=BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=128, learning_rate=1e-3, no_cuda=True
        ),
    )
    trainer.prepare_training()
    trainer.model.train()
    return lambda: trainer.train_step(1)


def floor(latent: int) -> Callable[[], None]:
    """The matrix products of as many steps, forward and backward, and nothing else."""
    shapes = [(784, 400), (400, latent), (400, latent), (latent, 400), (400, 784)]
    layers = [
        (torch.randn(128, m), torch.randn(m, n), torch.randn(128, n), i > 0)
        for i, (m, n) in enumerate(shapes)
    ]
    spare = [(torch.empty(128, n), torch.empty(m, n), torch.empty(128, m)) for m, n in shapes]

    def steps():
        for _ in range(STEPS):
            for (x, weight, gradient, needs_input), (y, dw, dx) in zip(layers, spare, strict=True):
                torch.mm(x, weight, out=y)
                torch.mm(x.mT, gradient, out=dw)
                if needs_input:
                    torch.mm(gradient, weight.mT, out=dx)

    return steps


def training_steps(latent: int, everything: bool, folder: str) -> dict[str, Callable[[], None]]:
    calls = {
        "ours, diagonal": our_steps("diagonal", latent),
        "ours, AR(1)": our_steps("ar1", latent),
    }
    if shutil.which(os.environ.get("CXX", "g++")):
        calls["ours compiled, diagonal"] = our_steps("diagonal", latent, compiled=True)
        calls["ours compiled, AR(1)"] = our_steps("ar1", latent, compiled=True)
    if everything:
        calls["published pipeline"] = published_steps(latent)
        if find_spec("pythae"):
            calls["Pythae"] = pythae_steps(latent, folder)
        calls["floor"] = floor(latent)
    return calls


def optimizers() -> dict[str, Callable[[], None]]:
    """One step of Adam on the parameters of a rho-VAE, in torch's implementations."""
    kinds = {"for each tensor": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    calls = {}
    for name, how in kinds.items():
        how = how or {"foreach": False, "fused": False}
        vae = new_vae("ar1", 20)
        for parameter in vae.parameters():
            parameter.grad = torch.randn_like(parameter)
        calls[name] = torch.optim.Adam(vae.parameters(), lr=1e-3, **how).step
    return calls


def measure(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, dict]:
    """Milliseconds a call, over turns of about 5 ms or one call; at least 7 for each candidate."""

    def turn(call, calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls

    at_once = {
        name: max(1, round(5 / min(turn(call, 3), turn(call, 3)))) for name, call in calls.items()
    }
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 7:
        for name, call in calls.items():
            times[name].append(turn(call, at_once[name]))
    quartiles = {name: np.percentile(values, (25, 50, 75)) for name, values in times.items()}
    return {
        name: {"q1": low, "median": middle, "q3": high, "turns": len(times[name])}
        for name, (low, middle, high) in quartiles.items()
    }


def comparisons(folder: str) -> list[tuple[dict, Callable]]:
    """What is compared at which size, as labels and a function that makes the candidates."""
    found = []
    for batch, latent in (*SHAPES, *BATCHES, *LONG):
        label = {"what": "sampler", "batch": batch, "latent": latent}
        found.append((label, partial(samplers, batch, latent)))
    for quantity, latent in product(("log_prob", "kl"), (20, 64, 256)):
        label = {"what": quantity, "batch": 128, "latent": latent}
        found.append((label, partial(densities, quantity, 128, latent)))
    for latent in (5, 20, 64):
        label = {"what": "training", "batch": 128, "latent": latent, "steps": STEPS}
        found.append((label, partial(training_steps, latent, latent == 20, folder)))
    for batch, latent in ((128, 20), (128, 256), (128, 1024), (16, 100_000)):
        label = {"what": "scan", "batch": batch, "latent": latent}
        found.append((label, partial(scans, batch, latent)))
    found.append(({"what": "roofline"}, roofline))
    found.append(({"what": "optimizer", "batch": 128, "latent": 20}, optimizers))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4, help="for each comparison")
    parser.add_argument(
        "--save", type=Path, help="by default data/results/speed.json, if all is run"
    )
    parser.add_argument("--only", default="", help="sampler, scan, training, ...")
    arguments = parser.parse_args()
    save = arguments.save or (None if arguments.only else Path("data/results/speed.json"))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results = []
    with TemporaryDirectory() as folder:
        for label, make in comparisons(folder):
            if arguments.only in ("", label["what"]):
                times = measure(make(), arguments.seconds)
                results.append(label | {"milliseconds": times})
                show(label, times)
    record = {"seconds": arguments.seconds, "environment": environment(torch.device("cpu"))}
    if arguments.only in ("", "training"):
        record["profile"] = {name: step_profile(name) for name in ("diagonal", "ar1")}
    text = json.dumps(record | {"comparisons": results}, indent=1) + "\n"
    if save:
        write_whole(save, text.encode())


def show(label: dict, times: dict[str, dict]) -> None:
    reference = next(
        (n for n in times if n.startswith(("ours", "fused", "copy and"))), next(iter(times))
    )
    print(", ".join(f"{key} {value}" for key, value in label.items()), f"(x {reference})")
    for name, t in times.items():
        ratio = t["median"] / times[reference]["median"]
        quartiles = f"({t['q1']:.3g} to {t['q3']:.3g})"
        print(f"  {name:26s} {t['median']:9.3g} ms {quartiles:22s} {ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
