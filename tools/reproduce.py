"""The main job: run every notebook headlessly on the embedded images, into runs/embedded/.

    python tools/reproduce.py

Notebook 05 trains on both data sets; 06 draws the paper's figures from the records just made; the
others run as they are. For the full sets there is the Snakefile.
"""

import time
from pathlib import Path

from notebooks import NOTEBOOKS, ROOT, run
from rhovae.study.records import load_records, result_table

DATASETS = ("mnist", "fashion-mnist")
TRAIN, FIGURES = "05_train.ipynb", "06_paper_figures.ipynb"


def main() -> None:
    folder = Path("runs") / "embedded"
    out = ROOT / folder / "notebooks"
    start = time.perf_counter()
    results, figures = str(folder / "results"), str(folder / "figures")
    for old in [*(ROOT / results).glob("**/*.json"), *(ROOT / figures).glob("*.svg")]:
        old.unlink()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.name == TRAIN:
            for dataset in DATASETS:
                settings = dict(dataset=dataset, results=f"{results}/audit", latent=10,
                                posteriors=["diagonal", "ar1", "published-script"],
                                initialisation="xavier", seeds=[0, 1, 2])  # fmt: skip
                run(path, out / f"{path.stem}_{dataset}.ipynb", settings)
        elif path.name == FIGURES:
            settings = dict(results=results, source="embedded", save_to=figures)
            run(path, out / path.name, settings)
        else:
            run(path, out / path.name, {})
    print("\n" + result_table(load_records(ROOT / results / "audit")))
    drawn = sorted((ROOT / figures).glob("*.svg"))
    if not drawn:
        raise SystemExit(f"No figure was drawn into {figures}.")
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes.")
    print(f"Executed notebooks: {folder / 'notebooks'}\nRecords: {results}\nFigures:")
    print("\n".join(f"  {path.relative_to(ROOT)}" for path in drawn))


if __name__ == "__main__":
    main()
