"""Run a list of experiments, several at a time, skipping those whose record exists.

    python tools/run_grid.py audit --root FOLDER_WITH_FULL_SETS --jobs 2

A record appears when its run is finished, so the command can be stopped and repeated at any time.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from rhovae import Experiment, run_experiment

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"


def audit() -> list[Experiment]:
    """Notebooks 04 and 06: the paper's Figure 1 and its notebook, published and corrected."""
    ours = ("diagonal", "isotropic", "ar1")
    seeds, both = range(5), ("mnist", "fashion-mnist")
    notebook = product(seeds, both[1:], (*ours, "published-notebook"), (5,), ("torch",))
    script = product(seeds, both, (*ours, "published-script"), (10,), ("xavier",))
    return [
        Experiment(dataset=dataset, source="full", posterior=posterior, latent=latent, seed=seed,
                   initialisation=initialisation)
        for seed, dataset, posterior, latent, initialisation in (*notebook, *script)
    ]  # fmt: skip


def control() -> list[Experiment]:
    """Notebook 04: each of the code's two departures alone, in the setting of its notebook."""
    departures = [("diagonal", "divided-kl"), ("ar1", "divided-kl"), ("published-notebook", "elbo")]
    return [
        Experiment(dataset="fashion-mnist", source="full", latent=5, seed=seed,
                   posterior=posterior, objective=objective)
        for seed, (posterior, objective) in product(range(5), departures)
    ]  # fmt: skip


GRIDS = {"audit": audit, "control": control}
FOLDERS = {"audit": RESULTS, "control": RESULTS / "control"}


def _run(experiment: Experiment, folder: Path, root: str | None, threads: int) -> str:
    import torch

    torch.set_num_threads(threads)
    run_experiment(experiment, root=root, folder=folder, reuse=True, progress=False)
    return experiment.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", choices=GRIDS)
    parser.add_argument("--root", help="folder with the full sets in torchvision's layout")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    experiments = GRIDS[arguments.grid]()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        runs = [
            pool.submit(_run, e, FOLDERS[arguments.grid], arguments.root, threads)
            for e in experiments
        ]
        try:
            for run in tqdm(as_completed(runs), total=len(runs), unit="run"):
                tqdm.write(run.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # finish what runs, start nothing more
            raise


if __name__ == "__main__":
    main()
