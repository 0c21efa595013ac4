"""NVFP4 experts of ModelOpt checkpoints in SGLang."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptNvFp4FusedMoEMethod

from ...errors import UnsupportedLayerError
from ...nvfp4.scheme import MODELOPT_NAMES
from . import settings
from .arguments import FLAG
from .moe import PluginQuantInfo, new_weights, selected
from .weights import ExpertWeights


class PluginModelOptNvFp4FusedMoEMethod(ModelOptNvFp4FusedMoEMethod):
    """In place of SGLang's method, whose constructor is not called: it refuses Hopper, and what it sets belongs to other runners.

    SGLang's weight loader goes by the class: "ModelOpt" in its name, and its base.
    """

    fuse_routed_scaling_factor_in_topk = True
    load_up_proj_weight_first = False

    def __init__(self, quant_config: ModelOptFp4Config) -> None:
        if not quant_config.is_checkpoint_nvfp4_serialized:
            raise UnsupportedLayerError(FLAG, "weights that are to be quantised while they load", "an NVFP4 checkpoint")
        self.quant_config = quant_config
        self.enable_flashinfer_trtllm_moe = self.use_flashinfer_trtllm_weight_layout = False
        self._lora_marlin = False
        self._cache_permute_indices: dict = {}
        self._weights: ExpertWeights | None = None
        self._moe_runner_backend = get_moe_runner_backend()

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.intermediate_size_per_partition = intermediate_size_per_partition
        layer.params_dtype = params_dtype
        layer.quant_config = self.quant_config
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        self._weights = new_weights(layer, MODELOPT_NAMES, *sizes, params_dtype, extra_weight_attrs.get("with_bias", False))
        self._weights.create(layer, extra_weight_attrs["weight_loader"], layer.num_experts, everyone=True)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._weights.finish(layer, settings.dummy_weights())

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        self._weights.restore(layer)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        self.runner = MoeRunner(self._moe_runner_backend, moe_runner_config)

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, PluginQuantInfo(layer, self._weights))


def take(module: Any) -> None:
    """Let SGLang's class construct this package's where the runner is this package's; its subclasses stay what they are."""
    base = module.ModelOptNvFp4FusedMoEMethod

    def new(cls: type, *_args: Any, **_kwargs: Any) -> Any:
        return object.__new__(PluginModelOptNvFp4FusedMoEMethod if cls is base and selected() else cls)

    base.__new__ = staticmethod(new)
