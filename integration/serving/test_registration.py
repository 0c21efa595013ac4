"""``register()`` runs in every vLLM process at its start: cheap, idempotent, and no hand on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .process import environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

# CPU time of the one thread, not the clock: what other processes do meanwhile does not count.
MEASURE = """
import json, sys, time
import torch, vllm.engine.arg_utils
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, _CUSTOMIZED_METHOD_TO_QUANT_CONFIG as custom
before = set(sys.modules)
start = time.thread_time()
from moe_backend_plugin.engines.vllm import register
register()
spent = time.thread_time() - start
first = list(QUANTIZATION_METHODS), dict(custom)
register()
print(json.dumps({
    "seconds": spent,
    "modules": sorted(m for m in set(sys.modules) - before if "." not in m),
    "registered": "nvfp4_cutedsl" in custom,
    "unchanged": first == (list(QUANTIZATION_METHODS), dict(custom)),
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    def once() -> dict:
        done = subprocess.run([sys.executable, "-c", MEASURE], env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    found = [once()]
    # The first process after an installation also compiles the package; nothing is proved wrong by one slow process.
    while found[-1]["seconds"] >= 0.05 and len(found) < 3:
        found.append(once())
    return found


def test_costs_less_than_50_ms(measured: list[dict]) -> None:
    print([f"{run['seconds'] * 1000:.1f} ms" for run in measured])
    assert min(run["seconds"] for run in measured) < 0.05, measured


def test_registers_once(measured: list[dict]) -> None:
    assert all(run["registered"] and run["unchanged"] for run in measured), measured


def test_leaves_cuda_alone(measured: list[dict]) -> None:
    assert not any(run["cuda"] for run in measured), measured
