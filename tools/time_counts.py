"""Make the missing runs of notebook 10's study of counts: python tools/time_counts.py [--seeds 2]

One line each in data/results/time/counts.jsonl. It can be stopped and started again.
"""

import argparse

from rhovae.study.counts import run, settings
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import run_missing

PATH = DATA_FOLDER / "results" / "time" / "counts.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="only seeds below this one")
    seeds = parser.parse_args().seeds
    run_missing(PATH, [chosen for chosen in settings() if chosen["seed"] < seeds], run)


if __name__ == "__main__":
    main()
