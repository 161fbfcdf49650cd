# make demo: the main job on the sample; make test: the tests; make check: lint, format, types.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# another index for torch, e.g. TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_FLAGS ?=
# two processes, each with one thread; the tests of a file share what is slow to make
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
# more arguments for `nuclei3d run`, e.g. DEMO_ARGS="--set train.epochs=1"
DEMO_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := true

.PHONY: demo test check format clean help

help:
	@head -1 Makefile

.venv/installed: pyproject.toml requirements.lock
	@echo "Installing into .venv (the first time this takes some minutes) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q $(TORCH_FLAGS) torch==2.13.0
	$(PIP) install -q -c requirements.lock -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install -q -c requirements.lock -e ".[dev,slurm,dashboard,view]"
	touch $@

demo: .venv/installed
	$(BIN)/dvc pull -q data.dvc $(wildcard models/nuclei_3d.dvc)
	$(BIN)/nuclei3d run --data data --out out $(DEMO_ARGS)

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out runs slices predictions baselines evaluation
