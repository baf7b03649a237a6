"""How far the grid is, from its records and checkpoints: python tools/progress.py [RUNS [RESULTS]]

Reads files only, so it can be called at any time and, on a cluster, from any node.
"""

import sys
from pathlib import Path

from grids import GRIDS

from rhovae.checkpoint import read_checkpoint


def progress(runs: Path, results: Path, names: list[str]) -> list[str]:
    """One line per experiment that is under way, and one per grid that has begun."""
    lines = []
    for grid in names:
        experiments = GRIDS[grid]()
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
            f"({epochs / total:.0%})"
        )
    return lines


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/full")
    results = Path(sys.argv[2]) if len(sys.argv) > 2 else runs / "results"
    print("\n".join(progress(runs, results, [grid for grid in GRIDS if grid != "smoke"])))


if __name__ == "__main__":
    main()
