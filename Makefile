# `make distill` and `make test` are all the set-up there is: both make .venv where it is missing.
PYTHON ?= python3
# Any pip requirement or wheel; on machines without a GPU, a CPU build saves several GB.
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: distill test test-slow lint format

distill: $(INSTALLED)
	$(BIN)/accelerate launch examples/distill_vit.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[examples,dev]"
	touch $(INSTALLED)
