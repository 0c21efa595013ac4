"""``moe-backend bench moe`` and ``bench serve`` against vLLM's own code, as far as a CPU goes: layers are built, kernels are not run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from typer.testing import CliRunner

from moe_backend_plugin.bench import moe, serve, serve_sglang, serve_vllm
from moe_backend_plugin.bench.moe import Model
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.config import load_config
from moe_backend_plugin.moe.problem import Activation
from moe_backend_plugin.nvfp4.unscaled import unscaled

CPU = torch.device("cpu")
MODELS = Path(__file__).parents[2] / "integration/models"
PYCODER = {"qwen3-30b-a3b": MODELS / "pycoder-moe-nvfp4", "qwen3-next": MODELS / "pycoder-next-nvfp4"}
"""The shipped model of the same architecture."""
TINY = {"num_experts": 2, "hidden_size": 64, "vocab_size": 128, "moe_intermediate_size": 32}

# --- vLLM's layers -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    from moe_backend_plugin.bench.moe_peers import Engine

    engine = Engine(CPU)
    yield engine
    engine.close()


SHARED = Model("shared", experts=16, hidden=128, intermediate=64, top_k=4, ep=4)
CLAMPED = Model("clamped", experts=16, hidden=128, intermediate=64, top_k=4, activation=Activation("swigluoai", 1.702, 1.0, 7.0))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """vLLM picks the GPU's experts, and leaves weights as they are; returns (their class by provider, what their ``apply`` gets)."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    def unchanged(*, layer, w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, is_act_and_mul):
        return w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2

    monkeypatch.setattr(nvfp4, "prepare_nvfp4_moe_layer_for_marlin", unchanged)
    calls = {}
    for provider, experts in (("marlin", MarlinExperts), ("triton_bf16", TritonExperts)):
        monkeypatch.setattr(experts, "_supports_current_device", staticmethod(lambda: True))
        calls[provider] = create_autospec(experts.apply, return_value=None)
        monkeypatch.setattr(experts, "apply", calls[provider])
    monkeypatch.setattr(MarlinExperts, "moe_problem_size", lambda self, a1, w1, w2, ids: (len(w1), len(a1), 128, a1.shape[1], ids.shape[1]))
    return calls


@pytest.mark.parametrize("model", [SHARED, CLAMPED], ids=["EP", "swigluoai"])
@pytest.mark.parametrize("provider", ["marlin", "triton_bf16"])
def test_layers(engine, as_on_a_gpu, provider, model):
    """The router's choice, the expert map and the weights of this layer reach vLLM's experts; every layer has its own."""
    checkpoint = moe.random_checkpoint(model.problem, CPU)
    first, second = engine.layers(provider, model, checkpoint, 2)
    x = torch.randn(5, model.hidden).bfloat16()
    router, ids = moe.route(model, 5, "balanced", torch.Generator().manual_seed(0))
    out = first(x, router, ids, torch.empty_like(x))
    assert out.shape == x.shape
    second(x, router, ids, torch.empty_like(x))
    (one, two) = (call.kwargs for call in as_on_a_gpu[provider].call_args_list)
    assert one["hidden_states"] is x and one["topk_weights"] is router and one["topk_ids"] is ids
    assert one["global_num_experts"] == 16 and not one["apply_router_weight_on_input"]
    expected_map = model.expert_map(CPU)
    assert (one["expert_map"] is None) if expected_map is None else torch.equal(one["expert_map"], expected_map)
    assert one["activation"].value == ("silu" if model is SHARED else "swigluoai_uninterleave")
    experts = as_on_a_gpu[provider].call_args_list[0].args[0]
    if model is CLAMPED:
        config = experts.activation_config
        assert (config.alpha, config.beta, config.clamp_limit) == (1.702, 1.0, 7.0)
    if provider == "marlin":
        assert torch.equal(one["w1"], checkpoint.w13) and torch.equal(one["w2"], checkpoint.w2)
        assert torch.equal(experts.w1_scale, checkpoint.w13_scale) and torch.equal(experts.g1_alphas, checkpoint.w13_scale_2[:, 0])
        assert experts.quant_config.use_nvfp4_w4a16
    else:
        for gemm, (weight, scale, scale_2) in (("w1", checkpoint[:3]), ("w2", checkpoint[3:])):
            assert torch.equal(one[gemm].float(), unscaled(weight, scale) * scale_2.flatten()[0])
    assert one["w1"].data_ptr() != two["w1"].data_ptr()
    engine.forget()


