# Two commands matter: `make demo` and `make test`. Both do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one worker for each core, no more than memory allows: a worker holds torch and a few small models.
# A worker that has nothing left takes tests from another, so one long proof keeps no core waiting
WORKERS := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all docs check format clean

demo: $(STAMP)
	$(BIN)/linspec demo

test: $(STAMP) check
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(STAMP) check
	$(BIN)/python -m pytest $(WORKERS)

# not --quiet: mkdocs then counts no warnings, and --strict lets broken links pass
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,data,docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
