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
