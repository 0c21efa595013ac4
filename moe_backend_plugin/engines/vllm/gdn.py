"""Gated-delta-net layers in vLLM: this package's layer in place of vLLM's, wherever it has a provider for the device."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.utils.torch_utils import _encode_layer_name

from ...errors import UnsupportedLayerError
from .settings import name_graphs, plugin_config, provider

logger = init_logger("vllm.moe_backend_plugin")


@QwenGatedDeltaNetAttention.register_oot
class PluginGatedDeltaNetAttention(QwenGatedDeltaNetAttention):
    """vLLM's layer of Qwen3-Next and Qwen3.5 with another way through the state.

    Parameters, projections, convolution, prefill, normalisation and state pools are the base class's.  Where the
    configuration gives GDN to the engine, the layer is the base class's in every respect.
    """

    order_qkv: torch.Tensor
    order_z: torch.Tensor
    order_ba: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = get_current_vllm_config()
        choice = provider("gdn", where=self.prefix)
        self._kernels = None
        if choice.provider == "cutedsl":
            from . import gdn_cuda

            if (reason := gdn_cuda.unsupported_reason(self, vllm_config)) is None:
                self._kernels = gdn_cuda
                if gdn_cuda.prepare(self, vllm_config):
                    self._order_groups()
                    self._forward_method = self.forward_gated
            elif plugin_config().strict:
                raise UnsupportedLayerError(self.prefix, reason, "strict: false (the engine serves the layer), or gdn.provider: engine")
            else:
                logger.warning_once("Gated-delta-net layers are served by: engine (%s)", reason)
                return
        logger.info_once("Gated-delta-net layers are served by: %s (%s)", choice.provider, choice.reason)
        if choice.provider == "torch":
            from . import gdn_cpu  # noqa: F401  defines the op that forward_plugin calls

            name_graphs("gated-delta-net layers", "torch")
            self._forward_method = self.forward_plugin

    def _forward_core(self, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor) -> None:
        """On a GPU, inside vLLM's own op: [tokens, 2 HQ K + HV V], [tokens, HV] twice -> [tokens, HV, V], pools updated."""
        if self._kernels is None:
            super()._forward_core(mixed_qkv, b, a, core_attn_out)
        elif not self._kernels.step(self, mixed_qkv, b, a, core_attn_out):
            with self._kernels.rows_of_mixed_batches():
                super()._forward_core(mixed_qkv, b, a, core_attn_out)

    def forward_gated(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """On a GPU: [tokens, hidden] -> [tokens, hidden]; vLLM's course, but that one op goes as far as the gated norm."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        tokens = hidden_states.shape[0]
        if self.gqa_interleaved_layout:  # Qwen3-Next groups the projections by key head: a gather each
            parts = qkvz.view(tokens, -1, self.head_k_dim)
            qkv, z = parts.index_select(1, self.order_qkv).flatten(1), parts.index_select(1, self.order_z)
            b, a = ba.index_select(1, self.order_ba).chunk(2, dim=-1)
        else:
            value_dim = self.value_dim // self.tp_size
            qkv, z = qkvz.split([qkvz.shape[-1] - value_dim, value_dim], dim=-1)
            z = z.view(tokens, -1, self.head_v_dim)
            b, a = self.split_ba(ba)
        out = torch.zeros(tokens, b.shape[-1], self.head_v_dim, dtype=hidden_states.dtype, device=hidden_states.device)
        torch.ops.vllm.moe_backend_plugin_gdn_gated(qkv, b, a, z, out, _encode_layer_name(self.prefix))
        output, _ = self.out_proj(out.flatten(-2))
        return output

    def _order_groups(self) -> None:
        """Where q, k, v and z, and b and a, lie in Qwen3-Next's projections, in pieces of a head: one group after the other."""
        values, groups = self.num_v_heads // self.num_k_heads, self.num_k_heads // self.tp_size

        def order(name: str, sizes: list[int], wanted: slice) -> None:
            pieces = torch.arange(groups * sum(sizes)).view(groups, -1).split(sizes, dim=1)[wanted]
            # A buffer, which is kept when vLLM gives up its memory.
            self.register_buffer(name, torch.cat([piece.flatten() for piece in pieces]), persistent=False)

        order("order_qkv", [1, 1, values, values], slice(3))
        order("order_z", [1, 1, values, values], slice(3, 4))
        order("order_ba", [values, values], slice(2))

    def core_gated(self, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> None:
        """Inside that op: as :meth:`_forward_core`, and the norm with its gate ``z`` [tokens, HV, V]."""
        if not self._kernels.step(self, mixed_qkv, b, a, out, z):
            with self._kernels.rows_of_mixed_batches():
                super()._forward_core(mixed_qkv, b.contiguous(), a.contiguous(), out)
            self._kernels.normalise(self, out, z)

    def forward_plugin(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """On a CPU: [tokens, hidden] -> [tokens, hidden]; between the projections, one op that reads and writes the state pools."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        tokens = hidden_states.shape[0]
        heads = self.num_v_heads // self.tp_size
        if self.gqa_interleaved_layout:  # Qwen3-Next groups the projections by key head
            *qkv, z, b, a = self.fix_query_key_value_ordering(qkvz, ba)
            qkv = torch.cat([part.reshape(tokens, -1) for part in qkv], dim=-1)
        else:
            value_dim = self.value_dim // self.tp_size
            qkv, z = qkvz.split([qkvz.shape[-1] - value_dim, value_dim], dim=-1)
            z = z.reshape(tokens, heads, self.head_v_dim)
            b, a = self.split_ba(ba)
        out = torch.zeros(tokens, heads, self.head_v_dim, dtype=hidden_states.dtype, device=hidden_states.device)
        torch.ops.vllm.moe_backend_plugin_gdn(qkv, b, a, out, _encode_layer_name(self.prefix))
        return self._output_projection(out, z)
