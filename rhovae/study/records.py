"""Result records: one JSON file per finished run, from which every figure and table is made."""

import base64
import csv
import io
import json
import math
import os
import uuid
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SCHEMA = 1
REQUIRED = {"schema": int, "experiment": dict, "history": list, "test": dict, "iwae": dict,
            "latent": dict, "parameters": dict, "data": dict, "environment": dict,
            "wall_time_s": dict}  # fmt: skip


def save_record(record: dict, folder: str | Path) -> Path:
    """Write a record to <folder>/<name>.json, whole or not at all.

    Raises:
        ValueError: a record with NaN or infinity, which JSON has no word for.
    """
    path = Path(folder) / f"{record['name']}.json"
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise ValueError(
            f"The record {record['name']} has a value that is not a finite number in "
            f"{', '.join(_not_finite(record)) or 'an unknown place'}; it is not written. Look at "
            "the loss in its history: a lower learning rate may be all it needs."
        ) from None
    write_whole(path, text.encode())
    return path


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that its name never stands for half of it, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file, on whatever machines, must not share this one.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_writable(folder: str | Path, name: str = "") -> None:
    """Make a folder, and a file in it, so that a run learns at its start what its end would meet.

    Args:
        folder: where a run will be kept.
        name: what its file will be called.

    Raises:
        OSError: if that is not possible.
    """
    try:
        write_whole(Path(folder) / f".{name}.writable", b"?" * 4096)
        (Path(folder) / f".{name}.writable").unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"Nothing can be written into {folder} ({error.strerror or error}), so a run could not "
            "be kept; choose another folder, or make room or rights there."
        ) from None


def _not_finite(value, place: str = "") -> list[str]:
    """Where in nested dictionaries and lists the numbers are NaN or infinite."""
    if isinstance(value, float):
        return [] if math.isfinite(value) else [place.lstrip(".")]
    if not isinstance(value, dict | list):
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [found for key, v in pairs for found in _not_finite(v, f"{place}.{key}")]


def load_record(path: str | Path) -> dict:
    """Read one record.

    Raises:
        ValueError: if it is not a complete record of the schema this version knows.
    """
    try:
        record = json.loads(Path(path).read_text(), parse_constant=_refuse_constant)
        problem = _problem_of(record)
    except (ValueError, RecursionError) as error:  # also of JSON and of its encoding
        raise ValueError(f"{path} is not a result record: {error}.") from None
    if problem:
        raise ValueError(
            f"{path} is not a result record of schema {SCHEMA}: {problem}; delete it and run its "
            "experiment again, or update rhovae."
        )
    return record


def _refuse_constant(name: str):
    raise ValueError(f"it has {name} for a number")


def _problem_of(record) -> str:
    """What is wrong with a record, in words; empty if nothing is."""
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}"
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        return f"it lacks {', '.join(missing)}"
    wrong = [key for key, kind in REQUIRED.items() if not isinstance(record[key], kind)]
    if wrong:
        return f"{wrong[0]} is a {type(record[wrong[0]]).__name__}"
    if record["schema"] != SCHEMA:
        return f"it has schema {record['schema']}"
    for key, names in (("test", ("loss", "negative_elbo", "reconstruction", "kl")),
                       ("iwae", ("nll", "negative_elbo"))):  # fmt: skip
        for name in names:
            value = record[key].get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                return f"{key}.{name} is a {type(value).__name__}"
    epochs = {"epoch", "train", "test"}
    if not all(isinstance(entry, dict) and epochs <= entry.keys() for entry in record["history"]):
        return "its history is not a list of epochs"
    infinite = _not_finite(record)
    return f"{infinite[0]} is not a finite number" if infinite else ""


def load_records(folder: str | Path, **configuration) -> list[dict]:
    """All records of a folder whose experiment has the given values, in order of their names.

    Args:
        folder: where `save_record` put them.
        configuration: fields of Experiment and the values wanted, e.g. dataset="mnist".
    Raises:
        ValueError: a file that is no record, or one from before a wanted field existed.
    """
    records = [load_record(path) for path in sorted(Path(folder).glob("*.json"))]
    for record, key in product(records, configuration):
        if key not in record["experiment"]:
            raise ValueError(
                f"{record['name']} says nothing of {key!r}: there is no such setting, or there was "
                "none when it ran; choose by others."
            )
    return [
        record
        for record in records
        if all(record["experiment"].get(key) == value for key, value in configuration.items())
    ]


def curve(record: dict, quantity: str = "negative_elbo", split: str = "test") -> np.ndarray:
    """One quantity over the epochs of a run, in nats per image."""
    return np.array([entry[split][quantity] for entry in record["history"]])


def published_curves(path: str | Path, figure: str) -> dict[tuple[str, str], dict[int, float]]:
    """The paper's own test losses: (data set, posterior) -> epoch -> nats, see data/README.md.

    Args:
        path: data/published_curves.csv.
        figure: "figure1_vae", "figure3_beta_vae", "figure4_cnn_vae", "figure5_info_vae" or
            "notebook".
    """
    curves: dict = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["figure"] == figure:
                epochs = curves.setdefault((row["dataset"], row["posterior"]), {})
                epochs[int(row["epoch"])] = float(row["test_loss"])
    if not curves:
        raise ValueError(f"{path} has no curve of a figure {figure!r}.")
    return curves


def encode_png(pixels: np.ndarray) -> str:
    """Images side by side in one row, as a base64 PNG that knows how many they are.

    Args:
        pixels: uint8, (n, height, width) or in colour (n, height, width, 3).
    """
    count = PngInfo()
    count.add_text("images", str(len(pixels)))
    row = Image.fromarray(np.concatenate(list(pixels), axis=1))
    buffer = io.BytesIO()
    row.save(buffer, format="PNG", optimize=True, pnginfo=count)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_png(text: str) -> np.ndarray:
    """Undo `encode_png`: uint8 images (n, height, width) or (n, height, width, 3)."""
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    # The first records did not say how many they hold; their images are square.
    count = int(image.info.get("images", image.width // image.height))
    return np.stack(np.split(np.asarray(image), count, axis=1))
