# Every target makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
# What is compiled on first use belongs to the environment: no lock of a killed build elsewhere is waited for.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test test-all test-matrix test-newest support docs check clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "no venv: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

# FP8 beside stock DeepSpeed BF16 on two CPU ranks; demo/loss.png shows both.
demo: $(INSTALLED)
	$(BIN)/python examples/compare.py configs/zero2_o2.json configs/zero2_bf16.json --out demo

# The suite, with every pair of values of its grids.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

# What `make test` leaves out: the other cells of grids, long trainings, launchers, benchmarks.
test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# docs/support.md, from the tests that prove it, and docs/keys.md, from the tables of the config.
support: $(INSTALLED)
	DS_ACCELERATOR=cpu PYTHONPATH=examples $(BIN)/python tests/support.py > docs/support.md
	$(BIN)/python tests/keys.py > docs/keys.md

# The site, in site/.
docs: $(INSTALLED)
	$(BIN)/python docs/ways.py
	$(BIN)/python docs/overview.py
	$(BIN)/python docs/gains.py
	$(BIN)/mkdocs build --strict

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror ops/csrc/* ops/hopper/*.cpp

clean:
	rm -rf $(VENV) build dist demo site *.egg-info

# The suite at both ends of the supported range of DeepSpeed, each in a virtual environment of its own.
MATRIX := 0.19.5 $(shell sed -n "s,^deepspeed==,,p" constraints.txt)

test-matrix: $(MATRIX:%=test-matrix-%)

test-matrix-%:
	test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	sed 's/^deepspeed==.*/deepspeed==$*/' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --editable '.[test]'
	PATH="$(CURDIR)/.venv-$*/bin:$$PATH" .venv-$*/bin/python -m pytest -m "not slow"

# The suite on the newest torch, with the Triton that it asks for, in a virtual environment of its own.
test-newest:
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	sed '/^torch==/d; /^triton==/d' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	    --constraint .venv-newest/constraints.txt --editable '.[test]'
	PATH="$(CURDIR)/.venv-newest/bin:$$PATH" .venv-newest/bin/python -m pytest -m "not slow"
