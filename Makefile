# Every target sets up what it needs in .venv on a fresh machine; stamps make a second run start at once.
#   make demo     train the same GPT with zgraph on two ranks and with plain PyTorch, and compare
#   make test     the tests; `make quick` one in twelve of the small ones, in less than a minute
#   make lint     ruff and strict mypy
#   make docs     the site, from docs and docstrings, in build/site
#   make sweep    try every differentiable operator of torch; writes docs/operators.md
#   make nightly  properties of 25,000 random programs and the like, and all combinations of options
#   make bench    zgraph beside DDP, FSDP2 and plain PyTorch
#   make clean    remove .venv and everything that was built
# PYTHON=python3.12 make test   chooses the interpreter (3.10 to 3.13); changing it makes .venv anew.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Installed before anything that depends on torch, so that no dependency pulls a CUDA build onto a CPU machine.
NVIDIA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)$(wildcard /proc/driver/nvidia/version)
TORCH := $(if $(NVIDIA),torch>=2.13,torch==2.13.0)

PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(filter 3.10 3.11 3.12 3.13,$(PYTHON_VERSION)),)
ifneq ($(MAKECMDGOALS),clean)
$(error $(PYTHON) is Python '$(PYTHON_VERSION)'; zgraph needs 3.10 to 3.13: PYTHON=python3.12 make $(MAKECMDGOALS))
endif
endif
INTERPRETER := $(VENV)/python-$(PYTHON_VERSION)

# One thread per process: ranks and test workers share the cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := test
.NOTPARALLEL:
.PHONY: demo test quick lint docs sweep nightly bench types tree clean

demo: $(VENV)/package
	$(BIN)/zgraph demo

test: $(VENV)/for-test
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -m "not nightly" -n 2 --dist loadfile --durations 25 --ignore tests/distributed
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -m "not nightly" tests/distributed  # each of these uses both cores

quick: $(VENV)/for-test
	$(BIN)/python -m pytest -n 2 --dist load -m "not slow and not nightly and not hypothesis" --sample 12

lint: types $(VENV)/for-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and mkdocstrings find zgraph.passes and zgraph.codegen only in a tree of package shape: build/types is one, of links.
tree:
	rm -rf build/types
	mkdir -p build/types/zgraph
	ln -s $(CURDIR)/zgraph/* $(CURDIR)/passes $(CURDIR)/codegen build/types/zgraph/

types: tree $(VENV)/for-lint
	MYPYPATH=build/types $(BIN)/mypy -p zgraph

# Strict: a link that leads nowhere, or a docstring that cannot be found, stops it.
docs: tree $(VENV)/for-docs
	$(BIN)/mkdocs build --strict

# The table at the end of docs/operators.md; a test compares it with what operators do.
sweep: $(VENV)/for-test
	mkdir -p build
	$(BIN)/python -m tests.operators > build/operators.md
	sed -i '/^[0-9]* operators:/,$$d' docs/operators.md
	cat build/operators.md >> docs/operators.md

# Many more random examples of every property than make test tries, and combinations of options that it leaves out.
nightly: $(VENV)/for-test
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n 2 -m hypothesis --timeout 0
	$(BIN)/python -m pytest -m nightly tests

bench: $(VENV)/package
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Cleared only if it was made here with another interpreter.
$(INTERPRETER):
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/python-*),--clear) $(VENV)
	touch $@

$(VENV)/torch: $(INTERPRETER)
	$(BIN)/python -m pip install '$(TORCH)'
	touch $@

$(VENV)/package: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/for-%: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@
