"""Run every notebook headlessly and leave what they make under runs/<source>/.

    python tools/reproduce.py embedded      the main job, minutes
    python tools/reproduce.py full          the same on the full sets

Notebook 05 trains on both data sets; 06 draws the paper's figures from the records just made; the
others run as they are. Finished runs on the full sets are not repeated.
"""

import argparse
import os
import time
from pathlib import Path

from notebooks import NOTEBOOKS, ROOT, run
from rhovae.records import load_records, result_table

DATASETS = ("mnist", "fashion-mnist")
TRAIN, FIGURES = "05_train.ipynb", "06_paper_figures.ipynb"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=("embedded", "full"))
    source = parser.parse_args().source
    folder = Path("runs") / source
    out = ROOT / folder / "notebooks"
    start = time.perf_counter()
    # A folder for the full sets given relative to here must hold in the notebooks' folder too.
    if os.environ.get("RHOVAE_DATA"):
        os.environ["RHOVAE_DATA"] = str(Path(os.environ["RHOVAE_DATA"]).resolve())
    results, figures = str(folder / "results"), str(folder / "figures")
    if source == "embedded":
        for old in (ROOT / results).glob("*.json"):
            old.unlink()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.name == TRAIN:
            for dataset in DATASETS:
                settings = dict(dataset=dataset, source=source, results=results, latent=10,
                                posteriors=["diagonal", "ar1", "published-script"],
                                initialisation="xavier", seeds=[0, 1, 2],
                                reuse=source == "full")  # fmt: skip
                run(path, out / f"{path.stem}_{dataset}.ipynb", settings)
        elif path.name == FIGURES:
            settings = dict(results=results, source=source, save_to=figures)
            run(path, out / path.name, settings)
        else:
            run(path, out / path.name, {})
    print("\n" + result_table(load_records(ROOT / results)))
    drawn = sorted((ROOT / figures).glob("*.svg"))
    if not drawn:
        raise SystemExit(f"No figure was drawn into {figures}.")
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes.")
    print(f"Executed notebooks: {folder / 'notebooks'}\nRecords: {results}\nFigures:")
    print("\n".join(f"  {path.relative_to(ROOT)}" for path in drawn))


if __name__ == "__main__":
    main()
