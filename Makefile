# make reproduce | reproduce-all | test | book | pdf | zoo | bench | lint | clean
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
CHROMIUM ?= chromium
# One place for all results; `make clean` removes it.
export CAPSAE_HOME ?= $(CURDIR)/.capsae

.PHONY: reproduce reproduce-all test book pdf zoo bench lint clean env

reproduce: env  ## execute the main story (notebooks 01 to 06), build the book, compare every number with the published one
	$(BIN)/capsae reproduce --main --all
	$(BIN)/capsae verify

reproduce-all: env  ## the same with every notebook
	$(BIN)/capsae reproduce --all
	$(BIN)/capsae verify

test: env
	$(BIN)/python -m pytest

book: env  ## render the committed runs only
	$(BIN)/jupyter-book build -W -n --keep-going book/

pdf: book  ## the main pages (_toc_pdf.yml) as _build/html/book.pdf, printed by Chromium
	$(BIN)/jupyter-book build --builder custom --custom-builder singlehtml --toc $(CURDIR)/_toc_pdf.yml --path-output build/pdf book/
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --no-pdf-header-footer --print-to-pdf=_build/html/book.pdf build/pdf/_build/singlehtml/intro.html

zoo: env  ## every autoencoder and dictionary on the same features: tables in book/zoo
	$(BIN)/capsae zoo

bench: env $(BENCH)/.installed  ## the SAE trainers of other libraries stand beside ours, in an environment of their own
	$(BENCH)/bin/python -m benchmarks.sae_training
	! $(BENCH)/bin/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || $(BENCH)/bin/python -m benchmarks.sae_gpu
	$(BIN)/python -m benchmarks.extraction
	$(BIN)/python -m benchmarks.ood_scores

# A library that does not install must not keep the others out: then each by itself; the benchmark names who is missing.
$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(BENCH)
	grep -E '^(torch|numba|numpy)==' constraints.txt > $(BENCH)/constraints.txt
	$(BENCH)/bin/pip install -c $(BENCH)/constraints.txt -e . --config-settings editable_mode=compat
	$(BENCH)/bin/pip install -c $(BENCH)/constraints.txt -r benchmarks/requirements-peers.txt \
	  || sed 's/#.*//' benchmarks/requirements-peers.txt | xargs -n 1 $(BENCH)/bin/pip install -c $(BENCH)/constraints.txt \
	  || true
	touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .capsae _build build

env: $(VENV)/.installed

# editable_mode=compat: a plain path, so that `import capsae` works from the folder above a clone named capsae, too.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("capsae needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[book,test]' --config-settings editable_mode=compat
	touch $@
