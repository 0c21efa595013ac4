"""Settings of the plugin as vLLM's users give them: refused where they are wrong, and what they choose where they are right."""

from __future__ import annotations

from pathlib import Path

import pytest

from .engines import EngineHost, Refusal
from .test_bad_checkpoints import assert_clear

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TAKE = {"MOE_BACKEND_PLUGIN_TAKE_NVFP4_CHECKPOINTS": "true"}


def refusal(engines: EngineHost, model: Path, **arguments) -> str:
    found = engines.config(model, **arguments)
    assert isinstance(found, Refusal), f"accepted: {found}"
    return found.message


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({"moe": {"provder": "torch"}}, ["moe.provder", "unknown setting", "moe.provider"]),
        ({"moe": {"provider": "tpu"}}, ["moe.provider", "'tpu'", "torch", "engine"]),
        ({"strict": "maybe"}, ["strict", "'maybe'", "true, false"]),
        ({"moe": "torch"}, ["moe", "'torch'", "mapping"]),
        ({"moe": {"provider": "engine", "activations": "nvfp4"}}, ["moe.activations", "'nvfp4'", "moe.provider"]),
        ({"take_nvfp4_checkpoints": True}, ["take_nvfp4_checkpoints", "True", "only in the YAML file"]),
    ],
    ids=["unknown", "bad-value", "bad-type", "no-group", "contradiction", "too-late"],
)
def test_additional_config_is_checked(settings: dict, pieces: list[str], engines: EngineHost, moe_model: Path) -> None:
    message = refusal(engines, moe_model, additional_config={"moe_backend_plugin": settings})
    assert_clear(message, [*pieces, "additional config"])


def test_settings_that_are_no_mapping(engines: EngineHost, moe_model: Path) -> None:
    assert_clear(refusal(engines, moe_model, additional_config={"moe_backend_plugin": "strict"}), ["'strict'", "mapping of settings"])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("moe:\n  provider: cuda\n", ["moe.provider", "'cuda'", "torch"]),
        ("stirct: true\n", ["stirct", "did you mean strict"]),
        ("moe: [unclosed\n", ["malformed YAML"]),
        ("strict: true\nmoe: {provider: engine}\nlinear: {provider: engine}\ngdn: {provider: engine}\n", ["strict", "all 'engine'"]),
    ],
    ids=["bad-value", "unknown", "malformed", "contradiction"],
)
def test_yaml_file_is_checked(text: str, pieces: list[str], engines: EngineHost, moe_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "plugin.yaml"
    path.write_text(text)
    assert_clear(refusal(engines, moe_model, env={"MOE_BACKEND_PLUGIN_CONFIG": str(path)}), [*pieces, str(path)])


def test_missing_yaml_file(engines: EngineHost, moe_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    message = refusal(engines, moe_model, env={"MOE_BACKEND_PLUGIN_CONFIG": str(path)})
    assert_clear(message, ["MOE_BACKEND_PLUGIN_CONFIG", str(path), "does not exist"])


@pytest.mark.parametrize(
    ("name", "value", "pieces"),
    [
        ("MOE_BACKEND_PLUGIN_STRIKT", "1", ["names no setting", "MOE_BACKEND_PLUGIN_STRICT"]),
        ("MOE_BACKEND_PLUGIN_GDN__PROVIDER", "tritn", ["gdn.provider", "'tritn'", "engine"]),
    ],
    ids=["unknown", "bad-value"],
)
def test_environment_is_checked(name: str, value: str, pieces: list[str], engines: EngineHost, moe_model: Path) -> None:
    assert_clear(refusal(engines, moe_model, env={name: value}), [name, *pieces])


@pytest.mark.parametrize("model", ["moe_model", "next_model"])
def test_variable_selects_the_plugin_without_the_flag(model: str, engines: EngineHost, request: pytest.FixtureRequest) -> None:
    found = engines.config(request.getfixturevalue(model), quantization=None, env=TAKE)
    assert not isinstance(found, Refusal), found
    assert found["quantization"] == "nvfp4_cutedsl" and found["quant_config"].startswith("moe_backend_plugin."), found


def test_without_the_variable_the_checkpoint_is_vllms_own(engines: EngineHost, moe_model: Path) -> None:
    found = engines.config(moe_model, quantization=None)
    assert isinstance(found, Refusal) or not found["quant_config"].startswith("moe_backend_plugin."), found


def test_another_method_on_the_command_line_contradicts_the_variable(engines: EngineHost, moe_model: Path) -> None:
    message = refusal(engines, moe_model, quantization="modelopt_fp4", env=TAKE)
    assert_clear(message, ["take_nvfp4_checkpoints", "--quantization", "modelopt_fp4"])


def test_unquantised_models_are_left_alone(engines: EngineHost, moe_model: Path, tmp_path: Path) -> None:
    """Claiming NVFP4 checkpoints must not touch other models."""
    from moe_backend_plugin.verify import dequantize_checkpoint

    dequantize_checkpoint(moe_model, tmp_path / "model")
    found = engines.config(tmp_path / "model", quantization=None, env=TAKE)
    assert not isinstance(found, Refusal), found
    assert found["quantization"] is None, found
