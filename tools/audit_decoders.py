"""Make the records of the authors' two best objections (notebook 06, Section 6.6); resumable.

python tools/audit_decoders.py                 the baselines and the published models of Figure 1
python tools/audit_decoders.py --seeds 0 1     some of them
python tools/audit_decoders.py --all           also the corrected AR(1), and the notebook's models
"""

import argparse
from itertools import product

import torch

from rhovae.study import decoders
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import run_missing

PATH = DATA_FOLDER / "results" / "decoders.jsonl"
SEEDS = range(5)
SCRIPT = {"latent": 10, "initialisation": "xavier"}
NOTEBOOK = {"latent": 5, "initialisation": "torch"}


def runs(seeds=SEEDS, everything: bool = False) -> list[dict]:
    """Of the script's models first one seed of both, then the next; then the others alike."""
    cases = [list(product(("mnist", "fashion-mnist"), ("diagonal", "published-script"), (SCRIPT,)))]
    if everything:
        cases.append(list(product(("mnist", "fashion-mnist"), ("ar1",), (SCRIPT,))))
        cases.append(
            list(product(("fashion-mnist",), ("diagonal", "published-notebook"), (NOTEBOOK,)))
        )
    return [
        {"dataset": dataset, "posterior": posterior, "seed": seed, **settings}
        for part in cases
        for seed, (dataset, posterior, settings) in product(seeds, part)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    run_missing(PATH, runs(given.seeds, given.all), decoders.run)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
