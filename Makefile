PYTHON ?= python3
BIN := .venv/bin

# One process of pytest for each core, at most four.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations 20 --durations-min 0.5

.PHONY: demo claims family test test-all check docs clean

demo: .venv/installed
	$(BIN)/timemix demo

# DATA: a folder with the texts that benchmarks/claims.py names. An interrupted run resumes.
claims: .venv/installed
	$(BIN)/python benchmarks/claims.py --data $(or $(DATA),$(error give the folder of the texts: make claims DATA=FOLDER))

# As `make claims`, for benchmarks/family.py. It trains only the runs without a file in benchmarks/family/.
family: .venv/installed
	$(BIN)/python benchmarks/family.py --data $(or $(DATA),$(error give the folder of the texts: make family DATA=FOLDER))

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
	$(BIN)/python tools/words.py

# The site, in site/: pages, reference, search. It needs no network, to build or to read.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/installed-docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .hypothesis
