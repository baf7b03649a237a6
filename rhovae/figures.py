"""Figures from result records, in one style. Nothing is computed here but means over seeds."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .records import by_posterior, curve, decode_png

# Okabe and Ito's colours, which colour-blind readers can tell apart: one per posterior, everywhere.
COLORS = {
    "diagonal": "#0072B2",
    "ar1": "#D55E00",
    "isotropic": "#009E73",
    "published-notebook": "#CC79A7",
    "published-script": "#AA4499",
}
LABELS = {
    "diagonal": "diagonal (VAE)",
    "ar1": "AR(1) (rho-VAE)",
    "isotropic": "isotropic",
    "published-notebook": "as published, notebook",
    "published-script": "as published, script",
}


def style() -> None:
    """Set matplotlib to this repository's style: call it once, after the imports."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.figsize": (7, 3.6),
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "image.cmap": "gray",
            # The same figure gives the same bytes.
            "svg.hashsalt": "rhovae",
            "svg.fonttype": "path",
        }
    )


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write <folder>/<name>.svg, without a date so that the same figure is the same file."""
    path = Path(folder) / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def loss_curves(
    axes: Axes, records: list[dict], quantity: str = "negative_elbo", factor: float = 1.0
) -> None:
    """Test curves over epochs: the mean over seeds, and a band from the best to the worst seed.

    Args:
        axes: where to draw.
        records: runs that differ in posterior and seed only.
        quantity: of the history, "negative_elbo", "loss", "reconstruction" or "kl".
        factor: a normalisation to show the curves under.
    """
    for posterior, runs in by_posterior(records).items():
        curves = factor * np.stack([curve(run, quantity) for run in runs])
        epochs = np.arange(1, curves.shape[1] + 1)
        color = COLORS[posterior]
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.25, lw=0)
        axes.plot(epochs, curves.mean(0), color=color, label=LABELS[posterior])
    axes.set_xlabel("epoch")
    axes.set_ylabel("test $-$ELBO (nats per image)" if quantity == "negative_elbo" else quantity)


def sample_grids(records: list[dict], columns: int = 8) -> Figure:
    """Draws of each model's prior side by side, from the same latent noise."""
    figure, all_axes = plt.subplots(
        1, len(records), figsize=(3.4 * len(records), 2.1), squeeze=False
    )
    for axes, record in zip(all_axes[0], records, strict=True):
        pixels = decode_png(record["images"]["samples"], 32)
        rows = [np.concatenate(pixels[i : i + columns], 1) for i in range(0, 32, columns)]
        _show(axes, np.concatenate(rows), LABELS[record["experiment"]["posterior"]])
    return figure


def reconstructions(records: list[dict]) -> Figure:
    """Test images in the first row, and below them what each model makes of their mean code."""
    figure, all_axes = plt.subplots(len(records) + 1, 1, figsize=(6.4, 0.95 * (len(records) + 1)))
    originals = decode_png(records[0]["images"]["originals"], 8)
    _show(all_axes[0], np.concatenate(originals, 1), "test images")
    for axes, record in zip(all_axes[1:], records, strict=True):
        pixels = decode_png(record["images"]["reconstructions"], 8)
        label = LABELS[record["experiment"]["posterior"]]
        _show(axes, np.concatenate(pixels, 1), label)
    return figure


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()
