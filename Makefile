# make demo: from nothing to a report.  make test: what CI runs.  make test-all: the same, with more examples and longer runs.
# make docs: the documentation as a site, in site/.  make docs-serve: the same, at http://127.0.0.1:8001, following changes.
# TORCH_INDEX: another package index for torch alone, e.g. the one with CPU wheels that PyTorch's install page names.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: demo test test-all proof bench docs docs-serve clean

demo: .venv/installed
	$(BIN)/transfusion demo --out runs/digits

# Bytecode is written even if the environment disables it: otherwise each of the many processes of the tests compiles again.
test: PROFILE ?= quick
test: .venv/installed-dev
	$(BIN)/ruff check .
	TEST_PROFILE=$(PROFILE) PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-all:
	$(MAKE) test PROFILE=all

# The runs `digits` and `shapes`, each about ten minutes on two cores, with their evaluation and reports.
proof: demo
	$(BIN)/transfusion train shapes --out runs/shapes
	$(BIN)/transfusion evaluate runs/shapes
	$(BIN)/transfusion report runs/shapes

# Speed; `python -m benchmarks --compare` adds transfusion-pytorch on the same work.
bench: .venv/installed
	$(BIN)/python -m benchmarks

# Strict: a broken link or reference fails. REPOSITORY_URL: where links to source files go; without it they are plain text.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv runs out site .cache
