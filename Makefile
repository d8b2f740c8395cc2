# Every target sets up what it needs in $(VENV) and can be run again. PYTHON= and VENV= choose others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
NVCC ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml

.PHONY: setup cuda demo test test-newest test-ptx test-slow lint format bench gpu-check gpu-wheels clean

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

# The CUDA kernels too; needs nvcc, but neither a GPU nor a torch for one. Spilt registers (but CUB's), serialised matrix
# instructions and ignored register limits are errors.
cuda: setup
	@test -n "$(NVCC)" || { echo "make cuda needs nvcc: put it on PATH, or give NVCC=/path/to/nvcc"; exit 1; }
	@mkdir -p build
	$(BIN)/pip install --quiet --no-deps -r requirements-cuda.txt
	CUDACXX=$(NVCC) $(BIN)/pip install -v --no-build-isolation --no-deps -C build-dir=build/cuda \
	  -C cmake.define.PYFACTS_CUDA=ON -e . > build/cuda.log 2>&1 || { cat build/cuda.log; exit 1; }
	@if grep -E "spill|serialized|setmaxnreg" build/cuda.log | grep -v "'_ZN3cub"; then rm -rf build/cuda; exit 1; fi

demo: setup
	$(BIN)/pyfacts demo
	$(BIN)/pyfacts demo --text

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m "not slow"

# What meets models, with the newest transformers instead of the pinned one.
NEWEST ?= transformers==5.24.0
test-newest: setup
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/newest $(NEWEST)
	PYTHONPATH=build/newest OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto -m "not slow" tests/test_ablate.py \
	  tests/test_capture*.py tests/test_cli.py tests/test_demo.py tests/test_dump_inputs.py tests/test_models*.py

# The CUDA kernels on the CPU, from the PTX that nvcc makes of them (tests/ptx); needs nvcc, but no GPU.
CUTLASS = $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])")
test-ptx: setup
	@test -n "$(NVCC)" || { echo "make test-ptx needs nvcc: put it on PATH, or give NVCC=/path/to/nvcc"; exit 1; }
	@mkdir -p build
	$(BIN)/pip install --quiet --no-deps -r requirements-cuda.txt
	{ $(BIN)/cmake -S tests/ptx -B build/ptx -G Ninja -DCMAKE_CUDA_COMPILER=$(NVCC) \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCUTLASS_INCLUDE_DIR="$(CUTLASS)/source/include" && \
	  $(BIN)/cmake --build build/ptx && touch build/ptx/kernels.so; } > build/ptx.log 2>&1 || { cat build/ptx.log; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto tests/test_ptx.py

test-slow: setup
	$(BIN)/pytest -m slow

CXX_FILES = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup
	$(BIN)/python bench/run.py

# With this machine's own Python and torch. Packages that it lacks travel in third_party/wheels.
gpu-check:
	$(PYTHON) bench/gpu_check.py

GPU_PYTHON ?= 3.12
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  --dest third_party/wheels $$(grep -hE '^(xxhash|zstandard|pytest-benchmark|nvidia-cutlass)==' requirements-*.txt)

clean:
	rm -rf build $(VENV)
