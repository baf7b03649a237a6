"""Families of posteriors compared: over seeds from records, and by the best member of each.

                                                                  notebooks/07, notebooks/12, 13
A panel is one data set and one latent dimension, with the runs of every family. Each family is
compared with the diagonal one, seed by seed, and many comparisons are counted together.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..posteriors import POSTERIORS
from .records import load_records
from .seeds import by_posterior, format_nats, paired_difference, student_interval

Panels = dict[str, dict[str, list[dict]]]  # "mnist, d = 20" -> family -> a record for each seed

Comparison = tuple[str, str, str]  # panel, family, measure
Key = TypeVar("Key", bound=Hashable)

MEASURES: dict[str, Callable[[dict], float]] = {
    "−ELBO": lambda r: r["test"]["negative_elbo"],
    "IWAE-NLL": lambda r: r["iwae"]["nll"],
}
COLUMNS: dict[str, Callable[[dict], float | None]] = {
    "−ELBO": MEASURES["−ELBO"],
    "reconstruction": lambda r: r["test"]["reconstruction"],
    "KL": lambda r: r["test"]["kl"],
    "IWAE-NLL": MEASURES["IWAE-NLL"],
    "inference gap": lambda r: r["iwae"]["negative_elbo"] - r["iwae"]["nll"],
    "active units": lambda r: r["latent"]["active_units"],
    "mean abs. rho": lambda r: r["latent"]["abs_rho"],
}


def lowest(loss: Callable[[], Tensor], parameters: list[Tensor]) -> float:
    """The smallest value of a loss that L-BFGS finds; the parameters are moved there."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=2000, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=1e-8, tolerance_change=1e-10,
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def panels(
    folder: str | Path, sizes: tuple[int, ...], names: Sequence[str] = tuple(POSTERIORS)
) -> Panels:
    """The runs on the full sets, by panel, of the seeds that all families have.

    A panel that lacks a family, or has fewer than two common seeds, is left out.

    Args:
        folder: of records.
        sizes: latent dimensions.
        names: the families, all that the folder has.
    """
    found: Panels = {}
    for dataset, size in product(("mnist", "fashion-mnist"), sizes):
        runs = load_records(folder, source="full", dataset=dataset, latent=size)
        seeds = [{r["experiment"]["seed"] for r in g} for g in by_posterior(runs).values()]
        shared = set.intersection(*seeds) if len(seeds) == len(names) else set()
        groups = by_posterior([r for r in runs if r["experiment"]["seed"] in shared])
        if len(shared) > 1:
            found[f"{dataset}, d = {size}"] = {name: groups[name] for name in names}
    return found


def difference(ones: list[dict], others: list[dict], value) -> tuple[float, float, float]:
    """Mean of the differences seed by seed, and Student's 95 % interval for it."""
    found = paired_difference(ones, others, value)
    return (float(found.mean()), *student_interval(found))


def comparisons(found: Panels, against: str = "diagonal") -> dict[Comparison, np.ndarray]:
    """(panel, family, measure) -> the differences of a family from one of them, seed by seed."""
    return {
        (title, name, measure): paired_difference(groups[name], groups[against], value)
        for title, groups in found.items()
        for name, (measure, value) in product(groups, MEASURES.items())
        if name != against
    }


def together(differences: dict[Key, np.ndarray]) -> dict[Key, int]:
    """The sign of each mean that holds, counted together with all others here, else 0.

    By Student's test for each, at a false discovery rate of 5 % over all (Benjamini and Hochberg
    1995).

    Args:
        differences: what is compared -> a number for each seed.
    """
    p = [stats.ttest_1samp(pair, 0).pvalue for pair in differences.values()]
    holds = stats.false_discovery_control(p) < 0.05
    return {
        key: int(np.sign(pair.mean())) * int(h)
        for (key, pair), h in zip(differences.items(), holds, strict=True)
    }


def holding(found: Panels) -> dict[Comparison, int]:
    """(panel, family, measure) -> sign of what holds against the diagonal family, else 0."""
    return together(comparisons(found))


def family_table(found: Panels) -> str:
    """Markdown table: a row for each family of each panel, means ± standard error over seeds."""
    lines = [f"| data | family | seeds | {' | '.join(COLUMNS)} |", "|---" * 10 + "|"]
    for title, groups in found.items():
        for name, group in groups.items():
            values = [[value(r) for r in group] for value in COLUMNS.values()]
            cells = ["" if None in column else format_nats(column) for column in values]
            lines.append(f"| {title} | {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_table(
    found: Panels,
    predicted: dict[tuple[str, str], float] | None = None,
    signs: dict[Comparison, int] | None = None,
) -> str:
    """Markdown table: each family minus the diagonal one, with intervals; bold where it holds.

    Args:
        found: what is shown.
        predicted: (panel, family) -> nats, for a last column.
        signs: what holds, by `together`; without it, by `holding` over these panels alone.
    """
    predicted = predicted or {}
    lines = ["| data | family | seeds | −ELBO | IWAE-NLL | Theorem 2 |", "|---" * 6 + "|"]
    if not predicted:
        lines = ["| data | family | seeds | −ELBO | IWAE-NLL |", "|---" * 5 + "|"]
    signs = holding(found) if signs is None else signs
    for title, groups in found.items():
        for name in [name for name in groups if name != "diagonal"]:
            cells = [title, name, str(len(groups[name]))]
            for measure, value in MEASURES.items():
                mean, low, high = difference(groups[name], groups["diagonal"], value)
                text = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
                cells.append(f"**{text}**" if signs[title, name, measure] else text)
            if predicted:
                theory = predicted.get((title, name))
                cells.append("" if theory is None else f"{theory:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def folded(summary: str, table: str) -> str:
    """Markdown that shows a table behind a fold, in Jupyter and in the book."""
    return f"<details><summary>{summary}</summary>\n\n{table}\n\n</details>"
