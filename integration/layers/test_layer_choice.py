"""Which layers of a checkpoint are this package's: those that vLLM takes for NVFP4, with nothing around them that it would drop."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from moe_backend_plugin.config import load_config
from moe_backend_plugin.device import Choice
from moe_backend_plugin.errors import UnsupportedLayerError

from .test_moe_hopper import COMPRESSED

FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
GROUP = {"input_activations": FP4, "weights": FP4, "targets": ["Linear"]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "config_groups": {"group_0": GROUP}}
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "ignore": [],
    "quantized_layers": {"vision_tower.blocks.0.fc1": {"quant_algo": "NVFP4", "group_size": 16}},
}
ROTATED = COMPRESSED | {
    "ignore": [],
    "transform_config": {
        "config_groups": {
            "quip": {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}]},
            "folded": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]},
            "spin": {"type": "random-hadamard", "apply": [{"targets": ["re:.*v_proj$"], "location": "output"}]},
        }
    },
}
_number = itertools.count()


def linear(scheme: dict, prefix: str):
    """vLLM's layer of that name, with the method that it got."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from moe_backend_plugin.engines.vllm.quantization import Nvfp4CuteDslConfig

    return ReplicatedLinear(64, 32, bias=False, params_dtype=torch.bfloat16, quant_config=made(Nvfp4CuteDslConfig, scheme), prefix=prefix)


def made(cls: type, scheme: dict):
    return cls.from_config(copy.deepcopy(scheme))


@pytest.mark.parametrize(
    ("prefix", "quantised"),
    [
        ("language_model.model.layers.0.mlp.down_proj", True),
        ("vision_tower.encoder.layers.0.mlp.fc1", False),
        ("model.vision_model.blocks.3.attn.proj", False),
        ("vit_large_projector.0", False),
    ],
)
def test_vision_layers_of_older_modelopts_are_unquantised(vllm_config, prefix, quantised):
    """vLLM takes them for that though no exclude list names them, and so does the check of the files."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    from moe_backend_plugin.engines.vllm.linear import Nvfp4LinearMethod

    layer = linear(MODELOPT, prefix)
    assert type(layer.quant_method) is (Nvfp4LinearMethod if quantised else UnquantizedLinearMethod)
    if not quantised:
        own = made(ModelOptNvFp4Config, MODELOPT).get_quant_method(layer, prefix)
        assert type(own) is UnquantizedLinearMethod


def test_a_mixed_checkpoint_lists_what_is_quantised(vllm_config):
    from moe_backend_plugin.engines.vllm.linear import Nvfp4LinearMethod

    assert type(linear(MIXED, "vision_tower.blocks.0.fc1").quant_method) is Nvfp4LinearMethod


@pytest.mark.parametrize("groups", [{"group_0": GROUP | {"input_activations": None}}, {"group_0": GROUP}], ids=["W4A16", "W4A4"])
def test_activations_are_what_vllm_takes_them_for(vllm_config, groups):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    scheme = MODELOPT | {"config_groups": groups}
    layer = linear(scheme, "model.layers.0.mlp.down_proj")
    alone = made(ModelOptNvFp4Config, scheme).quant_method == "W4A16_NVFP4"
    assert layer.quant_method.has_input_scale != alone
    assert hasattr(layer, "input_scale") != alone


# --- rotations --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch):
    """In place of vLLM's own method, which needs a GPU."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    monkeypatch.setattr(CompressedTensorsConfig, "get_quant_method", lambda self, layer, prefix: ("vLLM's own", prefix))


@pytest.fixture
def ask(vllm_config, monkeypatch):
    """The method of a layer of that name, where ``provider`` serves dense layers."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from moe_backend_plugin.engines.vllm import configs, linear_cuda

    def ask(prefix: str, provider: str, **settings):
        monkeypatch.setattr(configs, "provider", lambda kind, where: Choice(provider, "a test"))
        monkeypatch.setattr(configs, "plugin_config", lambda: load_config(settings))
        monkeypatch.setattr(configs, "_handed_over", set())
        monkeypatch.setattr(linear_cuda, "unsupported_reason", lambda layer, use_nvfp4: None)
        layer = ReplicatedLinear(64, 32, bias=False, params_dtype=torch.bfloat16, prefix=f"model.layers.{next(_number)}.plain")
        config = made(configs.Nvfp4CompressedTensorsConfig, ROTATED)
        config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        return config.get_quant_method(layer, prefix)

    return ask


DOWN, QKV, UP = (f"model.layers.0.{name}" for name in ("mlp.down_proj", "self_attn.qkv_proj", "mlp.up_proj"))


@pytest.mark.parametrize(("prefix", "found"), [(DOWN, "hadamard quip"), (QKV, "random-hadamard spin")])
def test_a_rotated_layer_is_vllms_and_the_log_says_so(ask, engine, log, prefix, found):
    assert ask(prefix, "cutedsl") == ("vLLM's own", prefix)
    said = [line for line in log if found in line]
    assert len(said) == 1 and said[0].startswith(f"{prefix}, and layers like it, are served by: engine") and "transform_config" in said[0]


def test_strict_stops_at_a_rotated_layer(ask, engine):
    with pytest.raises(UnsupportedLayerError, match=r"down_proj: found transform_config with hadamard quip, .*strict: false"):
        ask(DOWN, "cutedsl", strict=True)


def test_a_cpu_has_no_layer_that_rotates(ask, engine):
    with pytest.raises(UnsupportedLayerError, match=r"down_proj: found transform_config with hadamard quip, .*allowed: .*no NVFP4 kernel"):
        ask(DOWN, "torch")


@pytest.mark.parametrize("provider", ["torch", "cutedsl"])
def test_a_rotation_that_is_in_the_weights_is_nobodys_work(ask, engine, provider):
    from moe_backend_plugin.engines.vllm.linear import Nvfp4LinearMethod

    assert isinstance(ask(UP, provider), Nvfp4LinearMethod)


def test_where_vllm_serves_all_layers_nothing_is_said(ask, engine, log):
    assert ask(DOWN, "engine", strict=False) == ("vLLM's own", DOWN)
    assert not any("transform_config" in line for line in log)
