"""The benchmarks' SGLang sides against SGLang itself, as far as a CPU goes: arguments and names; nothing is timed."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from moe_backend_plugin.bench import serve, serve_sglang


@pytest.mark.parametrize("provider", serve_sglang.PROVIDERS)
def test_engine_arguments_are_sglangs(sglang, tmp_path, provider):
    """Every argument of a provider, and those of the command line, is one of the Engine, and is taken as it was meant."""
    from sglang.srt.entrypoints.engine import Engine

    given = serve_sglang.engine_arguments(provider, [8, 1]) | {"attention_backend": "triton", "sampling_backend": "pytorch"}
    arguments = Engine.server_args_class(model_path=str(tmp_path), **given)
    assert {name: getattr(arguments, name) for name in given} == given
    assert (arguments.max_running_requests, arguments.cuda_graph_bs_decode) == (32, [1, 8])
    runner = {"plugin": "cutedsl", "marlin": "marlin", "humming": "auto"}[provider]
    assert arguments.moe_runner_backend == runner


def test_the_engine_is_called_as_it_wants_to_be(sglang):
    from sglang.srt.entrypoints.engine import Engine

    inspect.signature(Engine.generate).bind(None, input_ids=[[1]], sampling_params={})
    assert {"__enter__", "__exit__"} <= set(vars(Engine))


def test_sglang_would_load_the_random_weights(sglang, tmp_path, monkeypatch):
    """Its loader of ModelOpt checkpoints asks the method that is replaced, and reads no file besides."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader

    monkeypatch.setattr(loader.DefaultModelLoader, "_get_all_weights", loader.DefaultModelLoader._get_all_weights)
    serve_sglang.register()
    config = {**serve.CONFIG, "num_hidden_layers": 1, "num_experts": 2, "hidden_size": 64, "vocab_size": 128, "moe_intermediate_size": 32}
    serve.write_config(config, tmp_path)
    made = loader.ModelOptModelLoader(LoadConfig())
    names = {name for name, _ in made._get_all_weights(type("Config", (), {"model_path": str(tmp_path)}), torch.nn.Linear(1, 1))}
    assert "model.layers.0.mlp.experts.1.down_proj.weight_scale_2" in names
    assert "self._get_all_weights(model_config, model)" in inspect.getsource(loader.DefaultModelLoader.load_model)
    assert "super().load_model(" in inspect.getsource(loader.ModelOptModelLoader.load_model)


def test_the_model_is_nvfp4_to_sglang(arguments, tmp_path):
    serve.write_config({**serve.CONFIG, "num_hidden_layers": 1}, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_algo"] == "NVFP4"
    from sglang.srt.arg_groups.model_override_base import model_config_of

    made = arguments(tmp_path, **serve_sglang.PROVIDERS["plugin"], skip_tokenizer_init=True)
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
