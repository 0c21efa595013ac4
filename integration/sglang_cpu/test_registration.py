"""How this package gets into SGLang's own processes, and what they say to bad input: one line each."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_backend_plugin.device import Device
from moe_backend_plugin.errors import CheckpointError, PluginError

from .conftest import MODELS

MOE_MODEL, NEXT_MODEL = MODELS / "pycoder-moe-nvfp4", MODELS / "pycoder-next-nvfp4"
EXAMPLE = Path(__file__).resolve().parents[2] / "deploy/moe-backend-plugin.yaml"
FLAG = "--moe-runner-backend cutedsl: found "


PROGRAMS = {
    "sglang serve": [str(Path(sys.executable).with_name("sglang")), "serve"],
    "python -m sglang.launch_server": [sys.executable, "-m", "sglang.launch_server"],
}
REFUSED = "moe-backend-plugin: error: "


@pytest.fixture
def serve(sglang):
    """The last line of a server of its own that has to refuse its arguments: said once, and no traceback before it."""

    def run(*arguments: object, program: str = "sglang serve", **environment: str) -> str:
        command = [*PROGRAMS[program], "--device", "cpu", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith(REFUSED), done.stderr
        printed = done.stdout + done.stderr
        assert "Traceback" not in printed and "Error" not in printed and printed.count(last.removeprefix(REFUSED)) == 1, printed
        return last.removeprefix(REFUSED)

    return run


def config_with(folder: Path, quantization: dict | None) -> Path:
    """A folder with the small model's config.json but for its quantisation: what is looked at before any weight is."""
    config = json.loads((MOE_MODEL / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
    return folder


def test_sglang_finds_the_plugin(sglang):
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins_by_group

    from moe_backend_plugin.engines.sglang import register

    assert load_plugins_by_group(GENERAL_PLUGINS_GROUP)["moe_backend_plugin"] == (register, "moe-backend-plugin")
    for name, known in (("cutedsl", choices.MOE_RUNNER_BACKEND_CHOICES), ("cutedsl_plugin", choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES)):
        assert known.count(name) == 1


def test_the_runner_is_in_sglangs_registry(sglang):
    from sglang.srt.layers.moe.moe_runner import runner

    from moe_backend_plugin.engines.sglang.moe import PluginRunnerCore

    with pytest.raises(ValueError, match="cutedsl"):
        runner.register_moe_runner_core("cutedsl", PluginRunnerCore)


# SGLang's default way to keep states needs a GPU to copy them.
GDN = dict(model=NEXT_MODEL, moe_runner_backend="cutedsl", mamba_radix_cache_strategy="no_buffer", disable_overlap_schedule=True)

# --- one configuration file for both engines ---------------------------------------------------------------------------------------------


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Write the plugin's file, as this process would have found it at its start."""
    from moe_backend_plugin.engines.sglang import settings

    def write(text: str) -> None:
        (tmp_path / "plugin.yaml").write_text(text)
        monkeypatch.setenv("MOE_BACKEND_PLUGIN_CONFIG", str(tmp_path / "plugin.yaml"))
        settings.plugin_config.cache_clear()

    yield write
    settings.plugin_config.cache_clear()


def test_the_file_that_vllm_reads_is_read(arguments, settings):
    from moe_backend_plugin.engines.sglang.settings import plugin_config

    settings(EXAMPLE.read_text().replace("tactics: cache", "tactics: heuristic"))
    assert arguments(MOE_MODEL, moe_runner_backend="cutedsl").moe_runner_backend == "cutedsl"
    assert plugin_config().moe.tactics == "heuristic"


@pytest.mark.parametrize("depth", ["full", "headers"])
def test_a_damaged_checkpoint_is_refused_before_anything_starts(arguments, settings, tmp_path, depth):
    """As vLLM refuses it; the setting says how closely it is looked at."""
    from safetensors.torch import load_file, save_file

    settings(f"checkpoint_check: {depth}\n")
    model = shutil.copytree(MOE_MODEL, tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".experts.3.up_proj.weight_scale"))
    tensors[name].view(torch.uint8)[1, 1] = 0x7F  # NaN
    save_file(tensors, file)
    if depth == "headers":
        assert arguments(model, moe_runner_backend="cutedsl").moe_runner_backend == "cutedsl"
    else:
        with pytest.raises(CheckpointError, match=re.escape(name)):
            arguments(model, moe_runner_backend="cutedsl")
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"experts\.3: found no up_proj\.weight_scale"):
        arguments(model, moe_runner_backend="cutedsl")
    # Without this package's runner it is SGLang's own business.
    assert arguments(model, moe_runner_backend="triton").moe_runner_backend == "triton"


