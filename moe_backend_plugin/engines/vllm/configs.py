"""vLLM's configuration classes for NVFP4 checkpoints, with this package's layers in place of vLLM's."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import get_linear_transform_schemes
from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig, ModelOptNvFp4Config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ...errors import UnsupportedLayerError
from ...nvfp4.checkpoint import check_checkpoint
from ...nvfp4.scheme import QuantScheme, parse_scheme
from .linear import Nvfp4LinearMethod
from .moe import Nvfp4MoEMethod
from .settings import plugin_config, provider

logger = init_logger("vllm.moe_backend_plugin")
_NOT_QUANTISED = ("vision_tower", "vision_model", "vit_large_projector")
"""Parts of names of layers that vLLM takes for unquantised, excluded or not: ModelOpt before 0.39 does not list them."""
_handed_over: set[str] = set()
"""Why layers were handed to vLLM, as far as the log has it."""


class PluginLayers:
    """Mixed in before one of vLLM's configuration classes: sends NVFP4 layers to this package.

    A subclass says which layers are NVFP4 (:meth:`nvfp4_activations`); everything else is vLLM's.
    """

    scheme: QuantScheme

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        scheme = parse_scheme(config)
        self = super().from_config(config)
        self.scheme = scheme
        return self

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, hf_config: Any = None) -> None:
        return None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls this while it reads its arguments: the moment to refuse a bad checkpoint.

        Raises:
            CheckpointError, ConfigError: what is wrong, before a process is started or a weight read.
        """
        super().maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        config = plugin_config()
        if os.path.isdir(model_name):  # A model that is still to be downloaded is checked while it loads.
            check_checkpoint(model_name, depth=config.checkpoint_check)

    def nvfp4_activations(self, layer: torch.nn.Module, prefix: str) -> str | None:
        """``"nvfp4"`` or ``"bf16"``: what the checkpoint asks for; None for a layer that is not NVFP4."""
        raise NotImplementedError

    def transform(self, layer: torch.nn.Module, prefix: str) -> str | None:
        """What the checkpoint wants done to a layer's input or output, which only vLLM's own layer does; or None."""
        return None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        moe = isinstance(layer, RoutedExperts)
        if not moe and not isinstance(layer, (LinearBase, ParallelLMHead)):
            return super().get_quant_method(layer, prefix)
        activations = self.nvfp4_activations(layer, prefix)
        if activations is None:
            return super().get_quant_method(layer, prefix)
        kind = "moe" if moe else "linear"
        choice = provider(kind, where=prefix)
        # "auto" is W4A16: without FP4 tensor cores, rounding the activations costs time and accuracy and gains nothing.
        use_nvfp4 = getattr(plugin_config(), kind).activations == "nvfp4"
        method = Nvfp4MoEMethod if moe else Nvfp4LinearMethod
        transform = self.transform(layer, prefix)
        if transform is not None and choice.provider == "torch":
            raise UnsupportedLayerError(prefix, transform, "a checkpoint without transform_config on a CPU, where vLLM has no NVFP4 kernel")
        if transform is not None and choice.provider != "engine":
            hand_over(prefix, transform, kind)
            return super().get_quant_method(layer, prefix)
        if choice.provider == "cutedsl":
            if moe:
                from . import moe_cuda as hopper
            else:
                from . import linear_cuda as hopper

            if (reason := hopper.unsupported_reason(layer, use_nvfp4)) is not None:
                hand_over(prefix, reason, kind)
                return super().get_quant_method(layer, prefix)
            method = hopper.HopperMoEMethod if moe else hopper.HopperLinearMethod
        if choice.provider == "flashinfer":
            from . import moe_blackwell

            static = activations == "nvfp4"
            if (reason := moe_blackwell.unsupported_reason(layer, static, plugin_config().moe.activations)) is not None:
                hand_over(prefix, reason, kind)
                return super().get_quant_method(layer, prefix)
            method, use_nvfp4 = moe_blackwell.BlackwellMoEMethod, static
        # The reason is the same for every layer of a kind: said once, without the layer's name.
        logger.info_once("NVFP4 %s layers are served by: %s (%s)", kind, choice.provider, choice.reason)
        if choice.provider == "engine":
            return super().get_quant_method(layer, prefix)
        arguments = (self.scheme.names, activations, use_nvfp4)
        return method(*arguments, prefix, layer.moe_config) if moe else method(*arguments, prefix)


