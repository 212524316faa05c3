# Two commands do everything on a fresh machine:
#   make quickstart   trains a policy on the built-in LVLM and writes runs/quickstart/report.html
#   make test         runs the tests
# Both create .venv and install what they need if that is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TASK ?= crowded
ARGS ?=
# Test files run in so many processes; a file stays whole, because its tests share a cluster or a model.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# Two cores: leave one thread to each process, ray and torch fight for them otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: install quickstart test test-all check lint types clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/tprl quickstart --task $(TASK) $(ARGS)

test: install
	$(PYTEST) $(ARGS)

test-all: install
	$(PYTEST) -m "not gpu and not netns" $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist *.egg-info
