"""NVFP4 experts of compressed-tensors checkpoints in SGLang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsMoEScheme,
    CompressedTensorsW4A4Nvfp4MoE,
    CompressedTensorsW4A16Nvfp4MoE,
)

from ...errors import UnsupportedLayerError
from ...nvfp4.scheme import COMPRESSED_TENSORS_NAMES
from . import settings
from .arguments import FLAG
from .hooks import wrap
from .moe import PluginQuantInfo, new_weights, selected
from .weights import ExpertWeights


class PluginCompressedTensorsNvfp4MoE(CompressedTensorsMoEScheme):
    """``has_input_scales``: the checkpoint has input scales (W4A4), which nobody reads."""

    def __init__(self, has_input_scales: bool) -> None:
        self.has_input_scales = has_input_scales
        self._weights: ExpertWeights | None = None

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

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
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        self._weights = new_weights(layer, COMPRESSED_TENSORS_NAMES, *sizes, params_dtype, extra_weight_attrs.get("with_bias", False))
        self._weights.create(layer, extra_weight_attrs["weight_loader"], num_experts if self.has_input_scales else None)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._weights.finish(layer, settings.dummy_weights())

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        self._weights.restore(layer)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        # The method around the scheme is the layer's own; SGLang asks it, not the scheme.
        layer.quant_method.fuse_routed_scaling_factor_in_topk = True
        self.runner = layer.quant_method.runner = MoeRunner(get_moe_runner_backend(), moe_runner_config)

    def apply_weights(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, PluginQuantInfo(layer, self._weights))


def take(module: Any) -> None:
    """Exchange the scheme of NVFP4 experts where the runner is this package's."""
    wrap(module, "CompressedTensorsConfig.get_moe_scheme", _get_moe_scheme)


def _get_moe_scheme(wrapped: Callable, _instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    scheme = wrapped(*args, **kwargs)
    if scheme is None or not selected():
        return scheme
    if isinstance(scheme, CompressedTensorsW4A4Nvfp4MoE):
        return PluginCompressedTensorsNvfp4MoE(True)
    if isinstance(scheme, CompressedTensorsW4A16Nvfp4MoE):
        return PluginCompressedTensorsNvfp4MoE(scheme.has_input_global_scale)
    raise UnsupportedLayerError(FLAG, f"experts for which SGLang has {type(scheme).__name__}", "NVFP4 experts (nvfp4-pack-quantized)")
