"""The settings as a layer sees them: read once an engine, and each engine its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


def test_each_engine_has_the_settings_it_started_with(vllm_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from moe_backend_plugin.engines.vllm.settings import plugin_config

    file = tmp_path / "plugin.yaml"
    file.write_text("checkpoint_check: headers\n")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_CONFIG", str(file))
    strict = VllmConfig(additional_config={"moe_backend_plugin": {"strict": True}})
    with set_current_vllm_config(strict):
        assert plugin_config().strict and plugin_config().checkpoint_check == "headers"
        # Layers are built one after the other: a file that changes meanwhile must not split a model in two.
        file.write_text("checkpoint_check: full\n")
        assert plugin_config().checkpoint_check == "headers"
    with set_current_vllm_config(VllmConfig()):
        assert not plugin_config().strict and plugin_config().checkpoint_check == "full"
    with set_current_vllm_config(strict):
        assert plugin_config().strict


def test_one_file_serves_both_engines(vllm_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's side makes of a file is what SGLang's makes of it; integration/sglang_cpu serves with the same one."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from moe_backend_plugin.engines.sglang import settings as sglang
    from moe_backend_plugin.engines.vllm import settings as vllm

    file = tmp_path / "plugin.yaml"
    example = (Path(__file__).resolve().parents[2] / "deploy/moe-backend-plugin.yaml").read_text()
    file.write_text(example.replace("strict: false", "strict: true").replace("tactics: cache", "tactics: heuristic"))
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_CONFIG", str(file))
    with set_current_vllm_config(VllmConfig()):
        ours, theirs = vllm.plugin_config(), sglang.plugin_config.__wrapped__()  # unlike vLLM's, cached for a process
    assert ours == theirs and ours.strict and ours.moe.tactics == "heuristic"
