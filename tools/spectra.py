"""Write data/spectra.json: python tools/spectra.py [--root FOLDER]

The eigenvalues of the covariance of the full training sets, which notebook 07 needs.
"""

import argparse
import json

from rhovae.study.data import DATA_FOLDER, DATASETS, fingerprint, load_images
from rhovae.study.linear import data_spectrum
from rhovae.study.records import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with the full sets in torchvision's layout")
    root = parser.parse_args().root
    spectra = {}
    for dataset in DATASETS:
        images = load_images(dataset, "train", "full", root)
        spectra[dataset] = {
            "images": len(images),
            "train_sha256": fingerprint(images),
            "eigenvalues": data_spectrum(images).tolist(),
        }
    write_whole(DATA_FOLDER / "spectra.json", (json.dumps(spectra, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
