# Each target sets up all it needs in .venv and build/.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := $(shell find native python convert -type f -not -name '*.so' -not -path '*/__pycache__/*') \
           CMakeLists.txt pyproject.toml
TINY   := build/tiny-Q4_0.gguf

# Processes that share the tests: one for each core.
JOBS   ?= $(shell getconf _NPROCESSORS_ONLN)
C_SOURCES = $(shell find native tests bench examples -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp')

.PHONY: cuda cuda-all demo test test-clients test-cuda test-interchange test-ray test-packaging wheels wheels-cuda bench fuzz lint sanitize clean

demo: $(TINY)
	@$(BIN)/dgemma generate -m $(TINY) --chat --live --seed 1 -p "What is the capital of France?"
	@$(BIN)/dgemma generate -m $(TINY) --chat --live --seed 1 -p "Reverse the list: fox lamp river"
	@$(BIN)/dgemma generate -m $(TINY) --chat --live --seed 1 -p "Repeat: the red fox sees a bell near the lake."

test: lint $(VENV)/tests-installed
	$(BIN)/python -m pytest -q tests -m "not thorough" -n $(JOBS) --dist loadfile
	$(MAKE) sanitize
	@if command -v nvcc >/dev/null; then $(MAKE) cuda; else echo "no nvcc: the CUDA backend is not compiled"; fi

# All cases of the CUDA backend in an emulation of the device; `make test` runs some of them.
test-cuda: $(VENV)/tests-installed
	$(BIN)/python -m pytest -q tests/cuda -n $(JOBS) --dist worksteal

# Source distribution and wheels: their contents, twice the same bytes, installed without network, CUDA by pip's compiler.
test-packaging: $(VENV)/tests-installed
	$(BIN)/python -m pytest -q tests/packaging

# Into dist/: what this machine can build. `wheels-cuda` with the CUDA backend for every supported GPU, which takes long.
wheels:
	.ci/wheels

wheels-cuda:
	.ci/wheels cuda

# A Ray cluster on this machine: its own tests, and the plain server's against it.
test-ray: $(VENV)/tests-installed
	$(BIN)/python -m pytest -q tests/cluster -n 1
	DGEMMA_TEST_SERVER=ray $(BIN)/python -m pytest -q tests/server --ignore tests/server/clients

# Programs of others, with their own packages, against the server: a hundred packages, and apart for that reason.
test-clients: $(VENV)/tests-installed
	$(BIN)/pip install --quiet '.[test,clients]'
	@if command -v npm >/dev/null; then \
	  mkdir -p build/clients && cp tests/server/clients/programs/package.json build/clients/ && \
	  npm install --silent --no-audit --no-fund --prefix build/clients; \
	else echo "no npm: Claude Code, Codex, Continue, Cline and the packages in JavaScript are not tried"; fi
	$(BIN)/python -m pytest -q tests/server/clients tests/python/test_llama.py -n $(JOBS) --dist loadfile

# The same files in llama.cpp, through a package that compiles it: minutes, and apart for that reason.
test-interchange: $(VENV)/tests-installed
	$(BIN)/pip install --quiet llama-cpp-python==0.3.36
	$(BIN)/python -m pytest -q tests/interchange

# The C tests, and the Python tests of everything that reads untrusted bytes, under AddressSanitizer and UBSan; sessions at
# once under ThreadSanitizer.
sanitize: $(VENV)/tests-installed $(TINY)
	tests/native/sanitize.sh
	tests/native/sanitize_threads.sh $(TINY)

lint: $(VENV)/tests-installed
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy --strict

bench: $(TINY)
	$(BIN)/dgemma bench -m $(TINY)

fuzz: $(VENV)/tests-installed
	tests/fuzz/run.sh

$(TINY): models/tiny/model.safetensors $(VENV)/installed
	@mkdir -p build
	$(BIN)/dgemma convert models/tiny --outtype q4_0 --outfile $@ --force

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet .
	@touch $@

$(VENV)/tests-installed: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet '.[test]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf build $(VENV)

# libdgemma_cuda.so for the GPUs of this machine, or one architecture where there are none.
cuda: $(VENV)/tests-installed
	cmake -S . -B build/cuda -G Ninja -DDGEMMA_CUDA=ON -DDGEMMA_WERROR=ON
	cmake --build build/cuda --target dgemma_cuda

# The same for every supported GPU; takes long. CUDA code for later ones is made from the PTX of the last.
cuda-all: $(VENV)/tests-installed
	cmake -S . -B build/cuda-all -G Ninja -DDGEMMA_CUDA=ON -DDGEMMA_WERROR=ON \
	  "-DCMAKE_CUDA_ARCHITECTURES=80-real;86-real;89-real;90-real;100-real;120-real;121-real;120-virtual"
	cmake --build build/cuda-all --target dgemma_cuda
