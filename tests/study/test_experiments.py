"""From a name to a record: training, seeds, records and what is refused."""

import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from rhovae.objectives import negative_elbo
from rhovae.study import Experiment, experiments, load_images, run_experiment, training
from rhovae.study.checkpoint import Checkpoint, read_checkpoint
from rhovae.study.data import to_unit_interval
from rhovae.study.evaluation import latent_statistics
from rhovae.study.experiments import ALL_OBJECTIVES, ALL_POSTERIORS, build_vae
from rhovae.study.pictures import latent_map, pictures
from rhovae.study.records import decode_png, load_record, load_records, save_record, write_whole
from rhovae.study.seeds import mean_and_standard_error, paired_difference, result_table
from rhovae.study.training import fit, pick_device, set_seed

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture
def images():
    """Blurred squares: enough structure for a loss to fall."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(2, 6, (96, 2, 1, 1), generator=generator)
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    distance = (rows - centres[:, 0]).abs() + (columns - centres[:, 1]).abs()
    pixels = (255 - 80 * distance).clamp(0, 255).to(torch.uint8)
    return pixels[:64], pixels[64:]


SMALL = dict(dataset="squares", source="own", latent=3, epochs=2, batch_size=24,
             iwae_samples=5, iwae_images=10)  # fmt: skip


def run(images, folder=None, reuse=False, checkpoints=None, **changes):
    experiment = Experiment(**{**SMALL, **changes})
    train, test = images
    return run_experiment(experiment, train=train, test=test, folder=folder, reuse=reuse,
                          checkpoints=checkpoints, device="cpu", progress=False)  # fmt: skip


@pytest.mark.parametrize("posterior", ALL_POSTERIORS)
def test_the_same_seed_gives_the_same_record(images, posterior, without_times):
    first = run(images, posterior=posterior)
    torch.rand(17)  # what happened before must not matter
    second = run(images, posterior=posterior)
    assert without_times(first) == without_times(second)
    other = run(images, posterior=posterior, seed=1)
    assert first["history"] != other["history"]


def test_training_lowers_the_loss(images):
    history = run(images, epochs=30, learning_rate=1e-2)["history"]
    assert history[-1]["test"]["loss"] < 0.8 * history[0]["test"]["loss"]


def test_what_a_record_holds(images):
    record = run(images)
    assert [entry["epoch"] for entry in record["history"]] == [1, 2]
    for entry in record["history"]:
        for split in ("train", "test"):
            means = entry[split]
            total = means["reconstruction"] + means["kl"]
            assert math.isclose(means["negative_elbo"], total)
            assert math.isclose(means["loss"], total, rel_tol=1e-5)
        assert -1 < entry["rho"] < 1
    assert record["test"] == record["history"][-1]["test"]
    parameters = record["parameters"]
    assert parameters["posterior"] == 401 * (3 + 2)
    parts = parameters["encoder"] + parameters["posterior"] + parameters["decoder"]
    assert parameters["total"] == parts
    assert record["environment"]["torch"] == metadata.version("torch")
    assert {"device", "threads", "python", "numpy", "rhovae", "commit"} <= set(
        record["environment"]
    )
    assert record["wall_time_s"]["all"] >= record["wall_time_s"]["training"] > 0
    assert record["iwae"]["negative_elbo"] > record["iwae"]["nll"]
    assert 0 <= record["latent"]["abs_rho"] < 1
    assert record["latent"]["active_units"] <= 3 == len(record["latent"]["mean_variance"])
    assert decode_png(record["images"]["samples"]).shape == (32, 8, 8)
    assert (decode_png(record["images"]["originals"]) == images[1][:8].numpy()).all()
    assert json.loads(json.dumps(record)) == record


def test_an_evaluation_in_between_does_not_change_training(images):
    """Each epoch has its own random stream: two epochs at once are one and then another."""
    train, test = (part.unsqueeze(1) for part in images)
    experiment = Experiment(**SMALL)
    histories = []
    for evaluation_images in (test, test[:1]):
        vae = build_vae(experiment, (1, 8, 8))
        histories.append(
            fit(vae, train, evaluation_images, negative_elbo, epochs=3, progress=False)
        )
    for one, other in zip(*histories, strict=True):
        assert one["train"] == other["train"]


def test_an_extended_run_is_the_run_that_was_never_interrupted(
    images, tmp_path, monkeypatch, without_times
):
    """Weights, optimiser, batch statistics and random numbers go on as if nothing had been."""
    settings = dict(architecture="dcgan", posterior="ar1", batch_size=16)
    whole = run(images, epochs=5, **settings)
    for epochs in (1, 2, 4):
        run(images, epochs=epochs, checkpoints=tmp_path, **settings)
    trained, train_epoch = [], training.train_epoch
    monkeypatch.setattr(
        "rhovae.study.training.train_epoch", lambda *args: trained.append(1) or train_epoch(*args)
    )
    extended = run(images, epochs=5, checkpoints=tmp_path, **settings)
    assert len(trained) == 1, "four of five epochs were there"
    assert without_times(extended) == without_times(whole)
    (path,) = tmp_path.iterdir()
    assert len(read_checkpoint(path)["history"]) == 5


def test_a_finished_run_is_judged_again_without_training(images, tmp_path, monkeypatch):
    first = run(images, checkpoints=tmp_path)
    monkeypatch.setattr("rhovae.study.training.train_epoch", None)
    second = run(images, checkpoints=tmp_path, iwae_samples=7)
    assert second["history"] == first["history"] and second["iwae"]["samples"] == 7


def test_a_run_names_every_environment_that_trained_it(images, tmp_path, monkeypatch):
    run(images, epochs=1, checkpoints=tmp_path)
    assert "trained_in" not in run(images, epochs=2, checkpoints=tmp_path)
    elsewhere = {"device": "another machine"}
    monkeypatch.setattr("rhovae.study.experiments.environment", lambda device: elsewhere)
    judged = run(images, epochs=2, checkpoints=tmp_path)
    (first,) = judged["trained_in"]
    assert judged["environment"] == elsewhere and first["torch"] == metadata.version("torch")
    assert run(images, epochs=3, checkpoints=tmp_path)["trained_in"] == [first, elsewhere]


def test_a_checkpoint_from_before_a_setting_existed_is_used(images, tmp_path, monkeypatch):
    run(images, checkpoints=tmp_path)
    (path,) = tmp_path.iterdir()
    state = torch.load(path, weights_only=True)
    del state["run"]["kernel"], state["environments"]
    torch.save(state, path)
    monkeypatch.setattr("rhovae.study.training.train_epoch", None)
    assert run(images, checkpoints=tmp_path)["trained_in"] == []


def test_a_checkpoint_of_more_epochs_is_left_alone_and_of_other_images_refused(
    images, tmp_path, without_times
):
    run(images, epochs=3, checkpoints=tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    shorter = run(images, epochs=2, checkpoints=tmp_path)
    assert without_times(shorter) == without_times(run(images, epochs=2))
    assert path.read_bytes() == before
    other = (images[0].flip(0), images[1])
    with pytest.raises(ValueError, match="checkpoint of another run: it differs in train_sha256;"):
        run(other, checkpoints=tmp_path)


def test_a_run_that_lags_behind_does_not_rewind_the_checkpoint_of_another(images, tmp_path):
    """Two processes may train one run, as when two grids share it."""
    vae = build_vae(Experiment(**SMALL), tuple(images[0].shape[1:]))
    optimizer = torch.optim.Adam(vae.parameters())
    one, other = (Checkpoint(tmp_path / "run.pt", {}) for _ in range(2))
    epochs = [{"epoch": n} for n in range(1, 6)]
    assert one.restore(9, vae, optimizer) == other.restore(9, vae, optimizer) == []
    for ahead, behind in ((1, 0), (5, 2)):
        one.save(epochs[:ahead], vae, optimizer)
        other.save(epochs[:behind], vae, optimizer)
        assert read_checkpoint(one.path)["history"] == epochs[:ahead]
    other.save(epochs, vae, optimizer)
    assert len(read_checkpoint(one.path)["history"]) == 5


def test_a_checkpoint_of_another_network_is_refused(images, tmp_path):
    vae = build_vae(Experiment(**SMALL), tuple(images[0].shape[1:]))
    wider = build_vae(Experiment(**{**SMALL, "latent": 9}), tuple(images[0].shape[1:]))
    checkpoint = Checkpoint(tmp_path / "run.pt", {})
    checkpoint.save([{"epoch": 1}], vae, torch.optim.Adam(vae.parameters()))
    with pytest.raises(ValueError, match=r"run.pt does not fit this model \(.*; delete it"):
        checkpoint.restore(9, wider, torch.optim.Adam(wider.parameters()))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half", "pickle", "another", "list"])
def test_a_damaged_checkpoint_is_refused(images, tmp_path, damage):
    run(images, checkpoints=tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "pickle":
        torch.save({"run": print}, path)
    elif damage == "another":
        torch.save({"run": {}, "history": []}, path)
    elif damage == "list":
        torch.save({"run": [], "history": [], "vae": {}, "optimizer": {}}, path)
    else:
        path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"is not a checkpoint \(.+\); delete it"):
        run(images, checkpoints=tmp_path)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"before"


def test_streams_of_random_numbers(images):
    """With a learning rate of nearly zero only the random numbers tell two epochs apart."""
    history = run(images, learning_rate=1e-12, batch_size=7)["history"]
    first, second = history
    assert math.isclose(first["test"]["loss"], second["test"]["loss"], rel_tol=1e-6)
    assert not math.isclose(first["train"]["loss"], second["train"]["loss"], rel_tol=1e-5)


def test_every_epoch_has_an_order_of_its_own(images):
    train, test = (part.unsqueeze(1) for part in images)
    seen = []

    def watching(q, z, logits, x):
        seen.append(x.flatten(1).sum(1))
        return negative_elbo(q, z, logits, x)

    vae = build_vae(Experiment(**SMALL), (1, 8, 8))
    fit(vae, train, test, watching, epochs=2, batch_size=64, progress=False)
    orders = [seen[0], seen[2]]
    brightness = (train.float() / 255).flatten(1).sum(1)
    for order in orders:
        assert not torch.allclose(order, brightness), "not the order of the file"
        torch.testing.assert_close(order.sort().values, brightness.sort().values)
    assert not torch.allclose(*orders)


def test_one_latent_variable_has_no_neighbour(images, tmp_path):
    for posterior in ALL_POSTERIORS:
        record = run(images, folder=tmp_path, posterior=posterior, latent=1)
        assert record["latent"]["abs_rho"] is None and record["history"][-1]["rho"] is None


def test_use_of_the_latent_space():
    class Known(torch.nn.Module):
        def encode(self, x):
            loc = torch.stack((x.flatten(1)[:, 0], 0 * x.flatten(1)[:, 0]), -1)
            normal = torch.distributions.Normal(loc, torch.tensor([0.5, 1.0]))
            return torch.distributions.Independent(normal, 1)

    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    statistics = latent_statistics(Known(), images)
    assert statistics["variance_of_means"] == [0.25, 0.0]
    assert statistics["mean_variance"] == [0.25, 1.0]
    assert statistics["active_units"] == 1 and statistics["abs_rho"] is None


class Spread(torch.nn.Module):
    """Codes N(loc, scale^2) for images of three pixels: loc is the pixels, stretched and moved."""

    def __init__(self, stretch, shift, scale):
        super().__init__()
        self.stretch, self.shift, self.scale = stretch, shift, scale

    def encode(self, x):
        loc = x.flatten(1) * self.stretch + self.shift
        normal = torch.distributions.Normal(loc, self.scale.expand_as(loc))
        return torch.distributions.Independent(normal, 1)


def test_how_far_the_aggregated_posterior_is_from_the_prior():
    images = torch.randint(0, 256, (20_000, 1, 1, 3), dtype=torch.uint8)
    pixel_variance = (256**2 - 1) / 12 / 255**2  # of a uniform grey value
    stretch = torch.tensor([1.0, 1.0, 0.0])
    shift = torch.tensor([-0.5, 0.5, 0.0])  # means of the codes: 0, 1 and 0
    variance = pixel_variance * stretch.square() + 0.25
    expected = 0.5 * (variance.sum() + 1 - 3 - variance.log().sum()).item()
    found = latent_statistics(Spread(stretch, shift, torch.tensor(0.5)), images)
    assert math.isclose(found["aggregate_kl"], expected, abs_tol=0.05)
    assert found["aggregate_mmd"] > 0.05
    prior = latent_statistics(Spread(0 * stretch, 0 * shift, torch.tensor(1.0)), images)
    # Sampling error of the moments: d (d + 3) / 4n nats in the mean.
    assert 0 < prior["aggregate_kl"] < 10 * 3 * 6 / (4 * 20_000)
    assert abs(prior["aggregate_mmd"]) < 0.01


def test_a_map_of_two_variables_is_those_and_of_more_their_principal_plane():
    images = torch.randint(0, 256, (500, 1, 1, 3), dtype=torch.uint8)
    codes = to_unit_interval(images).flatten(1)
    model = Spread(torch.tensor([1.0, 4.0, 2.0]), torch.zeros(3), torch.tensor(1.0))
    labels = torch.arange(500) % 10
    plane = latent_map(model, images, labels)
    points, centred = torch.tensor(plane["points"]), codes - codes.mean(0)
    _, values, axes = torch.pca_lowrank((centred * model.stretch).double(), q=3)
    projected = (codes * model.stretch).double() @ axes[:, :2]
    torch.testing.assert_close(points.abs().double(), projected.abs(), atol=1e-3, rtol=0)
    assert (points.std(0).diff() < 0).all() and plane["labels"] == labels.tolist()
    share = (values[:2].square().sum() / values.square().sum()).item()
    assert math.isclose(plane["explained"], share, abs_tol=1e-4)
    model.stretch = torch.tensor([1.0, -2.0])
    model.shift = torch.zeros(2)
    pairs = images[..., :2]
    found = torch.tensor(latent_map(model, pairs, None)["points"])
    torch.testing.assert_close(found, codes[:, :2] * model.stretch, atol=1e-3, rtol=0)


def test_traversals_and_interpolations_start_from_the_codes_of_test_images():
    """With a decoder that shows its code, the pictures can be read."""
    images = torch.zeros(9, 1, 1, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = 25 * torch.arange(9)
    model = Spread(torch.ones(3), torch.zeros(3), torch.tensor(1.0))
    model.decoder = lambda z: z.unflatten(-1, (1, 1, 3))
    model.generate = lambda n: torch.zeros(n, 1, 1, 3)
    shown = pictures(model, images)

    def codes(name):
        return torch.tensor(decode_png(shown[name])).squeeze(1).double().div(255).logit()

    steps = torch.linspace(-3, 3, 8, dtype=torch.float64)
    traversals = codes("traversals").unflatten(0, (3, 8))
    for variable, row in enumerate(traversals):
        expected = torch.zeros(8, 3, dtype=torch.float64)
        expected[:, variable] = steps
        torch.testing.assert_close(row, expected, atol=0.05, rtol=0)
    between = codes("interpolations").unflatten(0, (4, 8))[..., 0]
    ends = torch.arange(8, dtype=torch.float64) * 25 / 255
    torch.testing.assert_close(between[:, 0], ends[:4], atol=0.02, rtol=0)
    torch.testing.assert_close(between[:, -1], ends[4:], atol=0.02, rtol=0)
    assert (between.diff(dim=-1) >= 0).all()


def test_published_posteriors_report_a_loss_that_is_not_their_elbo(images):
    for name in ("published-notebook", "published-script"):
        record = run(images, posterior=name)
        assert record["experiment"]["objective"] == "as-published"
        parts, test = record["published"], record["test"]
        assert math.isclose(parts["kl_true"], test["kl"], rel_tol=1e-5)
        reported = test["reconstruction"] + parts["kl_charged"]
        assert math.isclose(reported, test["loss"], rel_tol=1e-5)
        assert test["negative_elbo"] > test["loss"]


def test_records_are_written_whole_and_reused(images, tmp_path):
    record = run(images, folder=tmp_path)
    path = tmp_path / f"{record['name']}.json"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_record(path) == record
    stamped = {**record, "wall_time_s": {"training": 0, "all": 0}}
    save_record(stamped, tmp_path)
    assert run(images, folder=tmp_path, reuse=True) == stamped
    assert run(images, folder=tmp_path) != stamped


def test_a_record_of_other_images_or_settings_is_not_reused(images, tmp_path):
    record = run(images, folder=tmp_path)
    train, test = images
    other = run((train.flip(-1), test), folder=tmp_path, reuse=True)
    assert other["data"] != record["data"]
    save_record({**other, "experiment": {**other["experiment"], "epochs": 1}}, tmp_path)
    assert run(images, folder=tmp_path, reuse=True)["experiment"]["epochs"] == 2


def test_the_same_bytes_in_another_shape_are_other_images(images, tmp_path):
    train, test = (part.reshape(len(part), 1, 2, -1) for part in images)
    places = dict(folder=tmp_path, checkpoints=tmp_path)
    record = run(images, **places)
    (tmp_path / f"{record['name']}.json").unlink()
    with pytest.raises(ValueError, match="another run: it differs in image_shape"):
        run((train, test), **places)
    save_record(record, tmp_path)
    assert run((train, test), folder=tmp_path, reuse=True)["data"] != record["data"]


def test_a_record_of_settings_that_are_unknown_here_is_refused(images, tmp_path):
    record = run(images, folder=tmp_path)
    path = tmp_path / f"{record['name']}.json"
    path.write_text(path.read_text().replace('"latent"', '"later"', 1))
    with pytest.raises(ValueError, match=r"does not state an experiment \(.*'later'.* delete it"):
        run(images, folder=tmp_path, reuse=True)


def test_records_from_before_a_setting_existed_are_of_one_group(images, tmp_path):
    for seed in range(2):
        record = run(images, seed=seed)
        if not seed:
            del record["experiment"]["clip_norm"]
        save_record(record, tmp_path)
    (row,) = result_table(load_records(tmp_path)).splitlines()[2:]
    assert "| 2 |" in row, "seeds"
    with pytest.raises(ValueError, match=r"nothing of 'clip_norm'.*choose by others"):
        load_records(tmp_path, clip_norm=0.0)


def test_records_are_selected_and_tabulated(images, tmp_path):
    for posterior in ("diagonal", "ar1"):
        for seed in (0, 1):
            run(images, folder=tmp_path, posterior=posterior, seed=seed)
    assert len(load_records(tmp_path)) == 4
    chosen = load_records(tmp_path, posterior="ar1", latent=3)
    assert {r["experiment"]["seed"] for r in chosen} == {0, 1}
    table = result_table(load_records(tmp_path)).splitlines()
    assert len(table) == 4 and "±" in table[2] and table[2].count("|") == table[0].count("|")
    run(images, folder=tmp_path, objective="beta-elbo", beta=9.0)
    assert len(result_table(load_records(tmp_path)).splitlines()) == 5, "not another seed"
    runs = load_records(tmp_path, posterior="ar1")
    with pytest.raises(ValueError, match=r"share a seed \(\[0, 0, 1\]\)"):
        paired_difference(runs, runs, lambda record: 0.0)


def test_standard_error_of_the_mean():
    mean, error = mean_and_standard_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and math.isclose(error, math.sqrt(5 / 3 / 4))
    assert math.isnan(mean_and_standard_error([1.0])[1])


def test_the_name_of_a_record_tells_what_is_not_default():
    assert Experiment("mnist").name == "mnist-embedded-mlp-elbo-ar1-d10-e15-s0"
    changed = Experiment("mnist", learning_rate=0.01, initialisation="xavier")
    assert changed.name.endswith("s0-learning_rate=0.01-initialisation=xavier")


@pytest.mark.parametrize(
    "damage,sentence",
    [
        (lambda text: text[: len(text) // 2], "is not a result record: "),
        (lambda text: "[]", "is not a result record of schema 1: it is a list"),
        (lambda text: re.sub(r'"nll": [\d.]+', '"nll": NaN', text), "it has NaN for a number"),
        (lambda text: re.sub(r'"nll": [\d.]+', '"nll": "low"', text), "iwae.nll is a str"),
        (lambda text: re.sub(r'"history": \[', '"history": [1, ', text), "not a list of epochs"),
        (lambda text: text.replace('"history": [', '"history": {}, "x": ['), "history is a dict"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "it has schema 2; delete it"),
        (lambda text: text.replace('"iwae"', '"nll"'), "it lacks iwae; delete it"),
    ],
)
def test_a_damaged_record_is_refused_with_its_name(images, tmp_path, damage, sentence):
    record = run(images, folder=tmp_path)
    path = tmp_path / f"{record['name']}.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=sentence) as error:
        load_records(tmp_path)
    assert path.name in str(error.value)


def test_a_record_with_nan_is_not_written(images, tmp_path):
    record = {**run(images), "iwae": math.nan}
    with pytest.raises(ValueError, match=r"not a finite number in iwae; it is not written"):
        save_record(record, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes,sentence",
    [
        (
            dict(posterior="ar2"),
            "Unknown posterior 'ar2'; known are 'isotropic', ",
        ),
        (dict(dataset="../x", source="own"), r"dataset is '../x'; as it becomes a file name"),
        (dict(dataset="cifar"), "Unknown data set 'cifar'; known are 'mnist', 'fashion-mnist'"),
        (dict(source="web"), "Unknown source 'web'; known are 'embedded', 'full', 'own'"),
        (dict(architecture="resnet"), "Unknown architecture 'resnet'; known are 'mlp', 'cnn'"),
        (dict(objective="iwae"), "Unknown objective 'iwae'; known are 'elbo', 'beta-elbo'"),
        (dict(initialisation="zeros"), "Unknown initialisation 'zeros'"),
        (dict(kernel="linear"), "Unknown kernel 'linear'; known are 'rbf', 'imq'"),
        (dict(posterior=["ar1"]), r"posterior is \['ar1'\]; it must be a name"),
        (dict(learning_rate="1e-3"), "learning_rate is '1e-3'; it must be a number"),
        (dict(clip_norm=10**400), "clip_norm is 10+; it must be a number"),
        (dict(beta=4.0), "beta has no effect with objective 'elbo'; choose objective='beta-elbo'"),
        (dict(objective="beta-elbo", beta=-1.0), "beta is -1.0; it must be at least 0"),
        (dict(image_size=-2), "image_size is -2"),
        (dict(gap_images=-1), "gap_images is -1"),
        (dict(pictures="no"), "pictures is 'no'; it must be true or false"),
        (dict(latent=0), "latent is 0; it must be an integer of at least 1"),
        (dict(latent=2.5), "latent is 2.5; it must be an integer"),
        (dict(epochs=-1), "epochs is -1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; it must be positive"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
    ],
)
def test_an_experiment_that_cannot_be_run_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Experiment(**{"dataset": "mnist", **changes})


def test_two_and_two_point_zero_are_one_experiment():
    one, other = (Experiment("mnist", objective="beta-elbo", beta=beta) for beta in (2, 2.0))
    assert one == other and one.name == other.name and one.run_name == other.run_name


def test_a_name_that_is_no_file_name_is_refused_before_training(images, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(OSError, match=r"Nothing can be written into .* \(File name too long\)"):
        run(images, dataset="a" * 250, folder=tmp_path)


def test_own_images_go_with_their_source(images):
    train, test = images
    with pytest.raises(ValueError, match="source is 'own' and not both train and test"):
        run_experiment(Experiment("squares", source="own"))
    with pytest.raises(ValueError, match="pass both with source='own', or neither"):
        run_experiment(Experiment("mnist"), train=train, test=test)
    with pytest.raises(ValueError, match="pass both with source='own', or neither"):
        run_experiment(Experiment("squares", source="own"), train=train)
    with pytest.raises(ValueError, match="they must be the same"):
        run_experiment(Experiment("squares", source="own"), train=train, test=test[:, 1:])


LOSS_EXPLODED = (
    r"The training loss became (nan|-?inf) in step [23] of 3 of epoch 1 of 20; the step before had "
    r"[\d.e+]+ nats per image, and its largest gradient in (encoder|posterior|decoder)[\w.]+ "
    r"\([\d.e+]+\). Lower the learning rate \(it is 10000.0\)"
)


def test_a_loss_that_explodes_stops_the_run(images):
    with pytest.raises(FloatingPointError, match=LOSS_EXPLODED):
        run(images, epochs=20, learning_rate=1e4)


def test_a_test_loss_that_explodes_stops_the_run(images, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: ({"loss": math.inf}, None))
    sentence = (
        r"test loss became inf after epoch 1 of 3, with a training loss of [\d.]+; lower the "
        r"learning rate \(it is 0.001\)"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        run(images, epochs=3)


def test_devices_and_seeds():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cuda", "mps", "cpu")
    draws = []
    for path in ((0, 1), (0, 2), (1, 1), (0, 1)):
        set_seed(*path)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[3] and len(set(draws)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_a_gpu(tmp_path):
    """With everything that is judged, and resumed on the CPU."""
    experiment = Experiment("mnist", epochs=1, iwae_samples=2, iwae_images=10)
    record = run_experiment(experiment, checkpoints=tmp_path, device="cuda", progress=False)
    assert record["environment"]["device"] == torch.cuda.get_device_name()
    assert record["quality"]["images"] == 2000
    longer = dataclasses.replace(experiment, epochs=2)
    record = run_experiment(longer, checkpoints=tmp_path, device="cpu", progress=False)
    assert len(record["trained_in"]) == 2


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_every_objective_trains(images, objective):
    record = run(images, objective=objective, epochs=12, learning_rate=1e-2)
    assert record["history"][-1]["test"]["loss"] < record["history"][0]["test"]["loss"]


@pytest.mark.parametrize("dataset, posterior", [("mnist", "ar1"), ("fashion-mnist", "diagonal")])
def test_a_larger_beta_buys_a_smaller_kl_by_reconstruction(dataset, posterior):
    """On embedded images, as theory says: the KL falls and the reconstruction suffers."""
    parts = {"train": load_images(dataset)[:2000], "test": load_images(dataset, "test")[:500]}
    tests = []
    for beta in (1.0, 2.0, 4.0, 8.0):
        experiment = Experiment(
            f"part-of-{dataset}", source="own", posterior=posterior, objective="beta-elbo",
            beta=beta, epochs=4, batch_size=64, iwae_samples=1, iwae_images=1, pictures=False,
        )  # fmt: skip
        record = run_experiment(experiment, **parts, device="cpu", progress=False)
        tests.append(record["test"])
    kls = [test["kl"] for test in tests]
    assert kls == sorted(kls, reverse=True) and kls[-1] < 0.8 * kls[0]
    reconstructions = [test["reconstruction"] for test in tests]
    assert reconstructions == sorted(reconstructions)


def test_a_small_head_starts_near_the_prior_and_keeps_dcgan_from_diverging():
    """With heads as they come, the KL of the first steps passes a hundred thousand nats."""
    x = to_unit_interval(load_images("fashion-mnist")[:160])
    kls = {}
    for scale in (1.0, 0.01):
        experiment = Experiment(
            "fashion-mnist", architecture="dcgan", latent=10, initialisation="xavier",
            head_scale=scale,
        )  # fmt: skip
        vae = build_vae(experiment, (1, 28, 28))
        plain = build_vae(dataclasses.replace(experiment, head_scale=1.0), (1, 28, 28))
        for name, parameter in plain.named_parameters():
            factor = scale if name.startswith("posterior.") else 1.0
            torch.testing.assert_close(vae.get_parameter(name), factor * parameter)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
        kls[scale] = []
        for batch in x.split(32):
            terms = negative_elbo(*vae(batch), batch)
            optimizer.zero_grad()
            terms.loss.mean().backward()
            optimizer.step()
            kls[scale].append(terms.kl.mean().item())
    assert max(kls[0.01]) < 1e3 < 1e5 < max(kls[1.0])


def test_convolutions_are_laid_out_as_a_cpu_likes_them_and_compute_the_same():
    vae = build_vae(Experiment("mnist", architecture="cnn", latent=3), (1, 28, 28)).double()
    weights = [p for p in vae.parameters() if p.dim() == 4]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    plain = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    for model in (vae, plain):
        torch.manual_seed(0)
        negative_elbo(*model(x), x).loss.sum().backward()
    for parameter, other in zip(vae.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_images_are_resized_for_a_network_that_needs_it(images):
    record = run(images, architecture="beta_cnn", image_size=64, epochs=1)
    assert decode_png(record["images"]["samples"]).shape == (32, 64, 64)
    assert "image_size=64" in record["name"]


def test_clip_norm_limits_the_length_of_a_step(images):
    vae = build_vae(Experiment(**SMALL), (1, 8, 8))
    moved = copy.deepcopy(vae)
    optimizer = torch.optim.SGD(moved.parameters(), lr=1.0)
    loss_of = training.batch_loss(moved, negative_elbo)
    training.train_epoch(moved, images[0][:24, None], loss_of, optimizer, 24, clip_norm=0.5)
    pairs = zip(moved.parameters(), vae.parameters(), strict=True)
    steps = [(one - other).detach().square().sum() for one, other in pairs]
    assert torch.stack(steps).sum().sqrt().item() == pytest.approx(0.5, rel=1e-3)


def test_the_last_good_checkpoint_outlives_an_explosion(images, tmp_path):
    run(images, checkpoints=tmp_path, epochs=2)
    (path,) = tmp_path.iterdir()
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][0]["lr"] = 1e4  # a fault in the middle of the run
    torch.save(state, path)
    with pytest.raises(FloatingPointError, match="The training loss became"):
        run(images, checkpoints=tmp_path, epochs=30)
    state = read_checkpoint(path)
    assert 2 <= len(state["history"]) < 30
    assert all(weight.isfinite().all() for weight in state["vae"].values())


@pytest.mark.parametrize("place", ("folder", "checkpoints"))
def test_a_folder_that_cannot_be_written_is_refused_before_training(
    images, tmp_path, monkeypatch, place
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("rhovae.study.experiments.fit", None)
    sentence = r"Nothing can be written into .*file/results .*choose another"
    with pytest.raises(OSError, match=sentence):
        run(images, **{place: tmp_path / "file" / "results"})


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path):
    """A limit on file size stands for the disk: the write fails in the middle."""
    code = f"""
import resource, signal
from pathlib import Path
from rhovae.study.records import require_writable, write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for attempt in (lambda: write_whole(Path({str(tmp_path)!r}) / "record.json", b"x" * 5000),
                lambda: require_writable({str(tmp_path)!r})):
    try:
        attempt()
    except OSError as error:
        print(error)
"""
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "File too large" in out and "Nothing can be written into" in out
    assert not list(tmp_path.iterdir())
