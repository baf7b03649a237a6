"""Make data/results/time/coal.json, part by part: python tools/time_coal.py [nuts chain ...]

The posterior of the coal-mining disasters by Pyro's NUTS and by each family (notebook 10). Parts
that are there already are left as they are.
"""

import argparse
import json
import time

import torch
from torch import Tensor
from torch.distributions import Poisson

from rhovae.study.coal import (
    FAMILIES,
    PRIORS,
    WITHHELD,
    load_disasters,
    nuts,
    posterior_on_a_grid,
    rates_of,
)
from rhovae.study.data import DATA_FOLDER
from rhovae.study.provenance import environment
from rhovae.study.records import write_whole

PATH = DATA_FOLDER / "results" / "time" / "coal.json"
LEVELS = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["nuts", *FAMILIES])
    for part in parser.parse_args().parts:
        if part in read():
            continue
        start = time.perf_counter()
        result = by_nuts() if part == "nuts" else by_family(part)
        result["seconds"] = round(time.perf_counter() - start, 1)
        result["environment"] = environment(torch.device("cpu"))
        text = json.dumps(read() | {part: result}, indent=1, allow_nan=False)
        PATH.parent.mkdir(parents=True, exist_ok=True)
        write_whole(PATH, (text + "\n").encode())


def read() -> dict:
    return json.loads(PATH.read_text()) if PATH.is_file() else {}


def by_family(family: str) -> dict:
    grid = posterior_on_a_grid(load_disasters()[2], family)
    theta = (grid.log_time_constant, grid.log_scale, grid.rate)
    return {
        "parameters": {
            name: summary(x, grid.weight) for name, x in zip(PRIORS, theta, strict=True)
        },
        "rates": by_year(rates_of(grid)),
        "log_evidence": grid.log_evidence,
        "last_change": grid.last_change,
        "points": len(grid.weight),
        "heaviest_point": grid.weight.max().item(),
    }


def by_nuts() -> dict:
    from pyro.ops.stats import effective_sample_size, split_gelman_rubin

    found = nuts(load_disasters()[2])
    names = [*PRIORS, "log_rate"]
    return {
        "parameters": {name: summary(found[name].flatten()) for name in PRIORS},
        "rates": by_year(found["log_rate"].flatten(0, 1).exp()),
        "chains": list(found["rate"].shape),
        "divergences": found["divergences"],
        "r_hat": {n: split_gelman_rubin(found[n]).max().item() for n in names},
        "effective_draws": {n: effective_sample_size(found[n]).min().item() for n in names},
        "draws": {n: [round(x, 4) for x in found[n].flatten().tolist()] for n in PRIORS},
    }


def summary(values: Tensor, weight: Tensor | None = None) -> dict:
    """Mean, standard deviation and percentiles 1 to 99, of draws or of the points of a grid."""
    if weight is None:
        mean, deviation = values.mean(), values.std()
        percentiles = values.quantile(LEVELS.to(values))
    else:
        # Weights of a grid stand for cells: the distribution function runs through their centres.
        points, place = values.unique(return_inverse=True)
        mass = weight.new_zeros(len(points)).index_add(0, place, weight)
        mean = (mass * points).sum()
        deviation = (mass * (points - mean).square()).sum().sqrt()
        middle = mass.cumsum(0) - mass / 2
        right = torch.searchsorted(middle, LEVELS).clamp(1, len(points) - 1)
        share = (LEVELS - middle[right - 1]) / (middle[right] - middle[right - 1])
        percentiles = points[right - 1] + share.clamp(0, 1) * (points[right] - points[right - 1])
    return {
        "mean": mean.item(), "sd": deviation.item(), "percentiles": percentiles.tolist(),
    } | ({} if weight is None else {"grid": points.tolist(), "mass": mass.tolist()})  # fmt: skip


def by_year(rates: Tensor) -> dict:
    """What there is to draw of the rate of each year, and how probable the withheld counts were."""
    year, counts, _ = load_disasters()
    probability = Poisson(rates).log_prob(counts).exp().mean(0)
    low, middle, high = rates.quantile(torch.tensor([0.05, 0.5, 0.95]).to(rates), 0).tolist()
    log_rate = rates.log()
    return {
        "mean": rates.mean(0).tolist(), "low": low, "median": middle, "high": high,
        "log_mean": log_rate.mean(0).tolist(), "log_sd": log_rate.std(0).tolist(),
        "withheld": {str(y): probability[year == y].item() for y in WITHHELD},
    }  # fmt: skip


if __name__ == "__main__":
    main()
