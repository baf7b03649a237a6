"""The main job: run every notebook headlessly on the embedded images, into runs/embedded/.

    python tools/reproduce.py

Notebook 05 trains on both data sets; 06 draws the paper's figures from the records just made; the
others run as they are. Notebooks run side by side with one thread each, as they hardly gain by a
second: as many as there are processors, and at most four. For the full sets there is the Snakefile.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import notebooks
from notebooks import NOTEBOOKS, ROOT
from rhovae.study.records import load_records
from rhovae.study.seeds import result_table

DATASETS = ("mnist", "fashion-mnist")
TRAIN, FIGURES = "05_train.ipynb", "06_paper_figures.ipynb"
AT_ONCE = max(1, min(4, os.cpu_count() or 1))
running: set[subprocess.Popen] = set()
stopped = Event()


def run(path: Path, out: Path, parameters: dict) -> None:
    """One notebook in a process of its own; what it complains of is the error."""
    if stopped.is_set():
        return
    command = [sys.executable, notebooks.__file__, "run", str(out), str(path)]
    for name, value in parameters.items():
        command += ["-p", name, json.dumps(value)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=one_thread, stderr=subprocess.PIPE, text=True)
    running.add(process)
    _, errors = process.communicate()
    running.discard(process)
    if process.returncode and not stopped.is_set():
        stopped.set()
        for other in list(running):
            other.terminate()  # not SIGINT, which what runs in the background ignores
        raise SystemExit(errors.strip() or f"{path.name} ended with {process.returncode}.")


def run_all(results: str, figures: str, out: Path) -> None:
    """The trainings first, as they take longest and the figures wait for them."""
    trainings = [
        (path, out / f"{path.stem}_{dataset}.ipynb",
         dict(dataset=dataset, results=f"{results}/audit", latent=10, initialisation="xavier",
              posteriors=["diagonal", "ar1", "published-script"], seeds=[0, 1, 2]))
        for path in NOTEBOOKS.glob(TRAIN) for dataset in DATASETS
    ]  # fmt: skip
    drawn = [(path, out / path.name, dict(results=results, source="embedded", save_to=figures))
             for path in NOTEBOOKS.glob(FIGURES)]  # fmt: skip
    rest = [(path, out / path.name, {}) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
            if path.name not in (TRAIN, FIGURES)]  # fmt: skip
    stopped.clear()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        trained = [pool.submit(run, *job) for job in trainings]
        others = [pool.submit(run, *job) for job in rest]
        try:
            for job in trained:
                job.result()
            others += [pool.submit(run, *job) for job in drawn]
            for job in others:
                job.result()
        except KeyboardInterrupt:  # which all the notebooks have heard, too
            stopped.set()
            raise SystemExit(130) from None


def main() -> None:
    folder = Path("runs") / "embedded"
    start = time.perf_counter()
    results, figures = str(folder / "results"), str(folder / "figures")
    for old in [*(ROOT / results).glob("**/*.json"), *(ROOT / figures).glob("*.svg")]:
        old.unlink()
    run_all(results, figures, ROOT / folder / "notebooks")
    print("\n" + result_table(load_records(ROOT / results / "audit")))
    drawn = sorted((ROOT / figures).glob("*.svg"))
    if not drawn:
        raise SystemExit(f"No figure was drawn into {figures}.")
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes.")
    print(f"Executed notebooks: {folder / 'notebooks'}\nRecords: {results}\nFigures:")
    print("\n".join(f"  {path.relative_to(ROOT)}" for path in drawn))


if __name__ == "__main__":
    main()
