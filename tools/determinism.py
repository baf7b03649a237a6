"""What changes when the same seed runs with other threads or instructions.

    python tools/determinism.py [--epochs 15] [--save data/results/determinism.json]

Trains two small models in a process of their own for each setting and writes their test -ELBO after
every epoch, in nats per image. `ATEN_CPU_CAPABILITY=default` (torch's own switch) turns off the
vector instructions of torch's kernels; it stands in for another processor.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rhovae.study.provenance import environment
from rhovae.study.records import write_whole
from rhovae.study.training import pick_device

SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "1 thread, once more": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "1 thread, no vector instructions": {
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
    },
}
RUNS = """
import json, sys
from rhovae.study import Experiment, run_experiment
curves = {}
for posterior in ("diagonal", "ar1"):
    experiment = Experiment("fashion-mnist", posterior=posterior, latent=5, pictures=False,
                            epochs=int(sys.argv[1]))
    history = run_experiment(experiment, device="cpu", progress=False)["history"]
    curves[posterior] = [entry["test"]["negative_elbo"] for entry in history]
print(json.dumps(curves))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--save", type=Path, default=Path("data/results/determinism.json"))
    arguments = parser.parse_args()
    curves = {}
    for name, variables in SETTINGS.items():
        command = [sys.executable, "-c", RUNS, str(arguments.epochs)]
        out = subprocess.check_output(command, text=True, env=os.environ | variables)
        curves[name] = json.loads(out)
        print(name, {posterior: curve[-1] for posterior, curve in curves[name].items()}, flush=True)
    record = {"environment": environment(pick_device("cpu")), "negative_elbo": curves}
    write_whole(arguments.save, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
