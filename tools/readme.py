"""Write the tables of README.md from the committed records: python tools/readme.py"""

import re
from pathlib import Path

from rhovae.study.lines import read_lines
from rhovae.study.records import load_records, published_curves
from rhovae.study.seeds import by_posterior, format_nats, paired_difference, student_interval

ROOT = Path(__file__).resolve().parent.parent
# Name, data set, latent, published posterior, figure, and the script's normalisation of its losses.
SETTINGS = [
    ("Fashion-MNIST, d = 5", "fashion-mnist", 5, "published-notebook", "notebook", 1.0),
    ("MNIST, d = 10", "mnist", 10, "published-script", "figure1_vae", 10_000 / 10_112),
    ("Fashion-MNIST, d = 10", "fashion-mnist", 10, "published-script", "figure1_vae",
     10_000 / 10_112),
]  # fmt: skip


POSTERIORS = {
    "diagonal": "diagonal",
    "karhunen-loeve": "diagonal in the prior's Karhunen–Loève basis",
    "stepped": "**chain**",
    "maximum-likelihood": "*maximum likelihood*",
}


DATASETS = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
SIZES = (5, 10, 20, 50)


def ahead(dataset: str, latent: int) -> list[float]:
    """-ELBO of AR(1) minus that of the diagonal posterior, seed by seed."""
    folder = ROOT / "data" / "results" / "families"
    groups = by_posterior(load_records(folder, dataset=dataset, source="full", latent=latent))
    return list(
        paired_difference(groups["ar1"], groups["diagonal"], lambda r: r["test"]["negative_elbo"])
    )


def findings_table() -> str:
    """What AR(1) costs more than the diagonal posterior: d by data set."""
    lines = [f"| | {' | '.join(f'd = {size}' for size in SIZES)} |", "|---" * 5 + "|"]
    for dataset, label in DATASETS.items():
        cells = []
        for size in SIZES:
            found = ahead(dataset, size)
            low, high = student_interval(found)
            text = f"{sum(found) / len(found):+.1f} ({low:.1f} to {high:.1f})"
            cells.append(text.replace("-", "−"))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table() -> str:
    """Learned time constants and coverage by family, over the data sets of notebook 10."""
    runs = read_lines(ROOT / "data" / "results" / "time" / "counts.jsonl")
    settings = [(49.5, -1.0), (49.5, 1.0)]
    lines = [
        "| posterior of a series | learned time constant, few counts | many counts "
        "| 90 % intervals hold, few counts | many counts |",
        "|---|---|---|---|---|",
    ]
    for family, label in POSTERIORS.items():
        taus, shares = [], []
        for tau, rate in settings:
            want = {"family": family, "time_constant": tau, "rate": rate}
            found = [r["result"] for r in runs if want.items() <= r["settings"].items()]
            taus.append(f"{sum(f['time_constant'] for f in found) / len(found):.1f}")
            shares.append(f"{sum(f['coverage'] for f in found) / len(found):.0%}")
        lines.append("| " + " | ".join([label, *taus, *shares]) + " |")
    return "\n".join(lines)


def table() -> str:
    """Published, reported by a rerun, the true cost of that rerun, and corrected."""
    lines = [
        "| | | published loss | its loss, rerun | true −ELBO of that rerun | corrected −ELBO "
        "| corrected IWAE-NLL |",
        "|---|---|---|---|---|---|---|",
    ]
    data = ROOT / "data"
    for name, dataset, latent, posterior, figure, factor in SETTINGS:
        groups = by_posterior(
            load_records(data / "results" / "audit", dataset=dataset, source="full", latent=latent)
        )
        published = published_curves(data / "published_curves.csv", figure)
        for model, as_published, ours in (
            ("VAE", "diagonal", "diagonal"),
            ("rho-VAE", posterior, "ar1"),
        ):
            cells = [
                name,
                model,
                f"{published[dataset, as_published][15]:.2f}",
                format_nats(factor * r["test"]["loss"] for r in groups[as_published]),
                format_nats(r["test"]["negative_elbo"] for r in groups[as_published]),
                format_nats(r["test"]["negative_elbo"] for r in groups[ours]),
                format_nats(r["iwae"]["nll"] for r in groups[ours]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(readme: str) -> str:
    """README text with the tables between their marks made from data/results."""
    tables = {"findings": findings_table, "results": table, "time": time_table}
    for name, make in tables.items():
        marks = rf"(<!-- {name}: [^\n]*-->\n).*(<!-- end of {name} -->)"
        readme = re.sub(marks, lambda m, made=make(): m[1] + made + "\n" + m[2], readme, flags=re.S)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
