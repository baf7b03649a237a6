"""Cut the embedded samples from the front of the full sets: data/embedded/<name>.npz.

    python tools/embed_data.py --root FOLDER_WITH_FULL_SETS

Prints the SHA-256 of each file, to be copied into rhovae/study/data.py. Same input, same bytes.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from rhovae.study.data import DATASETS, _full

SIZES = {"train": 10_000, "test": 2_000}
FOLDER = Path(__file__).resolve().parent.parent / "data" / "embedded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with the full sets in torchvision's layout")
    root = parser.parse_args().root
    for name in DATASETS:
        arrays = {}
        for split, size in SIZES.items():
            full = _full(name, split, root)
            arrays[f"{split}_images"] = full.data[:size].numpy()
            arrays[f"{split}_labels"] = full.targets[:size].numpy().astype(np.uint8)
        path = FOLDER / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f'    "{name}": "{digest}",  # {path.stat().st_size / 1e6:.1f} MB')


if __name__ == "__main__":
    main()
