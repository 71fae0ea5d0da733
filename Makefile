# `make train` and `make test` are all that is needed on a fresh machine. make prints each command before it runs it:
# they are plain, and can be typed in any environment instead.

PYTHON ?= python3
VENV ?= .venv
# Options for train.py: make train ARGS="-x 200"
ARGS ?=
TEST_EXTRAS ?= test,demo,data,gpt2,mpi
# The extra for this machine's GPU, cuda12 or cuda13; empty without one. make train CUDA_EXTRA= does without it.
CUDA_EXTRA := $(shell $(PYTHON) -m engine.doctor --extra 2>/dev/null)

CUDA_SOURCES = kernels_cu/*.cu kernels_cu/*.cuh tests/shim/*.h tests/shim/*.cuh

.PHONY: train test lint format bench clean

train: $(VENV)/demo$(CUDA_EXTRA:%=-%)
	$(VENV)/bin/python train.py $(ARGS)

test: $(VENV)/test$(CUDA_EXTRA:%=-%)
	$(VENV)/bin/python -m pytest

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CUDA_SOURCES)

format: $(VENV)/dev
	$(VENV)/bin/clang-format -i $(CUDA_SOURCES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/demo$(CUDA_EXTRA:%=-%)
	$(VENV)/bin/python bench/cpu.py

clean:
	rm -rf $(VENV) build *.egg-info

# One empty file in the virtual environment for each set of extras that is installed, such as demo or demo-cuda13.
$(VENV)/demo$(CUDA_EXTRA:%=-%): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e ".[demo$(CUDA_EXTRA:%=,%)]"
	@touch $@

$(VENV)/test$(CUDA_EXTRA:%=-%): pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e ".[$(TEST_EXTRAS)$(CUDA_EXTRA:%=,%)]"
	@touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Backhand needs Python 3.10 or later: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
