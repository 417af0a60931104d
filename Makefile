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

.PHONY: help demo test test-slow test-torch test-torch-slow lint bench clean

help:
	@echo "make demo        train on handwritten digits, sample a grid, score it (CPU: under 5 minutes)"
	@echo "make test        the test suite        make lint        ruff"
	@echo "make test-slow   the slow tests        make test-torch  the comparisons with PyTorch (test-torch-slow: the long ones)"
	@echo "make bench       operator and train-step benchmarks on this machine"

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

demo: $(READY)
	$(BIN)/python -m gspn_jax.demo

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not torch" -n $(JOBS) --dist loadfile

test-torch: $(TORCH_READY)
	$(BIN)/python -m pytest -m "torch and not slow"

test-torch-slow: $(TORCH_READY)
	$(BIN)/python -m pytest -m "torch and slow"

lint: $(READY)
	$(BIN)/ruff check .

bench: $(READY)
	$(BIN)/python benchmarks/operator.py
	$(BIN)/python benchmarks/train_step.py

clean:
	rm -rf $(VENV) .cache build *.egg-info
