# Every target sets up what it needs in $(VENV) and can be run again. PYTHON= and VENV= choose others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml

.PHONY: setup demo test test-slow lint format bench clean

setup: $(VENV)/.built
$(VENV)/.installed: pyproject.toml requirements-dev.txt requirements-sae.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps -r requirements-sae.txt
	touch $@
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/pyfacts demo
	$(BIN)/pyfacts demo --text

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'tests/*.cpp' 'tests/*.h')

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'tests/*.cpp' 'tests/*.h')

bench: setup
	$(BIN)/python bench/run.py

clean:
	rm -rf build $(VENV)
