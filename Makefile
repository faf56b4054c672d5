# `make distill` and `make test` are all the set-up there is: both make .venv where it is missing.
PYTHON ?= python3
# Any pip requirement or wheel; on machines without a GPU, a CPU build saves several GB.
TORCH ?= torch==2.13.0

BIN := .venv/bin
INSTALLED := .venv/.installed

BENCH := .venv-bench
# The peers that the benchmark compares with, in an environment of its own; torchdistill would bring torchvision.
PEERS := trl==1.16.0 nvidia-modelopt==0.47.0 sentence-transformers==6.2.0

.PHONY: distill test test-slow bench bench-gpu lint format types docs dist versions

distill: $(INSTALLED)
	$(BIN)/accelerate launch examples/distill_vit.py

# A process for each core, up to 4; a file stays with one of them, whose fixtures its tests share.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[export]"
	$(BIN)/python -m pytest -m slow

bench: $(BENCH)/.installed
	$(BENCH)/bin/python examples/benchmarks/step_time.py

# All that takes a GPU: its tests, then every measurement, with figures in outputs/gpu; what is compiled comes last.
GPU := outputs/gpu
GPU_SETTINGS := "the default" "states, last stone" "states, last two stones" "all stones" "hints"
bench-gpu: $(INSTALLED) $(BENCH)/.installed
	mkdir -p $(GPU)
	$(BIN)/python -m pytest tests/trainer/test_cuda.py
	$(BENCH)/bin/python examples/benchmarks/step_time.py --output $(GPU) --settings "plain KD" $(GPU_SETTINGS)
	$(BENCH)/bin/python examples/benchmarks/step_profile.py --output $(GPU)/step_profile.json
	$(BENCH)/bin/python examples/benchmarks/loss_memory.py --tokens 4096 --output $(GPU)/loss_memory.json
	$(BENCH)/bin/python examples/benchmarks/step_memory.py --output $(GPU)/step_memory.json
	$(BENCH)/bin/python examples/benchmarks/step_time.py --output $(GPU)/compiled --settings "plain KD" \
		"plain KD, compiled" "the default, compiled" "all stones, compiled"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A script of a person's sees the types of all our names, in pyright's strict mode.
types: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[types]"
	PATH="$(CURDIR)/$(BIN):$$PATH" pyright tests/typed_use.py

# A page for each module in build/docs; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	rm -rf build/docs
	$(BIN)/python -W error::UserWarning -m pdoc --docformat google --no-show-source --output-directory build/docs \
		hf_blockkd $(sort $(subst /,.,$(basename $(wildcard hf_blockkd/[a-z]*.py)) $(patsubst %/__init__.py,%,$(wildcard hf_blockkd/*/__init__.py))))

# Wheel and sdist in dist/, which are then installed and called where nothing of this folder is seen.
dist: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[dist]"
	rm -rf dist build/lib build/bdist.* build/clean
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet $(TORCH)
	build/clean/bin/python -m pip install --quiet dist/*.whl
	cd build && clean/bin/python -I -c "import hf_blockkd; print(hf_blockkd.__version__, hf_blockkd.__file__)"
	cd build && clean/bin/hf-blockkd --help

# A few tests with the oldest versions that pyproject.toml claims, and with the newest that it allows.
OLDEST := $(filter-out torch==%,$(shell sed -n '/^dependencies/,/^]/s/.*"\([a-z]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml))
VERSION_TESTS := tests/test_private_names.py tests/test_config.py tests/routing/test_entering.py \
	tests/trainer/test_saving.py tests/saving/test_model_card.py tests/ladder/test_caches.py
versions: versions-oldest versions-newest
versions-oldest: PINS = $(OLDEST)
versions-newest: PINS = --upgrade --upgrade-strategy eager
versions-%:
	test -x build/$@/bin/python || $(PYTHON) -m venv build/$@
	build/$@/bin/python -m pip install --quiet $(TORCH) --editable ".[examples]" pytest pytest-timeout $(PINS)
	build/$@/bin/python -m pytest -q $(VERSION_TESTS)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[examples,dev]"
	touch $(INSTALLED)

$(BENCH)/.installed: pyproject.toml
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet $(TORCH)
	$(BENCH)/bin/python -m pip install --quiet --editable ".[examples]" $(PEERS)
	$(BENCH)/bin/python -m pip install --quiet --no-deps torchdistill==1.1.5
	touch $(BENCH)/.installed
