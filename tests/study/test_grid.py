"""The grid: what is planned, what a kill leaves, and how far it says it is."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from rhovae.study import Experiment, run_experiment
from rhovae.study.checkpoint import read_checkpoint
from rhovae.study.records import REQUIRED, SCHEMA, load_record

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import grids  # noqa: E402
import progress  # noqa: E402

import notebooks  # noqa: E402

FIGURES = ("04_decomposition", "06_figure_1_full", "06_figure_2_mnist_full",
           "06_figure_2_fashion-mnist_full")  # fmt: skip


UNFINISHED = {"smoke", "corrected", "released"}
FAMILIES = ("families", "gaps", "rows", "active", "flows")
UNFINISHED |= {"anchor", "fair", "long", "rates"}
SEEDS_THERE = {  # of grids that were widened; the seeds beyond are still to be run
    "families": lambda experiment: 5 if experiment.latent in (5, 20) else 3,
    "gaps": lambda experiment: 1,
    "rows": lambda experiment: 3,
}

pytestmark = pytest.mark.usefixtures("float32")


def command(folder, *arguments, **config):
    """Snakemake in a folder of the test's own, where it also keeps its notes and its lock."""
    settings = [f"{key}={value}" for key, value in ({"runs": folder} | config).items()]
    start = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile"]
    return [*start, "--directory", folder, "--cores", "2", *arguments, "--config", *settings]