class Nvfp4ModelOptConfig(PluginLayers, ModelOptNvFp4Config):
    """ModelOpt checkpoints in which every quantised layer is NVFP4."""

    def nvfp4_activations(self, layer: torch.nn.Module, prefix: str) -> str | None:
        if self.is_layer_excluded(prefix) or any(part in prefix for part in _NOT_QUANTISED):
            return None
        return self.scheme.activations


class Nvfp4ModelOptMixedConfig(PluginLayers, ModelOptMixedPrecisionConfig):
    """ModelOpt checkpoints that mix NVFP4 with other formats, layer by layer."""

    def nvfp4_activations(self, layer: torch.nn.Module, prefix: str) -> str | None:
        if self.is_layer_excluded(prefix):
            return None
        return {"NVFP4": "nvfp4", "W4A16_NVFP4": "bf16"}.get(self._resolve_quant_algo(prefix))


class Nvfp4CompressedTensorsConfig(PluginLayers, CompressedTensorsConfig):
    """compressed-tensors checkpoints with ``nvfp4-pack-quantized`` layers."""

    def nvfp4_activations(self, layer: torch.nn.Module, prefix: str) -> str | None:
        if isinstance(layer, RoutedExperts):
            self._add_fused_moe_to_target_scheme_map()  # a group that targets Linear means the experts too
            parts = self.get_scheme_dict(layer, f"{prefix}.0.{layer.ckpt_down_proj_name}")
        else:
            try:
                parts = self.get_scheme_dict(layer, prefix)
            except ValueError:
                if not isinstance(layer, ParallelLMHead):
                    raise
                return None  # no group targets the output matrix: vLLM leaves it unquantised as well
        if not parts or not self._is_nvfp4_format(parts.get("weights")):
            return None
        return "nvfp4" if parts.get("input_activations") is not None else "bf16"

    def transform(self, layer: torch.nn.Module, prefix: str) -> str | None:
        if not isinstance(layer, LinearBase):  # vLLM transforms no others
            return None
        at_input, at_output = get_linear_transform_schemes(layer, prefix, self.transform_config, self.packed_modules_mapping)
        found = {f"{entry.scheme.type} {entry.scheme_name}" for entry in (*at_input.values(), *at_output.values())}
        if not found:
            return None
        return f"transform_config with {', '.join(sorted(found))}, and this package's layers transform neither input nor output"


def hand_over(prefix: str, reason: str, kind: str) -> None:
    """Say, once a reason, that vLLM's own kernel serves a layer ("moe", "linear") which this package's kernels cannot.

    Raises:
        UnsupportedLayerError: ``strict`` forbids it.
    """
    if plugin_config().strict:
        raise UnsupportedLayerError(prefix, reason, f"strict: false (vLLM's own kernel serves the layer), or {kind}.provider: engine")
    if reason not in _handed_over:
        _handed_over.add(reason)
        logger.warning_once("%s, and layers like it, are served by: engine, vLLM's own kernel (%s)", prefix, reason)


def config_class(config: dict[str, Any]) -> type[PluginLayers]:
    """The class for a checkpoint's quantisation description.

    Raises:
        CheckpointError: the description is not NVFP4.
    """
    scheme = parse_scheme(config)
    if scheme.producer == "compressed-tensors":
        return Nvfp4CompressedTensorsConfig
    return Nvfp4ModelOptMixedConfig if scheme.algo == "MIXED_PRECISION" else Nvfp4ModelOptConfig
