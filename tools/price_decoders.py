"""Make the missing records of what families cost by decoders' Jacobians; resumable.

python tools/price_decoders.py                 the six decoders of the grid `gaps`
python tools/price_decoders.py --images 500    on more of the test images

Each decoder is trained once more, as the grid keeps no weights, and what the grid measures is
measured again on the same model. Weights and measurements stay in runs/jacobians/.
"""

import argparse
import functools
from itertools import product

import torch

from rhovae.study import jacobians
from rhovae.study.data import DATA_FOLDER
from rhovae.study.lines import run_missing

PATH = DATA_FOLDER / "results" / "jacobians.jsonl"
CHECKPOINTS = DATA_FOLDER.parent / "runs" / "jacobians" / "checkpoints"


def runs(images: int) -> list[dict]:
    """Both sets, decoders trained with three families."""
    return [
        {"dataset": dataset, "decoder": decoder, "images": images}
        for decoder, dataset in product(("diagonal", "ar1", "full"), ("mnist", "fashion-mnist"))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="test images per decoder")
    parser.add_argument("--checkpoints", default=CHECKPOINTS, help="folder of the models")
    given = parser.parse_args()
    run = functools.partial(jacobians.run, checkpoints=given.checkpoints)
    run_missing(PATH, runs(given.images), run)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