@pytest.mark.parametrize(("provider", "expected"), [("auto", None), ("cutedsl", "cutedsl_plugin")])
def test_the_file_chooses_the_gdn_kernels(arguments, settings, provider, expected):
    settings(f"gdn: {{provider: {provider}}}\n")
    from sglang.srt.arg_groups.model_override_base import resolved_view

    assert resolved_view(arguments(**GDN)).linear_attn_decode_backend == expected


def runner_of(made) -> str:
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(made).moe_runner_backend


TAKE = "take_nvfp4_checkpoints: true\n"


def test_the_file_chooses_the_runner_of_nvfp4_experts(arguments, settings, tmp_path, caplog):
    """As it makes vLLM take such checkpoints; a flag that names a runner wins."""
    caplog.set_level("INFO")
    settings(TAKE)
    assert runner_of(arguments(MOE_MODEL)) == runner_of(arguments(**GDN | {"moe_runner_backend": "auto"})) == "cutedsl"
    assert caplog.text.count("take_nvfp4_checkpoints in this package's settings: --moe-runner-backend cutedsl") == 2
    assert runner_of(arguments(MOE_MODEL, moe_runner_backend="triton")) == "triton"
    assert runner_of(arguments(config_with(tmp_path, None))) == "auto"
    for text in ("{}", f"{TAKE}moe: {{provider: engine}}\n"):
        settings(text)
        assert runner_of(arguments(MOE_MODEL)) == "auto"


def test_only_nvfp4_experts_are_taken(arguments, settings, tmp_path):
    """By the files, or by the description of a checkpoint that has none yet."""
    settings(TAKE)
    described = json.loads((MOE_MODEL / "config.json").read_text())["quantization_config"]
    without = described | {"ignore": [*described["ignore"], "*.experts*"]}
    for name, quantization, expected in (("with", described, "cutedsl"), ("without", without, "auto")):
        (tmp_path / name).mkdir()  # SGLang remembers what it read of a folder
        assert runner_of(arguments(config_with(tmp_path / name, quantization), load_format="dummy")) == expected
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(MOE_MODEL, tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    save_file({name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}, file)
    assert runner_of(arguments(model)) == "auto"


@pytest.mark.parametrize("strict", [True, False])
def test_what_the_runner_cannot_do_stays_sglangs(arguments, settings, caplog, strict):
    settings(f"{TAKE}strict: {str(strict).lower()}\n")
    flags = dict(model=MOE_MODEL, enable_pdmux=True, chunked_prefill_size=-1, disable_overlap_schedule=True)
    if strict:
        with pytest.raises(PluginError, match="--enable-pdmux"):
            arguments(**flags)
    else:
        assert runner_of(arguments(**flags)) == "auto"
        assert f"take_nvfp4_checkpoints: the experts stay on SGLang's runner. {FLAG}--enable-pdmux" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("moe: {provider: engine}\n", "moe.provider 'engine'"),
        ("moe: {providr: auto}\n", "moe.providr"),
        ("gdn: {provider: engine}\n", "gdn.provider 'engine'"),
        ("strict: true\nlinear: {provider: torch}\n", "strict: found true with linear.provider 'torch'"),
    ],
)
def test_a_file_that_contradicts_the_flags_is_refused(arguments, settings, text, words):
    settings(text)
    with pytest.raises(PluginError) as error:
        arguments(**GDN, linear_attn_decode_backend="cutedsl_plugin")
    assert words in str(error.value) and "\n" not in str(error.value)


# --- models with other linear attention, or none ----------------------------------------------------------------------------------------


def kimi_linear():
    from sglang.srt.configs.kimi_linear import KimiLinearConfig

    kda = dict(kda_layers=[1], full_attn_layers=[2], num_heads=2, head_dim=16, short_conv_kernel_size=4)
    return KimiLinearConfig(linear_attn_config=kda)


def jet_nemotron():
    from sglang.srt.configs.jet_nemotron import JetNemotronConfig

    return JetNemotronConfig(layer_types=["jet", "attn"])


def jet_vlm():
    from sglang.srt.configs.jet_vlm import JetVLMConfig

    return JetVLMConfig(text_config={"layer_types": ["jet", "attn"]})


def gigachat():
    from sglang.srt.configs.gigachat35 import GigaChat35Config

    return GigaChat35Config()


def nemotron_h():
    from sglang.srt.configs.nemotron_h import NemotronHConfig

    return NemotronHConfig()


def model_config(config):
    """What SGLang's functions look at."""
    from sglang.srt.configs.linear_attn_model_registry import get_linear_attn_config

    return SimpleNamespace(hf_config=config, is_draft_model=False, linear_attn_registry_result=get_linear_attn_config(config))


