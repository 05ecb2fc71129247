# On a fresh machine each target does its own set-up: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= demo
PORT ?= 8000
WORKERS ?= 2
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*)

.PHONY: help serve test lint format docs docs-serve bench bench-gpu tune-gpu test-slow test-gpu clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/.ready: pyproject.toml constraints.txt $(PLUGINS:=/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . $(PLUGINS:%=-e %) --group dev
	touch $@

serve: $(BIN)/.ready  ## serve MODEL (a small real chat model unless given) on PORT
	$(BIN)/lightllm-serve --model $(MODEL) --port $(PORT)

test: $(BIN)/.ready  ## the whole test suite, in as many processes as WORKERS says
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(BIN)/.ready  ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(BIN)/.ready  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(BIN)/.ready  ## write the reference from the code, and build the site into site/
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build

docs-serve: $(BIN)/.ready  ## the site on http://127.0.0.1:8001, rebuilt as its pages change
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

bench: $(BIN)/.ready  ## speed, memory and start-up of this server; see benchmarks/README.md for the peers
	$(BIN)/python benchmarks/serving.py

bench-gpu: $(BIN)/.ready  ## how close to a CUDA device's limits; see benchmarks/gpu/run.py
	$(BIN)/python benchmarks/gpu/run.py

tune-gpu: $(BIN)/.ready  ## the attention kernels' fastest tiles on a CUDA device; see benchmarks/gpu/tune.py
	$(BIN)/python benchmarks/gpu/tune.py

test-slow: $(BIN)/.ready  ## what takes minutes on two cores
	$(BIN)/python -m pytest -m slow

test-gpu: $(BIN)/.ready  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu plugins

clean:  ## remove what the other targets made
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
