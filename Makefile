# make demo | test | lint: each makes the virtual environment itself on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo demo-dpo test test-unit test-e2e test-gpu test-browser test-trackers lint docs format clean

help:  ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

# Made without ensurepip, which some systems leave out of python3; their own pip fills it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "veneer needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check -c constraints.txt pip -e '.[dev]'
	touch $@

demo: $(READY)  ## Fine-tune a real model on this machine and see that it got better (4 minutes on 2 cores)
	$(BIN)/veneer demo

demo-dpo: $(READY)  ## Go on from the demo's run with pairs of answers, and see its win rate (3 minutes on 2 cores)
	$(BIN)/veneer demo --dpo

test: test-unit test-e2e  ## All tests that need no GPU

test-unit: $(READY)  ## Unit tests, a process a core; a file in one process, which shares what its tests make
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n logical --dist loadfile

test-e2e: $(READY)  ## Whole commands on the real SmolLM2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e -n 2 --dist loadgroup

test-gpu: $(READY)  ## Tests that need a CUDA GPU
	$(BIN)/python -m pytest tests/gpu

test-browser: $(READY)  ## Pages in a real browser; needs a Chromium (apt-get install chromium)
	$(BIN)/python -m pytest tests/browser

# In an environment of their own: trackio asks for older libraries than constraints.txt has.
test-trackers:  ## Runs reported to W&B, trackio and MLflow through their real clients, offline
	$(PYTHON) -m venv --without-pip .venv-trackers
	$(PYTHON) -m pip --python .venv-trackers/bin/python install --quiet --disable-pip-version-check -e '.[wandb,trackio,mlflow]' pytest
	OMP_NUM_THREADS=1 .venv-trackers/bin/python -m pytest tests/trackers

lint: $(READY)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## Write docs/settings.md, docs/advice.md, docs/metrics.md and the tables of docs/memory.md from the code (a minute)
	$(BIN)/python -m tools.settings_page > docs/settings.md
	$(BIN)/python -m tools.advice_page > docs/advice.md
	$(BIN)/python -m tools.metrics_page > docs/metrics.md
	$(BIN)/python -m tools.memory_figure
	$(BIN)/python -m tools.memory_page

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
