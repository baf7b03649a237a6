"""Make the records of the learned deconvolution (notebook 11, Section 11.1); it can be stopped.

python tools/time_deconvolution.py prices     what the exact model predicts, 44 minimisations
python tools/time_deconvolution.py            the 240 runs, all of one seed before the next
"""

import argparse
from itertools import product

import torch

from rhovae.study import deconvolution
from rhovae.study.data import DATA_FOLDER
from rhovae.study.deconvolution import DECODERS, FAMILIES, MISSING, STARTS
from rhovae.study.lines import run_missing

FOLDER = DATA_FOLDER / "results" / "time"
SEARCHED = {"dense": STARTS, "turned": [name for name in STARTS if name != "no blur"]}
PRICES = [
    {"decoder": decoder, "missing": missing, "start": start}
    for missing, decoder in product(MISSING, ("fixed", "turned", "convolution", "dense"))
    for start in SEARCHED.get(decoder, STARTS[:1])
]
SEEDS = range(5)


def runs(seeds=SEEDS) -> list[dict]:
    return [
        {"decoder": decoder, "missing": missing, "posterior": posterior, "seed": seed}
        for seed, missing, decoder, posterior in product(seeds, MISSING, DECODERS, FAMILIES)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("prices", "runs"), default="runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    if given.what == "prices":
        path = FOLDER / "deconvolution_prices.jsonl"
        run_missing(path, PRICES, deconvolution.decoder_price)
    else:
        run_missing(FOLDER / "deconvolution.jsonl", runs(given.seeds), deconvolution.train)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
