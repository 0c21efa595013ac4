"""NVFP4 experts of compressed-tensors checkpoints in SGLang."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.moe import MoeRunnerConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsMoEScheme,
    CompressedTensorsW4A4Nvfp4MoE,
    CompressedTensorsW4A16Nvfp4MoE,
)

from ...errors import UnsupportedLayerError
from ...nvfp4.scheme import COMPRESSED_TENSORS_NAMES
from .arguments import FLAG
from .experts import PluginExperts
from .hooks import wrap
from .moe import of_a_draft, selected, with_triton


class PluginCompressedTensorsNvfp4MoE(PluginExperts, CompressedTensorsMoEScheme):
    """``has_input_scales``: the checkpoint has input scales (W4A4), which nobody reads."""

    names = COMPRESSED_TENSORS_NAMES

    def __init__(self, has_input_scales: bool) -> None:
        self.has_input_scales = has_input_scales

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    def input_scales(self, layer: torch.nn.Module, num_experts: int) -> int | None:
        return num_experts if self.has_input_scales else None

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        super().create_moe_runner(layer, moe_runner_config)
        # The method around the scheme is the layer's own; SGLang asks it, not the scheme.
        layer.quant_method.fuse_routed_scaling_factor_in_topk = True
        layer.quant_method.runner = self.runner

    def apply_weights(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self._run(layer, dispatch_output)


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
    if of_a_draft():  # its experts may be of any kind; they stay SGLang's
        scheme.create_moe_runner = partial(with_triton, scheme.create_moe_runner)
        return scheme
    raise UnsupportedLayerError(FLAG, f"experts for which SGLang has {type(scheme).__name__}", "NVFP4 experts (nvfp4-pack-quantized)")
