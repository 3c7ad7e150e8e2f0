# make demo | test | test-all | lint | docs | clean. The first use creates $(VENV) and installs the pinned dependencies
# into it: for the demo what draws it (1.4 GB), for the tests everything that is tested (3.8 GB).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# An editable install knows its modules by name: one that is added, moved or removed makes it due again.
MODULES := $(shell find fastcache engines kernels -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
DEMO := $(VENV)/.installed-demo-$(MODULES)
TESTS := $(VENV)/.installed-tests-$(MODULES)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt

PYTEST := $(BIN)/pytest --maxprocesses 4 --dist loadfile --no-loadscope-reorder -n
# Slow tests wait for what they start: two fifths of two cores stayed idle under two workers.
MORE := $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count()) + 1)')
SLOW_WORKERS = $(if $(filter auto,$(WORKERS)),$(MORE),$(WORKERS))

.PHONY: demo test test-slow test-all lint docs clean
.NOTPARALLEL:

demo: $(DEMO)
	$(BIN)/fastcache demo --output demo-output
	@echo "the command: $(BIN)/fastcache, or after 'source $(BIN)/activate' just fastcache"

test: lint
	$(PYTEST) $(WORKERS) -m "not slow" $(PYTEST_ARGS)

test-slow: $(TESTS)
	$(PYTEST) $(SLOW_WORKERS) -m slow $(PYTEST_ARGS)

test-all: lint
	$(PYTEST) $(SLOW_WORKERS) $(PYTEST_ARGS)

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

docs: $(TESTS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

# torch goes first, alone and pinned: left to the resolver it may become a build with gigabytes of CUDA packages.
define install_torch
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)' || \
	  echo "installing PyTorch: on Linux this may be the build for NVIDIA GPUs, of several gigabytes. Without such a GPU" \
	  "stop here, and set PIP_EXTRA_INDEX_URL to the CPU index that PyTorch's page 'Start Locally' names"
	$(PIP) torch
	$(PIP) scikit-build-core
	@$(BIN)/python -m pip --disable-pip-version-check uninstall -qy fastcache 2>/dev/null  # what this was called before
	rm -f $(VENV)/.installed*
endef

# Bytecode is compiled when a module is first used: ahead it would take 300 MB, mostly for modules that never are.
$(DEMO): PIP += --no-compile
$(DEMO): pyproject.toml constraints.txt
	$(install_torch)
	$(PIP) --no-build-isolation -e '.[cpu,openvino]'
	touch $(DEMO)

# What the tests need holds what the demo needs.
$(TESTS): pyproject.toml constraints.txt
	$(install_torch)
	$(PIP) --no-build-isolation -e '.[bench,cpu,docs,openvino,ray,serve,tensorrt-rtx,test]'
	touch $(DEMO) $(TESTS)

# build/ may hold trained weights: only what this Makefile, .ci/run and the tests made goes.
clean:
	rm -rf .venv build/ci-venv build/test-store build/test-caches build/site demo-output dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find fastcache kernels engines tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
