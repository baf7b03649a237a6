"""Faults put in on purpose: processes killed, files mutated, parameters that make no sense."""

import json
import os
import subprocess
import sys

from rhovae.checkpoint import read_checkpoint

KILLS = int(os.environ.get("RHOVAE_KILLS", "20"))  # make test-long sets more

# A process that forks the runs, so that each starts in milliseconds with torch imported.
KILLER = """
import os, random, signal, sys, time
import torch
from rhovae import Experiment, run_experiment

torch.set_num_threads(1)
kills, folder, longest = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (400, 12, 12), generator=generator).to(torch.uint8)
experiment = Experiment("noise", source="own", latent=4, epochs=60, batch_size=20,
                        iwae_samples=5, iwae_images=10)

def run():
    run_experiment(experiment, train=images, test=images[:50], folder=folder, checkpoints=folder,
                   device="cpu", progress=False)

moments, killed, start = random.Random(0), 0, time.perf_counter()
while True:
    child = os.fork()
    if not child:
        run()
        os._exit(0)
    if killed < kills:
        time.sleep(moments.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    killed += 1
print(killed, time.perf_counter() - start)
"""


def run_and_kill(folder, kills=0, longest=0.0):
    """How often the run was killed before it came to its end, seconds, and what it left."""
    command = [sys.executable, "-c", KILLER, str(kills), str(folder), str(longest)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed, seconds = subprocess.check_output(command, text=True, env=environment).split()
    (record,) = (json.loads(path.read_text()) for path in folder.glob("*.json"))
    (checkpoint,) = (read_checkpoint(path) for path in folder.glob("*.pt"))
    return int(killed), float(seconds), record, checkpoint


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path, without_times):
    """Bit for bit: the record, the weights and the state of the optimiser."""
    _, seconds, expected, whole = run_and_kill(tmp_path / "whole")
    # On average the kills fall into the first six tenths of the work.
    longest = 1.2 * seconds / KILLS
    killed, _, record, mended = run_and_kill(tmp_path / "killed", KILLS, longest)
    assert killed == KILLS, "it came to its end before it was killed often enough"
    assert without_times(record) == without_times(expected)
    assert whole["vae"].keys() == mended["vae"].keys()
    for name, weight in whole["vae"].items():
        assert weight.equal(mended["vae"][name]), name
    for one, other in zip(
        whole["optimizer"]["state"].values(), mended["optimizer"]["state"].values(), strict=True
    ):
        assert all(one[key].equal(other[key]) for key in one)
