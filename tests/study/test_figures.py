"""Figures: drawn from records, the same bytes each time, one colour per posterior."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from rhovae.study import figures
from rhovae.study.data import DATA_FOLDER
from rhovae.study.experiments import ALL_POSTERIORS
from rhovae.study.records import curve, decode_png, encode_png, load_records, published_curves
from rhovae.study.released import RELEASED_POSTERIORS
from rhovae.study.seeds import (
    agreement,
    paired_difference,
    prediction_interval,
    published_name,
    quality_table,
    welch_interval,
)


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


def run_of(posterior, losses, seed=0):
    """A record with a curve of losses, and of -ELBOs ten nats above."""
    tests = [{"loss": x, "negative_elbo": x + 10} for x in losses]
    history = [{"epoch": i, "test": test} for i, test in enumerate(tests, 1)]
    return {"experiment": {"posterior": posterior, "seed": seed}, "history": history}


def test_welch_s_interval_is_the_formula():
    ones, others = [1.0, 2.0, 4.0, 4.5], [0.0, 0.5, 0.25]
    low, high = welch_interval(ones, others)
    parts = [np.var(x, ddof=1) / len(x) for x in (ones, others)]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    middle = np.mean(ones) - np.mean(others)
    assert (low, high) == pytest.approx((middle - half, middle + half))


def test_one_more_seed_falls_into_the_prediction_interval_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, (4000, 4))
    inside = [
        low <= last <= high for *few, last in draws for low, high in [prediction_interval(few)]
    ]
    assert abs(np.mean(inside) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)


def test_reruns_agree_within_two_nats_or_within_what_seeds_vary():
    dots = {epoch: 100.0 for epoch in range(1, 16)}
    flat = [100.0] * 15
    near, far = ([run_of("released-info", np.add(flat, by))] for by in (1.9, 2.1))
    assert [row["epoch"] for row in agreement(near, dots)] == [5, 10, 15]
    assert all(row["agrees"] for row in agreement(near, dots))
    assert not any(row["agrees"] for row in agreement(far, dots))
    spread = [run_of("released-beta", np.add(flat, by), s) for s, by in enumerate((0, 4, 8))]
    assert all(row["agrees"] and row["low"] < 100 < row["high"] for row in agreement(spread, dots))
    two = agreement(spread[1:], dots)
    assert not any(row["agrees"] for row in two) and np.isnan(two[0]["low"]), "needs three seeds"
    tight = [run_of("released-beta", np.add(flat, 4 + by), s) for s, by in enumerate((0, 0.1, 0.2))]
    assert not any(row["agrees"] for row in agreement(tight, dots)), "three seeds beside the dot"


def test_agreement_of_short_runs_and_under_a_normalisation():
    dots = {epoch: 100.0 - epoch for epoch in range(1, 15)}  # one curve ends at epoch 14
    (row,) = agreement([run_of("released-cnn", [198.0])], dots, factor=0.5)
    assert row["epoch"] == 1 and row["mean"] == 99 and row["agrees"]
    whole = agreement([run_of("released-cnn", [100.0 - e for e in range(1, 16)])], dots)
    assert [row["epoch"] for row in whole] == [5, 10, 14] and whole[-1]["mean"] == 86


def test_released_models_go_by_the_names_of_the_published_curves():
    names = {name: published_name(name) for name in RELEASED_POSTERIORS}
    assert {n for n, p in names.items() if p == "published-script"} == {
        n for n in RELEASED_POSTERIORS if "rho" in n
    }
    assert set(names.values()) == {"diagonal", "published-script"}
    assert published_name("published-notebook") == "published-notebook"


def test_row_one_shows_the_released_models_where_there_are_any():
    ours = {name: [run_of(name, [5.0, 4.0])] for name in ("diagonal", "published-script")}
    seeds = [run_of("released-info", [3.0, 2.0, 1.0], seed) for seed in range(2)]
    released = {"mnist": {"released-info": seeds}}
    runs = {"mnist": ours, "fashion-mnist": ours}
    dots = {("mnist", "diagonal"): {1: 3.0}}
    figure = figures.as_published_and_true(runs, dots, released=released)
    tops = {axes.get_title(): axes for axes in figure.axes if "reported" in axes.get_ylabel()}
    titles = ["as released (epochs: 3, seeds: 2)", "our network, reported"]
    assert list(tops) == [f"{name}: {title}" for name, title in zip(runs, titles, strict=True)]
    lines = [
        {line.get_label() for line in axes.get_lines() if line.get_label()[0] != "_"}
        for axes in tops.values()
    ]
    assert lines == [{"VAE, as released"}, {"diagonal (VAE)", "as published, script"}]
    (alone,) = (axes for axes in figures.as_published_and_true({"mnist": ours}, dots).axes[:1])
    assert alone.get_title() == "mnist: as published"
    bottoms = [axes.get_title() for axes in figure.axes if "ELBO" in axes.get_ylabel()]
    expected = [f"{name}: ours, true cost (epochs: 2, seeds: 1)" for name in runs]
    assert bottoms == ["mnist: as released, true cost", *expected]


def test_a_curve_of_one_epoch_is_a_mark():
    _, axes = plt.subplots()
    figures.loss_curves(axes, [run_of("released-cnn", [3.0])], "loss")
    (line,) = axes.get_lines()
    assert line.get_marker() == "s" and line.get_ydata() == [3.0]


def test_a_figure_says_from_which_records_it_was_made(records, tmp_path):
    text = figures.save(plt.figure(), tmp_path, "empty", records).read_text()
    commits = {record["environment"]["commit"][:10] for record in records}
    for fact in ("mnist (full)", "seeds 0, 1, 2, 3, 4", "SHA-256 ", "make paper", *commits):
        assert fact in text


def test_a_film_strip_has_a_row_for_each_frame():
    frames = {"0 images": np.zeros((3, 1, 4, 4)), "10 images": np.ones((3, 1, 4, 4))}
    rows = figures.film_strip(frames).axes
    assert [axes.get_images()[0].get_array().shape for axes in rows] == [(4, 12), (4, 12)]
