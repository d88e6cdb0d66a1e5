# Every target that needs the virtual environment makes it first, so that `make demo` and `make test` are all that a
# fresh clone needs. Other Python: make PYTHON=python3.12 test. Other place: make VENV=/tmp/venv test.

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVING := $(VENV)/.installed-serving
CODE := salmonn_hf training eval tests model_cards/make_card.py

.DEFAULT_GOAL := help
.PHONY: help install quality style test test-all test-slow test-contract demo clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create the virtual environment and install the package with all development tools.

# torch goes first: nothing installed later may then choose another build of it.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(SERVING): $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,serving]'
	touch $@

quality: $(STAMP) ## Check style and formatting.
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

style: $(STAMP) ## Fix style and formatting in place.
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Two workers of one thread each: the tests' models are too small to share a matrix product out over cores.
test: $(STAMP) ## Run the quick tests: minutes. What was skipped is listed with the reason, here and below.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: $(SERVING) test-contract ## Run every test, those too that take minutes or download models.
	$(BIN)/python -m pytest -q -m ''

test-slow: $(SERVING) ## Run what `test-all` adds to `test`.
	$(BIN)/python -m pytest -q -m slow

test-contract: $(STAMP) ## Run transformers' own tests of a model and a processor, out of its source archive, on ours.
	$(BIN)/python tests/contract/archive.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m '' tests/contract

demo: $(STAMP) ## Transcribe the recordings that ship with the project, or one file: make demo AUDIO=file.wav
	$(BIN)/python eval/demo.py $(AUDIO)

clean: ## Remove caches and build products; the virtual environment stays.
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find $(CODE) -type d -name __pycache__ -prune -exec rm -rf {} +
