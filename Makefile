# Needs python3 (3.11 or newer) and make; everything else is put into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers/.installed
MEASURES := .venv-measures/.installed
FORMATS := .venv-formats/.installed
# what needs no server, browser or peer, and neither kills, breaks nor fuzzes for long
QUICK := not slow and not live and not browser and not peers and not measures and not formats
PYTEST := $(BIN)/pytest -n 2 --dist loadfile
# the many processes that tests start would compile all modules anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-rest test-all test-newest test-peers peers measures formats check lint types docs bench gpu gpu-wheels gpu-rehearsal explorer clean

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

# what defines the product, in under four minutes on two cores
test: install
	$(PYTEST) -m "$(QUICK)"

# the rest: kills, faults, fuzz, clusters, the real S3 server, a browser, public solvers; what is missing is skipped with a reason
test-rest: install peers
	$(PYTEST) -n 4 -m "not ($(QUICK))"

test-all: test test-rest

# what public solvers and measures of attributions say of the same arrays, and what other tools read of our catalogs
test-peers: install peers measures formats
	$(PYTEST) -m "peers or measures or formats"

# dmdata alone, without torch, on the newest Python there is and the newest of every package; kills and fuzz left out
test-newest:
	$$(tests/newest-python) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-newest/bin/pip install --quiet --editable '.[xarray]' --group tests
	.venv-newest/bin/pytest -q -n 2 --dist loadfile -m "not slow"

# lint, types, docs and the quick tests
check: lint types docs test

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: install
	$(BIN)/mypy

# the doctests, and the site in site/; a warning is an error
docs: install
	$(BIN)/pytest -q --doctest-modules dmdata dmpipeline
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html --doctree-dir site/.doctrees docs site

# of attributions, next to dattri's: make measures bench BENCH=attribution
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

# dattri and quanda, which measure attributions, with the torch of constraints.txt: about 2 GB; quanda wants a numpy below 2
measures: $(MEASURES)

$(MEASURES): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-measures
	.venv-measures/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-measures/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-measures/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)" --group measures
	touch $(MEASURES)

# the script of the page that dmpipeline report writes, from its source, and the tests of its parts; needs npm
explorer:
	cd dmpipeline/report/explorer && npm ci --no-audit --no-fund --loglevel=error && npm run --silent build && npm test --silent

# mlcroissant, intake and frictionless, which read exported catalogs, with dmdata for its xarray engine
formats: $(FORMATS)

$(FORMATS): pyproject.toml
	$(PYTHON) -m venv .venv-formats
	.venv-formats/bin/pip install --quiet --upgrade 'pip>=25.1'
	.venv-formats/bin/pip install --quiet --editable '.[xarray]' --group formats
	touch $(FORMATS)

clean:
	rm -rf $(VENV) .venv-peers .venv-measures .venv-formats .venv-newest demo site dist gpu-wheels
