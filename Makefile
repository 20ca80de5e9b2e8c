# Everything runs in a virtual environment of its own; needs Python 3.11 with pip, make and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
WORKDIR ?= runs/figure1

.PHONY: figure1 test notebook check lint types soak format clean

figure1: $(READY)  ## The paper's Figure 1 on the embedded digits, into $(WORKDIR).
	$(BIN)/python -m experiments.figure1 --workdir=$(WORKDIR)

test: $(READY)  ## All tests but the slow ones.
	$(BIN)/python -m pytest -m "not slow" --numprocesses=auto --dist=loadfile tests se_vae

soak: $(READY)  ## The slow tests: kills, full disks, 10,000 fuzzed inputs of each kind.
	$(BIN)/python -m pytest -m slow tests
	SE_VAE_FUZZ=10000 $(BIN)/python -m pytest tests/test_fuzz.py

notebook: $(READY)  ## Runs the notebook from top to bottom.
	$(BIN)/python -m pytest tests/test_notebook.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types notebook test  ## What continuous integration runs.

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installed once for each requirements.txt and setup.cfg; a broken installation leaves no mark.
$(READY): requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo 'error: $(PYTHON) is not Python 3.11; say which one is with make PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