# --- the served model ----------------------------------------------------------------------------------------------------------------


def tiny(model: str) -> dict:
    """A config.json of the model's architecture and recipe, with one layer of each kind at least."""
    shape = serve.MODELS[model]
    return replace(shape, config={**shape.config, **TINY}).of_layers(shape.period)


@pytest.mark.parametrize("model", serve.MODELS)
def test_tensors_are_those_of_a_modelopt_checkpoint(model):
    """Names, types and shapes as ModelOpt wrote them for the shipped model of the same architecture, and values that are valid."""
    from safetensors import safe_open

    config = json.loads((PYCODER[model] / "config.json").read_text())
    if "num_local_experts" in config:  # transformers 5 writes another name than the published checkpoints have
        config["num_experts"] = config.pop("num_local_experts")
    found = dict(serve.tensors(config, CPU))
    with safe_open(PYCODER[model] / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(tensor.float().isfinite().all() for tensor in found.values() if tensor.dtype != torch.uint8)
    assert all(tensor.float().min() > 0 for name, tensor in found.items() if "scale" in name)
    experts = [found[f"model.layers.0.mlp.experts.{i}.up_proj.weight"] for i in range(4)]
    assert not any(torch.equal(a, b) for a, b in zip(experts, experts[1:], strict=False))
    # A config that says nothing of its quantisation has ModelOpt's default.
    assert serve.quantization(config) == config.pop("quantization_config")
    assert {name: tensor.shape for name, tensor in serve.tensors(config, CPU)} == {name: tensor.shape for name, tensor in found.items()}


@pytest.mark.parametrize("model", serve.MODELS)
def test_what_the_config_ignores_is_not_quantised(model):
    """Every module that is ignored exists, in bf16; every other matrix is NVFP4."""
    config = tiny(model)
    found = dict(serve.tensors(config, CPU))
    ignored = config["quantization_config"]["ignore"]
    assert len(ignored) == len({*ignored})
    assert all(found[f"{name}.weight"].dtype == torch.bfloat16 and f"{name}.weight_scale" not in found for name in ignored)
    matrices = {name.removesuffix(".weight") for name, tensor in found.items() if name.endswith(".weight") and tensor.ndim > 1}
    assert all(found[f"{name}.weight"].dtype == torch.uint8 and f"{name}.weight_scale_2" in found for name in matrices - {*ignored})


def test_the_recipe_of_qwen3_next():
    """As NVIDIA publishes it: the projections into both kinds of attention are bf16 too, those out of them and all experts NVFP4."""
    shape = serve.MODELS["qwen3-next"]
    ignored = shape.of_layers(4)["quantization_config"]["ignore"]
    of_gdn = ["linear_attn.conv1d", "linear_attn.in_proj_ba", "linear_attn.in_proj_qkvz", "mlp.gate", "mlp.shared_expert_gate"]
    of_attention = ["mlp.gate", "mlp.shared_expert_gate", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]
    layers = [f"model.layers.{layer}.{name}" for layer, names in enumerate([*3 * [of_gdn], of_attention]) for name in names]
    assert ignored == ["lm_head", "model.embed_tokens", *layers]


@pytest.mark.parametrize(("name", "weights"), [("qwen3-30b-a3b", 29e9), ("qwen3-next", 77.3e9)])
def test_shape_is_that_of_the_model(name, weights):
    served = serve.MODELS[name]
    model, config = moe.MODELS[served.name], served.config
    sizes = (config["num_experts"], config["hidden_size"], config["moe_intermediate_size"], config["num_experts_per_tok"])
    assert sizes == (model.experts, model.hidden, model.intermediate, model.top_k)
    assert config["num_hidden_layers"] * model.experts * model.expert_weights == pytest.approx(weights, rel=0.01)


def test_shape_is_that_of_qwen3_next():
    """transformers' defaults are Qwen3-Next-80B-A3B's, but for names, lengths and what no layer here has."""
    transformers = pytest.importorskip("transformers")
    published = transformers.Qwen3NextConfig().to_dict()
    found = transformers.Qwen3NextConfig(**serve.MODELS["qwen3-next"].config).to_dict()
    differ = {key for key in published if published[key] != found.get(key)}
    named = {"architectures", "dtype", "bos_token_id", "eos_token_id"}
    assert differ <= named | {"intermediate_size", "max_position_embeddings", "rope_parameters"}
    assert found["layer_types"] == 12 * [*3 * ["linear_attention"], "full_attention"]
    rope = found["rope_parameters"]
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (10000000.0, 0.25)
    assert [serve.is_gdn(found | {"full_attention_interval": 4}, layer) for layer in range(4)] == [True, True, True, False]


def test_engine_arguments_exist():
    """SGLang's are checked where it is installed, in integration/sglang_cpu."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    import dataclasses

    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)} | {"load_format", "skip_tokenizer_init", "enable_prefix_caching"}
    for model, provider in ((model, provider) for model, providers in serve_vllm.PROVIDERS.items() for provider in providers):
        arguments = serve_vllm.engine_arguments(model, provider, [8, 1])
        assert set(arguments) <= names
        assert arguments["max_num_seqs"] == 32 and arguments["compilation_config"]["cudagraph_capture_sizes"] == [1, 8]
        assert ("moe_backend" in arguments) == (not provider.startswith("plugin"))


@pytest.mark.parametrize(
    ("model", "provider", "moe_provider", "gdn_provider"),
    [
        ("qwen3-30b-a3b", "plugin", "cutedsl", "auto"),
        ("qwen3-next", "plugin", "cutedsl", "cutedsl"),
        ("qwen3-next", "marlin", "auto", "engine"),
        ("qwen3-next", "humming", "auto", "engine"),
    ],
)
def test_who_serves_what_in_vllm(model, provider, moe_provider, gdn_provider):
    """This package's GDN layer does not come in where vLLM's own kernels are timed."""
    arguments = serve_vllm.engine_arguments(model, provider, [1])
    config = load_config(arguments["additional_config"]["moe_backend_plugin"])
    assert (config.moe.provider, config.gdn.provider) == (moe_provider, gdn_provider)
    assert arguments["quantization"] == ("nvfp4_cutedsl" if provider == "plugin" else "modelopt_fp4")


@pytest.mark.parametrize("engine", serve.ENGINES)
def test_every_model_has_providers(engine):
    child = serve.child_of(engine)
    assert list(child.PROVIDERS) == list(serve.MODELS) and all("plugin" in providers for providers in child.PROVIDERS.values())
    assert all(part in child.SAID for model in serve.MODELS.values() for part in model.parts)


@pytest.mark.parametrize(
    ("engine", "line", "expected"),
    [
        ("vllm", "INFO [configs.py:82] NVFP4 moe layers are served by: cutedsl (moe.provider is x)", "cutedsl (moe.provider is x)"),
        ("vllm", "INFO [nvfp4.py:300] Using 'MARLIN' NvFp4 MoE backend out of potential backends: ['X']", "'MARLIN' NvFp4 MoE backend"),
        ("vllm", "INFO nothing", None),
        ("sglang", "server_args={'moe_runner_backend': 'cutedsl'}\nNVFP4 moe layers are served by: cutedsl (x)", "cutedsl (x)"),
        ("sglang", "server_args={'speculative_moe_runner_backend': 'auto', 'moe_runner_backend': 'marlin', 'a': 1}", "marlin"),
    ],
)
def test_served_by(engine, line, expected):
    said = serve.child_of(engine).SAID
    assert serve.served_by(f"first\n{line}\nlast", {"experts": said["experts"]}) == expected


@pytest.mark.parametrize(
    ("engine", "log", "expected"),
    [
        (
            "vllm",
            "NVFP4 moe layers are served by: cutedsl (x)\nGated-delta-net layers are served by: cutedsl (y)",
            "experts: cutedsl (x); GDN decode: cutedsl (y)",
        ),
        (
            "vllm",
            "Using 'MARLIN' NvFp4 MoE backend out of\nGated-delta-net layers are served by: engine (y)",
            "experts: 'MARLIN' NvFp4 MoE backend; GDN decode: engine (y)",
        ),
        ("vllm", "NVFP4 moe layers are served by: cutedsl (x)", "experts: cutedsl (x); GDN decode: None"),
        ("vllm", "nothing", None),
        (
            "sglang",
            "NVFP4 moe layers are served by: cutedsl (x)\nLinear attention kernel backend: decode=custom, prefill=triton\n"
            "Gated-delta-net decode is served by: cutedsl_plugin (verification of drafts: this package's kernel)",
            "experts: cutedsl (x); GDN decode: cutedsl_plugin",
        ),
        (
            "sglang",
            "{'moe_runner_backend': 'marlin'}\nLinear attention kernel backend: decode=cutedsl, prefill=triton, verify=triton",
            "experts: marlin; GDN decode: cutedsl",
        ),
    ],
)
def test_served_by_of_a_gdn_model(engine, log, expected):
    said = serve.child_of(engine).SAID
    assert serve.served_by(log, {part: said[part] for part in serve.MODELS["qwen3-next"].parts}) == expected


def test_measured_rows():
    """Every batch is timed to its first and to its last token, and one batch of long prompts; prompts are the same in each round."""
    calls: list[tuple[int, int, int]] = []
    seen: dict[tuple[int, int, int], list] = {}

    def generate(prompts, new):
        calls.append((len(prompts), len(prompts[0]), new))
        assert seen.setdefault(calls[-1], prompts) == prompts
        assert all(3 <= token < 100 for prompt in prompts for token in prompt)

    rows = serve.measure(generate, {"vocab_size": 100, "max_position_embeddings": 1000}, [1, 4])
    rounds = serve.WARM_UPS + serve.RUNS
    expected = [(1, serve.PROMPT, 1), (1, serve.PROMPT, serve.NEW), (4, serve.PROMPT, 1), (4, serve.PROMPT, serve.NEW)]
    assert calls == [call for call in (*expected, (serve.PREFILL_BATCH, 1000 - serve.NEW, 1)) for _ in range(rounds)]
    assert [list(row) for row in rows] == 2 * [["batch", "output_tok_s", "first_token_ms"]] + [["batch", "prefill_tok_s"]]


@pytest.mark.parametrize("model", serve.MODELS)
def test_sglang_gets_the_random_weights(tmp_path, model):
    """What stands in for the loader's files: the tensors of the config.json in the model's folder, on the model's device."""
    from types import SimpleNamespace

    config = tiny(model)
    serve.write_config(config, tmp_path)
    found = serve_sglang.random_weights(None, SimpleNamespace(model_path=str(tmp_path)), torch.nn.Linear(1, 1))
    shapes = {name: tensor.shape for name, tensor in found}
    assert shapes == {name: tensor.shape for name, tensor in serve.tensors(config, CPU)}


def test_a_child_leaves_a_config_and_its_rows(monkeypatch, tmp_path):
    """Layers are those asked for, settings come on top of the provider's arguments."""
    seen = []
    monkeypatch.setattr(serve_sglang, "serve", lambda *arguments: seen.append(arguments) or [{"batch": 1}])
    work = {"model": "qwen3-next", "provider": "plugin_cutedsl_gdn", "batches": [1], "layers": 8, "settings": {"attention_backend": "x"}}
    serve.main("sglang", json.dumps({**work, "folder": str(tmp_path)}))
    arguments, config, batches, folder = seen[0]
    assert (arguments["linear_attn_decode_backend"], arguments["attention_backend"], batches) == ("cutedsl", "x", [1])
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(config)) == serve.MODELS["qwen3-next"].of_layers(8)
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"batch": 1}]


@pytest.mark.parametrize("engine", serve.ENGINES)
def test_serve_run(monkeypatch, engine):
    """Rows of a provider that serves, an error of one that does not, written after each."""

    def child(command, **_):
        work = json.loads(command[-1])
        assert command[1:3] == ["-m", f"moe_backend_plugin.bench.serve_{engine}"]
        assert work["settings"] == {"attention_backend": "triton"}
        if work["provider"] == "humming":
            return type("Done", (), {"returncode": 1, "stdout": "begin", "stderr": "no such kernel"})
        rows = [{"batch": batch, "output_tok_s": 10.0 * batch, "first_token_ms": 1.0} for batch in work["batches"]]
        (Path(work["folder"]) / "rows.json").write_text(json.dumps([*rows, {"batch": 32, "prefill_tok_s": 5.0}]))
        return type("Done", (), {"returncode": 0, "stdout": "NVFP4 moe layers are served by: cutedsl (x)", "stderr": ""})

    monkeypatch.setattr(serve.subprocess, "run", child)
    lines: list[str] = []
    first, last = serve.run(serve.Options(engine, ("plugin", "humming"), (1, 8), settings={"attention_backend": "triton"}), lines.append)
    assert first is last and len(last["rows"]) == 3
    row = {
        "model": "qwen3-30b-a3b",
        "provider": "plugin",
        "batch": 8,
        "output_tok_s": 80.0,
        "first_token_ms": 1.0,
        "served_by": "cutedsl (x)",
    }
    assert last["rows"][1] == row
    assert last["rows"][2]["prefill_tok_s"] == 5.0
    assert last["errors"] == [{"model": "qwen3-30b-a3b", "provider": "humming", "error": "exit code 1: beginno such kernel"}]
    assert any("no such kernel" in line for line in lines)


