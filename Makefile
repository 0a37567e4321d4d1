# Everything runs in .venv, made here from pinned versions (constraints.txt).
PYTHON ?= python3
PY := .venv/bin/python
# Modules are compiled when they are first imported: most of what the packages hold never is.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# A process on each core, a file's tests in one of them; they share compiled programs on disk.
PYTEST := $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: help ablation test test-fast test-large lint setup assets constraints clean

help:
	@echo "make ablation   set up, run a real rank ablation, write its report"
	@echo "make test       set up, run all tests"
	@echo "make test-fast  set up, run what tells most in three minutes"
	@echo "make test-large fetch weights of 500 MB, run the tests that need them"
	@echo "make lint       ruff and mypy"

ablation: .venv/ready assets
	@$(PY) -m experiments.ablation

test: .venv/ready-test assets
	@$(PYTEST) -m "not production"
	@$(PYTEST) -m production $$(grep -rl mark.production tests --include="test_*.py")

# Without what imports PEFT or compares whole models with PyTorch's.
test-fast: .venv/ready-test assets
	@$(PYTEST) -m "not production and not slow" --ignore=tests/interop --ignore=tests/models --ignore-glob="*peft*"

test-large: .venv/ready-test
	@$(PY) scripts/fetch_assets.py mpnet smollm2
	@$(PY) -m pytest tests/large --timeout=1800

lint: .venv/ready-lint
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy

setup: .venv/ready

assets: .venv/ready
	@$(PY) scripts/fetch_assets.py

.venv/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"error: Python {v.major}.{v.minor} is too old; lorax needs 3.11 or newer: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/ready: .venv/python pyproject.toml constraints.txt
	@echo "Installing pinned dependencies into .venv (a minute or two) ..."
	@$(PIP) -e .
	@touch $@

# PyTorch is the peer that the parity tests compare with. Its CPU wheel is a tenth of the default
# one; where the index of CPU wheels cannot be reached, the default index serves.
.venv/ready-test: .venv/ready
	@echo "Installing test dependencies (PyTorch's CPU wheel, transformers, peft) ..."
	@$(PIP) --retries 1 --timeout 20 --index-url $(TORCH_CPU) torch==2.13.0 2>/dev/null || $(PIP) torch==2.13.0
	@$(PIP) -e ".[test]"
	@touch $@

.venv/ready-lint: .venv/ready
	@$(PIP) -e ".[lint]"
	@touch $@

# The newest versions for every Python and platform: run, then `make test`. The packages that
# only PyTorch's CUDA build needs are left out, so that they do not bind JAX's.
constraints: .venv/python
	@$(PY) -m pip install --quiet uv
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-annotate --no-header \
	  --extra test --extra lint --extra hub --extra slurm pyproject.toml | \
	  grep -vE '^(nvidia-|cuda-|triton)' > constraints.partial && mv constraints.partial constraints.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
