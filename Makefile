# `make help` lists what there is to do. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format typecheck wheel bench readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/torch: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "fmkernels needs Python >= 3.10; name one with make PYTHON=..."; exit 1; }
	@echo "[1/3] making $(VENV) with $$($(PYTHON) --version), and PyTorch"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet "$$(grep '^torch==' requirements-dev.txt)" "setuptools>=77" wheel
	@touch $@

$(VENV)/ready: $(VENV)/torch requirements-dev.txt pyproject.toml setup.py
	@echo "[2/3] installing fmkernels, its tests and the packages that it is compared with"
	@$(PIP) install --quiet --no-build-isolation --requirement requirements-dev.txt
	@touch $(VENV)/built $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	@echo "[3/3] compiling the kernels that changed"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: $(VENV)/built ## NeCo's loss on photographs, beside diffsort
	$(BIN)/python -m fmkernels demo

test: $(VENV)/built ## all tests
	$(BIN)/python -m pytest -q --durations=10

lint: $(VENV)/built ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: wheel ## mypy, against the installed wheel
	$(PIP) install --quiet --no-deps --target build/typecheck --upgrade dist/*.whl
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fmkernels

format: $(VENV)/built ## rewrite Python into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/built ## dist/fmkernels-*.whl
	rm -rf dist build/lib* build/bdist*
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist

bench: $(VENV)/built ## measure, write benchmarks/results and the README's tables
	$(BIN)/python -m fmkernels bench --save
	$(BIN)/python benchmarks/report.py

readme: $(VENV)/built ## the README's tables and plots from benchmarks/results
	$(BIN)/python benchmarks/report.py

clean: ## remove what was built, and .venv
	rm -rf $(VENV) build dist *.egg-info fmkernels/_C.abi3.so fmkernels/_build_info.py
