# `make reproduce` and `make test` each work first and alone on a fresh clone: they build .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
export IPYKERNEL_CELL_NAME := <cell>

.DEFAULT_GOAL := help
.PHONY: help setup reproduce paper progress figures benchmark book test test-core test-oldest test-long lint
.PHONY: dist notebooks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv with every dependency at the pinned version (CONSTRAINTS= for the newest)

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old: the pinned versions need 3.11 or newer; name one with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]'
	@touch $(READY)

reproduce: $(READY)  ## the main job: run all notebooks on the embedded images into runs/embedded
	$(BIN)/python tools/reproduce.py

# ARGS go to Snakemake: make paper ARGS='--cores 8 --config threads=2 grids=convolutional epochs=15'
paper: $(READY)  ## every run of the paper's systems on the full sets (RHOVAE_DATA, or downloaded), in runs/full
	$(BIN)/snakemake $(ARGS)

progress: $(READY)  ## how far make paper is
	@$(BIN)/python tools/progress.py $(ARGS)

# Side by side with one thread each, as they hardly use more.
figures: $(READY)  ## redraw figures/ from the committed records
	printf '%s\n' 04_published_code 06_paper_figures 12_trained_posteriors 10_time | OMP_NUM_THREADS=1 xargs -P 3 -I {} \
	    $(BIN)/python tools/notebooks.py run runs/executed/{}.ipynb notebooks/{}.ipynb -p save_to figures

benchmark: $(READY)  ## time draws, densities and training into data/results/speed.json (with Pythae: pip install -e '.[pythae]')
	$(BIN)/python -m tools.benchmark $(ARGS)

# Where there is no Chromium, the last step says so and passes; LOOK=--required makes it fail.
book: $(READY)  ## README, notebooks and docstrings as a site, in runs/book/site, and a look at it in Chromium
	$(PIP) -e '.[book]'
	$(BIN)/python tools/book.py
	$(BIN)/python tools/browser.py $(LOOK)

# Two workers with one thread each: on a shared machine more threads only wait for one another.
test: $(READY)  ## lint, types, unit tests, doctests, and every cell of every notebook
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -o addopts= \
	    --nbval --nbval-current-env --nbval-cell-timeout 300 $(STRICT)
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -o addopts= \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout 300 $(LAX)

# Their outputs depend on training, hence on machine and threads; the cells assert what must hold.
LAX := notebooks/00_rho_vae_in_one_page.ipynb notebooks/05_train.ipynb
STRICT := $(filter-out $(LAX),$(wildcard notebooks/*.ipynb))

test-long: $(READY)  ## kills, mutations and extremes in larger numbers: about half an hour
	RHOVAE_KILLS=200 RHOVAE_FUZZ=20000 RHOVAE_EXAMPLES=5000 OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -q -n 2 tests/study/test_faults.py tests/core/test_extremes.py

test-core:  ## the core with torch alone, from the wheel, in an environment of its own (TORCH=torch==2.9.1)
	$(PYTHON) tools/core_alone.py --torch '$(TORCH)'

TORCH := torch
OLDEST := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)

test-oldest:  ## the same with the oldest torch that pyproject.toml admits
	$(PYTHON) tools/core_alone.py --torch 'torch==$(OLDEST).*'

lint: $(READY)  ## check code and notebooks with ruff, mend what can be mended, and check types
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

dist: $(READY)  ## build what a release publishes (TAG=v0.2.0 checks that it is called so)
	$(BIN)/python tools/dist.py $(TAG)

notebooks: $(READY)  ## run the committed notebooks in place and normalise them
	$(BIN)/python tools/notebooks.py execute

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) runs dist
