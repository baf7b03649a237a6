"""Figures: drawn from records, the same bytes each time, one colour per posterior."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest

from rhovae.study import figures
from rhovae.study.data import DATA_FOLDER
from rhovae.study.experiments import ALL_POSTERIORS
from rhovae.study.records import (
    curve,
    decode_png,
    encode_png,
    load_records,
    paired_difference,
    published_curves,
    quality_table,
)
from rhovae.study.released import RELEASED_POSTERIORS


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
    own = [name for name in figures.COLORS if name not in RELEASED_POSTERIORS]
    assert len({figures.COLORS[name] for name in own}) == len(own)
    for name in RELEASED_POSTERIORS:  # never in one plot with what they look like
        like = "published-script" if "rho" in name else "diagonal"
        assert figures.COLORS[name] == figures.COLORS[like]


def test_loss_curves_show_the_mean_and_the_range_over_seeds(records):
    _, axes = plt.subplots()
    figures.loss_curves(axes, records)
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    runs = [curve(r) for r in records if r["experiment"]["posterior"] == "ar1"]
    np.testing.assert_allclose(lines["AR(1) (rho-VAE)"], np.mean(runs, axis=0))
    assert axes.get_xlabel() == "epoch" and "nats" in axes.get_ylabel()


def test_saved_figures_are_the_same_bytes(records, tmp_path):
    files = []
    for _ in range(2):
        figure = figures.sample_grids(records[:2])
        files.append(figures.save(figure, tmp_path, "same", records[:2]).read_bytes())
        plt.close("all")
    assert files[0] == files[1] and b"<dc:date>" not in files[0]


def test_a_latent_map_with_and_without_classes():
    places = {"points": [[0.0, 1.0], [1.0, 0.0]], "explained": 0.5, "labels": [3, 4]}
    record = {"experiment": {"posterior": "ar1"}, "map": places}
    figure = figures.latent_maps([record])
    assert figure.axes[0].get_title() == "AR(1) (rho-VAE), 50% of variance"
    assert [text.get_text() for text in figure.legends[0].get_texts()] != []
    places |= {"labels": None, "explained": None}
    figure = figures.latent_maps([record])
    assert figure.legends == [] and figure.axes[0].get_title() == "AR(1) (rho-VAE)"


def test_pictures_keep_their_colour_shape_and_number():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6), dtype=np.uint8)
    assert (decode_png(encode_png(pixels)) == pixels).all()
    coloured = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    assert (decode_png(encode_png(coloured)) == coloured).all()


def test_the_quality_table_has_means_over_seeds_of_the_runs_with_scores():
    def record(seed, distance):
        experiment = dict(dataset="mnist", source="full", architecture="cnn", epochs=5,
                          posterior="ar1", seed=seed)  # fmt: skip
        scores = dict(frechet_distance=distance, frechet_distance_of_training_images=0.5,
                      precision=0.75, recall=0.25)  # fmt: skip
        return {"name": f"mnist-full-cnn-elbo-ar1-d10-e5-s{seed}", "experiment": experiment,
                "quality": scores, "latent": {"aggregate_kl": 1.0}}  # fmt: skip

    others = [record(0, 9.0) | {"quality": None}]
    lines = quality_table([record(0, 1.0), record(1, 3.0), *others]).splitlines()
    assert len(lines) == 3
    expected = ["mnist (full)", "cnn", "5", "ar1", "2", "2.00 ± 1.00", "0.50 ± 0.00"]
    assert [cell.strip() for cell in lines[2].split("|")][1:8] == expected


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


def test_paired_differences_are_those_of_equal_seeds():
    def run(posterior, seed, value):
        return {"experiment": {"posterior": posterior, "seed": seed}, "value": value}

    groups = {
        "diagonal": [run("diagonal", 1, 5.0), run("diagonal", 0, 10.0), run("diagonal", 2, 0.0)],
        "ar1": [run("ar1", 0, 11.0), run("ar1", 1, 8.0), run("ar1", 2, 2.0)],
    }
    predicted = {("panel", "ar1"): 0.5}
    figure = figures.paired_differences(
        {"panel": groups}, {"nats": lambda r: r["value"]}, predicted
    )
    (axes,) = (axes for axes in figure.axes if axes.axison)
    assert axes.get_title() == "panel (3 seeds)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AR(1) (rho-VAE)"]
    (bar,) = axes.containers
    assert bar[0].get_xdata()[0] == pytest.approx(2.0)  # of 1, 3 and 2
    (segment,) = bar[2][0].get_segments()
    # Student's quantile for two degrees of freedom is 4.303, the standard error 1 / sqrt(3).
    assert np.ptp(segment[:, 0]) / 2 == pytest.approx(4.303 / np.sqrt(3), abs=1e-3)
    (cross,) = (line for line in axes.get_lines() if line.get_marker() == "x")
    assert cross.get_xdata()[0] == 0.5


def test_a_figure_says_from_which_records_it_was_made(records, tmp_path):
    text = figures.save(plt.figure(), tmp_path, "empty", records).read_text()
    commits = {record["environment"]["commit"][:10] for record in records}
    for fact in ("mnist (full)", "seeds 0, 1, 2, 3, 4", "SHA-256 ", "make paper", *commits):
        assert fact in text


def test_a_film_strip_has_a_row_for_each_frame():
    frames = {"0 images": np.zeros((3, 1, 4, 4)), "10 images": np.ones((3, 1, 4, 4))}
    rows = figures.film_strip(frames).axes
    assert [axes.get_images()[0].get_array().shape for axes in rows] == [(4, 12), (4, 12)]
