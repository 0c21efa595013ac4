"""The state side of a gated-delta-net layer in vLLM's CPU engine.

Decode rows and rows with draft tokens run on this package's ops, straight on vLLM's pools; prefills run on vLLM's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_update_cpu
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import (
    _causal_conv1d_update_cpu,
    _conv_buffer_view,
    _cpu_gdn_attention_nonspec,
    _spec_aware_nonspec,
    _spec_aware_nonspec_subset,
    _ssm_state_view,
    _unpacked_conv_weight,
    is_arm_bf16,
)
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

from ...gdn import slots
from ...gdn.op import gdn_conv_update, gdn_decode


def _gdn(mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor, layer_name: LayerNameType) -> None:
    """The op behind one layer: mixed_qkv [tokens, 2 HQ K + HV V], a, b [tokens, HV] -> out [tokens, HV, V], pools updated."""
    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if not isinstance(context.attn_metadata, dict):  # vLLM's profiling run has no requests
        return
    metadata = context.attn_metadata[layer.prefix]
    if metadata.num_actual_tokens == 0:
        return
    if metadata.spec_sequence_masks is None:
        _without_drafts(layer, metadata, mixed_qkv, b, a, out)
    else:
        _with_drafts(layer, metadata, mixed_qkv, b, a, out)


direct_register_custom_op(op_name="moe_backend_plugin_gdn", op_func=_gdn, mutates_args=["out"])


def _without_drafts(
    layer: QwenGatedDeltaNetAttention, m: GDNAttentionMetadata, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor
) -> None:
    """Decode rows come first in the batch and are this package's; what follows are prefills, which are vLLM's."""
    rows, tokens = m.num_decodes, m.num_decode_tokens
    indices, starts = m.non_spec_state_indices_tensor, m.non_spec_query_start_loc
    if rows:
        # One token a row, so tokens and rows count the same.
        conv, states = _pools(layer)
        x = _conv(layer, mixed_qkv[:tokens], conv, indices[:rows])
        state_slots = slots.from_vllm_decode(indices, rows, slots.PoolLayout.of(states, order="KV"))
        gdn_decode(x, a[:tokens], b[:tokens], layer.A_log, layer.dt_bias, states, state_slots, out=out[:tokens], as_vllm=True)
    if m.num_prefills:
        rest = replace(
            m,
            num_decodes=0,
            num_decode_tokens=0,
            num_actual_tokens=m.num_actual_tokens - tokens,
            non_spec_state_indices_tensor=indices[rows:],
            non_spec_query_start_loc=starts[rows:] - tokens,
            has_initial_state=m.has_initial_state[rows:],
        )
        # The buffer is wider than the history when drafts are configured; vLLM has a function for each width.
        arguments = (layer, rest, mixed_qkv[tokens:], b[tokens:], a[tokens:], out[tokens:])
        width = layer.conv1d.weight.shape[-1]
        if _conv_buffer_view(layer).shape[-1] == width - 1:
            _cpu_gdn_attention_nonspec(*arguments)
        else:
            _spec_aware_nonspec(*arguments, _conv_buffer_view(layer), _ssm_state_view(layer), width)


def _with_drafts(
    layer: QwenGatedDeltaNetAttention, m: GDNAttentionMetadata, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor
) -> None:
    """Rows with draft tokens are this package's; the other rows of such a batch are prefills, which are vLLM's."""
    rows = m.num_spec_decodes
    alone = m.num_prefills == 0 and m.num_decodes == 0
    mine = slice(None, m.num_spec_decode_tokens) if alone else m.spec_token_indx.long()
    indices, starts = m.spec_state_indices_tensor[:rows], m.spec_query_start_loc[: rows + 1]
    accepted = m.num_accepted_tokens[:rows]
    conv, states = _pools(layer)
    conv_slots = slots.from_vllm_spec_conv(indices, starts, slots.PoolLayout.of(conv))
    x = gdn_conv_update(
        mixed_qkv[mine], conv, _conv_weight(layer), layer.conv1d.bias, conv_slots, num_accepted=accepted, activation=layer.activation
    )
    state_slots = slots.from_vllm_spec(indices, accepted, starts, slots.PoolLayout.of(states, order="KV"))
    # vLLM's kernel for drafts has another step size than its kernel for one token; here drafts must not change the text.
    out[mine] = gdn_decode(x, a[mine], b[mine], layer.A_log, layer.dt_bias, states, state_slots, as_vllm=True)
    if not alone:
        others = m.non_spec_token_indx.long()
        conv_view, state_view, width = _conv_buffer_view(layer), _ssm_state_view(layer), layer.conv1d.weight.shape[-1]
        out[others] = _spec_aware_nonspec_subset(layer, m, mixed_qkv[others], b[others], a[others], conv_view, state_view, width)


def _conv(layer: QwenGatedDeltaNetAttention, x: torch.Tensor, pool: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The convolution of one token a row: vLLM's own kernel where vLLM would call it, for the same bits as there.

    vLLM has one for CPUs with bfloat16 instructions and one for others. The first has no null rule: a null row (slot 0) rolls the null
    block's buffer, which is nobody's.
    """
    arguments = {"x": x.contiguous(), "bias": layer.conv1d.bias, "conv_state_indices": indices}
    if pool.shape[-1] == layer.conv1d.weight.shape[-1] - 1:
        if torch.cpu._is_avx512_bf16_supported() or is_arm_bf16():
            silu = layer.activation == "silu"
            return _causal_conv1d_update_cpu(
                conv_states=pool, weight=layer.conv1d.weight, silu_activation=silu, is_weight_packed=True, **arguments
            )
        return causal_conv1d_update_cpu(conv_state=pool, weight=_conv_weight(layer), activation=layer.activation, **arguments)
    place = slots.from_vllm_decode(indices, len(indices), slots.PoolLayout.of(pool))
    return gdn_conv_update(x, pool, _conv_weight(layer), layer.conv1d.bias, place, activation=layer.activation)


def _pools(layer: QwenGatedDeltaNetAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution pool [slots, channels, columns] and state pool [slots, HV, V, K]; views into one allocation of vLLM's."""
    return _conv_buffer_view(layer), layer.kv_cache[1]


def _conv_weight(layer: QwenGatedDeltaNetAttention) -> torch.Tensor:
    """[channels, width]; on CPUs with bf16 instructions vLLM repacks the parameter and keeps this copy."""
    return _unpacked_conv_weight(layer)
