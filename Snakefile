# The experiments and what is made of them, on one machine (make paper) or a cluster.
#
#     snakemake --cores 2                                        everything, into runs/full
#     snakemake --cores 2 --config grids=convolutional           a part
#     snakemake --cores 2 --config grids=families,gaps,rows,active,flows     notebooks 12 and 13, hours
#     snakemake --cores 2 --config results=data/results figures=figures       what is committed
#     snakemake --workflow-profile profiles/slurm                on a cluster
#
# A record's name states its whole experiment, so a changed setting is another file. Notebooks and
# package are no inputs: nothing is trained again because a sentence was edited.
# Every job can be killed and repeated. It saves each epoch, and writes its record in one step.
import os
import shlex
import sys
from pathlib import Path

NOTEBOOKS, TOOLS = (Path(workflow.basedir) / name for name in ("notebooks", "tools"))
sys.path.insert(0, str(TOOLS))
from grids import GRIDS, command_line, convolutional, parameters

RUNS = config.get("runs", "runs/full")  # checkpoints and executed notebooks, and by default
RESULTS = config.get("results", f"{RUNS}/results")  # the records, and
FIGURES = config.get("figures", f"{RUNS}/figures")  # the figures
THREADS = int(config.get("threads", 1))  # of a training run: runs at a time = cores / threads
CHOSEN = config.get("grids", "audit,control,control_script,convolutional").split(",")
RUN = shlex.join([sys.executable, str(TOOLS / "notebooks.py"), "run"])

unknown = set(CHOSEN) - set(GRIDS)
if unknown:
    raise WorkflowError(
        f"There is no grid {', '.join(sorted(unknown))}; choose from {', '.join(GRIDS)}."
    )
EXPERIMENTS = {grid: {e.name: e for e in GRIDS[grid]()} for grid in CHOSEN}
if "epochs" in config and "convolutional" in CHOSEN:  # in another length than a CPU's
    EXPERIMENTS["convolutional"] = {e.name: e for e in convolutional(int(config["epochs"]))}
if "RHOVAE_DATA" in os.environ:  # a notebook runs in its own folder, so paths must hold there
    os.environ["RHOVAE_DATA"] = str(Path(os.environ["RHOVAE_DATA"]).absolute())


def absolute(*parts):
    return str(Path(*parts).absolute())


def records(*grids):
    return [f"{RESULTS}/{grid}/{name}.json" for grid in grids for name in EXPERIMENTS.get(grid, ())]


# Notebook 06 draws Figures 3 to 5 from `released` and `corrected` where their records are, and else
# from `convolutional`.
OF_FIGURES = ("audit", "convolutional", "corrected", "released")
NUMBERS = ["1", "2_mnist", "2_fashion-mnist"]
NUMBERS += ["3", "4", "5"] * bool({"convolutional", "corrected"} & set(CHOSEN))
PAPER_FIGURES = [f"{FIGURES}/06_figure_{number}_full.svg" for number in NUMBERS]
ALL = records(*CHOSEN)
ALL += PAPER_FIGURES if "audit" in CHOSEN else []
OF_AUDIT = ("audit", "control", "control_script")
ALL += [f"{FIGURES}/04_decomposition.svg"] if set(OF_AUDIT) <= set(CHOSEN) else []
FAMILIES = ("families", "gaps", "rows", "active", "flows")
ALL += [f"{FIGURES}/12_families.svg"] if set(FAMILIES) <= set(CHOSEN) else []


wildcard_constraints:
    grid=r"[\w-]+",
    name=r"[\w.=-]+",


rule all:
    input:
        ALL,


rule experiment:
    output:
        f"{RESULTS}/{{grid}}/{{name}}.json",
    log:
        f"{RUNS}/notebooks/{{grid}}/{{name}}.ipynb",
    params:
        notebook=NOTEBOOKS / "05_train.ipynb",
        settings=lambda w: command_line(
            **parameters(EXPERIMENTS[w.grid][w.name]),
            results=absolute(RESULTS, w.grid),
            checkpoints=absolute(RUNS, "checkpoints"),
            reuse=True,
        ),
    threads: THREADS
    resources:
        # Weights, gradients and Adam's moments of 309 million parameters, twice when they are saved.
        mem_mb=lambda w: 14000 if "released_cnn" in w.name else 4000,
        runtime=720,
    message:
        "training {wildcards.name}"
    shell:
        "{RUN} {log:q} {params.notebook:q} {params.settings}"


rule paper_figures:
    input:
        records(*OF_FIGURES),
    output:
        PAPER_FIGURES,
    log:
        f"{RUNS}/notebooks/06_paper_figures.ipynb",
    params:
        notebook=NOTEBOOKS / "06_paper_figures.ipynb",
        settings=command_line(results=absolute(RESULTS), source="full", save_to=absolute(FIGURES)),
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "drawing the paper's figures"
    shell:
        "{RUN} {log:q} {params.notebook:q} {params.settings}"


rule audit_figures:
    input:
        records(*OF_AUDIT),
    output:
        f"{FIGURES}/04_decomposition.svg",
    log:
        f"{RUNS}/notebooks/04_published_code.ipynb",
    params:
        notebook=NOTEBOOKS / "04_published_code.ipynb",
        settings=command_line(results=absolute(RESULTS), save_to=absolute(FIGURES)),
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "drawing the audit"
    shell:
        "{RUN} {log:q} {params.notebook:q} {params.settings}"


rule family_figures:
    input:
        records(*FAMILIES),
    output:
        f"{FIGURES}/12_families.svg",
    log:
        f"{RUNS}/notebooks/12_trained_posteriors.ipynb",
    params:
        notebook=NOTEBOOKS / "12_trained_posteriors.ipynb",
        settings=command_line(results=absolute(RESULTS), save_to=absolute(FIGURES)),
    resources:
        mem_mb=4000,
        runtime=60,
    message:
        "drawing which posterior to use"
    shell:
        "{RUN} {log:q} {params.notebook:q} {params.settings}"
