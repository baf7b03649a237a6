"""Make the records of the VAE on moving images (notebook 11, Section 11.2); it can be stopped.

python tools/time_moving.py                 160 runs, all of one seed before the next
python tools/time_moving.py --seeds 0 1     some of them
python tools/time_moving.py --longer        how far from convergence: seed 0, four times as long
python tools/time_moving.py --starts        other first time constants of the prior, 60 % missing
"""

import argparse
from itertools import product

import torch

from rhovae.study import moving
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import run_missing
from rhovae.study.moving import DATA, FAMILIES, MISSING

PATH = DATA_FOLDER / "results" / "time" / "moving.jsonl"
PATH_LONGER = PATH.with_name("moving_longer.jsonl")
PATH_STARTS = PATH.with_name("moving_starts.jsonl")
SEEDS = range(5)


def runs(seeds=SEEDS) -> list[dict]:
    cases = list(product(DATA, MISSING, FAMILIES))
    cases += [("digits", missing, "smoothed") for missing in MISSING[1:]]  # a control
    return [
        {"data": data, "missing": missing, "posterior": posterior, "seed": seed}
        for seed in seeds
        for data, missing, posterior in cases
    ]


LONGER = [
    {"data": "digits", "missing": 0.3, "posterior": posterior, "seed": 0, "steps": 6000}
    for posterior in ("chain", "sites", "diagonal", "karhunen-loeve", "gp-vae")
]

# All channels alike, at the spot's true time constant and at four times that.
STARTS = [
    {"data": data, "missing": 0.6, "posterior": posterior, "seed": seed, "time_constant": start}
    for data, seeds, starts, posteriors in (
        ("spot", (0, 1), (20.0, 5.0), ("karhunen-loeve", "chain", "sites", "diagonal")),
        ("digits", (0,), (20.0,), ("diagonal", "sites")),
    )
    for seed in seeds
    for start in starts
    for posterior in posteriors
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--longer", action="store_true")
    parser.add_argument("--starts", action="store_true")
    given = parser.parse_args()
    if given.longer:
        run_missing(PATH_LONGER, LONGER, moving.train)
    elif given.starts:
        run_missing(PATH_STARTS, STARTS, moving.train)
    else:
        run_missing(PATH, runs(given.seeds), moving.train)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
