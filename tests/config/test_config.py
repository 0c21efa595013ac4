"""Settings: which source wins, and what a user reads when one is wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_backend_plugin.config import ENV_FILE, EXTRA_SOURCE, PluginConfig, describe, fields, load_config, variable
from moe_backend_plugin.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "deploy" / "moe-backend-plugin.yaml"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.upper().startswith("MOE_BACKEND_PLUGIN_"):
            monkeypatch.delenv(name)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Write a settings file and name it in the environment."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "plugin.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv(ENV_FILE, str(path))
        return str(path)

    return write


def sources(config: PluginConfig) -> dict[str, tuple]:
    return {setting.field: (setting.value, setting.source) for setting in describe(config)}


def test_defaults():
    config = load_config()
    assert not config.strict and not config.take_nvfp4_checkpoints and config.checkpoint_check == "full"
    assert (config.moe.provider, config.moe.activations, config.linear.provider, config.gdn.provider) == ("auto",) * 4
    assert {source for _, source in sources(config).values()} == {"default"}


def test_sources_win_in_order_and_merge(config_file, monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__PROVIDER", "engine")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_LINEAR__PROVIDER", "engine")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_STRICT", "true")
    path = config_file("moe: {provider: torch}\nlinear: {provider: torch}\ncheckpoint_check: headers\n")
    config = load_config({"linear": {"activations": "nvfp4"}, "moe": {"provider": "auto"}})
    assert sources(config) == {
        "strict": (True, "MOE_BACKEND_PLUGIN_STRICT"),
        "take_nvfp4_checkpoints": (False, "default"),
        "checkpoint_check": ("headers", path),
        "kernel_cache": ("", "default"),
        "moe.provider": ("auto", EXTRA_SOURCE),
        "moe.activations": ("auto", "default"),
        "moe.tactics": ("cache", "default"),
        "linear.provider": ("torch", path),
        "linear.activations": ("nvfp4", EXTRA_SOURCE),
        "gdn.provider": ("auto", "default"),
    }


def test_an_empty_kernel_cache_is_not_set(config_file, monkeypatch):
    """As in the sample file, which lists every setting: the folder that a container's variable names stays in force."""
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_KERNEL_CACHE", "/var/cache/kernels")
    path = config_file('kernel_cache: ""\nstrict: true\n')
    for extra in ({}, {"kernel_cache": ""}):
        found = sources(load_config(extra))
        assert found["kernel_cache"] == ("/var/cache/kernels", "MOE_BACKEND_PLUGIN_KERNEL_CACHE") and found["strict"] == (True, path)


@pytest.mark.parametrize("name", ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"])
def test_what_kubernetes_says_of_a_service_of_this_name_is_no_setting(monkeypatch, name):
    monkeypatch.setenv(f"MOE_BACKEND_PLUGIN_{name}", "10.0.0.1")
    assert load_config() == PluginConfig()


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("False", False)])
def test_booleans_of_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_TAKE_NVFP4_CHECKPOINTS", text)
    assert load_config().take_nvfp4_checkpoints is value


def test_example_file_lists_every_setting_with_its_default(config_file):
    config_file(EXAMPLE.read_bytes())
    assert load_config().model_dump() == PluginConfig().model_dump()
    listed = yaml.safe_load(EXAMPLE.read_text())
    flat = {f"{k}.{inner}" for k, v in listed.items() if isinstance(v, dict) for inner in v} | {
        k for k, v in listed.items() if not isinstance(v, dict)
    }
    assert flat == {name for name, _ in fields()}


def test_frozen_hashable_and_picklable():
    config = load_config({"moe": {"provider": "torch"}})
    with pytest.raises(Exception, match="frozen"):
        config.strict = True
    assert pickle.loads(pickle.dumps(config)) == config
    hash(config)


