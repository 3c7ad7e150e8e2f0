# make demo | test | test-all | lint | clean. The first use creates $(VENV) and installs the pinned dependencies into it.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# An editable install knows its modules by name: one that is added, moved or removed makes it due again.
MODULES := $(shell find fastcache engines kernels -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(MODULES)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt

PYTEST := $(BIN)/pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all lint clean
.NOTPARALLEL:

demo: $(STAMP)
	$(BIN)/fastcache demo --output demo-output

test: lint
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: lint
	$(PYTEST) $(PYTEST_ARGS)

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
	rm -f $(VENV)/.installed*
	touch $@

# build/ may hold trained weights: only what this Makefile, .ci/run and the tests made goes.
clean:
	rm -rf .venv build/ci-venv build/test-store build/test-caches demo-output dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find fastcache kernels engines tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
