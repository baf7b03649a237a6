"""What a run may be told beside its model: when to stop, at which rate, of which pixels."""

import json
import math
import os
import signal

import pytest
import torch

from rhovae.objectives import negative_elbo
from rhovae.study import Experiment, run_experiment, training
from rhovae.study.checkpoint import Checkpoint, read_checkpoint
from rhovae.study.data import drawn_once, fingerprint, set_apart
from rhovae.study.experiments import build_vae
from rhovae.study.training import fit, judged_epoch, set_seed, tripling

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def images():
    """Noise: with few images of it a model overfits within some epochs."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (104, 1, 4, 4), generator=generator).to(torch.uint8)
    return pixels[:72], pixels[72:]


SMALL = dict(dataset="noise", source="own", posterior="diagonal", latent=3, epochs=12,
             batch_size=16, learning_rate=0.01, iwae_samples=5, iwae_images=10,
             pictures=False)  # fmt: skip
STOPPED = dict(validation_images=24, patience=2)


def run(images, checkpoints=None, **changes):
    train, test = images
    return run_experiment(Experiment(**{**SMALL, **changes}), train=train, test=test,
                          checkpoints=checkpoints, device="cpu", progress=False)  # fmt: skip


@pytest.fixture
def losses_on_validation(monkeypatch):
    """Let `fit` find these losses on validation images, and the true ones on the others."""
    evaluate = training.evaluate

    def script(values):
        values = iter(values)

        def scripted(vae, found, *rest):
            means, rho = evaluate(vae, found, *rest)
            return (means | {"loss": next(values)} if len(found) == 24 else means), rho

        monkeypatch.setattr(training, "evaluate", scripted)

    return script


def fitted(images, checkpoint=None, epochs=8, patience=2, watch=None, **settings):
    """A model after `fit` with a quarter of the images for validation, and its history."""
    train, test = images
    vae = build_vae(Experiment(**SMALL), (1, 4, 4))
    history = fit(
        vae, train[:48], test, watch or negative_elbo, epochs=epochs, batch_size=16,
        validation=train[48:], patience=patience, progress=False, checkpoint=checkpoint, **settings,
    )  # fmt: skip
    return vae, history


@pytest.mark.parametrize(
    "losses,patience,epochs,best",
    [
        ([5, 4, 4.5, 4.2, 3, 3.5, 3.5, 1], 2, 4, 2),
        ([5, 4, 4.5, 4.2, 3, 3.5, 3.5, 1], 3, 8, 8),
        ([5, 4, 4, 4, 4, 4, 4, 4], 3, 5, 2),  # no lower is no better, and the first is kept
        ([5, 6, 7, 8, 9, 9, 9, 9], 0, 8, 1),
        ([8, 7, 6, 5, 4, 3, 2, 1], 1, 8, 8),
    ],
)
def test_a_run_stops_when_it_has_been_patient_and_keeps_its_best_model(
    images, losses_on_validation, losses, patience, epochs, best
):
    losses_on_validation(losses)
    vae, history = fitted(images, patience=patience)
    assert len(history) == epochs and judged_epoch(history) is history[best - 1]
    assert [entry["validation"]["loss"] for entry in history] == losses[:epochs]
    losses_on_validation(losses)
    at_its_best, _ = fitted(images, epochs=best, patience=0)
    assert all(map(torch.equal, vae.state_dict().values(), at_its_best.state_dict().values()))


def test_validation_changes_nothing_else(images):
    """Nor does it use up random numbers: the same steps, up to the end."""
    train, test = images
    settings = dict(epochs=3, batch_size=16, progress=False)
    vae = build_vae(Experiment(**SMALL), (1, 4, 4))
    plain = fit(vae, train[:48], test, negative_elbo, **settings)
    _, watched = fitted(images, epochs=3, patience=0)
    assert all("validation" not in entry for entry in plain)
    for one, other in zip(plain, watched, strict=True):
        assert one["train"] == other["train"] and one["test"] == other["test"]


def test_a_stopped_run_killed_after_any_epoch_is_the_run_that_was_not(
    images, tmp_path, losses_on_validation
):
    losses = [5, 4, 4.5, 3, 3.5, 3.2, 1, 1]
    losses_on_validation(losses)
    whole, expected = fitted(images)
    assert len(expected) == 6
    weights = {}
    for epochs in (1, 2, 4):
        losses_on_validation(losses)
        weights[epochs] = fitted(images, epochs=epochs, patience=0)[0].state_dict()
    for killed in range(1, 7):
        path = tmp_path / f"{killed}.pt"
        losses_on_validation(losses)
        fitted(images, Checkpoint(path, {}), epochs=killed)
        kept = read_checkpoint(path)
        best = [1, 2, 2, 4, 4, 4][killed - 1]
        assert training.judged_epoch(kept["history"])["epoch"] == best
        assert kept["best"].keys() == weights[best].keys()
        assert all(map(torch.equal, kept["best"].values(), weights[best].values()))
        losses_on_validation(losses[killed:])
        vae, history = fitted(images, Checkpoint(path, {}))
        for one, other in zip(history, expected, strict=True):
            assert {**one, "seconds": 0} == {**other, "seconds": 0}
        assert all(map(torch.equal, vae.state_dict().values(), whole.state_dict().values()))
        vae, history = fitted(images, Checkpoint(path, {}), epochs=50)
        assert len(history) == 6, "it had stopped, and more epochs change nothing"


def test_a_run_with_every_option_that_is_killed_is_the_run_that_was_not(
    images, tmp_path, without_times
):
    """By SIGKILL in the middle of its fifth epoch: the record and the checkpoint, bit for bit."""
    settings = dict(validation_images=24, patience=4, schedule="tripling", binarised=True)
    whole = run(images, tmp_path / "whole", **settings)
    assert len(whole["history"]) > 5
    child = os.fork()
    if not child:
        train_epoch, epochs = training.train_epoch, iter(range(1, 100))

        def deadly(*args):
            if next(epochs) == 5:
                train_epoch(*args, steps=1)
                os.kill(os.getpid(), signal.SIGKILL)
            return train_epoch(*args)

        training.train_epoch = deadly
        run(images, tmp_path / "killed", **settings)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    (path,) = (tmp_path / "killed").iterdir()
    assert len(read_checkpoint(path)["history"]) == 4
    mended = run(images, tmp_path / "killed", **settings)
    assert without_times(mended) == without_times(whole)
    files = [read_checkpoint(p) for f in ("whole", "killed") for p in (tmp_path / f).iterdir()]
    for part in ("vae", "best"):
        one, other = (file[part] for file in files)
        assert all(map(torch.equal, one.values(), other.values()))
    one, other = (training.judged_epoch(file["history"])["epoch"] for file in files)
    assert one == other


def test_a_record_states_what_was_set_apart_and_judges_the_best_epoch(images, monkeypatch):
    record = run(images, **STOPPED, epochs=60)
    assert len(record["history"]) < 60, "it overfits"
    values = [entry["validation"]["loss"] for entry in record["history"]]
    best = values.index(min(values)) + 1
    assert len(values) == best + 2
    validation = record["validation"]
    assert validation["images"] == 24 and validation["epoch"] == best
    assert record["test"] == record["history"][best - 1]["test"] != record["history"][-1]["test"]
    again = run(images, **{**STOPPED, "patience": 0}, epochs=best)
    for part in ("iwae", "latent", "test"):
        assert again[part] == record[part], "its weights, too, are those of the best epoch"
    other = run(images, **STOPPED, seed=1, epochs=1)
    assert other["validation"]["sha256"] != validation["sha256"]
    assert other["data"] == record["data"], "of all images"
    assert json.loads(json.dumps(record)) == record


def test_the_images_set_apart_are_the_others(images):
    train, _ = images
    set_seed(0, 8)
    kept, apart = set_apart(train, 24)
    assert len(kept) == 48 and len(apart) == 24
    rows = [tuple(image.flatten().tolist()) for image in torch.cat((kept, apart))]
    assert sorted(rows) == sorted(tuple(image.flatten().tolist()) for image in train)
    assert not torch.equal(apart, train[:24]) and not torch.equal(apart, train[48:])


def test_the_test_images_decide_nothing(images):
    train, test = images
    settings = dict(epochs=8, **STOPPED)
    one, other = (run((train, part), **settings) for part in (test, 255 - test[:20]))
    assert len(one["history"]) == len(other["history"])
    for entry, changed in zip(one["history"], other["history"], strict=True):
        assert entry["validation"] == changed["validation"] and entry["test"] != changed["test"]


def test_a_validation_loss_that_explodes_stops_the_run(images, losses_on_validation):
    losses_on_validation([5.0, math.inf])
    with pytest.raises(FloatingPointError, match="The validation loss became inf after epoch 2 of"):
        fitted(images)


def test_the_stages_of_the_schedule():
    """Burda et al. (2016): 3^i epochs at 0.001 * 10^(-i / 7) for i = 0, ..., 7."""
    expected = [10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert len(expected) == 3280
    assert [tripling(epoch) for epoch in range(1, 3281)] == expected
    assert tripling(4000) == expected[-1]


def test_the_rate_is_that_of_the_epoch(images, tmp_path, monkeypatch):
    rates, train_epoch = [], training.train_epoch

    def watching(vae, found, loss_of, optimizer, *rest):
        rates.append(optimizer.param_groups[0]["lr"])
        return train_epoch(vae, found, loss_of, optimizer, *rest)

    monkeypatch.setattr(training, "train_epoch", watching)
    for epochs in (3, 6):  # goes on after three
        fitted(images, Checkpoint(tmp_path / "run.pt", {}), epochs=epochs, patience=0,
               schedule=tripling, learning_rate=0.01)  # fmt: skip
    slower = 10 ** (-1 / 7)
    assert rates == pytest.approx([0.01] + 3 * [0.01 * slower] + 2 * [0.01 * slower**2])
    rates.clear()
    fitted(images, epochs=2, learning_rate=0.01)
    assert rates == [0.01, 0.01]


def test_binarised_pixels_are_drawn_anew_in_each_epoch_and_for_the_test_once(images):
    seen = []

    def watching(q, z, logits, x):
        seen.append((torch.is_grad_enabled(), x))
        return negative_elbo(q, z, logits, x)

    fitted(images, watch=watching, binarised=True, epochs=2, patience=0)
    batches = [x for training_now, x in seen if training_now]
    assert len(batches) == 6 and all(set(x.unique().tolist()) <= {0, 1} for x in batches)
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert sorted(first.flatten(1).sum(1).tolist()) != sorted(second.flatten(1).sum(1).tolist())
    record = run(images, binarised=True, epochs=2)
    assert "-binarised=True" in record["name"]


def test_pixels_are_drawn_with_their_grey_value_as_probability():
    greys = torch.arange(256, dtype=torch.uint8)
    n = 500
    drawn = drawn_once(greys.expand(n, 1, 16, 256))
    assert set(drawn.unique().tolist()) == {0, 255} and drawn.dtype == torch.uint8
    share = (drawn == 255).double().mean((0, 1, 2))
    chance = greys.double() / 255
    error = (chance * (1 - chance) / (16 * n)).sqrt()
    # 5 standard errors: of 254 greys, one in 7,000 seeds would fail.
    assert ((share - chance).abs() <= 5 * error).all(), "exactly where there is no chance"
    torch.manual_seed(5)
    assert torch.equal(drawn[:9], drawn_once(greys.expand(9, 1, 16, 256))), "in every run the same"


def test_a_run_of_binary_images_is_judged_on_binary_images(images, monkeypatch):
    judged = []
    monkeypatch.setattr(
        "rhovae.study.experiments._judge",
        lambda experiment, vae, train, test, root: judged.append(fingerprint(test)) or {},
    )
    train, test = images
    for seed in range(2):
        record = run(images, binarised=True, epochs=1, seed=seed, validation_images=24)
    assert judged == 2 * [fingerprint(drawn_once(test))]
    set_seed(1, 8)
    _, apart = set_apart(train, 24)
    assert record["validation"]["sha256"] == fingerprint(drawn_once(apart))


def test_without_the_options_names_are_as_they_were():
    assert Experiment("mnist").name == "mnist-embedded-mlp-elbo-ar1-d10-e15-s0"
    changed = Experiment("mnist", validation_images=5000, patience=5, schedule="tripling")
    assert changed.name.endswith("-schedule=tripling-validation_images=5000-patience=5")
    assert changed.run_name == changed.name.replace("-e15", "")


def test_a_checkpoint_without_the_options_holds_what_it_did(images, tmp_path):
    run(images, tmp_path, epochs=1)
    (path,) = tmp_path.iterdir()
    assert set(read_checkpoint(path)) == {"run", "environments", "history", "vae", "optimizer"}


@pytest.mark.parametrize(
    "changes,sentence",
    [
        (dict(patience=2), "patience is 2, but validation_images is 0; set some apart, as the"),
        (dict(patience=-1), "patience is -1; it must be an integer of at least 0"),
        (dict(validation_images=2.5), "validation_images is 2.5; it must be an integer"),
        (dict(binarised=1), "binarised is 1; it must be true or false"),
        (dict(schedule="cosine"), "Unknown schedule 'cosine'; known are 'constant', 'tripling'"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Experiment(**{**SMALL, **changes})


def test_something_must_be_left_to_train_on(images):
    with pytest.raises(ValueError, match="validation_images is 72, but there are 72 training im"):
        run(images, validation_images=72)
    vae = build_vae(Experiment(**SMALL), (1, 4, 4))
    with pytest.raises(ValueError, match="patience is 3, but there are no validation images"):
        fit(vae, *images, negative_elbo, epochs=1, patience=3)
