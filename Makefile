# make demo: set up, then the whole path on the embedded corpus (minutes)
# make test: set up, then the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo demo-long test test-slow soak lint corpus tasks clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "Python 3.11 or newer is needed; say which with make PYTHON=..." >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/gamayun demo

# The same config, eight times as many tokens: under an hour on 2 cores.
demo-long: setup
	$(BIN)/gamayun demo --long 8 --workdir runs/demo-long

test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

# Kill the corpus build, training and the report at least a hundred times.
soak: setup
	$(BIN)/python tests/faults/soak.py --kills 120

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rebuild the embedded corpus from public packages (needs apt-get, dpkg-deb, npm).
corpus: setup
	$(BIN)/python -m recipes.demo_data.debian sample gamayun_jax/demo_corpus --work build/debian

# Rebuild the embedded tasks, after the corpus: no item may be in its training files.
tasks: setup
	$(BIN)/gamayun tasks build --out gamayun_jax/demo_tasks --work build/debian --embedded

clean:
	rm -rf $(VENV) build runs
