# One command a job; `make help` lists them. Everything lives in .venv and build/, results in out/.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2
TESTS ?= tests

SOURCES := $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name 'CMakeLists.txt' -o -name '*.cmake')
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.native-built

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-native test-qemu fuzz sanitize lint format bench native install docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found; install one or set PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Build tools first: the extension is built without isolation, so that a rebuild costs seconds.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt scikit-build-core nanobind cmake ninja setuptools wheel
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[test,lint]'
	@touch $(INSTALLED) $(BUILT)

$(BUILT): $(SOURCES) | $(INSTALLED)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $(BUILT)

install: $(INSTALLED) $(BUILT)  ## create .venv and install the project in it, editable

native: install  ## rebuild the native engine if its sources changed

demo: install  ## the main job on the shipped model: evidence in out/demo
	$(BIN)/python examples/demo.py out/demo

NATIVE_TESTS := -DTRILEMMA_TESTS=ON -DTRILEMMA_PYTHON=OFF -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
test-native: install  ## the C++ tests, on every instruction set of this host
	$(BIN)/cmake -S native -B build/tests $(NATIVE_TESTS)
	$(BIN)/cmake --build build/tests -j $(JOBS) && $(BIN)/ctest --test-dir build/tests -j $(JOBS) --output-on-failure

test: install test-native  ## the test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m 'not full' $(TESTS)

test-full: install test-native  ## the test suite with the full matrix of contracts
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

# The C++ tests where this host's processor is not: ARM with NEON, and x86 without AVX-512 (emulated). Debian's packages
# g++-aarch64-linux-gnu and qemu-user are needed. A qemu that knows AVX-VNNI (7.2 does not) runs that tier as well; hosts
# with AVX-512 test it in `make test-native` by its twin.
test-qemu: test-native  ## the C++ tests on emulated ARM and on x86 without AVX-512
	@command -v qemu-aarch64 aarch64-linux-gnu-g++ >/dev/null || { \
	  echo "error: install g++-aarch64-linux-gnu and qemu-user (Debian, Ubuntu)" >&2; exit 2; }
	$(BIN)/cmake -S native -B build/arm $(NATIVE_TESTS) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	$(BIN)/cmake --build build/arm -j $(JOBS) && $(BIN)/ctest --test-dir build/arm -j $(JOBS) --output-on-failure
	printf '%s\n' products rows attention inputs engine | xargs -P $(JOBS) -I{} qemu-x86_64 -cpu max build/tests/tests/test_{}

lint: install  ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: install  ## damaged model files through the loader, 1,000 of each kind
	$(BIN)/python tests/mutations/fuzz.py

# Each sanitizer is a build of its own: together, the kernels take far longer to compile.
sanitize: install  ## the C++ tests under the sanitizers: address, undefined, thread
	for kind in address undefined thread; do \
	  folder=build/sanitize-$$kind; \
	  $(BIN)/cmake -S native -B $$folder $(NATIVE_TESTS) -DTRILEMMA_SANITIZE=$$kind && \
	  $(BIN)/cmake --build $$folder -j $(JOBS) && $(BIN)/ctest --test-dir $$folder --output-on-failure || exit 1; \
	done

bench: install  ## what the shipped shapes cost on this machine
	$(BIN)/trilemma bench examples/shapes/SmolLM2-135M examples/shapes/SmolLM2-360M --scheme bf16,W8A8,W4A8-g32

docs: install  ## write the generated pages of docs/reference anew
	$(BIN)/python docs/make_reference.py

clean:  ## remove builds, caches and results; .venv stays
	rm -rf build out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(BUILT)
	find src tests examples docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
