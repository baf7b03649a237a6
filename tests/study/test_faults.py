"""Faults put in on purpose: processes killed, files mutated, parameters that make no sense."""

import dataclasses
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rhovae.study import Experiment, load_images
from rhovae.study.checkpoint import Checkpoint, read_checkpoint
from rhovae.study.data import DATA_FOLDER
from rhovae.study.experiments import build_vae
from rhovae.study.records import load_record

pytestmark = pytest.mark.usefixtures("float32")

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("RHOVAE_KILLS", "20"))  # make test-long sets more of both
FUZZ = int(os.environ.get("RHOVAE_FUZZ", "1000"))

# A process that forks the runs, so that each starts in milliseconds with torch imported. A run is
# killed at a random moment within two epochs after it has saved one.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numba, torch, torch._dynamo  # with what each run would load again
from rhovae.study import Experiment, run_experiment

torch.set_num_threads(1)
kills, folder, epoch = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (400, 12, 12), generator=generator).to(torch.uint8)
experiment = Experiment("noise", source="own", latent=4, epochs=3 * kills + 20, batch_size=20,
                        iwae_samples=5, iwae_images=10)
folder = folder / "runs"

def saved():
    return [path.stat().st_mtime_ns for path in folder.glob("*.pt")]

moments, killed = random.Random(0), 0
while True:
    before = saved()
    child = os.fork()
    if not child:
        run_experiment(experiment, train=images, test=images[:50], folder=folder,
                       checkpoints=folder, device="cpu", progress=False)
        os._exit(0)
    if epoch and killed < kills:
        while saved() == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 2 * epoch))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    killed += 1
print(killed)
"""


def run_and_kill(folder, epoch=0.0):
    """How often the run was killed before it came to its end, and what it left."""
    command = [sys.executable, "-c", KILLER, str(KILLS), str(folder), str(epoch)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = int(subprocess.check_output(command, text=True, env=environment))
    (record,) = (json.loads(path.read_text()) for path in folder.glob("runs/*.json"))
    (checkpoint,) = (read_checkpoint(path) for path in folder.glob("runs/*.pt"))
    return killed, record, checkpoint


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path, without_times):
    """Bit for bit: the record, the weights and the state of the optimiser."""
    _, expected, whole = run_and_kill(tmp_path / "whole")
    epoch = sorted(entry["seconds"] for entry in expected["history"])[len(expected["history"]) // 2]
    killed, record, mended = run_and_kill(tmp_path / "killed", max(epoch, 0.01))
    assert killed == KILLS, "it came to its end before it was killed often enough"
    assert without_times(record) == without_times(expected)
    assert whole["vae"].keys() == mended["vae"].keys()
    for name, weight in whole["vae"].items():
        assert weight.equal(mended["vae"][name]), name
    states = (found["optimizer"]["state"].values() for found in (whole, mended))
    for one, other in zip(*states, strict=True):
        assert all(one[key].equal(other[key]) for key in one)


def mutated(content, random):
    """Bytes changed, cut off, doubled or put in."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(content) + 1)
        kind = random.randrange(4)
        if kind == 0 and place < len(content):
            content[place] = random.randrange(256)
        elif kind == 1:
            del content[place : place + random.randrange(1, 50)]
        elif kind == 2:
            content[place:place] = random.randbytes(random.randrange(1, 20))
        elif random.random() < 0.2:
            content = content[:place]
    return bytes(content)


def refused(read, content, path, random, times):
    """How many of the mutated contents were refused, each by a ValueError with the file's name."""
    count = 0
    for _ in range(times):
        path.write_bytes(mutated(content, random))
        try:
            read()
        except ValueError as error:
            assert path.name in str(error) or str(path.parent) in str(error), error
            count += 1
    return count


@pytest.mark.filterwarnings("ignore")  # of torch's unpickler about what it finds
def test_mutated_files_bring_out_our_own_errors_only(tmp_path, monkeypatch):
    """Records, checkpoints, the embedded sample and idx files; anything else would be raised."""
    chance = random.Random(0)
    record = next((DATA_FOLDER / "results" / "families").glob("*.json")).read_bytes()
    path = tmp_path / "record.json"
    count = refused(lambda: load_record(path), record, path, chance, 5 * FUZZ)
    assert count > 2 * FUZZ, "most mutations of JSON are no JSON any more"

    path = tmp_path / "run.pt"
    vae = build_vae(Experiment("noise", source="own", latent=2), (1, 2, 2))
    Checkpoint(path, run={"seed": 0}).save([{"epoch": 1}], vae, torch.optim.Adam(vae.parameters()))
    small = path.read_bytes()
    refused(lambda: read_checkpoint(path), small, path, chance, FUZZ)

    folder = tmp_path / "embedded"
    folder.mkdir()
    monkeypatch.setattr("rhovae.study.data.DATA_FOLDER", tmp_path)
    path = folder / "mnist.npz"
    np.savez(path, train_images=np.zeros((2, 4, 4), np.uint8), train_labels=np.zeros(2, np.uint8))
    sample = path.read_bytes()
    hashes = {"mnist": hashlib.sha256(sample).hexdigest()}
    monkeypatch.setattr("rhovae.study.data.EMBEDDED_SHA256", hashes)
    assert load_images("mnist").shape == (2, 1, 4, 4)
    changed = refused(lambda: load_images("mnist"), sample, path, chance, FUZZ)
    assert changed > 0.9 * FUZZ, "all but those that a mutation left as they were"

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx((5, 4, 4)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((5,)))
    hashes = {("mnist", "train"): hashlib.sha256(bytes(5 * 4 * 4 + 5)).hexdigest()}
    monkeypatch.setattr("rhovae.study.data.FULL_SHA256", hashes)
    read = partial(load_images, "mnist", "train", "full", root=tmp_path)
    assert read().shape == (5, 1, 4, 4)
    for path in (raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"):
        whole = path.read_bytes()
        # Zeros cut out of zeros, and put in again, are the same file.
        assert refused(read, whole, path, chance, FUZZ) > 0.8 * FUZZ
        path.write_bytes(whole)


def idx(shape):
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(math.prod(shape))


def test_parameters_of_any_text_are_values_or_our_own_errors():
    sys.path.insert(0, str(ROOT / "tools"))
    from notebooks import value_of

    chance = random.Random(0)
    alphabet = "0123456789.eE+-[]{}:,\"'\\ \t\nabcxyz#&*!|>%@`~nulltrue"
    for _ in range(2 * FUZZ):
        text = "".join(chance.choices(alphabet, k=chance.randrange(12)))
        try:
            value_of(text)
        except ValueError as error:
            assert "is not a value" in str(error)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        field.name: st.one_of(
            st.integers(-3, 3), st.floats(), st.text(max_size=5), st.none(), st.booleans(),
            st.lists(st.integers(), max_size=2), st.sampled_from(["mnist", "ar1", "elbo", "own"]),
        )
        for field in dataclasses.fields(Experiment)
    },
)  # fmt: skip


@given(FIELDS)
@settings(deadline=None, max_examples=FUZZ)
def test_experiments_of_any_values_are_made_or_refused_in_our_words(values):
    try:
        experiment = Experiment(**{"dataset": "mnist"} | values)
    except ValueError as error:
        assert str(error).endswith((".", "'"))
    else:
        assert Experiment(**dataclasses.asdict(experiment)) == experiment
