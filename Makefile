# Each target sets itself up: a virtual environment in .venv, pinned by constraints.txt.
# A machine with an NVIDIA driver gets JAX for CUDA 13; GPU=0 or GPU=1 decides by hand.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
GPU ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
comma := ,
EXTRAS := dev$(if $(filter 1,$(GPU)),$(comma)cuda13)
READY := $(VENV)/.ready-gpu$(GPU)
TORCH_READY := $(VENV)/.ready-torch
NEWEST_VENV := .venv-newest
NEWEST_READY := $(NEWEST_VENV)/.ready
NEWEST_TESTS ?= tests/kernels tests/models tests/diffusion tests/training/test_step.py
COMPILE_VENV := .venv-compile
COMPILE_READY := $(COMPILE_VENV)/.ready
ARGS ?= recorded

# The emulator of machine code has an environment of its own, with the JAX of Python 3.12: make test-ptx PTX_JAX=0.11.2
PTX_JAX ?= $(shell sed -n 's/^jax==\(.*\); python_version >= "3.12"$$/\1/p' constraints.txt)
PTX_VENV ?= .venv-ptx-$(PTX_JAX)
PTX_READY := $(PTX_VENV)/.ready
PYTHON_PTX ?= $(shell for python in $(PYTHON) python3.12 python3.13 $(HOME)/.pyenv/versions/3.1[23].*/bin/python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$python && break; done)

.PHONY: help demo test test-slow test-notebook test-newest test-torch test-torch-slow test-ptx test-ptx-slow lint bench peers \
	gpu-compile clean

help:
	@echo "make demo        train on handwritten digits, sample a grid, score it (CPU: under 5 minutes)"
	@echo "make test        the test suite        make lint        ruff and pyrefly"
	@echo "make test-slow   the slow tests        make test-torch  the comparisons with PyTorch (test-torch-slow: the long ones)"
	@echo "make test-notebook  docs/quickstart.ipynb, run from its first cell to its last"
	@echo "make test-newest a part of the tests with the newest JAX, on Python 3.12 or newer"
	@echo "make test-ptx    the GPU kernels' machine code, emulated (test-ptx-slow: all sizes, with a table of errors)"
	@echo "make bench       operator and train-step benchmarks on this machine        make peers  beside PyTorch"
	@echo "make gpu-compile ARGS='step GSPN-XL/2'    what XLA makes of it for an H200, without a GPU (4 GB of wheels)"
	@echo "make clean       removes the environments and what was built"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(TORCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[oracle]'
	@# without torchvision, which its metrics do not use and which does not load beside every build of PyTorch
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt torch-fidelity
	@touch $@

$(PTX_READY): constraints.txt
	@test -n "$(PYTHON_PTX)" || { echo "Emulating machine code needs Python 3.12 or newer, and none was found; name one: make test-ptx PYTHON_PTX=python3.12"; exit 1; }
	$(PYTHON_PTX) -m venv $(PTX_VENV)
	sed '/^jax\(lib\)\{0,1\}==/d' constraints.txt > $(PTX_VENV)/constraints.txt
	$(PTX_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(PTX_VENV)/bin/python -m pip install --quiet -c $(PTX_VENV)/constraints.txt jax==$(PTX_JAX) jaxlib==$(PTX_JAX) \
		beartype jaxtyping numpy pytest pytest-timeout pytest-xdist
	$(PTX_VENV)/bin/python -m tests.ptx.toolchain
	@touch $@

$(NEWEST_READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON_PTX)" || { echo "The newest JAX needs Python 3.12 or newer, and none was found; name one: make test-newest PYTHON_PTX=python3.12"; exit 1; }
	$(PYTHON_PTX) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m gspn_jax.demo

# shapes and types of arrays are checked where functions are called (tests/shapes.py)
test: $(READY)
	GSPN_CHECK_SHAPES=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not torch and not ptx" -n $(JOBS) --dist loadfile

test-notebook: $(READY)
	$(BIN)/python -m pytest tests/test_quickstart.py -m notebook

test-newest: $(NEWEST_READY)
	$(NEWEST_VENV)/bin/python -m pytest $(NEWEST_TESTS) -n $(JOBS) --dist loadfile

# a thread each: two workers with all cores each wait for one another
test-torch: $(TORCH_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "torch and not slow" -n $(JOBS) --dist loadfile

test-torch-slow: $(TORCH_READY)
	$(BIN)/python -m pytest -m "torch and slow"

test-ptx: $(PTX_READY)
	$(PTX_VENV)/bin/python -m pytest tests/ptx -m "ptx and not slow" -n $(JOBS)

test-ptx-slow: $(PTX_READY)
	$(PTX_VENV)/bin/python -m pytest tests/ptx -m ptx -n $(JOBS)
	$(PTX_VENV)/bin/python -m tests.ptx.table

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

# XLA's compiler for GPUs, which needs none: 4 GB of wheels, so an environment of its own and no part of CI
$(COMPILE_READY): pyproject.toml
	$(PYTHON_PTX) -m venv $(COMPILE_VENV)
	$(COMPILE_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(COMPILE_VENV)/bin/python -m pip install --quiet -e '.[train]' 'jax[cuda13]==$(PTX_JAX)'
	@touch $@

gpu-compile: $(COMPILE_READY)
	$(COMPILE_VENV)/bin/python benchmarks/gpu_compile.py $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/line_scan.py
	$(BIN)/python benchmarks/train_step.py

peers: $(TORCH_READY)
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf $(VENV) $(NEWEST_VENV) $(COMPILE_VENV) .venv-ptx-* .cache build *.egg-info
