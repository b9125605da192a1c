PYTHON ?= python3
BIN := .venv/bin

# One process of pytest for each core, at most four.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20 --durations-min 0.5

.PHONY: demo claims test test-all check clean

demo: .venv/installed
	$(BIN)/timemix demo

# DATA: a folder with the texts that benchmarks/claims.py names. Stopped, it goes on where it was.
claims: .venv/installed
	$(BIN)/python benchmarks/claims.py --data $(or $(DATA),../shared/data)

# The fast tier: minutes on two cores.
test: check
	$(PYTEST) -m 'not slow'

# What `make test` leaves out: slow tests, and properties again with all their examples.
test-all: .venv/installed-dev
	TIMEMIX_TESTS=all $(PYTEST) -m 'slow or hypothesis'

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
