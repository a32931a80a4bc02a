# Each target does all of its own set-up: a virtual environment with pinned packages, and this package in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-all lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

train: $(VENV)/.installed
	$(BIN)/offrl data build offrl/walker2d-mixed-v0 --rows 200000
	$(BIN)/offrl train td3bc offrl/walker2d-mixed-v0 --steps 50000 --eval-every 5000

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs
