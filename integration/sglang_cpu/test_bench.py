"""The benchmarks' SGLang sides against SGLang itself, as far as a CPU goes: arguments and names; nothing is timed."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import pytest
import torch

from moe_backend_plugin.bench import serve, serve_sglang

SMALL = {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "vocab_size": 128}
SMALL_NEXT = {"shared_expert_intermediate_size": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
PROVIDERS = [(model, provider) for model, providers in serve_sglang.PROVIDERS.items() for provider in providers]


def tiny(model: str) -> dict:
    """A config.json of the model's architecture and recipe, with one layer of each kind at least."""
    shape = serve.MODELS[model]
    return replace(shape, config={**shape.config, **SMALL, **(SMALL_NEXT if model == "qwen3-next" else {})}).of_layers(shape.period)


@pytest.mark.parametrize(("model", "provider"), PROVIDERS)
def test_engine_arguments_are_sglangs(sglang, tmp_path, model, provider):
    """Every argument of a provider, and those of the command line, is one of the Engine, and is taken as it was meant."""
    from sglang.srt.entrypoints.engine import Engine

    given = serve_sglang.engine_arguments(model, provider, [8, 1]) | {"attention_backend": "triton", "sampling_backend": "pytorch"}
    arguments = Engine.server_args_class(model_path=str(tmp_path), **given)
    assert {name: getattr(arguments, name) for name in given} == given
    assert (arguments.max_running_requests, arguments.cuda_graph_bs_decode) == (32, [1, 8])
    assert arguments.moe_runner_backend == {"marlin": "marlin", "humming": "auto"}.get(provider, "cutedsl")
    decode = {"plugin": "cutedsl_plugin", "plugin_triton_gdn": "triton", "plugin_cutedsl_gdn": "cutedsl", "marlin": "triton"}
    assert arguments.linear_attn_decode_backend == (decode[provider] if model == "qwen3-next" else None)


@pytest.mark.parametrize("provider", serve_sglang.PROVIDERS["qwen3-next"])
def test_sglang_has_the_gdn_kernels(sglang, provider):
    """Each is a choice of the command line as well, and what is not this package's is one of SGLang's own backends."""
    from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend

    decode = serve_sglang.PROVIDERS["qwen3-next"][provider]["linear_attn_decode_backend"]
    made = sglang.prepare_server_args(["--model-path", "m", "--linear-attn-decode-backend", decode])
    assert made.linear_attn_decode_backend == decode
    own = LinearAttnKernelBackend(decode)
    assert own.is_custom() if provider == "plugin" else own.value == decode


def test_the_engine_is_called_as_it_wants_to_be(sglang):
    from sglang.srt.entrypoints.engine import Engine

    inspect.signature(Engine.generate).bind(None, input_ids=[[1]], sampling_params={})
    assert {"__enter__", "__exit__"} <= set(vars(Engine))


@pytest.mark.parametrize("model", serve.MODELS)
def test_sglang_would_load_the_random_weights(sglang, tmp_path, monkeypatch, model):
    """Its loader of ModelOpt checkpoints asks the method that is replaced, and reads no file besides."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader

    monkeypatch.setattr(loader.DefaultModelLoader, "_get_all_weights", loader.DefaultModelLoader._get_all_weights)
    serve_sglang.register()
    serve.write_config(tiny(model), tmp_path)
    made = loader.ModelOptModelLoader(LoadConfig())
    names = {name for name, _ in made._get_all_weights(type("Config", (), {"model_path": str(tmp_path)}), torch.nn.Linear(1, 1))}
    assert "model.layers.0.mlp.experts.1.down_proj.weight_scale_2" in names
    assert ("model.layers.0.linear_attn.A_log" in names) == (model == "qwen3-next")
    assert "self._get_all_weights(model_config, model)" in inspect.getsource(loader.DefaultModelLoader.load_model)
    assert "super().load_model(" in inspect.getsource(loader.ModelOptModelLoader.load_model)


@pytest.mark.parametrize("fused", [False, True], ids=["shared expert", "fused shared expert"])
def test_sglangs_qwen3_next_takes_the_random_weights(qwen3_next, tmp_path, monkeypatch, fused):
    """Every parameter of its model is loaded, by name and shape; on a GPU the shared expert is one more of the routed ones."""
    from sglang.srt.models import qwen2_moe

    monkeypatch.setattr(qwen2_moe, "_is_cuda", fused)
    config = tiny("qwen3-next")
    serve.write_config(config, tmp_path)
    model, missing = qwen3_next(tmp_path, serve.tensors(config, torch.device("cpu")), skip_tokenizer_init=True)
    assert missing == {f"model.layers.3.attn.{name}_scale" for name in "kv"}  # of the cache
    assert model.model.layers[0].mlp.experts.w13_weight.shape == (5 if fused else 4, 128, 64)


@pytest.mark.parametrize("model", serve.MODELS)
def test_the_model_is_nvfp4_to_sglang(arguments, tmp_path, model):
    serve.write_config(serve.MODELS[model].of_layers(4), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_algo"] == "NVFP4"
    from sglang.srt.arg_groups.model_override_base import model_config_of

    made = arguments(tmp_path, **serve_sglang.PROVIDERS[model]["plugin"], skip_tokenizer_init=True, disable_radix_cache=True)
    assert model_config_of(made).quantization == "modelopt_fp4"


def test_the_gdn_kernel_of_sglang_is_called_by_its_names(sglang):
    """What `moe-backend bench gdn` calls; it compiles only on a GPU."""
    from sglang.kernels.ops.attention.cutedsl_gdn import cutedsl_fused_sigmoid_gating_delta_rule_update as update

    from moe_backend_plugin.bench import gdn

    source = inspect.getsource(gdn._sglang)
    assert f"from {update.__module__} import {update.__name__}" in source
    names = "A_log dt_bias q k v a b initial_state_source initial_state_indices cu_seqlens use_qk_l2norm_in_kernel".split()
    assert all(f"{name}=" in source for name in names)
    inspect.signature(update).bind(**dict.fromkeys(names))
