# Everything runs in a virtual environment of its own; needs a supported Python with pip, make and git.

SUPPORTED := 3.11, 3.12, 3.13 and 3.14
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
# The newest supported Python on the path; make PYTHON=... takes another.
ifndef PYTHON
PYTHON := $(shell for python in python3.14 python3.13 python3.12 python3.11; do \
  $$python -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$python && exit; done; echo python3)
endif
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready-$(VERSION)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
UV := .venv-uv/bin/uv
LOCK := $(UV) pip compile setup.cfg --extra=test --extra=docs --universal --python-version=3.11 \
  --generate-hashes --no-emit-index-url --quiet --custom-compile-command='make lock' --output-file=requirements.txt
# A worker that crashes ends the run: with a new worker in its place, pytest-xdist can wait forever.
XDIST := --numprocesses=auto --dist=loadfile --max-worker-restart=0
FAST_TESTS := -m "not long and not slow" $(XDIST) tests
ALL_TESTS := -m "not slow" $(XDIST) tests se_vae
WORKDIR ?= runs/figure1
RESULTS_FLAGS = $(if $(ROWS),--rows=$(ROWS)) $(if $(DATA),--data_dir=$(DATA))

.PHONY: figure1 test test-all results results-check cheap-result notebook docs check lint types soak mutants lowest newest lock upgrade format python clean

figure1: $(READY)  ## The paper's Figure 1 on the embedded digits, into $(WORKDIR).
	$(BIN)/python -m experiments.figure1 --workdir=$(WORKDIR)

test: $(READY)  ## The fast tests: every formula, every attack, and training and probing end to end.
	$(BIN)/python -m pytest $(FAST_TESTS)

test-all: $(READY)  ## The long tests too: every binary, interruptions, many processes, the examples of docs.
	$(BIN)/python -m pytest $(ALL_TESTS)

soak: $(READY)  ## The slow tests (kills, full disks, 10,000 fuzzed inputs of each kind), ROUNDS=1 times.
	$(BIN)/python -m tests.tools.soak --rounds=$(or $(ROUNDS),1)

results: $(READY)  ## Builds what is missing of ROWS=a,b (all if not given), with the MNIST files in DATA.
	$(BIN)/python -m experiments.results build $(RESULTS_FLAGS)

results-check: $(READY)  ## Builds ROWS anew in another directory, and compares with what is expected.
	$(BIN)/python -m experiments.results check $(RESULTS_FLAGS) $(if $(SEEDS),--seeds=$(SEEDS))

cheap-result: $(READY)  ## A row of the results that takes a minute, built anew.
	rm -rf build/results_check
	$(BIN)/python -m experiments.results check --rows=embedded_smoothed --workdir=build/results_check

notebook: $(READY)  ## Runs the notebook from top to bottom.
	$(BIN)/python -m pytest tests/test_notebook.py

docs: $(READY)  ## The documentation site, into build/docs; a warning is an error. Needs no network.
	$(BIN)/python -m sphinx --builder=html --nitpicky --fail-on-warning --keep-going --quiet docs build/docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

check: lint types docs notebook cheap-result test-all  ## What continuous integration runs.

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mutants: $(READY)  ## Changes of the mathematics that no test notices, of FILES="objectives attacks" (all if not given).
	$(PIP) install cosmic-ray==8.7.0
	$(BIN)/python -m tests.tools.mutants $(FILES)

# uv compiles modules only if it is told to. When tests import them, a warning of the compiler fails.
lowest: $(UV)  ## The tests with the lowest versions that setup.cfg allows: make lowest PYTHON=python3.11.
	$(PYTHON) -m venv --clear .venv-lowest
	$(UV) pip install --quiet --compile-bytecode --python=.venv-lowest --resolution=lowest-direct --editable '.[test]'
	.venv-lowest/bin/python -m pytest $(ALL_TESTS)

# An override drops the extras that others ask of a package, so packages with extras keep their bound.
newest: $(UV)  ## The tests with the newest versions there are, beyond what setup.cfg allows.
	$(PYTHON) -m venv --clear .venv-unbound
	sed -nE 's/^    ([^ []+ >=[0-9.]+), <[0-9.]+$$/\1/p' setup.cfg > .venv-unbound/lower_bounds.txt
	$(UV) pip install --quiet --compile-bytecode --python=.venv-unbound --override=.venv-unbound/lower_bounds.txt --editable '.[test]'
	.venv-unbound/bin/python -m pytest $(ALL_TESTS)

lock: $(UV)  ## Writes requirements.txt from setup.cfg, and keeps the versions that still fit.
	$(LOCK)

upgrade: $(UV)  ## The same with the versions that setup.cfg allows.
	$(LOCK) --upgrade

python:  ## Says which Python make would take.
	@echo $(PYTHON)

# Installed once for each Python, requirements.txt and setup.cfg; a broken installation leaves no mark.
$(READY): requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c '$(IS_SUPPORTED)' 2>/dev/null || { echo "error: $(PYTHON) is" \
	  "$(if $(VERSION),Python $(VERSION),not a Python that runs); se_vae supports Python $(SUPPORTED):" \
	  "name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --require-hashes --requirement requirements.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv

clean:
	rm -rf .venv .venv-uv .venv-lowest build dist *.egg-info