@pytest.mark.parametrize(
    ("make", "is_gdn", "words"),
    [
        (gigachat, True, None),
        (nemotron_h, False, None),
        (kimi_linear, False, "KDA layers"),
        (jet_nemotron, False, "Jet-Nemotron"),
        (jet_vlm, False, "Jet-Nemotron"),
    ],
)
@pytest.mark.parametrize("by_file", [True, False])
def test_only_models_with_gdn_layers_get_its_kernels(sglang, settings, monkeypatch, make, is_gdn, words, by_file):
    from sglang.srt.arg_groups import model_override_base

    from moe_backend_plugin.engines.sglang.arguments import choose_gdn

    settings(f"gdn: {{provider: {'cutedsl' if by_file else 'auto'}}}\n")
    args = sglang.ServerArgs(model_path="m", linear_attn_decode_backend=None if by_file else "cutedsl_plugin")
    config = model_config(make())
    monkeypatch.setattr(model_override_base, "model_config_of", lambda _: config)
    called = []
    if words and not by_file:
        with pytest.raises(PluginError) as error:
            choose_gdn(args, called.append)
        assert str(error.value).startswith("--linear-attn-decode-backend cutedsl_plugin: found ") and words in str(error.value)
        assert not called
        return
    choose_gdn(args, called.append)
    chosen = model_override_base.resolved_view(args).linear_attn_decode_backend
    assert called == [args] and chosen == ("cutedsl_plugin" if is_gdn or not by_file else None)


def test_a_model_without_linear_attention_ignores_flag_and_file(arguments, settings):
    from sglang.srt.arg_groups.model_override_base import resolved_view

    assert arguments(MOE_MODEL, linear_attn_decode_backend="cutedsl_plugin")
    settings("gdn: {provider: cutedsl}\n")
    assert resolved_view(arguments(MOE_MODEL)).linear_attn_decode_backend is None


def test_what_the_file_says_of_dense_layers_is_not_ignored_in_silence(arguments, settings, caplog):
    settings("linear: {provider: torch}\n")
    arguments(MOE_MODEL, moe_runner_backend="cutedsl")
    assert "Dense NVFP4 layers stay on SGLang's kernels; not used: linear.provider 'torch'" in caplog.text


# --- bad input ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (None, "a checkpoint without quantisation (bf16 or fp16 weights); allowed: an NVFP4 checkpoint"),
        (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
            "quantization 'fp8'; allowed: modelopt_fp4, modelopt_mixed, compressed-tensors: an NVFP4 checkpoint",
        ),
    ],
)
def test_a_model_of_another_kind(arguments, tmp_path, quantization, words):
    with pytest.raises(PluginError) as error:
        arguments(config_with(tmp_path, quantization), moe_runner_backend="cutedsl")
    assert str(error.value).startswith(FLAG + words) and "\n" not in str(error.value)


def test_the_generic_name_of_modelopt_is_accepted(arguments):
    assert arguments(MOE_MODEL, moe_runner_backend="cutedsl", quantization="modelopt").moe_runner_backend == "cutedsl"


def test_fp8_models_with_nvfp4_experts_are_accepted(arguments, tmp_path):
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    nvfp4 = {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16, "ignore": []}
    assert arguments(config_with(tmp_path, fp8 | nvfp4), moe_runner_backend="cutedsl").moe_runner_backend == "cutedsl"


def test_streams_side_by_side_are_refused(arguments):
    with pytest.raises(PluginError) as error:
        arguments(MOE_MODEL, moe_runner_backend="cutedsl", enable_pdmux=True, chunked_prefill_size=-1, disable_overlap_schedule=True)
    assert str(error.value).startswith(f"{FLAG}--enable-pdmux; allowed: ")


RAY = "found Ray's scheduler actors (--use-ray), which load no plugins; allowed: SGLang's own processes, or another backend"


def test_ray_is_refused(arguments):
    with pytest.raises(PluginError) as error:
        arguments(MOE_MODEL, moe_runner_backend="cutedsl", use_ray=True)
    assert str(error.value) == f"--moe-runner-backend cutedsl: {RAY}"
    with pytest.raises(PluginError) as error:
        arguments(**GDN | {"moe_runner_backend": "auto"}, linear_attn_decode_backend="cutedsl_plugin", use_ray=True)
    assert str(error.value) == f"--linear-attn-decode-backend cutedsl_plugin: {RAY}"


