"""``moe-backend bench moe`` and ``bench serve`` against vLLM's own code, as far as a CPU goes: layers are built, kernels are not run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from typer.testing import CliRunner

from moe_backend_plugin.bench import moe, serve, serve_sglang, serve_vllm
from moe_backend_plugin.bench.moe import Model
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.moe.problem import Activation
from moe_backend_plugin.nvfp4.unscaled import unscaled

CPU = torch.device("cpu")
PYCODER = Path(__file__).parents[2] / "integration/models/pycoder-moe-nvfp4"

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


def test_tensors_are_those_of_a_modelopt_checkpoint():
    """Names, types and shapes as ModelOpt wrote them for the shipped model of the same architecture, and values that are valid."""
    from safetensors import safe_open

    config = json.loads((PYCODER / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")  # transformers 5 writes another name than the published checkpoints have
    found = dict(serve.tensors(config, CPU))
    with safe_open(PYCODER / "model.safetensors", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    assert all(tensor.float().isfinite().all() for tensor in found.values() if tensor.dtype != torch.uint8)
    assert all(tensor.float().min() > 0 for name, tensor in found.items() if "scale" in name)
    experts = [found[f"model.layers.0.mlp.experts.{i}.up_proj.weight"] for i in range(4)]
    assert not any(torch.equal(a, b) for a, b in zip(experts, experts[1:], strict=False))
    assert serve.quantization(config) == config["quantization_config"]


def test_shape_is_that_of_qwen3_30b():
    model = moe.MODELS[serve.MODEL]
    config = serve.CONFIG
    sizes = (config["num_experts"], config["hidden_size"], config["moe_intermediate_size"], config["num_experts_per_tok"])
    assert sizes == (model.experts, model.hidden, model.intermediate, model.top_k)
    weights = config["num_hidden_layers"] * model.experts * model.expert_weights
    assert weights == pytest.approx(29e9, rel=0.01)


def test_engine_arguments_exist():
    """SGLang's are checked where it is installed, in integration/sglang_cpu."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    import dataclasses

    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs)} | {"load_format", "skip_tokenizer_init", "enable_prefix_caching"}
    for provider in serve_vllm.PROVIDERS:
        arguments = serve_vllm.engine_arguments(provider, [8, 1])
        assert set(arguments) <= names
        assert arguments["max_num_seqs"] == 32 and arguments["compilation_config"]["cudagraph_capture_sizes"] == [1, 8]
    assert "moe_backend" not in serve_vllm.engine_arguments("plugin", [1])


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
    assert serve.served_by(f"first\n{line}\nlast", serve.child_of(engine).SAID) == expected


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


def test_sglang_gets_the_random_weights(tmp_path):
    """What stands in for the loader's files: the tensors of the config.json in the model's folder, on the model's device."""
    from types import SimpleNamespace

    config = {**serve.CONFIG, "num_hidden_layers": 1, "num_experts": 2, "hidden_size": 64, "vocab_size": 128, "moe_intermediate_size": 32}
    serve.write_config(config, tmp_path)
    found = serve_sglang.random_weights(None, SimpleNamespace(model_path=str(tmp_path)), torch.nn.Linear(1, 1))
    shapes = {name: tensor.shape for name, tensor in found}
    assert shapes == {name: tensor.shape for name, tensor in serve.tensors(config, CPU)}


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


@pytest.mark.parametrize("engine", serve.ENGINES)
def test_serve_command(monkeypatch, tmp_path, engine):
    from moe_backend_plugin import device
    from moe_backend_plugin.bench import stamp

    done = CliRunner().invoke(app, ["bench", "serve", "--providers", "triton"])
    assert done.exit_code == 2 and "--providers: found 'triton'; allowed: plugin, marlin, humming" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--engine", "tgi"])
    assert done.exit_code == 2 and "--engine: found 'tgi'; allowed: vllm, sglang" in done.stderr
    done = CliRunner().invoke(app, ["bench", "serve", "--attention-backend", "triton"])
    assert done.exit_code == 2 and "--attention-backend: found --engine vllm; allowed: --engine sglang" in done.stderr
    monkeypatch.setattr(device, "find_device", lambda *_, **__: device.Device.cpu())
    assert "bench serve: found no CUDA device" in CliRunner().invoke(app, ["bench", "serve"]).stderr

    monkeypatch.setattr(device, "find_device", lambda *_, **__: device.Device("cuda", "NVIDIA H200", 0, (9, 0)))
    monkeypatch.setattr(stamp, "gpu_stamp", lambda *arguments: {"device": arguments[0], "kernel": list(arguments[2])})
    rows = [{"model": "qwen3-30b-a3b", "provider": "plugin", "batch": 1, "output_tok_s": 300.0, "first_token_ms": 4.0}]
    monkeypatch.setattr(serve, "run", lambda options, say: iter([{"ceilings": {}, "rows": rows, "errors": []}]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    out = tmp_path / "serve_h200.json"
    further = ["--engine", engine, *(["--attention-backend", "triton"] if engine == "sglang" else [])]
    done = CliRunner().invoke(app, ["bench", "serve", *further, "--out", str(out)])
    assert done.exit_code == 0, done.output
    stored = json.loads(out.read_text())
    assert stored["rows"] == rows and stored["stamp"]["kernel"] == list(moe.KERNELS) and "300.0" in done.output
