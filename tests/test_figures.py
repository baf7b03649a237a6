"""Figures: drawn from records, the same bytes each time, one colour per posterior."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from rhovae import figures
from rhovae.data import DATA_FOLDER
from rhovae.experiments import ALL_POSTERIORS
from rhovae.records import curve, load_records, paired_difference, published_curves


@pytest.fixture(autouse=True)
def restore_style():
    with matplotlib.rc_context():
        figures.style()
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def records():
    return load_records(DATA_FOLDER / "results" / "audit", dataset="mnist", latent=10)


def test_every_posterior_has_a_colour_of_its_own():
    assert set(figures.COLORS) == set(figures.LABELS) == set(ALL_POSTERIORS)
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)


def test_loss_curves_show_the_mean_and_the_range_over_seeds(records):
    _, axes = plt.subplots()
    figures.loss_curves(axes, records)
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    runs = [curve(r) for r in records if r["experiment"]["posterior"] == "ar1"]
    np.testing.assert_allclose(lines["AR(1) (rho-VAE)"], np.mean(runs, axis=0))
    assert axes.get_xlabel() == "epoch" and "nats" in axes.get_ylabel()


def test_saved_figures_are_the_same_bytes(records, tmp_path):
    files = []
    for name in ("one", "two"):
        files.append(figures.save(figures.sample_grids(records[:2]), tmp_path, name).read_bytes())
        plt.close("all")
    assert files[0] == files[1] and b"<dc:date>" not in files[0]


def test_reconstructions_have_a_row_per_model(records):
    assert len(figures.reconstructions(records[:3]).axes) == 4


def test_published_curves():
    path = DATA_FOLDER / "published_curves.csv"
    curves = published_curves(path, "figure1_vae")
    assert {posterior for _, posterior in curves} == {"diagonal", "published-script"}
    assert all(sorted(epochs) == list(range(1, 16)) for epochs in curves.values())
    assert published_curves(path, "notebook")["fashion-mnist", "diagonal"][15] == 245.6655
    with pytest.raises(ValueError, match="no curve of a figure 'figure2'"):
        published_curves(path, "figure2")


def test_differences_are_taken_between_runs_of_the_same_seed():
    def runs(values):
        return [{"experiment": {"seed": seed}, "x": x} for seed, x in values]

    ones, others = runs([(2, 5.0), (0, 1.0), (7, 9.0)]), runs([(0, 3.0), (2, 1.0)])
    difference = paired_difference(ones, others, lambda record: record["x"])
    assert difference.tolist() == [-2.0, 4.0]
