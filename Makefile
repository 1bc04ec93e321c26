# Every target makes its own environment in $(VENV), with `python3` or the one given by PYTHON=.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: help setup demo demo-from-scratch test test-slow test-hosts test-faults test-browser parity fullsize bench bench-data lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 20

setup: $(VENV)/.ready  ## the environment alone, with all that the tests need

# The smallest environment, so that the demo starts soon; the others add to it.
$(VENV)/.ready-demo: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparqle_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

$(VENV)/.ready: $(VENV)/.ready-demo
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/.ready-parity: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,parity]'
	touch $@

demo: $(VENV)/.ready-demo  ## the miniature: trained in minutes, evaluated, and a page to look at
	$(BIN)/python -m sparqle_jax.demo

demo-from-scratch: $(VENV)/.ready  ## the miniature with its towers and stage 1: two hours
	$(BIN)/python -m sparqle_jax.demo --from-scratch

# A file's tests share what they compile, so they stay in one process.
PYTEST := $(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile
test: $(VENV)/.ready  ## everything that needs no PyTorch and little time
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.ready  ## the rest of it: whole pipelines, hours of audio, fuzzing
	$(PYTEST) -m slow

test-hosts: $(VENV)/.ready  ## several processes that train together, as the hosts of a pod do
	$(BIN)/pytest tests/hosts

KILLS ?= 20
test-faults: $(VENV)/.ready  ## a run of two processes, killed KILLS times (20), must end as if it never was
	$(BIN)/python -m tests.hosts.faults --kills $(KILLS)

$(VENV)/.ready-browser: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,browser]'
	touch $@

test-browser: $(VENV)/.ready-browser  ## the web demo in a headless Chromium (on Debian: apt-get install chromium)
	$(BIN)/pytest tests/browser

parity: $(VENV)/.ready-parity  ## the same numbers as PyTorch
	$(BIN)/pytest tests/parity

fullsize: $(VENV)/.ready-parity  ## full-size towers: HuBERT-large against PyTorch, memory of a 1B LLM
	$(BIN)/python -m tests.parity.fullsize

bench: $(VENV)/.ready-parity  ## how fast the encoder, both stages and decoding are, beside PyTorch
	$(BIN)/python -m benchmarks

bench-data: $(VENV)/.ready-parity  ## how fast data are read, beside soundfile and PyTorch's DataLoader
	$(BIN)/python -m benchmarks.data

lint: $(VENV)/.ready  ## ruff, and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh

format: $(VENV)/.ready  ## mend what lint finds
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove environments and caches
	rm -rf $(VENV) .venv-* .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
