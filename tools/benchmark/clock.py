"""Candidates that take turns."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Calls = dict[str, Callable[[], object]]  # name of a candidate -> what is timed


def measure(calls: Calls, seconds: float) -> dict[str, dict]:
    """Milliseconds a call in turns of about 5 ms or one call, at least 7 turns for each candidate.

    The candidates take turns, so that a slow moment of the machine meets all of them, and each has
    run before. Its best turn is what a candidate takes, later ones also what else the machine did.
    Only ratios of what was measured together mean anything.
    """

    def turn(call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - start) / repeats

    repeats = {
        name: max(1, round(5 / min(turn(call, 3), turn(call, 3)))) for name, call in calls.items()
    }
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while calls and (time.perf_counter() < end or min(map(len, times.values())) < 7):
        for name, call in calls.items():
            times[name].append(turn(call, repeats[name]))
    return {
        name: {"best": min(all_), "median": float(np.median(all_)), "turns": len(all_)}
        for name, all_ in times.items()
    }


def with_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], None]:
    """A call of the function and of its backward pass."""
    weights = torch.ones_like(function(*inputs))

    def call():
        function(*inputs).backward(weights)
        for x in inputs:
            x.grad = None

    return call


def show(label: dict, times: dict[str, dict]) -> None:
    reference = "ours" if "ours" in times else next(iter(times), None)
    print(", ".join(f"{key} {value}" for key, value in label.items()), f"(x {reference})")
    for name, t in times.items():
        ratio = t["best"] / times[reference]["best"]
        print(
            f"  {name:26s} {t['best']:9.3g} ms, median {t['median']:9.3g} {ratio:9.2f}", flush=True
        )
