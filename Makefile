# Every target that needs an environment makes it first: .venv, with the versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo study test test-models matrix fuzz sanitize aarch64 bench gpu docs lint format clean help

help:
	@echo "make demo   distil a segmenter by every method, start to end (about 8 minutes on two cores)"
	@echo "make study  what masks add to distilling a detector, eight seeds (up to three hours on two cores; resumes)"
	@echo "make test   all tests (GPU tests only where there is a GPU)"
	@echo "make test-models  models of transformers, timm, Lightning, Ultralytics, torchdistill, OpenMMLab, in their own environment"
	@echo "make matrix  kernel tests with the oldest, the pinned and the newest torch and triton, each in an environment of its own"
	@echo "make fuzz   random calls against the reference in float64 (SEED, CASES)"
	@echo "make sanitize  fuzzer and kernel tests with AddressSanitizer and UndefinedBehaviorSanitizer in the C++ kernels"
	@echo "make aarch64  the C++ kernels cross-compiled and checked in an emulator (Debian: g++-aarch64-linux-gnu qemu-user)"
	@echo "make bench  microbenchmarks on the CPU against the published formula, torch.compile and a streaming pass"
	@echo "make gpu    tests and benches on an NVIDIA GPU, with the torch that PYTHON has; installs nothing"
	@echo "make docs   the documentation as a site, in build/site"
	@echo "make lint   ruff, mypy, clang-format"

$(INSTALLED): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/* python/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,triton]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/maskd-kernels demo --out demo_output

study: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[examples]"
	$(BIN)/python examples/study.py

# Side by side: most of it is Triton's interpreter, one thread of Python. Threads that wait must not spin meanwhile.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

# The frameworks' newest releases beside the pinned torch. Nothing is downloaded but packages: all weights are random.
MODELS_VENV := .venv-models
MODELS := "transformers[torch]>=5" "timm>=1" "lightning>=2.5" "ultralytics>=8.4" "cloudpickle>=3.1" "torchdistill>=1.1" \
	"mmengine>=0.10" "mmdet>=3.3" "mmsegmentation>=1.2" "mmcv-lite>=2,<2.2" ftfy regex

test-models:
	$(PYTHON) -m venv $(MODELS_VENV)
	$(MODELS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[test]" $(MODELS)
	YOLO_CONFIG_DIR=$(abspath build) YOLO_OFFLINE=true $(MODELS_VENV)/bin/python -m pytest \
		tests/test_models.py tests/test_integrations.py tests/test_integrations_transformers.py \
		tests/test_integrations_mmengine.py tests/test_configs_mmengine.py tests/test_documentation.py

# Five gigabytes and some minutes each; removed afterwards. Beside the native kernels of .venv.
matrix: $(INSTALLED)
	$(BIN)/python tests/matrix.py

SEED ?= 0
CASES ?= 3000

fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py --seed $(SEED) --cases $(CASES)

# The package beside a sanitized extension. The sanitizer's runtime must be there before Python is, and the C++ library
# before it looks for what it intercepts; what Python and PyTorch never free is theirs: leaks are not looked for. Its report
# goes past Python: pytest must not capture it.
SANITIZED := build/sanitized
SANITIZED_TESTS = tests/test_fuzz.py tests/test_receptive_stats.py tests/test_maskd_loss.py tests/test_streaming_ops.py \
	tests/test_masked_conv.py tests/test_bindings.py

sanitize: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pybind11 cmake ninja
	cmake=$(abspath $(BIN))/cmake; export PATH="$(abspath $(BIN)):$$PATH"; \
	$$cmake -S . -B $(SANITIZED) -G Ninja -DMASKD_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python && \
	$$cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/maskd_kernels && cp -r maskd_kernels $(SANITIZED)/ && rm -f $(SANITIZED)/maskd_kernels/*.so
	cp $(SANITIZED)/_native*.so $(SANITIZED)/maskd_kernels/
	cd $(SANITIZED) && export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" && \
	$(abspath $(BIN))/python -c 'import sys, pytest; from maskd_kernels import native; \
		assert native.module().__file__.startswith("$(abspath $(SANITIZED))/"); sys.exit(pytest.main(sys.argv[1:]))' \
		-p no:cacheprovider --capture=sys -k "not triton" $(abspath $(SANITIZED_TESTS))

# What tests/kernels/check.cpp compares. CMAKE is any from 3.18 on; natively, and by another compiler:
#   cmake -S . -B build/check -DMASKD_CHECK=ON -DCMAKE_CXX_COMPILER=clang++
CMAKE ?= cmake
AARCH64 := build/aarch64

aarch64:
	$(CMAKE) -S . -B $(AARCH64) -DMASKD_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(CMAKE) --build $(AARCH64) --parallel
	qemu-aarch64 -L /usr/aarch64-linux-gnu $(AARCH64)/kernel_check

bench: $(INSTALLED)
	$(BIN)/python -m bench --json bench/results
	$(BIN)/python -m bench.scaling --json bench/results
	$(BIN)/python -m bench.end_to_end --json bench/results
	$(BIN)/python -m bench.plot
	$(BIN)/python -m bench.document

# Side by side, since it is compiling that takes the time. All of it takes ten minutes at most.
GPU_TESTS = tests/test_receptive_stats.py tests/test_maskd_loss.py tests/test_streaming_ops.py tests/test_golden.py tests/test_functional.py \
	tests/test_losses_maskd.py tests/test_losses_mgd.py tests/test_losses_amd.py tests/test_gpu.py

gpu:
	printf '%s\n' $(GPU_TESTS) | MASKD_TEST_GPU=1 timeout 150 xargs -P $(words $(GPU_TESTS)) -I {} $(PYTHON) -m pytest -q {}
	for tool in memcheck racecheck; do \
		if command -v compute-sanitizer; then MASKD_TEST_GPU=1 timeout 55 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(PYTHON) -m pytest -q tests/test_golden.py -k triton || exit 1; else echo "no compute-sanitizer: $$tool skipped"; fi; \
	done
	timeout 230 $(PYTHON) -m bench --device cuda --suite maskd-gpu,operators-gpu,generative-gpu --seconds 3 --json bench/results
	timeout 90 $(PYTHON) -m bench.end_to_end --device cuda --seconds 6 --json bench/results

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[lint]"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h python/*.cpp python/*.h tests/kernels/*

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h python/*.cpp python/*.h tests/kernels/*

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info maskd_kernels/*.so
