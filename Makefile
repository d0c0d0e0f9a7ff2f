# Two commands matter: `make demo` and `make test`. Each creates .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
OUT ?= runs/demo
SOURCES := workbench kernels tests data notebooks

# File by file, in order: the longest lie first. The default would start files of a single test last, however long.
SPREAD := --dist loadfile --no-loadscope-reorder

TRITONS := $(VENV)/tritons
OLD_TRITON := 3.6.0

.PHONY: help demo test slow browser lab notebooks docs check kernels kernels-aot format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     run the main job on the bundled model; prints where the report is (OUT=DIR: not in runs/demo)"
	@echo "make test     the fast tests"
	@echo "make slow     the slow tests (full-width parity, memory, notebooks, ...)"
	@echo "make browser  the tests that open the report, the explorer and the notebooks in headless chromium"
	@echo "make lab      JupyterLab on notebooks/"
	@echo "make notebooks  run every notebook and write its outputs back"
	@echo "make docs     the documentation as a site that opens offline: build/site/index.html"
	@echo "make check    ruff, format, import rules, types"
	@echo "make kernels  the Triton kernels with the oldest triton that is supported: interpreted, then compiled"
	@echo "make kernels-aot  compile what kernels/tools/aot.csv lacks of every configuration and architecture, and record it"

# A stamp per set of extras: installed once, again when what is to be installed changes.
$(VENV)/created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found. Install Python 3.11 or 3.12, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON): expected Python 3.11 or newer, got $$($(PYTHON) -V). Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/base: $(VENV)/created pyproject.toml constraints.txt
	@echo "installing the workbench into $(VENV)"
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@echo "installing what the tests need"
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/notebooks: $(VENV)/base
	$(PIP) install -c constraints.txt -e '.[notebooks]'
	@touch $@

$(VENV)/docs: $(VENV)/base
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/base
	$(BIN)/workbench study --out $(OUT)

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 $(SPREAD) -m "not slow and not browser and not gpu"

slow: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 $(SPREAD) --durations 12 -m "slow and not gpu"

browser: $(VENV)/dev
	@sh .ci/install-chromium
	$(BIN)/python -m pytest -n logical --maxprocesses 2 $(SPREAD) -m browser $(TESTS)

lab: $(VENV)/notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

# Two at a time; each in a temporary folder. tests/notebooks/ says what a committed notebook must be.
notebooks: $(VENV)/dev
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/docs
	DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet
	@echo build/site/index.html

check: $(VENV)/dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy

# The release that torch is paired with is in constraints.txt and runs in `make test`; this is the other one.
$(TRITONS)/$(OLD_TRITON): $(VENV)/dev
	$(PIP) install --no-deps --target $@ triton==$(OLD_TRITON)
	@touch $@

kernels: $(TRITONS)/$(OLD_TRITON)
	PYTHONPATH=$(TRITONS)/$(OLD_TRITON) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 $(SPREAD) -m "not slow" tests/kernels/interpreted
	PYTHONPATH=$(TRITONS)/$(OLD_TRITON) $(BIN)/python kernels/tools/aot_check.py --no-ledger --arch sm_90 --formats bfloat16/16 --jobs 2

kernels-aot: $(VENV)/dev
	$(BIN)/python kernels/tools/aot_check.py --record --jobs 2

format: $(VENV)/dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
