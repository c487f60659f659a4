# Each target makes .venv, installs the pinned requirements and builds the native core first, where that has not
# been done. A machine needs Python >= 3.10 and a C++ compiler; make the first call with another interpreter by
# `make PYTHON=python3.12 ...`, and give pip further options by `make PIP_FLAGS=...`.
PYTHON ?= python3
PIP_FLAGS ?=
BENCH_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TOOLS := $(VENV)/.stamp-tools
REQUIREMENTS := $(VENV)/.stamp-requirements
INSTALLED := $(VENV)/.stamp-installed
CXX_FILES = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PY_PATHS := $(wildcard fastattn tests bench examples scripts setup.py)

.DELETE_ON_ERROR:
.PHONY: help build native test test-all test-install test-native sanitize bench bench-avx2 bench-gpu demo lint format clean

help:
	@echo "make build         build the native core in place"
	@echo "make demo          learn English to Chinese with fastattn, compare with PyTorch, look at the result"
	@echo "make test          the test suite"
	@echo "make test-all      the same with the slow tests, every way to install, the sanitizers and other processors"
	@echo "make sanitize      the kernels under the address, undefined-behaviour and thread sanitizers"
	@echo "make bench         measure against PyTorch, then guard the floors (BENCH_FLAGS=--quick for the short run)"
	@echo "make bench-avx2    the same measurement with both sides held to AVX2"
	@echo "make bench-gpu     on a CUDA device: check every case, then measure against PyTorch's paths"
	@echo "make lint          ruff, mypy, clang-format"
	@echo "make format        rewrite the sources as lint wants them"
	@echo "make clean         remove what was built (and not .venv)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: fastattn needs Python 3.10 or newer; try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# What the native core needs, which then can be built while the rest is installed: make --jobs=2 build.
$(TOOLS): requirements/constraints.txt | $(BIN)/python
	$(PIP) install --quiet $(PIP_FLAGS) -c requirements/constraints.txt cmake ninja pybind11 setuptools
	@touch $@

# --no-compile: half of the time would go into bytecode, most of it never used.
$(REQUIREMENTS): requirements/dev.txt requirements/no-deps.txt requirements/constraints.txt $(TOOLS)
	$(PIP) install --quiet --no-compile $(PIP_FLAGS) -r requirements/dev.txt
	$(PIP) install --quiet --no-compile $(PIP_FLAGS) --no-deps -r requirements/no-deps.txt
	@touch $@

# Registers the package in place. The native core is not built here but by CMake below, which can go on from
# what it built before.
$(INSTALLED): pyproject.toml setup.py fastattn/_version.py $(REQUIREMENTS)
	FASTATTN_NATIVE=0 $(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

build: $(INSTALLED) native

native: $(TOOLS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/build_in_place.sh

# One process for each core; threads that wait must not keep the others from it.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test: build
	$(PYTEST)

test-all: build test-native sanitize test-install
	$(PYTEST) -m ''

test-native: $(REQUIREMENTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/test_native.sh

sanitize: $(REQUIREMENTS)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/sanitize.sh

test-install: $(REQUIREMENTS)
	bash scripts/check_install.sh

bench: build
	$(BIN)/python -m fastattn bench $(BENCH_FLAGS)
	$(BIN)/python -m pytest -q bench/test_bench_guard.py

# What a processor without AVX-512 would show: both sides held to AVX2.
bench-avx2: build
	FASTATTN_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(BIN)/python -m fastattn bench $(BENCH_FLAGS)

# Status 1 where a result is wrong. On a machine without network and with a torch of its own: scripts/gpu_proof.sh.
bench-gpu: build
	$(BIN)/python -m fastattn bench --gpu $(BENCH_FLAGS)

demo: build
	$(BIN)/python -m fastattn demo

lint: $(REQUIREMENTS)
	$(BIN)/ruff check $(PY_PATHS)
	$(BIN)/ruff format --check $(PY_PATHS)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(REQUIREMENTS)
	$(BIN)/ruff check --fix $(PY_PATHS)
	$(BIN)/ruff format $(PY_PATHS)
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info fastattn/_C.*.so fastattn/_cuda.*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(INSTALLED)
