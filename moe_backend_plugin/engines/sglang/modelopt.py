"""NVFP4 experts of ModelOpt checkpoints in SGLang."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptNvFp4FusedMoEMethod

from ...errors import UnsupportedLayerError
from ...nvfp4.scheme import MODELOPT_NAMES
from .arguments import FLAG
from .experts import PluginExperts
from .moe import selected


class PluginModelOptNvFp4FusedMoEMethod(PluginExperts, ModelOptNvFp4FusedMoEMethod):
    """In place of SGLang's method, whose constructor is not called: it refuses Hopper, and what it sets belongs to other runners.

    SGLang's weight loader goes by the class: "ModelOpt" in its name, and its base.
    """

    names = MODELOPT_NAMES
    every_input_scale = True
    fuse_routed_scaling_factor_in_topk = True
    load_up_proj_weight_first = False

    def __init__(self, quant_config: ModelOptFp4Config) -> None:
        if not quant_config.is_checkpoint_nvfp4_serialized:
            raise UnsupportedLayerError(FLAG, "weights that are to be quantised while they load", "an NVFP4 checkpoint")
        self.quant_config = quant_config
        self.enable_flashinfer_trtllm_moe = self.use_flashinfer_trtllm_weight_layout = False
        self._lora_marlin = False
        self._cache_permute_indices: dict = {}
        self._moe_runner_backend = get_moe_runner_backend()

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        layer.quant_config = self.quant_config
        super().create_weights(layer, *args, **kwargs)

    def input_scales(self, layer: torch.nn.Module, num_experts: int) -> int:
        return layer.num_experts

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self._run(layer, dispatch_output)


def take(module: Any) -> None:
    """Let SGLang's class construct this package's where the runner is this package's; its subclasses stay what they are."""
    base = module.ModelOptNvFp4FusedMoEMethod

    def new(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        return object.__new__(PluginModelOptNvFp4FusedMoEMethod if cls is base and selected() else cls)

    base.__new__ = staticmethod(new)
