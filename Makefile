# `make` alone lists the targets, each by the comment beside it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
# Memory in huge pages, as the command asks for by itself (docs/speed.md): here for tests.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Hundreds of processes import the package: each would compile it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo demo-long test test-slow soak lint corpus tasks clean
.DEFAULT_GOAL = help

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## install the package and what its tests need into .venv

$(VENV)/.ready: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "Python 3.11 or newer is needed; say which with make PYTHON=..." >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup ## the whole path on the embedded corpus (minutes)
	$(BIN)/gamayun demo

demo-long: setup ## the demo with eight times as many tokens (under an hour on 2 cores)
	$(BIN)/gamayun demo --long 8 --workdir runs/demo-long

test: setup ## the tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: setup ## the tests that take many seconds or minutes each
	$(BIN)/python -m pytest -q -m slow -n auto --dist worksteal

soak: setup ## kill the corpus build, training and the report 120 times
	$(BIN)/python tests/faults/soak.py --kills 120

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

corpus: setup ## rebuild the embedded corpus from packages (needs apt-get, dpkg-deb, npm)
	$(BIN)/python -m recipes.demo_data.debian sample gamayun_jax/demo_corpus --work build/debian

# After the corpus: no item may be in its training files.
tasks: setup ## rebuild the embedded tasks, after the corpus
	$(BIN)/gamayun tasks build --out gamayun_jax/demo_tasks --work build/debian --embedded

clean: ## remove .venv, build and runs
	rm -rf $(VENV) build runs
