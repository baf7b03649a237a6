# The experiments and what is made of them, on one machine (make paper) or a cluster.
#
#     snakemake --cores 2                                        everything, into runs/full
#     snakemake --cores 2 --config grids=convolutional           a part
#     snakemake --cores 2 --config results=data/results figures=figures       what is committed
#     snakemake --workflow-profile profiles/slurm                on a cluster
#
# A record's name states its whole experiment, so a changed setting is another file, and nothing is
# repeated because a notebook's prose was edited: code enters through ancient(), by name only.
# Every job can be killed and repeated. It saves each epoch, and writes its record in one step.
import shlex
import sys
from pathlib import Path

HERE = Path(workflow.basedir)
sys.path.insert(0, str(HERE / "tools"))
from grids import GRIDS, convolutional, command_line, parameters

RUNS = config.get("runs", "runs/full")  # checkpoints and executed notebooks, and by default
RESULTS = config.get("results", f"{RUNS}/results")  # the records, and
FIGURES = config.get("figures", f"{RUNS}/figures")  # the figures
THREADS = int(config.get("threads", 1))  # of a training run: runs at a time = cores / threads
CHOSEN = config.get("grids", "audit,control,convolutional").split(",")
RUN = shlex.join([sys.executable, str(HERE / "tools" / "notebooks.py"), "run"])

unknown = set(CHOSEN) - set(GRIDS)
if unknown:
    raise WorkflowError(
        f"There is no grid {', '.join(sorted(unknown))}; choose from {', '.join(GRIDS)}."
    )
EXPERIMENTS = {grid: {e.name: e for e in GRIDS[grid]()} for grid in CHOSEN}
if "epochs" in config:  # the convolutional runs in another length than a CPU's
    EXPERIMENTS["convolutional"] = {e.name: e for e in convolutional(int(config["epochs"]))}


def absolute(*parts):
    """A notebook runs in its own folder, so what it is told must hold there."""
    return str(Path(*parts).absolute())


def notebook(name):
    return ancient(HERE / "notebooks" / name)


def records(*grids):
    return [f"{RESULTS}/{grid}/{name}.json" for grid in grids for name in EXPERIMENTS.get(grid, ())]


NUMBERS = ["1", "2_mnist", "2_fashion-mnist"] + ["3", "4", "5"] * ("convolutional" in CHOSEN)
PAPER_FIGURES = [f"{FIGURES}/06_figure_{number}_full.svg" for number in NUMBERS]
ALL = records(*CHOSEN)
ALL += PAPER_FIGURES if "audit" in CHOSEN else []
ALL += [f"{FIGURES}/04_decomposition.svg"] if {"audit", "control"} <= set(CHOSEN) else []


wildcard_constraints:
    grid=r"[\w-]+",
    name=r"[\w.=-]+",


rule all:
    input:
        ALL,


rule experiment:
    input:
        notebook=notebook("05_train.ipynb"),
    output:
        f"{RESULTS}/{{grid}}/{{name}}.json",
    log:
        f"{RUNS}/notebooks/{{grid}}/{{name}}.ipynb",
    params:
        settings=lambda w: command_line(
            **parameters(EXPERIMENTS[w.grid][w.name]),
            results=absolute(RESULTS, w.grid),
            checkpoints=absolute(RUNS, "checkpoints"),
            reuse=True,
        ),
    threads: THREADS
    resources:
        mem_mb=4000,
        runtime=720,
    message:
        "training {wildcards.name}"
    shell:
        "{RUN} {log:q} {input.notebook:q} {params.settings}"


rule paper_figures:
    input:
        records("audit", "convolutional"),
        notebook=notebook("06_paper_figures.ipynb"),
    output:
        PAPER_FIGURES,
    log:
        f"{RUNS}/notebooks/06_paper_figures.ipynb",
    params:
        settings=command_line(results=absolute(RESULTS), source="full", save_to=absolute(FIGURES)),
    message:
        "drawing the paper's figures"
    shell:
        "{RUN} {log:q} {input.notebook:q} {params.settings}"


rule audit_figures:
    input:
        records("audit", "control"),
        notebook=notebook("04_published_code.ipynb"),
    output:
        f"{FIGURES}/04_decomposition.svg",
    log:
        f"{RUNS}/notebooks/04_published_code.ipynb",
    params:
        settings=command_line(results=absolute(RESULTS), save_to=absolute(FIGURES)),
    message:
        "drawing the audit"
    shell:
        "{RUN} {log:q} {input.notebook:q} {params.settings}"
