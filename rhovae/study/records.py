"""Result records: one JSON file per finished run, from which every figure and table is made."""

import base64
import csv
import io
import json
import math
import os
import re
import uuid
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.special import stdtrit

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


def paired_difference(ones: list[dict], others: list[dict], value) -> np.ndarray:
    """value(one) - value(other) for the runs of each seed that both have, in order of seed.

    The runs of a seed see the images in the same order. That does not make their difference vary
    less than either: in most comparisons of posteriors it varies more (notebook 06, Section 6.2).
    """
    for runs in (ones, others):
        seeds = [r["experiment"]["seed"] for r in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"Several runs share a seed ({sorted(seeds)}); pass runs that differ in it alone."
            )
    left, right = ({r["experiment"]["seed"]: value(r) for r in runs} for runs in (ones, others))
    return np.array([left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())])


def mean_and_standard_error(values) -> tuple[float, float]:
    """Mean over seeds and its standard error (NaN for one seed)."""
    values = np.asarray(list(values), dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def student_interval(differences, level: float = 0.95) -> tuple[float, float]:
    """Student's confidence interval for the mean of a few numbers, one per seed."""
    mean, error = mean_and_standard_error(differences)
    reach = error * float(stdtrit(len(differences) - 1, (1 + level) / 2))
    return mean - reach, mean + reach


def welch_interval(ones, others, level: float = 0.95) -> tuple[float, float]:
    """Welch's confidence interval for the difference of two means, without pairing by seed.

    Student's with the standard errors added in squares, and degrees of freedom that allow for
    unequal variances.
    """
    from scipy import stats  # here, as it takes a second to load

    result = stats.ttest_ind(list(ones), list(others), equal_var=False)
    low, high = result.confidence_interval(level)
    return float(low), float(high)


def prediction_interval(values, level: float = 0.95) -> tuple[float, float]:
    """Where one more seed falls with this probability, by Student's t from at least two seeds.

    mean -+ t_{n-1} s sqrt(1 + 1/n), s the standard deviation over the n seeds.
    """
    values = list(values)
    mean, error = mean_and_standard_error(values)
    reach = error * math.sqrt(len(values) + 1) * float(stdtrit(len(values) - 1, (1 + level) / 2))
    return mean - reach, mean + reach


AGREE_AT, AGREE_WITHIN = (5, 10, 15), 2.0
"""Epochs at which reruns are compared with the paper's dots; how far off a mean may be, in nats."""


def agreement(runs: list[dict], dots: dict[int, float], factor: float = 1.0) -> list[dict]:
    """Whether reruns as released give a published curve, at epochs 5, 10 and 15.

    They do where their mean lies within 2 nats of the dot, or where, with three seeds or more, the
    dot lies in the 95 % prediction interval for one more seed. Where the runs are shorter, their
    last epoch takes the place of the missing ones.

    Args:
        runs: of one model, one for each seed.
        dots: epoch -> nats, from `published_curves`.
        factor: the normalisation under which the code reports.
    Returns:
        For each epoch: epoch, seeds, published, mean, low and high (the prediction interval, NaN
        with fewer than three seeds), and agrees.
    """
    curves = [factor * curve(run, "loss") for run in runs]
    length = min(map(len, curves))
    epochs = sorted({min(epoch, length, max(dots)) for epoch in AGREE_AT})
    rows = []
    for epoch in epochs:
        values = np.array([losses[epoch - 1] for losses in curves])
        enough = len(values) > 2
        low, high = prediction_interval(values) if enough else (math.nan, math.nan)
        mean, dot = float(values.mean()), dots[epoch]
        rows.append({"epoch": epoch, "seeds": len(values), "published": dot, "mean": mean,
                     "low": low, "high": high,
                     "agrees": abs(mean - dot) < AGREE_WITHIN or low <= dot <= high})  # fmt: skip
    return rows


def published_name(posterior: str) -> str:
    """What a released model of Figures 3 to 5 is called in `published_curves`."""
    if not posterior.startswith("released-"):
        return posterior
    return "published-script" if "rho" in posterior else "diagonal"


def by_posterior(records: list[dict]) -> dict[str, list[dict]]:
    """Records grouped by posterior, in order of first appearance."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["experiment"]["posterior"], []).append(record)
    return groups


def result_table(records: list[dict]) -> str:
    """Markdown table: one row per experiment, mean +- standard error over its seeds, in nats.

    -ELBO and its parts are means over the test images after the last epoch; IWAE-NLL is the
    importance-weighted NLL of the same runs.
    """
    lines = [
        "| data | d | posterior | parameters of head | seeds | test -ELBO | reconstruction | KL "
        "| IWAE-NLL | mean abs. rho |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in _same_but_for_the_seed(records):
        e = group[0]["experiment"]
        cells = [f"{e['dataset']} ({e['source']})", e["latent"], e["posterior"]]
        cells += [f"{group[0]['parameters']['posterior']:,}", len(group)]
        for key in ("negative_elbo", "reconstruction", "kl"):
            cells.append(format_nats(record["test"][key] for record in group))
        cells.append(format_nats(record["iwae"]["nll"] for record in group))
        rhos = [record["latent"].get("abs_rho") for record in group]
        cells.append("" if None in rhos else format_nats(rhos))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def quality_table(records: list[dict]) -> str:
    """Markdown table of how good samples are: mean +- standard error over seeds.

    Runs whose record has no such scores are left out.
    """
    lines = [
        "| data | network | epochs | posterior | seeds | Fréchet distance | of training images "
        "| precision | recall | KL of aggregate to prior (nats) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in _same_but_for_the_seed([r for r in records if r.get("quality")]):
        e = group[0]["experiment"]
        cells = [f"{e['dataset']} ({e['source']})", e["architecture"], e["epochs"], e["posterior"]]
        cells.append(len(group))
        for key in ("frechet_distance", "frechet_distance_of_training_images", "precision",
                    "recall"):  # fmt: skip
            cells.append(format_nats(record["quality"][key] for record in group))
        cells.append(format_nats(record["latent"]["aggregate_kl"] for record in group))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _same_but_for_the_seed(records: list[dict]) -> list[list[dict]]:
    groups: dict = {}
    for record in records:
        # By the name, which leaves out what is default: older records lack the later fields.
        seed = record["experiment"]["seed"]
        name = re.sub(rf"(-d\d+-e\d+)-s{seed}(?=-|$)", r"\1", record["name"])
        groups.setdefault(name, []).append(record)
    return list(groups.values())


def format_nats(values) -> str:
    """Mean +- standard error over seeds; the mean alone for one seed."""
    mean, error = mean_and_standard_error(values)
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


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
