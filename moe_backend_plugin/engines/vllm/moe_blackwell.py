"""NVFP4 mixture-of-experts layers in vLLM on a Blackwell GPU, through FlashInfer: which layers, their weights, and the calls.

W4A4: with static activation scales where the checkpoint has them, else with a scale a token where ``moe.activations: nvfp4`` asks for
that. Before a weight is read the kernels are held to the reference on a small layer of the same shape, in every way that calls will run
them, tuned or not, and a server whose kernels are wrong does not start. Nothing here has run on such a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import Parameter
from vllm.distributed import get_ep_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ...errors import PluginError
from ...moe import blackwell, kernel_check, tactics
from ...moe.op import nvfp4_moe_flashinfer
from ...moe.problem import MoEProblem
from ...nvfp4.blackwell import ActivationScales
from .. import experts
from . import moe_cuda
from .moe import Nvfp4MoEMethod
from .moe_cuda import is_modular, most_tokens, problem_of
from .settings import plugin_config

logger = init_logger("vllm.moe_backend_plugin")


def unsupported_reason(layer: RoutedExperts, static: bool, activations: str) -> str | None:
    """Why the kernels cannot serve this layer, or None. ``static``: the checkpoint has input scales; ``activations``: the setting."""
    moe = layer.moe_config
    if reason := moe_cuda.engine_reason(layer):
        return reason
    if activations == "bf16" or (activations == "auto" and not static):
        return "activations in bf16, and these kernels multiply NVFP4 activations (moe.activations: nvfp4)"
    if is_modular(moe.moe_parallel_config):
        return "tokens that move between ranks, which this package does not bring to these kernels"
    if reason := blackwell.missing():
        return reason
    try:
        problem = problem_of(moe, use_nvfp4=True, on_input=layer.apply_router_weight_on_input)
    except PluginError as error:
        return str(error)
    return blackwell.unsupported_reason(problem, moe.in_dtype)


@cache
def prepare(problem: MoEProblem, tokens: torch.dtype, device: torch.device, max_tokens: int, scales: ActivationScales) -> int:
    """Read what was tuned for layers of this problem, and make the arena large enough; once for all of them. Returns the arena's bytes."""
    experts.use(plugin_config())
    tactics.load(problem, tokens, device.index or 0)
    return blackwell.prepare(problem, tokens, device, max_tokens, scales)


class BlackwellMoEMethod(Nvfp4MoEMethod):
    """The routed experts of one layer on a Blackwell GPU, one that :func:`unsupported_reason` lets through.

    After loading the layer holds the fields of ``moe.blackwell.Weights`` as parameters named ``w13_weight``, ``w13_weight_scale``,
    ``w13_alpha``, ``w2_weight``, ``w2_weight_scale``, ``w2_alpha``, ``h_scale`` and, with static scales, ``x_scale``.
    """

    problem: MoEProblem
    first: int | None
    """Global id of this rank's first expert, where they follow one another."""

    @property
    def scales(self) -> ActivationScales:
        return "static" if self.use_nvfp4 else "token"

    def _prepare(self, layer: RoutedExperts) -> None:
        moe = self.moe
        self.problem = problem_of(moe, use_nvfp4=True, on_input=layer.apply_router_weight_on_input)
        ids = self._global_ids(layer)
        self.first = ids[0] if ids == list(range(ids[0], ids[0] + len(ids))) else None
        device, tokens = moe_cuda.current_device(), most_tokens(moe)
        # The check uses the arena too, for calls of a few hundred tokens: first the largest, so that it grows once.
        size = prepare(self.problem, moe.in_dtype, device, tokens, self.scales)
        checked = kernel_check.require(self.problem, device, tokens, self.scales, where=self.prefix, dtype=moe.in_dtype)
        text = "FlashInfer's NVFP4 MoE kernels: %d tactics agree with the reference; workspace of all layers: %.1f MiB for up to %d tokens"
        logger.info_once(text, checked, size / 2**20, tokens)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        names = self.names
        self._check(layer)
        parts: dict[str, torch.Tensor] = {}
        for gemm in ("w13", "w2"):
            weight, scale = (self._take(layer, f"{gemm}_{name}") for name in (names.weight, names.scale))
            scale_2, input_scale = (self._take(layer, f"{gemm}_{name}") for name in (names.global_scale, names.input_scale))
            if names.reciprocal:
                scale_2, input_scale = scale_2.reciprocal(), input_scale.reciprocal()
            if gemm == "w13" and self.moe.activation is MoEActivation.SWIGLUOAI:
                weight, scale = (torch.cat((t[:, 0::2], t[:, 1::2]), dim=1) for t in (weight, scale.view(torch.uint8)))
                scale = scale.view(torch.float8_e4m3fn)
            parts |= {gemm: weight, f"{gemm}_scale": scale, f"{gemm}_scale_2": scale_2}
            if self.use_nvfp4:
                parts[f"{gemm}_input_scale"] = self._of_all_ranks(input_scale)
        try:
            weights = blackwell.pack(self.problem, **parts)
        except PluginError as error:
            raise type(error)(f"{self.prefix}: {error.where}", error.found, error.allowed) from None
        for field, name in _NAMES.items():
            tensor = getattr(weights, field)
            setattr(layer, name, None if tensor is None else Parameter(tensor, requires_grad=False))

    def _of_all_ranks(self, scale: torch.Tensor) -> torch.Tensor:
        """Every expert's scale the largest of all ranks, so that outputs do not depend on which rank has which expert."""
        largest = scale.max()
        if self.moe.moe_parallel_config.ep_size > 1:
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=get_ep_group().device_group)
        return largest.expand(scale.shape).contiguous()

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return super().topk_indices_dtype or torch.int32

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        weights = blackwell.Weights(*(getattr(layer, name) for name in _NAMES.values()))
        return nvfp4_moe_flashinfer(
            x.contiguous(),
            weights,
            topk_weights.float().contiguous(),
            topk_ids.contiguous(),
            self.problem,
            layer.expert_map if self.first is None else None,
            self.first or 0,
        )


_NAMES = {
    "w13": "w13_weight",
    "w13_scale": "w13_weight_scale",
    "w13_alpha": "w13_alpha",
    "w2": "w2_weight",
    "w2_scale": "w2_weight_scale",
    "w2_alpha": "w2_alpha",
    "h_scale": "h_scale",
    "x_scale": "x_scale",
}
assert tuple(_NAMES) == blackwell.Weights._fields
