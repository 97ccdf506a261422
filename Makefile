# Every target that needs an environment makes it first: .venv, with the versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test bench gpu lint format clean help

help:
	@echo "make demo   distil a segmenter through receptive tokens, start to end (about 10 minutes on two cores)"
	@echo "make test   all tests (GPU tests only where there is a GPU)"
	@echo "make bench  microbenchmarks on the CPU against the published formula, torch.compile and a streaming pass"
	@echo "make gpu    tests and benches on an NVIDIA GPU, with the torch that PYTHON has; installs nothing"
	@echo "make lint   ruff, mypy, clang-format"

$(INSTALLED): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*) python/bindings.cpp
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,triton]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/maskd-kernels demo --out demo_output

test: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	$(BIN)/python -m bench --json bench/results
	$(BIN)/python -m bench --keep-memory --json bench/results

gpu:
	MASKD_TEST_GPU=1 $(PYTHON) -m pytest -q tests/test_receptive_stats.py tests/test_streaming_ops.py tests/test_golden.py \
		tests/test_functional.py tests/test_losses_maskd.py tests/test_losses_mgd.py tests/test_losses_amd.py tests/test_gpu.py
	$(PYTHON) -m bench --device cuda --json bench/results

lint: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[lint]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h python/*.cpp

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h python/*.cpp

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info maskd_kernels/*.so
