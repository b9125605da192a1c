PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo claims test test-slow check clean

demo: .venv/installed
	$(BIN)/timemix demo

# DATA: a folder with the texts that benchmarks/claims.py names. Stopped, it goes on where it was.
claims: .venv/installed
	$(BIN)/python benchmarks/claims.py --data $(or $(DATA),../shared/data)

test: check
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: .venv/installed-dev
	$(BIN)/pytest -m slow

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
