# Fresh machine: Python 3.11+, a C compiler, pip. Everything goes into .venv and runs/.
PYTHON ?= python3
BIN := .venv/bin
# Test processes at once, each with one thread; a file's tests stay together, and share what they make.
JOBS ?= 2

.PHONY: setup quickstart test test-slow test-gpu test-engines test-engines-slow engines capabilities check format clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip --constraint constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# xgrammar asks for Triton, which no CPU uses and torch imports wherever it is: 286 MB less.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps xgrammar apache-tvm-ffi
	touch $@

quickstart: .venv/ready
	$(BIN)/python -m skyrl_train.entrypoints.main_base

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu and not engines"

test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist load -m "slow and not engines"

engines:  # real SGLang and vLLM for the CPU, into .engines: 4 minutes, 6 GB, needs Python 3.11 and g++
	$(PYTHON) scripts/engines/install.py

test-engines: .venv/ready  # against the real servers; SKYRL_SGLANG_PYTHON and SKYRL_VLLM_PYTHON name others
	$(PYTHON) scripts/engines/install.py --unless-named
	SKYRL_REQUIRE_ENGINES=1 $(BIN)/python -m pytest -q -m "(engines or contract) and not slow"

test-engines-slow: .venv/ready  # the whole quickstart on each of them: 20 minutes
	$(PYTHON) scripts/engines/install.py --unless-named
	SKYRL_REQUIRE_ENGINES=1 $(BIN)/python -m pytest -q -m "engines and slow"

capabilities: .venv/ready  # what each engine can do, anew: the suite's record and the table in docs/BACKEND_SELECTION.md
	$(PYTHON) scripts/engines/install.py --unless-named
	SKYRL_REQUIRE_ENGINES=1 SKYRL_WRITE_CAPABILITIES=1 $(BIN)/python -m pytest -q tests/contract --ignore=tests/contract/test_table.py
	$(BIN)/python scripts/capability_table.py

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache

test-gpu: .venv/ready  # on a machine with a CUDA device
	$(BIN)/python -m pytest -q -m gpu tests/gpu
