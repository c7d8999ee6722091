# Needs python3 (3.11 or newer) and make; everything else is put into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers/.installed
TESTED := $(VENV)/.tested
# what the tests ran on: every file, changed or not, and what had to or could run
TREE = $(shell (git ls-files -s; git diff HEAD; git status --porcelain; echo $$DMDATA_TESTS_REQUIRE $$S3_ENDPOINT) | git hash-object --stdin)

.PHONY: install demo test tested test-newest test-peers peers check lint types docs bench gpu gpu-wheels gpu-rehearsal clean

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
	$(BIN)/pytest -n 2 --dist loadfile
	@echo "$(TREE)" > $(TESTED)

# dmdata alone, without torch, on the newest Python there is and the newest of every package; kills and fuzz left out
test-newest:
	$$(tests/newest-python) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-newest/bin/pip install --quiet --editable '.[xarray]' --group tests
	.venv-newest/bin/pytest -q -n 2 --dist loadfile -m "not slow"

# the gate: lint, types, tests and docs; tests that passed on this very tree are not run again
check: lint types tested docs

tested: install
	@if git rev-parse --quiet --verify HEAD >/dev/null && [ "$$(cat $(TESTED) 2>/dev/null)" = "$(TREE)" ]; then echo "the tests passed on this very tree"; \
	else $(MAKE) test; fi

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/pytest -q --doctest-modules dmdata dmpipeline
	$(BIN)/pdoc --docformat numpy --output-directory site dmdata dmpipeline

# our solver against public ones
test-peers: install peers
	DMDATA_TESTS_REQUIRE=peers $(BIN)/pytest -q -m peers

bench: install peers
	$(BIN)/python benchmarks/run.py $(BENCH)

# a table of what a GPU does, and the tests marked gpu, in under six minutes; this Python has torch, and no network is
# needed where gpu-wheels has what else is missing
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

# what a machine with torch, numpy, numba and pytest lacks, to be taken there with this checkout
PYTHON_THERE ?= 3.12
gpu-wheels: install
	$(BIN)/python benchmarks/gpu_wheels.py --python $(PYTHON_THERE)

# the same table on the CPU, tiny: shows that all of it runs
gpu-rehearsal: install
	$(BIN)/python benchmarks/gpu.py --rehearse

# s3fs and public LASSO solvers, in an environment of their own: they pin packages that are not ours
peers: $(PEERS)

$(PEERS): pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-peers/bin/pip install --quiet --group peers
	touch $(PEERS)

clean:
	rm -rf $(VENV) .venv-peers .venv-newest demo site dist gpu-wheels