BAD_EXTRA = [
    ({"moe": {"provider": "cuda"}}, ["moe.provider", "'cuda'", "auto, cutedsl, torch, engine"]),
    ({"linear": {"provider": "marlin"}}, ["linear.provider", "'marlin'", "auto, cutedsl, torch, engine"]),
    ({"moe": {"activations": "fp8"}}, ["moe.activations", "'fp8'", "auto, bf16, nvfp4"]),
    ({"strict": "maybe"}, ["strict", "'maybe'", "true, false"]),
    ({"strict": None}, ["strict", "None", "true, false"]),
    ({"checkpoint_check": True}, ["checkpoint_check", "True", "full, headers"]),
    ({"moe": {"tactics": "tune"}}, ["moe.tactics", "'tune'", "cache, heuristic"]),
    ({"kernel_cache": 5}, ["kernel_cache", "5", "the path of a folder"]),
    ({"meo": {}}, ["meo", "unknown setting", "did you mean moe?"]),
    ({"gdn": {"activations": "bf16"}}, ["gdn.activations", "unknown setting", "gdn.provider"]),
    ({"moe": {"providr": "torch"}}, ["moe.providr", "did you mean moe.provider?"]),
    ({"moe": "torch"}, ["moe", "'torch'", "a mapping of settings"]),
    ({"moe": None}, ["moe", "None", "a mapping of settings"]),
    ({7: 1}, ["7", "unknown setting"]),
    ([1], ["list [1]", "a mapping of settings"]),
    ({"take_nvfp4_checkpoints": True}, ["take_nvfp4_checkpoints", "True", "MOE_BACKEND_PLUGIN_TAKE_NVFP4_CHECKPOINTS"]),
    ({"moe": {"provider": "engine", "activations": "nvfp4"}}, ["moe.activations", "'nvfp4'", "moe.provider", "'engine'"]),
    ({"linear": {"provider": "engine", "activations": "bf16"}}, ["linear.activations", "'bf16'", "linear.provider", "'engine'"]),
    (
        {"strict": True, "moe": {"provider": "engine"}, "linear": {"provider": "engine"}, "gdn": {"provider": "engine"}},
        ["strict", "all 'engine'", "at least one provider"],
    ),
]


@pytest.mark.parametrize(("extra", "words"), BAD_EXTRA, ids=lambda value: str(value)[:40])
def test_bad_additional_config(extra, words):
    with pytest.raises(ConfigError) as caught:
        load_config(extra)
    for word in [*words, EXTRA_SOURCE]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = [
    ("moe: [provider", ["malformed YAML"]),
    ("moe:\n\tprovider: torch", ["malformed YAML", "line 2"]),
    ("strict: true\nstrict: false\n", ["'strict' appears twice", "line"]),
    ("", ["no settings", ENV_FILE]),
    ("# only a comment\n", ["no settings"]),
    ("- strict", ["list", "a mapping of settings"]),
    ("torch", ["'torch'", "a mapping of settings"]),
    ("stric: true", ["stric", "did you mean strict?"]),
    ("moe: {provider: 3}", ["moe.provider", "3", "auto, cutedsl, torch, engine"]),
    (b"\xff\xfe\x00", ["not UTF-8 text"]),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES, ids=lambda value: repr(value)[:30])
def test_bad_file(config_file, text, words):
    path = config_file(text)
    with pytest.raises(ConfigError) as caught:
        load_config()
    for word in [*words, path]:
        assert word in str(caught.value)


def test_file_that_is_missing_a_folder_or_not_named(tmp_path, monkeypatch):
    for value, words in [
        (tmp_path / "none.yaml", "does not exist"),
        (tmp_path, "cannot be read"),
        ("", "an empty value"),
        (" ", "an empty value"),
    ]:
        monkeypatch.setenv(ENV_FILE, str(value))
        with pytest.raises(ConfigError, match=words) as caught:
            load_config()
        assert ENV_FILE in str(caught.value)


BAD_VARIABLES = [
    ("MOE_BACKEND_PLUGIN_STRCIT", "1", "did you mean MOE_BACKEND_PLUGIN_STRICT?"),
    ("MOE_BACKEND_PLUGIN_MOE_PROVIDER", "torch", "did you mean MOE_BACKEND_PLUGIN_MOE__PROVIDER?"),
    ("MOE_BACKEND_PLUGIN_MOE", '{"provider": "torch"}', "MOE_BACKEND_PLUGIN_MOE__PROVIDER"),
    ("MOE_BACKEND_PLUGIN_STRICT", "", "an empty value"),
    ("MOE_BACKEND_PLUGIN_STRICT", "perhaps", "'perhaps'; allowed: true, false"),
    ("MOE_BACKEND_PLUGIN_GDN__PROVIDER", "Torch", "'Torch'; allowed: auto, cutedsl, torch, engine"),
    ("MOE_BACKEND_PLUGIN_CONFIGS", "x", "did you mean MOE_BACKEND_PLUGIN_CONFIG?"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD_VARIABLES)
def test_bad_variable(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert name in str(caught.value) and words in str(caught.value)


def test_contradiction_names_both_sources(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__ACTIVATIONS", "bf16")
    with pytest.raises(ConfigError) as caught:
        load_config({"moe": {"provider": "engine"}})
    assert "MOE_BACKEND_PLUGIN_MOE__ACTIVATIONS" in str(caught.value) and EXTRA_SOURCE in str(caught.value)


def test_every_setting_is_described_and_has_a_variable():
    for name, field in fields():
        assert field.description
        assert variable(name).startswith("MOE_BACKEND_PLUGIN_")


def test_import_is_light():
    code = "import sys, moe_backend_plugin.config, moe_backend_plugin.device; print('torch' in sys.modules, 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False"]
