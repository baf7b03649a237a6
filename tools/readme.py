"""Write the result table of README.md from the committed records: python tools/readme.py"""

import re
from pathlib import Path

from rhovae.study.records import by_posterior, format_nats, load_records, published_curves

ROOT = Path(__file__).resolve().parent.parent
# Name, data set, latent, published posterior, figure, and the script's normalisation of its losses.
SETTINGS = [
    ("Fashion-MNIST, d = 5", "fashion-mnist", 5, "published-notebook", "notebook", 1.0),
    ("MNIST, d = 10", "mnist", 10, "published-script", "figure1_vae", 10_000 / 10_112),
    ("Fashion-MNIST, d = 10", "fashion-mnist", 10, "published-script", "figure1_vae",
     10_000 / 10_112),
]  # fmt: skip


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
    """README text with the table between its two marks made from data/results."""
    marks = r"(<!-- results: [^\n]*-->\n).*(<!-- end of results -->)"
    return re.sub(marks, lambda m: m[1] + table() + "\n" + m[2], readme, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
