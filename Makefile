# Two commands do everything on a machine that has Python 3.11 to 3.13 and make:
#   make train   installs into .venv and runs `epctl train --ep 4 --zero 3 --optim muon`
#   make test    installs into .venv and runs lint, types and tests
# A second run installs nothing: .venv/.installed is newer than its inputs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' $(CONSTRAINTS))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
PYTEST_ARGS ?=
# Processes that share the test files; each may start up to four gloo ranks of its own.
WORKERS ?= 2

.PHONY: train test lint types pytest install clean

train: install
	$(BIN)/epctl train --ep 4 --zero 3 --optim muon

test: lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

pytest: install
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

install: $(VENV)/.installed

# torch goes first: DeepSpeed's build looks for it. No compiler is needed on the CPU path.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"epctl needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; use make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; about two minutes and 2 GB)" >&2
	@$(PIP) install -c $(CONSTRAINTS) "$(TORCH)" "setuptools<82" wheel
	@$(PIP) install -c $(CONSTRAINTS) --editable ".[train,dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
