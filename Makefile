# make reproduce | test | book | bench | lint | clean
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One place for all results; `make clean` removes it.
export CAPSAE_HOME ?= $(CURDIR)/.capsae

.PHONY: reproduce test book bench lint clean env

reproduce: env  ## execute every notebook on the embedded profiles, then build the book
	$(BIN)/capsae reproduce --all

test: env
	$(BIN)/python -m pytest

book: env  ## render the committed runs only
	$(BIN)/jupyter-book build -W -n --keep-going book/

bench: env
	$(BIN)/python -m benchmarks.sae_training
	$(BIN)/python -m benchmarks.extraction

lint: env
	$(BIN)/ruff check .

clean:
	rm -rf .capsae _build build

env: $(VENV)/.installed

# editable_mode=compat: a plain path, so that `import capsae` works from the folder above a clone named capsae, too.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("capsae needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[book,test]' --config-settings editable_mode=compat
	touch $@
