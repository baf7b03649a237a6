"""What runs that differ in their seed say together: means, intervals, agreement, and tables."""

import math
import re

import numpy as np
from scipy.special import stdtrit

from .records import curve


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
