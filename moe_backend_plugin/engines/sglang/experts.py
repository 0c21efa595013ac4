"""The weights of a layer's experts between SGLang and this package: what its methods and its schemes for them have in common."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.utils import get_moe_runner_backend

from ...nvfp4.scheme import TensorNames
from . import settings
from .moe import PluginQuantInfo, new_weights
from .weights import ExpertWeights


class PluginExperts:
    """Mixed into the class that SGLang asks for the weights and the output of one layer's experts."""

    names: TensorNames
    every_input_scale = False
    """A rank has the input scales of all experts of the model, not only of its own."""

    _weights: ExpertWeights

    def input_scales(self, layer: torch.nn.Module, num_experts: int) -> int | None:
        """How many experts have input scales, of the ``num_experts`` of this rank or of all; None if the checkpoint has none."""
        raise NotImplementedError

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
        self._weights = new_weights(layer, self.names, *sizes, params_dtype, extra_weight_attrs.get("with_bias", False))
        loader, input_scales = extra_weight_attrs["weight_loader"], self.input_scales(layer, num_experts)
        self._weights.create(layer, loader, input_scales, everyone=self.every_input_scale)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._weights.finish(layer, settings.dummy_weights())

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        self._weights.restore(layer)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        self.moe_runner_config = moe_runner_config
        self.runner = MoeRunner(get_moe_runner_backend(), moe_runner_config)

    def _run(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, PluginQuantInfo(layer, self._weights))
