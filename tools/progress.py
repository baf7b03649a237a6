"""How far the grid is, from its records and checkpoints.

    python tools/progress.py [--runs runs/full] [--results data/results] [--epochs 15]

with what was told to Snakemake. Reads files only, so it can be called at any time and, on a
cluster, from any node.
"""

import argparse
from pathlib import Path

from grids import GRIDS, convolutional

from rhovae.study import Experiment
from rhovae.study.checkpoint import read_checkpoint


def progress(runs: Path, results: Path, grids: dict[str, list[Experiment]]) -> list[str]:
    """One line per experiment that is under way, and one per grid."""
    lines = []
    for grid, experiments in grids.items():
        done = epochs = 0
        for experiment in experiments:
            checkpoint = runs / "checkpoints" / f"{experiment.run_name}.pt"
            if (results / grid / f"{experiment.name}.json").is_file():
                done += 1
                epochs += experiment.epochs
            elif checkpoint.is_file():
                history = read_checkpoint(checkpoint)["history"]
                epochs += min(len(history), experiment.epochs)
                lines.append(
                    f"  {experiment.name}: epoch {len(history)} of {experiment.epochs}, test -ELBO "
                    f"{history[-1]['test']['negative_elbo']:.2f} nats"
                )
        total = sum(experiment.epochs for experiment in experiments)
        lines.append(
            f"{grid}: {done} of {len(experiments)} records, {epochs} of {total} epochs "
            f"({epochs / max(total, 1):.0%})"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/full"))
    parser.add_argument("--results", type=Path, help="if they are not in the folder of the runs")
    parser.add_argument("--epochs", type=int, default=5, help="of cnn")
    arguments = parser.parse_args()
    grids = {name: grid() for name, grid in GRIDS.items() if name != "smoke"}
    grids["convolutional"] = convolutional(arguments.epochs)
    results = arguments.results or arguments.runs / "results"
    print("\n".join(progress(arguments.runs, results, grids)))


if __name__ == "__main__":
    main()
