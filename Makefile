# make demo | test | test-long | lint | bench | gpu | experiment-small | experiment-gpu | abi-check | clean
#                                                                 (README.md explains each)
# make fuzz | sanitize | arm64-check                         (CONTRIBUTING.md says when to run them)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

CXX_SOURCES := $(wildcard csrc/*.* csrc/*/*.* tests/cuda_emulation/*.h tests/cuda_emulation/*.cpp \
  tests/cpu_threads/*)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-long lint bench gpu experiment-small experiment-gpu abi-check fuzz sanitize
.PHONY: arm64-check clean data

# The environment, and the extension in it; rebuilt when a C++ source changes.
# torch and torchvision come in one command: their builds must match.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mmae_fast needs Python >= 3.10; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
$(VENV)/.requirements: pyproject.toml | $(BIN)/python
	$(PIP) install -q "torch>=2.11" torchvision "setuptools>=77" wheel ninja
	@touch $@
# Two GPU generations (and PTX for the rest) where the CUDA toolkit is found, so that it stays short;
# `pip install .` builds for all.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0+PTX;9.0a}" $(PIP) install -q --no-build-isolation -e ".[test,lint]"
	@touch $@

# Real labelled images for the demo, from the distribution where that is possible.
FASHION := /usr/share/datasets/fashion-mnist
data:
	@if [ ! -e $(FASHION) ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing the Debian package dataset-fashion-mnist"; \
	  { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; } >/dev/null 2>&1 \
	    || echo "That package is not to be had here; the demo will look elsewhere"; \
	fi

demo: $(VENV)/.installed data
	$(BIN)/mmae demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "not gpu and not slow"

# What takes minutes: trainings killed twenty times, and the like.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "slow and not gpu"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python -m benchmarks.report --check

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.report

# On a machine with a GPU; uses the python3 that has torch there, and installs nothing but this
# package. STEPS="build tests" for some of the steps.
gpu:
	$(PYTHON) -m benchmarks.gpu $(STEPS)

# Pretraining on CIFAR-10 with what two views share; the same command goes on where it was stopped.
# CIFAR=folder with cifar10_train.npz and cifar10_test.npz, or CIFAR=download.
CIFAR ?=
experiment-small: $(VENV)/.installed
	CIFAR="$(CIFAR)" $(BIN)/python -m benchmarks.experiment small
# On a machine with a GPU; uses the python3 that has torch there.
experiment-gpu:
	CIFAR="$(CIFAR)" $(PYTHON) -m benchmarks.experiment gpu

# One wheel, unchanged, on the oldest supported torch and the newest. (-I: not the extension that lies
# here, but the wheel's.)
abi-check: $(VENV)/.installed
	rm -rf .abi/dist && mkdir -p .abi
	$(PIP) wheel -q --no-build-isolation --no-deps -w .abi/dist .
	for torch in oldest:torch==2.11.* newest:torch; do \
	  env=.abi/$${torch%%:*}; \
	  test -x $$env/bin/python || $(PYTHON) -m venv $$env; \
	  $$env/bin/python -m pip install -q --disable-pip-version-check "$${torch#*:}" numpy pytest hypothesis && \
	  $$env/bin/python -m pip install -q --disable-pip-version-check --no-deps --force-reinstall .abi/dist/*.whl && \
	  $$env/bin/python -I -c 'import torch, mmae_fast._C as c; print("torch", torch.__version__, "loads", c.__file__)' && \
	  $$env/bin/python -I -m pytest -q $(OP_TESTS) || exit 1; \
	done
OP_TESTS := $(addprefix tests/test_,$(addsuffix .py,reference ops accuracy autograd dispatch))

# Random calls of the CPU backend against everything that is promised: FUZZ of them, other ones each time.
FUZZ ?= 20000
fuzz: $(VENV)/.installed
	MMAE_FAST_FUZZ_CASES=$(FUZZ) $(BIN)/python -m pytest -q tests/test_fuzz.py

# The CPU kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, the CUDA
# kernels under ThreadSanitizer (Linux, g++).
sanitize: $(VENV)/.installed
	$(BIN)/python tests/sanitize.py

# The kernels as arm64 machine code (NEON), alone, in an emulator of that processor.
ARM64_CXX ?= aarch64-linux-gnu-g++
ARM64_RUN ?= qemu-aarch64
arm64-check:
	@for tool in $(ARM64_CXX) $(ARM64_RUN); do command -v $$tool >/dev/null || { \
	  echo "skipped: no $$tool here (Debian packages g++-aarch64-linux-gnu and qemu-user)"; exit 0; }; done; \
	mkdir -p build/arm64 && set -x && \
	$(ARM64_CXX) -std=c++17 -O3 -fno-math-errno -fno-trapping-math -Wno-psabi -static -pthread -Icsrc \
	  tests/cpu_threads/main.cpp csrc/cpu/kernels_*.cpp -o build/arm64/cpu_threads && \
	$(ARM64_RUN) build/arm64/cpu_threads

clean:
	rm -rf build *.egg-info mmae_fast/*.so .abi runs