# Runs Snakemake's command in a fork of itself for each line of arguments that it reads, so that
# Snakemake, torch and the grids are loaded once and not for each plan.
FORKS = """
import json, os, sys
from snakemake.cli import main

sys.path.insert(0, sys.argv[1])
import grids

for line in sys.stdin:
    file, arguments = json.loads(line)
    child = os.fork()
    if not child:
        out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["snakemake", *arguments]
        main()  # which exits
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def snakemake(tmp_path_factory):
    """A function of Snakemake's arguments: exit code and text of what trains nothing."""
    file = tmp_path_factory.mktemp("snakemake") / "text"
    forks = subprocess.Popen(
        [sys.executable, "-c", FORKS, ROOT / "tools"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def run(folder, *arguments, **config):
        _, _, _, *words = command(folder, *arguments, **config)
        forks.stdin.write(json.dumps([str(file), list(map(str, words))]) + "\n")
        forks.stdin.flush()
        return int(forks.stdout.readline()), file.read_text()

    yield run
    forks.communicate()


@pytest.fixture
def planned(snakemake):
    """What a dry run would do, as {rule: number of jobs} and its whole text."""
    return lambda folder, **config: plan_of(*snakemake(folder, "--dry-run", **config))


def plan_of(code, text):
    assert code == 0, text
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", text.partition("Job stats:")[2], flags=re.M))
    return {rule: int(count) for rule, count in jobs.items() if rule not in ("all", "total")}, text


@pytest.fixture
def finished(tmp_path):
    """A tree in which everything is made; what its files hold does not matter to a plan."""
    for grid in ("audit", "control", "control_script"):
        folder = tmp_path / "results" / grid
        folder.mkdir(parents=True)
        for experiment in grids.GRIDS[grid]():
            (folder / f"{experiment.name}.json").touch()
    (tmp_path / "figures").mkdir()
    for name in FIGURES:
        (tmp_path / "figures" / f"{name}.svg").touch()
    return tmp_path


def test_on_a_finished_tree_nothing_is_planned_and_a_lost_record_is(finished, planned):
    config = dict(grids="audit,control,control_script")
    jobs, text = planned(finished, **config)
    assert jobs == {} and "Nothing to be done" in text
    lost = {grid: grids.GRIDS[grid]()[3].name for grid in ("audit", "control")}
    path = finished / "results" / "control" / f"{lost['control']}.json"
    path.unlink()
    jobs, text = planned(finished, **config)
    assert jobs == {"experiment": 1, "audit_figures": 1} and f"training {lost['control']}" in text
    path.touch()
    (finished / "results" / "audit" / f"{lost['audit']}.json").unlink()
    for name in FIGURES:  # as new as the record, so that only what is missing counts
        (finished / "figures" / f"{name}.svg").touch()
    jobs, text = planned(finished, **config)
    assert jobs == {"experiment": 1, "audit_figures": 1, "paper_figures": 1}
    assert f"training {lost['audit']}" in text


def test_the_committed_records_are_those_of_the_grid(tmp_path, planned):
    """Nothing of the committed results would be trained again, and nothing else lies there."""
    results = ROOT / "data" / "results"
    jobs, _ = planned(tmp_path, results=results, figures=tmp_path / "figures")
    assert "experiment" not in jobs
    beyond = dict(grids=",".join(FAMILIES), results=results, figures=tmp_path / "figures")
    paths = [results / g / f"{e.name}.json" for g in FAMILIES for e in grids.GRIDS[g]()]
    missing = [path for path in paths if not path.is_file()]
    expected = {"family_figures": 1} | ({"experiment": len(missing)} if missing else {})
    assert planned(tmp_path, **beyond)[0] == expected
    count = len(paths)
    assert f"notebooks 12 and 13 are {count} more" in (ROOT / "README.md").read_text()
    for grid in grids.GRIDS:
        names = {experiment.name for experiment in grids.GRIDS[grid]()}
        found = {path.stem for path in (results / grid).glob("*.json")}
        there = SEEDS_THERE.get(grid, lambda experiment: math.inf)
        due = {e.name for e in grids.GRIDS[grid]() if e.seed < there(e) and grid not in UNFINISHED}
        assert due <= found <= names, grid
        for path in (results / grid).glob("*.json"):
            assert Experiment(**load_record(path)["experiment"]).name == path.stem


def test_an_unknown_grid_is_refused(tmp_path, snakemake):
    code, text = snakemake(tmp_path, "--dry-run", grids="audits")
    assert code != 0 and "There is no grid audits; choose from active, anchor, audit, " in text


def test_active_has_as_many_variables_as_the_records_say():
    for dataset, latent in grids.ACTIVE.items():
        paths = (ROOT / "data" / "results" / "families").glob(f"{dataset}-*-diagonal-d50-*.json")
        counts = [load_record(path)["latent"]["active_units"] for path in paths]
        assert len(counts) >= 3
        assert latent == round(sum(counts[:3]) / 3)


def test_the_rate_is_chosen_on_validation_images_of_a_whole_search(tmp_path, monkeypatch):
    """By the best epoch of each run, whatever the test says; two of three rates choose nothing."""

    def record(validation, test):
        means = dict.fromkeys(("loss", "negative_elbo", "reconstruction", "kl"), test)
        history = [
            {"epoch": n, "train": means, "test": means, "validation": means | {"loss": loss}}
            for n, loss in enumerate(validation, 1)
        ]
        judged = {"test": means, "iwae": {"nll": test, "negative_elbo": test}}
        return {key: {} for key in REQUIRED} | {"schema": SCHEMA, "history": history} | judged

    scripted = {3e-4: ([9, 8], 1.0), 1e-3: ([9, 5, 7], 3.0), 3e-3: ([6, 6], 2.0)}
    assert grids.chosen_rates(tmp_path) == {}
    for experiment in grids.rates():
        whole = experiment.posterior in ("ar1", "full") or experiment.learning_rate < 2e-3
        if experiment.dataset == "mnist" and whole:
            path = tmp_path / f"{experiment.name}.json"
            path.write_text(json.dumps(record(*scripted[experiment.learning_rate])))
    chosen = {("mnist", "ar1"): 1e-3, ("mnist", "full"): 1e-3}
    assert grids.chosen_rates(tmp_path) == chosen
    monkeypatch.setattr(grids, "chosen_rates", lambda: chosen)
    runs = grids.fair()
    assert len(runs) == 6 and {run.learning_rate for run in runs} == {1e-3}
    assert not {run.name for run in runs} & {run.name for run in grids.rates()}


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_a_job_runs_the_experiment_of_its_name(grid):
    """What notebook 05 makes of the parameters is the experiment again."""
    for experiment in grids.GRIDS[grid]():
        words = shlex.split(grids.command_line(**grids.parameters(experiment)))
        assert set(words[::3]) == {"-p"}
        pairs = zip(words[1::3], words[2::3], strict=True)
        settings = {name: notebooks.value_of(text) for name, text in pairs}
        more = settings.pop("more")
        (posterior,), (seed,) = settings.pop("posteriors"), settings.pop("seeds")
        assert Experiment(posterior=posterior, seed=seed, **settings, **more) == experiment


def kill_with_everything_it_started(process):
    """SIGKILL at once, as when a machine loses power: nobody can tidy up."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=20)


def test_a_killed_grid_goes_on_and_ends_as_if_nothing_had_been(
    tmp_path, without_times, snakemake, planned
):
    """Two runs, killed with the head once both have saved an epoch, then the same command again."""
    experiments = grids.smoke()
    checkpoints = [tmp_path / "checkpoints" / f"{e.run_name}.pt" for e in experiments]
    records = [tmp_path / "results" / "smoke" / f"{e.name}.json" for e in experiments]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command(tmp_path, grids="smoke"), stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not all(path.is_file() for path in checkpoints):
            assert process.poll() is None and time.monotonic() < deadline, log.name
            time.sleep(0.05)
        kill_with_everything_it_started(process)
        process.wait()
    assert not all(path.is_file() for path in records), "it was killed too late to show anything"
    lines = progress.progress(tmp_path, tmp_path / "results", {"smoke": experiments})
    assert re.search(r"epoch [1-5] of 5, test -ELBO \d+\.\d\d nats", lines[0]), lines
    saved = [read_checkpoint(path)["history"] for path in checkpoints]
    assert re.fullmatch(r"smoke: [01] of 2 records, \d+ of 10 epochs \(\d+%\)", lines[-1]), lines

    assert snakemake(tmp_path, "--unlock", grids="smoke")[0] == 0
    run = subprocess.run(command(tmp_path, grids="smoke"), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "steps (100%) done" in run.stdout + run.stderr
    for path, history in zip(records, saved, strict=True):
        # Wall times included: these very epochs, and not the same ones computed again.
        assert load_record(path)["history"][: len(history)] == history
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for experiment, path in zip(experiments, records, strict=True):
        uninterrupted = run_experiment(experiment, device="cpu", progress=False)
        assert load_record(path)["environment"]["threads"] == 1
        # Head and test may see another commit state; all else must agree.
        found, expected = (r | {"environment": {}} for r in (load_record(path), uninterrupted))
        assert without_times(found) == without_times(expected)
    torch.set_num_threads(threads)
    lines = progress.progress(tmp_path, tmp_path / "results", {"smoke": experiments})
    assert lines == ["smoke: 2 of 2 records, 10 of 10 epochs (100%)"]
    assert planned(tmp_path, grids="smoke")[0] == {}


def test_a_second_grid_is_refused_and_ctrl_c_leaves_no_process_and_no_lock(
    tmp_path, in_a_session, signal_session, snakemake, planned
):
    """Two `make paper` at once: the second is told so, the first never notices."""
    one = tmp_path / "results" / "smoke" / f"{grids.smoke()[0].name}.json"  # a job is enough
    first = in_a_session(
        command(tmp_path, one, grids="smoke"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "checkpoints").glob("*.pt")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(first.pid).children(recursive=True)
    assert len(family) >= 2, "the job and its kernel"
    for process in family:
        process.suspend()  # or they might be done before the second is refused
    code, text = snakemake(tmp_path, grids="smoke")
    assert code != 0 and "Directory cannot be locked" in text
    for process in family:
        process.resume()
    assert first.poll() is None
    text, _ = signal_session(first, signal.SIGINT, family)
    assert first.returncode != 0, text
    assert planned(tmp_path, grids="smoke")[0] == {"experiment": 2}, "not locked, nothing half-done"