def test_serve_run_of_another_model(monkeypatch):
    def child(command, **_):
        work = json.loads(command[-1])
        assert (work["model"], work["layers"]) == ("qwen3-next", 8)
        (Path(work["folder"]) / "rows.json").write_text(json.dumps([{"batch": 32, "prefill_tok_s": 5.0}]))
        log = "NVFP4 moe layers are served by: cutedsl (x)\nGated-delta-net layers are served by: cutedsl (y)"
        return type("Done", (), {"returncode": 0, "stdout": log, "stderr": ""})

    monkeypatch.setattr(serve.subprocess, "run", child)
    *_, last = serve.run(serve.Options(model="qwen3-next", layers=8), lambda line: None)
    assert [row["provider"] for row in last["rows"]] == ["plugin", "marlin", "humming"]
    assert last["rows"][0] == {
        "model": "qwen3-next-80b",
        "layers": 8,
        "provider": "plugin",
        "batch": 32,
        "prefill_tok_s": 5.0,
        "served_by": "experts: cutedsl (x); GDN decode: cutedsl (y)",
    }


@pytest.mark.parametrize("engine", serve.ENGINES)
def test_serve_command(monkeypatch, tmp_path, engine):
    from moe_backend_plugin import device
    from moe_backend_plugin.bench import stamp

    done = CliRunner().invoke(app, ["bench", "serve", "--providers", "triton"])
    assert done.exit_code == 2 and "--providers: found 'triton'; allowed: plugin, plugin_linear, marlin, humming" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--engine", "tgi"])
    assert done.exit_code == 2 and "--engine: found 'tgi'; allowed: vllm, sglang" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--attention-backend", "triton"])
    assert done.exit_code == 2 and "--attention-backend: found --engine vllm; allowed: --engine sglang" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--engine", "sglang", "--compile"])
    assert done.exit_code == 2 and "--compile: found --engine sglang; allowed: --engine vllm" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--model", "gpt"])
    assert done.exit_code == 2 and "--model: found 'gpt'; allowed: qwen3-30b-a3b, qwen3-next" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--model", "qwen3-next", "--layers", "6"])
    assert done.exit_code == 2 and "--layers: found 6; allowed: a multiple of 4 with --model qwen3-next" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--engine", "sglang", "--model", "qwen3-next", "--providers", "humming"])
    assert done.exit_code == 2 and "found 'humming'; allowed: plugin, plugin_triton_gdn, plugin_cutedsl_gdn, marlin;" in done.stderr
    monkeypatch.setattr(device, "find_device", lambda *_, **__: device.Device.cpu())
    assert "bench serve: found no CUDA device" in CliRunner().invoke(app, ["bench", "serve"]).stderr

    monkeypatch.setattr(device, "find_device", lambda *_, **__: device.Device("cuda", "NVIDIA H200", 0, (9, 0)))
    monkeypatch.setattr(
        stamp, "gpu_stamp", lambda *arguments: {"device": arguments[0], "command": arguments[1], "kernel": list(arguments[2])}
    )
    monkeypatch.setattr(stamp, "results_folder", lambda: tmp_path)
    rows = [{"model": "qwen3-30b-a3b", "provider": "plugin", "batch": 1, "output_tok_s": 300.0, "first_token_ms": 4.0}]
    asked = []
    monkeypatch.setattr(serve, "run", lambda options, say: asked.append(options) or iter([{"ceilings": {}, "rows": rows, "errors": []}]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def invoke(*arguments):
        monkeypatch.setattr("sys.argv", ["/somewhere/bin/moe-backend", "bench", "serve", *arguments])
        return CliRunner().invoke(app, ["bench", "serve", *arguments])

    out = tmp_path / "serve_h200.json"
    further = ["--engine", engine, *(["--attention-backend", "triton"] if engine == "sglang" else [])]
    done = invoke(*further, "--out", str(out))
    assert done.exit_code == 0, done.output
    stored = json.loads(out.read_text())
    assert stored["rows"] == rows and stored["stamp"]["kernel"] == list(moe.KERNELS) and "300.0" in done.output
    assert stored["stamp"]["command"] == f"moe-backend bench serve {' '.join(further)}"
    assert "Qwen3-30B-A3B shape in " in done.output

    done = invoke("--engine", engine)
    file = tmp_path / f"serve_{engine}_h200.json"
    assert done.exit_code == 0 and json.loads(file.read_text())["stamp"]["command"] == f"moe-backend bench serve --engine {engine}"
    done = invoke(*further, "--model", "qwen3-next", "--layers", "8")
    assert done.exit_code == 0 and "Qwen3-Next-80B-A3B shape in " in done.output
    stored = json.loads((tmp_path / f"serve_{engine}_qwen3-next_h200.json").read_text())["stamp"]
    assert stored["kernel"] == [*moe.KERNELS, "gdn_decode"]
    assert stored["command"] == f"moe-backend bench serve {' '.join(further)} --model qwen3-next --layers 8"
    if engine == "sglang":
        return
    assert asked[-1].settings == {}
    done = invoke("--compile", "--batch", "8,1")
    stored = json.loads((tmp_path / "serve_vllm_compile_h200.json").read_text())["stamp"]
    assert done.exit_code == 0 and stored["command"] == "moe-backend bench serve --compile --batch 8,1"
    assert asked[-1].settings == {"compilation_config": {"cudagraph_capture_sizes": [1, 8]}}
