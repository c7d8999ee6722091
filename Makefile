# Needs python3 (3.11 or newer) and make; everything else is put into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test check lint types docs bench clean

install: $(STAMP)

# torch goes first, so that its pinned version is there when other packages ask for any
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all]' --group tests --group lint --group docs
	touch $(STAMP)

# the whole circle on scikit-learn's digits, in under three minutes; leaves demo/
demo: install
	$(BIN)/dmpipeline demo demo

test: install
	$(BIN)/pytest

# the gate: lint, types, tests and docs
check: lint types test docs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/pytest -q --doctest-modules dmdata dmpipeline
	$(BIN)/pdoc --docformat numpy --output-directory site dmdata dmpipeline

bench: install .venv-peers
	$(BIN)/python benchmarks/run.py $(BENCH)

# s3fs, in an environment of its own: it pins a botocore that is not ours
.venv-peers: pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-peers/bin/pip install --quiet --group peers
	touch .venv-peers

clean:
	rm -rf $(VENV) .venv-peers .venv-newest demo site dist
