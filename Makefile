# Two commands for a newcomer: `make demo`, `make test`. Each builds .venv from constraints.txt the first time.

PYTHON ?= python3
BIN := .venv/bin
DEMO_OUT ?= demo-run
DEMO_API_OUT ?= demo-api-run
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-api test check format bench soak docs clean python

# One thread for each test process: the machine's cores belong to the processes.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

help:
	@echo "make demo    distil the bundled teacher into a small student and open the book on it (a few minutes)"
	@echo "make demo-api  the same with the teacher behind an address: a real llama.cpp server, probed, asked and accounted for (some ten minutes)"
	@echo "make test    all tests, on $(WORKERS) processes"
	@echo "make check   lint, format, types, contract tests but the guides, which make test follows"
	@echo "make bench   speed against TRL, installed apart into build/peers, and the demo over three seeds; an hour; dated files in benchmarks/results"
	@echo "make soak    the long runs that make test leaves out, 1,560 schedules of faults and deaths of a collection among them"
	@echo "make docs    write the generated pages of docs/reference again"
	@echo "make clean   remove .venv, caches and the demo's run"

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Stillroom needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there')."; \
	  echo "If another one is installed, name it: make PYTHON=python3.12 $(firstword $(MAKECMDGOALS))"; exit 1; }

# The stamps stand inside .venv, so that removing it removes them. The install is editable: a change of source needs no new one.
.venv/.made: | python
	@$(PYTHON) -m venv .venv || { echo "Python's venv module does not work here; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@touch $@

.venv/.train: pyproject.toml constraints.txt .venv/.made
	@echo "Installing into .venv (once; about a minute, and longer where PyTorch comes with CUDA libraries) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

.venv/.serve: pyproject.toml constraints.txt .venv/.made
	@echo "Installing into .venv with llama.cpp (once; about a minute, and longer where PyTorch comes with CUDA libraries) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]'
	@touch $@ .venv/.train

.venv/.dev: pyproject.toml constraints.txt .venv/.made
	@echo "Installing into .venv with what the tests need (once; a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/.train .venv/.serve

demo: .venv/.train
	$(BIN)/stillroom demo --out $(DEMO_OUT)

demo-api: .venv/.serve
	$(BIN)/stillroom demo --api --out $(DEMO_API_OUT)

test: .venv/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not soak"

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m "not soak" -k "not can_be_followed" tests/contract

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	$(BIN)/python benchmarks/fused_divergence.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/demo.py

soak: .venv/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -m soak

docs: .venv/.dev
	$(BIN)/python scripts/generate_docs.py

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(DEMO_OUT) $(DEMO_API_OUT)
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
