# `make demo` makes a reasoning model on two CPU cores; `make test` proves the code. Both may be run again at any time.
#
# A GPU machine takes another torch build:   make install TORCH=cu130
# (any build that https://download.pytorch.org/whl/ lists; `make clean` first if .venv already has another one)
# Another Python:                            make install PYTHON=python3.13

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

TORCH ?= cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/$(TORCH)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
# The macOS wheels carry no build name.
TORCH_BUILD := $(if $(filter Darwin,$(shell uname -s)),,+$(TORCH))

# The first Python on the path that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# pip would compile twenty thousand files on one core; compileall takes all of them, and passes over what is no Python.
PIP := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
BYTECODE := $(BIN)/python -m compileall -qq -j 0

# Tests run one thread each, one more at once than there are cores (a third of the time they wait), up to five:
#   make test PYTEST_ARGS="-m 'not slow'"
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n > 4 ? 5 : n + 1 )))
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help demo demo-fast test crash fuzz bench check docs install install-dev clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: install ## Install, make a small reasoning model, the whole chain (10 minutes on two cores), say how to chat with it
	@$(BIN)/tafkir run recipes/wordmath-tiny.toml

demo-fast: install ## The same with each stage shortened (4 minutes): how it goes, not what it can do
	@$(BIN)/tafkir run recipes/wordmath-tiny.toml recipes/fragments/fast.toml --name demo-fast

test: install-dev ## Install, run the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

crash: install-dev ## Kill every command at random moments, fill its disk, turn its clock: what it leaves is the same
	@OMP_NUM_THREADS=1 TAFKIR_KERNELS=torch PYTHONPATH=src:. $(BIN)/python -m tests.crash.driver --out benchmarks/results/crash.json

fuzz: install-dev ## A hundred thousand broken inputs to every reader, grader and request parser
	@OMP_NUM_THREADS=1 PYTHONPATH=src:. $(BIN)/python -m tests.fuzz.driver --out benchmarks/results/fuzz.json

bench: install-dev ## Measure every figure again, beside peers where they are named (an hour, nothing else running)
	@PYTHONPATH=src $(BIN)/python benchmarks/run_all.py $(BENCH_ARGS)

check: install-dev ## Lint, formatting, types, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/write_sizes.py --check

docs: install-dev ## Build the docs site into site/: offline, links checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet && echo "site/index.html"

install: $(STAMPS)/native ## Create .venv with what Tafkir needs to run; compile its kernels if there is a compiler

install-dev: $(STAMPS)/dev $(STAMPS)/native ## Create .venv with what the tests need as well

clean: ## Remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer found. Fix: install one, then say which: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), Tafkir needs 3.11 or newer. Fix: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@echo "Creating $(VENV) with $$($(PYTHON) -V 2>&1)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch-$(TORCH): $(STAMPS)/venv constraints.txt
	@echo "Installing torch $(TORCH_VERSION)$(TORCH_BUILD) into $(VENV) ..."
	@# A machine whose own package sources hold this build is not sent elsewhere.
	@$(PIP) "torch==$(TORCH_VERSION)$(TORCH_BUILD)" 2>/dev/null || \
		$(PIP) --extra-index-url $(TORCH_INDEX) "torch==$(TORCH_VERSION)$(TORCH_BUILD)"
	@touch $@

$(STAMPS)/runtime: $(STAMPS)/torch-$(TORCH) pyproject.toml constraints.txt
	@echo "Installing Tafkir and what it needs to run into $(VENV) ..."
	@$(PIP) -e .
	@$(BYTECODE) $(VENV)/lib || true
	@touch $@

$(STAMPS)/native: $(STAMPS)/runtime $(wildcard src/tafkir/native/*)
	@$(BIN)/python -m tafkir.native.build --optional
	@touch $@

$(STAMPS)/dev: $(STAMPS)/runtime
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@$(BYTECODE) $(VENV)/lib || true
	@touch $@