def test_ray_is_refused_without_its_flag(arguments, monkeypatch):
    """``RayEngine`` by its own name, which needs no flag. Ray is not installed: its decorator and two names are enough to import it."""
    ray = {name: ModuleType(name) for name in ("ray", "ray.util", "ray.util.placement_group", "ray.util.scheduling_strategies")}
    ray["ray"].remote = lambda decorated: decorated
    ray["ray.util.placement_group"].PlacementGroup = ray["ray.util.scheduling_strategies"].PlacementGroupSchedulingStrategy = object
    for name, module in ray.items():
        monkeypatch.setitem(sys.modules, name, module)
    from sglang.srt.ray.engine import RayEngine

    launch = RayEngine._launch_scheduler_processes
    with pytest.raises(PluginError) as error:
        launch(arguments(MOE_MODEL, moe_runner_backend="cutedsl"), None, None)
    assert str(error.value) == f"--moe-runner-backend cutedsl: {RAY}"
    with pytest.raises(PluginError) as error:
        launch(arguments(**GDN | {"moe_runner_backend": "auto"}, linear_attn_decode_backend="cutedsl_plugin"), None, None)
    assert str(error.value) == f"--linear-attn-decode-backend cutedsl_plugin: {RAY}"
    with pytest.raises(AttributeError):  # of the module that stands in for Ray
        launch(arguments(MOE_MODEL), None, None)


@pytest.mark.parametrize(("name", "capability"), [("NVIDIA A100", (8, 0)), ("NVIDIA B200", (10, 0)), ("NVIDIA RTX PRO 6000", (12, 0))])
def test_an_unsupported_gpu(arguments, monkeypatch, name, capability):
    from moe_backend_plugin.engines.sglang import settings

    monkeypatch.setattr(settings, "device", lambda: Device("cuda", name, 80 << 30, capability))
    with pytest.raises(PluginError) as error:
        arguments(MOE_MODEL, moe_runner_backend="cutedsl")
    assert str(error.value).startswith(f"{FLAG}{name} (sm{capability[0]}{capability[1]}); allowed: a GPU of compute capability 9.0")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_server_says_it_in_one_line(serve, tmp_path, program):
    """Through the program, a configuration file and every plugin that comes with SGLang."""
    model = config_with(tmp_path, None)
    (tmp_path / "server.yaml").write_text("moe-backend: cutedsl\n")
    last = serve("--model-path", model, "--config", tmp_path / "server.yaml", program=program)
    assert last.startswith(f"{FLAG}a checkpoint without quantisation")


def test_a_server_says_in_one_line_what_is_wrong_with_the_settings(serve, tmp_path):
    (tmp_path / "plugin.yaml").write_text("gdn: {provider: engine}\n")
    flags = ("--linear-attn-decode-backend", "cutedsl_plugin")
    last = serve("--model-path", MOE_MODEL, *flags, MOE_BACKEND_PLUGIN_CONFIG=str(tmp_path / "plugin.yaml"))
    assert last.startswith("--linear-attn-decode-backend cutedsl_plugin: found gdn.provider 'engine'")


def test_engine_raises_what_a_program_prints(sglang, tmp_path):
    from sglang.srt.entrypoints.engine import Engine

    with pytest.raises(PluginError, match="a checkpoint without quantisation"):
        Engine(model_path=str(config_with(tmp_path, None)), moe_backend="cutedsl", device="cpu")


def test_another_plugin_claims_the_name_first(serve, tmp_path):
    """A second distribution with a runner of the same name, which SGLang loads before this package."""
    (tmp_path / "rival-1.0.dist-info").mkdir()
    (tmp_path / "rival-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (tmp_path / "rival-1.0.dist-info/entry_points.txt").write_text("[sglang.srt.plugins]\nrival = rival:register\n")
    (tmp_path / "rival.py").write_text(
        "def register():\n"
        "    from sglang.srt.arg_groups.choices import add_moe_runner_backend_choices\n"
        "    add_moe_runner_backend_choices(['cutedsl'])\n"
    )
    last = serve("--model-path", MOE_MODEL, "--moe-backend", "cutedsl", PYTHONPATH=str(tmp_path))
    assert last.startswith(FLAG) and "one owner of the name" in last


def test_another_plugin_claims_the_name_later(arguments, monkeypatch):
    from sglang.srt.arg_groups import choices

    from moe_backend_plugin.engines.sglang import arguments as ours

    monkeypatch.setattr(ours, "_claimed_by", None)
    choices.add_moe_runner_backend_choices(["cutedsl"])
    try:
        with pytest.raises(PluginError) as error:
            arguments(MOE_MODEL, moe_runner_backend="cutedsl")
    finally:
        choices.MOE_RUNNER_BACKEND_CHOICES.pop()
    expected = "an entry of that name from another plugin too; allowed: one owner of the name; SGLANG_PLUGINS says which plugins are loaded"
    assert str(error.value) == FLAG + expected


def test_a_missing_engine(tmp_path):
    """The entry point where SGLang is not there; every plugin of a process is called, whichever engine it is."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['sglang'] = None\n")
    code = "from moe_backend_plugin.engines.sglang import register; register()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    expected = "moe_backend_plugin.errors.ConfigError: engine: found no SGLang; allowed: SGLang 0.5.22 or 0.5.23; pip install "
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(expected)
