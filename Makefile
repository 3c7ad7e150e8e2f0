# make demo | test | lint | clean. The first use creates $(VENV) and installs the pinned dependencies into it.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt

.PHONY: demo test lint clean
.NOTPARALLEL:

demo: $(STAMP)
	$(BIN)/fastcache demo --output demo-output

test: lint
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# torch goes first, alone and pinned: left to the resolver it may become a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core
	$(PIP) --no-build-isolation -e '.[bench,cpu,openvino,ray,serve,tensorrt-rtx,test]'
	touch $@

# build/ may hold trained weights: only what this Makefile and .ci/run made goes.
clean:
	rm -rf .venv build/ci-venv demo-output dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find fastcache kernels engines tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
