# Every chore has one word here, and CI uses the same words.
# All paths are relative, so that a space in the name of the directory does no harm.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help venv install demo test check bench clean

# The first of these that is new enough; `make PYTHON=/path/to/python3.12 ...` overrides it.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$name" -c "$(NEW_ENOUGH)" >/dev/null 2>&1 && { echo "$$name"; exit; }; done; echo python3)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt

help:
	@echo "make demo     fit the demo model into 160 MB, compare it with the original, and ask it something"
	@echo "make test     install what is needed and run the tests"
	@echo "make check    ruff and mypy"
	@echo "make bench    the benchmarks, each ending in one line of JSON"
	@echo "make install  a virtual environment in .venv with packlight and its development tools"
	@echo "make clean    remove what was built; .venv stays"

venv: .venv/.made

.venv/.made:
	@"$(PYTHON)" -c "$(NEW_ENOUGH)" 2>/dev/null || { \
		echo "packlight needs Python 3.11 or newer, and '$(PYTHON)' is" \
			"$$("$(PYTHON)" --version 2>/dev/null || echo 'not there'): use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "making .venv with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv .venv
	@touch $@

install: .venv/.installed

# torch first and alone: it is the large one, and the constraints decide which build of it everything else finds.
.venv/.installed: .venv/.made pyproject.toml constraints.txt
	@echo "installing torch and packlight into .venv (a few minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

demo: install
	@$(BIN)/packlight demo

test: install
	@$(BIN)/python -m pytest -m "not slow and not gpu and not peer"

check: install
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

bench: install
	@for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python "$$file" || exit; done

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
