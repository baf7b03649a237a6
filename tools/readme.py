"""Write the tables of README.md from the committed records: python tools/readme.py"""

import re
from pathlib import Path

from rhovae.study.lines import read_lines
from rhovae.study.records import by_posterior, format_nats, load_records, published_curves

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
    for name, make in (("results", table), ("time", time_table)):
        marks = rf"(<!-- {name}: [^\n]*-->\n).*(<!-- end of {name} -->)"
        readme = re.sub(marks, lambda m, made=make(): m[1] + made + "\n" + m[2], readme, flags=re.S)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
