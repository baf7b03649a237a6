"""Figures from result records, in one style. Of the records nothing but means is computed."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from .records import curve, decode_png
from .seeds import by_posterior, paired_difference, student_interval

# Okabe and Ito's colours, which colour-blind readers can tell apart: one per posterior, everywhere.
COLORS = {
    "diagonal": "#0072B2",
    "ar1": "#D55E00",
    "isotropic": "#009E73",
    "ar1-scaled": "#E69F00",
    "ar1-stepped": "#F0E442",
    "low-rank": "#56B4E9",
    "full": "#000000",
    "iaf": "#882255",
    "householder": "#44AA99",
    "published-notebook": "#CC79A7",
    "published-script": "#AA4499",
}
LABELS = {
    "diagonal": "diagonal (VAE)",
    "ar1": "AR(1) (rho-VAE)",
    "isotropic": "isotropic",
    "ar1-scaled": "AR(1), scaled",
    "ar1-stepped": "AR(1), stepped",
    "low-rank": "low-rank",
    "full": "full",
    "iaf": "inverse autoregressive flow",
    "householder": "Householder flow",
    "published-notebook": "as published, notebook",
    "published-script": "as published, script",
}
# The released models of Figures 3 to 5 look like the baseline and the rho-VAE of Figure 1.
for _name in ("beta", "cnn", "early-cnn", "info"):
    COLORS[f"released-{_name}"] = COLORS["diagonal"]
    LABELS[f"released-{_name}"] = "VAE, as released"
for _name in ("rho-beta", "rho-cnn", "early-rho-cnn", "rho-info"):
    COLORS[f"released-{_name}"] = COLORS["published-script"]
    LABELS[f"released-{_name}"] = "rho-VAE, as released"
LABELS["released-early-cnn"] = "VAE, before the floors"
LABELS["released-early-rho-cnn"] = "rho-VAE, before the floors"


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


def save(figure: Figure, folder: str | Path, name: str, records: list[dict] | str) -> Path:
    """Write <folder>/<name>.svg, which says in its metadata from which records it was made.

    It has no date, so that the same figure is the same file. Where there are no records of
    experiments, a sentence takes their place.
    """
    path = Path(folder) / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Title": name, "Description": _description(records)}
    figure.savefig(path, metadata=metadata)
    return path


def _description(records: list[dict] | str) -> str:
    return records if isinstance(records, str) else made_from(records)


def made_from(records: list[dict]) -> str:
    """Data, seeds, versions and commits of records, in one sentence; how to remake them."""

    def distinct(part: str, key: str, length: int | None = None) -> str:
        values = {str(record[part].get(key))[:length] for record in records}
        return ", ".join(sorted(values))

    return (
        f"Drawn from {len(records)} records of rhovae (data/results): "
        f"{distinct('experiment', 'dataset')} ({distinct('experiment', 'source')}), test images "
        f"with SHA-256 {distinct('data', 'test_sha256', 8)}...; posteriors "
        f"{distinct('experiment', 'posterior')}; seeds {distinct('experiment', 'seed')}; trained "
        f"with torch {distinct('environment', 'torch')} at commits "
        f"{distinct('environment', 'commit', 10)}. make figures draws it again, make paper trains."
    )


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
        length = min(len(run["history"]) for run in runs)  # one that stopped early cuts the others
        curves = factor * np.stack([curve(run, quantity)[:length] for run in runs])
        epochs = np.arange(1, curves.shape[1] + 1)
        color = COLORS[posterior]
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.25, lw=0)
        mark = "s" if len(epochs) == 1 else ""  # a line of one point cannot be seen
        axes.plot(epochs, curves.mean(0), color=color, marker=mark, ms=4, label=LABELS[posterior])
    axes.set_xlabel("epoch")
    axes.set_ylabel("test $-$ELBO (nats per image)" if quantity == "negative_elbo" else quantity)


def as_published_and_true(
    runs: dict[str, dict[str, list[dict]]],
    published: dict,
    factor: float = 1.0,
    released: dict[str, dict[str, list[dict]]] | None = None,
) -> Figure:
    """Row one: the loss the released code reports, lines of reruns through the published dots.

    Last row: the true -ELBO of our networks; between the two, where there are any, that of the
    released models.

    Args:
        runs: data set -> posterior -> records of our networks.
        published: (data set, posterior) -> epoch -> nats, from `records.published_curves`, or {}.
        factor: the normalisation under which the released code reports.
        released: the same as runs, of the released models; row one then shows these, and those of
            `runs` only where there are none. None where runs are the released models themselves.
    """
    rows = 3 if released else 2
    size = (4.5 * len(runs), 3.3 * rows)
    figure, all_axes = plt.subplots(
        rows, len(runs), figsize=size, sharex="col", squeeze=False, dpi=90
    )
    for (top, *between, bottom), (dataset, groups) in zip(all_axes.T, runs.items(), strict=True):
        models = (released or {}).get(dataset, {})
        ours = [groups.get(name, []) for name in ("diagonal", "published-script")]
        shown = [record for group in models.values() or ours for record in group]
        loss_curves(top, shown, "loss", factor=factor)
        for name in ("diagonal", "published-script"):
            dots = published.get((dataset, name), {})
            top.plot(list(dots), list(dots.values()), "o", ms=3.5, mfc="none", color=COLORS[name])
        what = "as published" if released is None else "our network, reported"
        what = f"as released ({extent(shown)})" if models else what
        top.set(title=f"{dataset}: {what}", ylabel="reported test loss (nats)", xlabel="")
        for axes in between:
            if models:
                loss_curves(axes, shown)
                axes.set(title=f"{dataset}: as released, true cost", xlabel="")
            else:
                axes.set_axis_off()
        everything = [record for group in groups.values() for record in group]
        loss_curves(bottom, everything)
        what = "ours, true cost" if released else "true cost"
        bottom.set(title=f"{dataset}: {what} ({extent(everything)})")
    all_axes[0, 0].legend()
    all_axes[-1, 0].legend()
    return figure


def paired_differences(
    panels: dict[str, dict[str, list[dict]]],
    quantities: dict[str, Callable[[dict], float]],
    predicted: dict[tuple[str, str], float] | None = None,
    columns: int = 2,
) -> Figure:
    """Each posterior minus the diagonal one, paired by seed, with Student's 95 % intervals.

    Args:
        panels: title -> posterior -> records, the diagonal one among them.
        quantities: label -> value of a record, in nats.
        predicted: (title, posterior) -> nats, drawn as a cross.
        columns: panels in a row.
    """
    predicted = predicted or {}
    rows = -(-len(panels) // columns)
    size = (4.6 * columns, 0.4 + 2.4 * rows)
    figure, all_axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axes, (title, groups) in zip(all_axes.flat, panels.items(), strict=False):
        names = [name for name in LABELS if name in groups and name != "diagonal"]
        for place, name in enumerate(names):
            color, line = COLORS[name], dict(capsize=2, lw=1.2, ms=5, mec="0.3", mew=0.5)
            for k, value in enumerate(quantities.values()):
                gaps = paired_difference(groups[name], groups["diagonal"], value)
                low, high = student_interval(gaps)
                half, y = (high - low) / 2, place + 0.25 * k
                style = dict(fmt="os"[k], color=color, mfc=color if k == 0 else "white")
                axes.errorbar(gaps.mean(), y, xerr=half, **style, **line)
            if (title, name) in predicted:
                axes.plot(predicted[title, name], place - 0.22, "kx", ms=6)
        axes.axvline(0, color=COLORS["diagonal"])
        axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        seeds = {len(group) for group in groups.values()}
        axes.set_title(f"{title} ({min(seeds)} seeds)")
    for axes in all_axes[-1]:
        axes.set_xlabel("minus diagonal (nats)")
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    shown = [Line2D([], [], marker="os"[k], ls="", color="0.3", mfc=("0.3", "white")[k])
             for k in range(len(quantities))]  # fmt: skip
    shown += [Line2D([], [], marker="x", ls="", color="k")] * bool(predicted)
    figure.legend(shown, [*quantities, "Theorem 2"][: len(shown)], loc="outside lower center",
                  ncols=3)  # fmt: skip
    return figure


def extent(records: list[dict]) -> str:
    """How many epochs and seeds a figure shows; the least where posteriors differ."""
    groups = by_posterior(records).values()
    epochs = sorted({len(record["history"]) for record in records})
    seeds = sorted({len(group) for group in groups})
    return f"epochs: {epochs[0]}, seeds: {seeds[0]}"


def sample_grids(
    records: list[dict], picture: str = "samples", columns: int = 8, rows: int = 4
) -> Figure:
    """Pictures that models made, side by side.

    Args:
        records: one axes each.
        picture: "samples" (draws of the prior, from the same latent noise in every model),
            "traversals" (in each row one latent variable moves from -3 to 3, from the code of the
            same test image) or "interpolations" (in each row from one test image's code to
            another's).
        columns, rows: of images; further ones are left out.
    """
    size = (3.4 * len(records), 0.43 * rows + 0.4)
    # Photographs compress badly, and small images gain nothing from more dots.
    figure, all_axes = plt.subplots(1, len(records), figsize=size, squeeze=False, dpi=72)
    for axes, record in zip(all_axes[0], records, strict=True):
        pixels = decode_png(record["images"][picture])[: columns * rows]
        strips = [
            np.concatenate(pixels[i : i + columns], 1) for i in range(0, len(pixels), columns)
        ]
        _show(axes, np.concatenate(strips), LABELS[record["experiment"]["posterior"]])
    return figure


def latent_maps(records: list[dict]) -> Figure:
    """Posterior means of test images in two dimensions, coloured by class, over the prior.

    The circles hold 50 and 95 % of the prior's draws. With more than two latent variables the
    plane is that of the first two principal components of the means.
    """
    figure, all_axes = plt.subplots(
        1, len(records), figsize=(3.5 * len(records), 3.6), squeeze=False, sharex=True,
        sharey=True, dpi=72,
    )  # fmt: skip
    for axes, record in zip(all_axes[0], records, strict=True):
        places = record["map"]
        known = places["labels"] is not None
        colors = dict(c=places["labels"], cmap="tab10") if known else dict(color="0.4")
        dots = axes.scatter(*np.array(places["points"]).T, s=4, **colors)
        for share in (0.5, 0.95):
            radius = np.sqrt(-2 * np.log(1 - share))
            axes.add_patch(Circle((0, 0), radius, fill=False, color="0.5", lw=0.8))
        axes.set_aspect("equal")
        explained = places["explained"]
        rest = "" if explained in (None, 1) else f", {explained:.0%} of variance"
        axes.set_title(LABELS[record["experiment"]["posterior"]] + rest)
    if known:
        figure.legend(*dots.legend_elements(), loc="outside right center", title="class")
    return figure


def film_strip(frames: dict[str, np.ndarray]) -> Figure:
    """A model as it learns: a row for each frame, images (n, 1, height, width) in [0, 1]."""
    figure, all_axes = plt.subplots(
        len(frames), 1, figsize=(5.2, 0.55 * len(frames)), dpi=72, squeeze=False
    )
    for axes, (label, images) in zip(all_axes[:, 0], frames.items(), strict=True):
        axes.imshow(np.concatenate(images[:, 0], 1), vmin=0, vmax=1)
        axes.text(-4, images.shape[-2] / 2, label, ha="right", va="center")
        axes.set_axis_off()
    return figure


def reconstructions(records: list[dict]) -> Figure:
    """Test images in the first row, and below them what each model makes of their mean code."""
    figure, all_axes = plt.subplots(len(records) + 1, 1, figsize=(6.4, 0.95 * (len(records) + 1)))
    originals = decode_png(records[0]["images"]["originals"])
    _show(all_axes[0], np.concatenate(originals, 1), "test images")
    for axes, record in zip(all_axes[1:], records, strict=True):
        pixels = decode_png(record["images"]["reconstructions"])
        label = LABELS[record["experiment"]["posterior"]]
        _show(axes, np.concatenate(pixels, 1), label)
    return figure


def _show(axes: Axes, pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()
