# make demo    see fastship work on this machine (makes its own .venv first)
# make test    all tests that need nothing but PyPI
# make check   formatting, lints, types, layers
# make crash   every fault that the tests of tests/crash know, into docs/reliability.md (FASTSHIP_FAULTS=0.1: a tenth;
#              FASTSHIP_SOAK_S=3600: an hour of the long run)
# make bench   benchmarks of this checkout, on this machine
# make bench-peers   fastship beside other programs, into docs/benchmarks.md (needs nginx: see bench/README.md)
#
# PYTHON=python3.12 make ... chooses the interpreter for .venv (3.11 or newer, Linux).

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check crash bench bench-peers
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo-ready
	$(BIN)/fastship demo

# Three at a time: half of their time is waiting. No bytecode: a test that limits the size of files would spoil it.
test: export PYTHONDONTWRITEBYTECODE = 1
test: $(VENV)/.dev-ready
	$(BIN)/pytest -n 3 --dist worksteal

check: $(VENV)/.dev-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

crash: export PYTHONDONTWRITEBYTECODE = 1
crash: export FASTSHIP_FAULTS ?= 1
crash: export FASTSHIP_COUNTS ?= $(CURDIR)/.counts
crash: $(VENV)/.dev-ready
	rm -rf "$(FASTSHIP_COUNTS)"
	$(BIN)/pytest -n 3 --dist worksteal tests/crash
	@[ "$(FASTSHIP_FAULTS)" != 1 ] || $(BIN)/python tests/injection/report.py "$(FASTSHIP_COUNTS)" docs/reliability.md

bench: $(VENV)/.dev-ready
	$(BIN)/pytest bench -o python_files='bench_*.py' --benchmark-only

bench-peers: $(VENV)/.dev-ready
	$(BIN)/python -m bench.peers --write docs/benchmarks.md

# Editable, so that only a change of pyproject.toml asks for another installation.
$(VENV)/.demo-ready: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[receiver]'
	@touch $@

$(VENV)/.dev-ready: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[dev]'
	@touch $@ $(VENV)/.demo-ready

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "fastship needs Python 3.11 or newer and found none; say PYTHON=/path/to/python make ..." >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fastship needs Python 3.11 or newer; $(PYTHON) is older or does not run" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
