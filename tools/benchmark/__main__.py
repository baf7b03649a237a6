"""Write data/results/speed.json, and print its ratios.

python -m tools.benchmark [--threads 2] [--seconds 4] [--save speed.json] [--only training]
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rhovae.study.provenance import environment
from rhovae.study.records import write_whole

from . import clock, conditioning, densities, draws, scans, training

WIDTHS = [(128, 5), (128, 20), (128, 64), (128, 256), (128, 1024)]
LONG = [(16, 1_000), (16, 3_162), (16, 10_000), (16, 31_623), (16, 100_000)]


def comparisons(folder: str) -> Iterator[tuple[dict, Callable[[], clock.Calls]]]:
    """What is compared at which size, as labels and a function that makes the candidates."""
    for what, make, sizes in (
        ("draw", draws.functions, WIDTHS + LONG),
        ("rsample", draws.families, WIDTHS),
        ("condition", conditioning.conditioning, [(128, 1_000)]),
        ("log_prob", partial(densities.densities, "log_prob"), WIDTHS[1:4]),
        ("kl", partial(densities.densities, "kl"), WIDTHS[1:4]),
        ("scan", scans.scans, [(128, 20), (128, 256), (128, 1024), (16, 100_000)]),
    ):
        for batch, latent in sizes:
            yield {"what": what, "batch": batch, "latent": latent}, partial(make, batch, latent)
    for latent in (5, 20, 64):
        label = {"what": "training", "batch": 128, "latent": latent, "steps": training.STEPS}
        yield label, partial(training.steps, latent, latent == 20, folder)
    for architecture in ("cnn", "dcgan", "beta_cnn"):
        label = {"what": "layout", "batch": 128, "latent": 10, "network": architecture}
        yield label, partial(training.layouts, architecture)
    yield {"what": "optimizer", "batch": 128, "latent": 20}, training.optimizers
    yield {"what": "likelihood", "batch": 128}, training.likelihoods
    yield {"what": "limits"}, scans.limits
    # Last, and the profiler after it: either makes torch's log1p faster for the rest of a process.
    label = {"what": "torch.compile", "batch": 128, "latent": 20, "steps": training.STEPS}
    yield label, partial(training.compiled_steps, 20)


def processor() -> str:
    """The name that Linux gives it; elsewhere that of its family."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4, help="for each comparison")
    parser.add_argument("--save", type=Path, help="default: data/results/speed.json, if all is run")
    parser.add_argument("--only", default="", help="draw, rsample, condition, training, ...")
    arguments = parser.parse_args()
    save = arguments.save or (None if arguments.only else Path("data/results/speed.json"))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record = {
        "seconds": arguments.seconds,
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "numba": version("numba") if find_spec("numba") else None,
        "environment": environment(torch.device("cpu")),
        "comparisons": [],
    }
    with TemporaryDirectory() as folder:
        for label, make in comparisons(folder):
            if arguments.only in ("", label["what"]):
                times = clock.measure(make(), arguments.seconds)
                record["comparisons"].append(label | {"milliseconds": times})
                clock.show(label, times)
    if arguments.only in ("", "training"):
        record["profile"] = {name: training.time_by_kind(name) for name in training.POSTERIORS}
    if save:
        write_whole(save, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
