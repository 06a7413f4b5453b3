# Two commands matter: `make demo` and `make test`. Both do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILT := $(VENV)/.built
KERNELS := setup.py $(wildcard src/linspec/kernels/cpu/csrc/*)
# one worker for each core, no more than memory allows: a worker holds torch and a few small models.
# A worker that has nothing left takes tests from another, so one long proof keeps no core waiting
WORKERS := -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all docs check format clean

demo: $(BUILT)
	$(BIN)/linspec demo

test: $(BUILT) check
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: $(BUILT) check
	$(BIN)/python -m pytest $(WORKERS)

# not --quiet: mkdocs then counts no warnings, and --strict lets broken links pass
docs: $(BUILT)
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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,data,docs,serve,otel]'
	touch $@ $(BUILT)

# kernels that changed after the installation, such as by a `git pull`
$(BUILT): $(KERNELS) | $(STAMP)
	@test -e $@ -a -z "$$(find $(KERNELS) -newer $@)" || $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
