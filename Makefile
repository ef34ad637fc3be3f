# Every target makes what it needs: .venv is created and filled on first use (see `make help`).
PYTHON ?= python3
JOBS ?= 2
SHELL := /bin/bash

VENV := .venv
# `make TARGET PY=python3` uses a Python that has everything already, and installs nothing.
ifdef PY
  export PYTHONPATH := .:kernels
  INSTALLED_DEMO :=
  INSTALLED_DEV :=
  INSTALLED_DOCS :=
else
  PY := $(VENV)/bin/python
  INSTALLED_DEMO := $(VENV)/.installed-demo
  INSTALLED_DEV := $(VENV)/.installed-dev
  INSTALLED_DOCS := $(VENV)/.installed-docs
endif

# Constraints hold for what is installed and for what builds it; without them torch may come in a build of gigabytes.
# pip before 25.3 takes PIP_CONSTRAINT for isolated builds, later ones PIP_BUILD_CONSTRAINT.
CONSTRAINTS := constraints-dev.txt
PIP_INSTALL := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-ordinary test-interpreter check format compat offline bench gpu clean distclean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED_DEMO) ## Train the vowels recipe on real data
	$(PY) -m fastrnn vowels $(ARGS)

test: test-interpreter test-ordinary ## Run all tests that need no GPU

# One thread per worker: the workers share the cores.
test-ordinary: $(INSTALLED_DEV) ## Run the tests that need no GPU and no Triton interpreter
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) -m "not gpu and not interpreter" $(ARGS)

# TRITON_INTERPRET is read when triton is imported, so these have processes of their own. pytest's 5: no test was found.
test-interpreter: $(INSTALLED_DEV) ## Run the Triton kernels' tests on the CPU
	@if grep -rqE 'mark\.interpreter' tests --include='*.py'; then \
	  echo "TRITON_INTERPRET=1 pytest -m interpreter"; \
	  OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -n $(JOBS) -m "interpreter and not gpu" $(ARGS) \
	    || [ $$? -eq 5 ]; \
	fi

check: $(INSTALLED_DEV) ## Lint, check the format and the types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED_DEV) ## Format, and mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

TORCH ?= 2.15.0
compat: ## Run all tests that need no GPU with torch TORCH (and triton TRITON), installed for this run alone
	PYTHON=$(PYTHON) JOBS=$(JOBS) .ci/compat $(TORCH) $(TRITON)

offline: $(INSTALLED_DEV) ## Compile every kind of kernel for four chips, and compare with the snapshots
	OMP_NUM_THREADS=1 $(PY) -m fastrnn_kernels.offline --jobs $(JOBS) --check kernels/offline_kinds.txt
	OMP_NUM_THREADS=1 $(PY) -m fastrnn_kernels.offline_norm --jobs $(JOBS) --check kernels/offline_norm.txt

bench: $(INSTALLED_DEV) ## Measure what this machine can: the CPU, and the GPU if there is one
	$(PY) -m bench cpu $(ARGS)
	$(PY) -m bench clip --device cpu
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PY) -m bench lstm && $(PY) -m bench clip --device cuda; \
	fi

OUT ?= runs/gpu
BUDGET ?= 540
gpu: $(INSTALLED_DEV) ## On a CUDA machine: the GPU's tests and benchmarks, within BUDGET seconds, into OUT
	$(PY) -m bench gpu --out $(OUT) --budget $(BUDGET) $(ARGS)

.PHONY: docs dist
docs: $(INSTALLED_DOCS) ## Build the site into site/; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

# The wheel is proved where the checkout cannot help it: in an environment of its own, from another folder.
dist: $(VENV)/bin/python ## Build wheel and sdist into dist/, check them, and train the demo from the wheel
	$(PIP_INSTALL) build twine
	rm -rf dist build
	PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
	set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	  $(PYTHON) -m venv "$$away/venv"; \
	  PIP_DISABLE_PIP_VERSION_CHECK=1 "$$away/venv/bin/python" -m pip install --quiet $(DIST_PIP_ARGS) \
	    "$$(ls $(CURDIR)/dist/*.whl)[demo]"; \
	  cd "$$away"; "$$away/venv/bin/python" -m fastrnn vowels --epochs 2; \
	  "$$away/venv/bin/python" -m fastrnn check

clean: ## Remove builds and caches
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

# dev includes demo.
$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed-demo
