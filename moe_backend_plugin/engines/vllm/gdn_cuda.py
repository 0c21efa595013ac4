"""The state side of a gated-delta-net layer in vLLM on an NVIDIA GPU: this package's kernels in vLLM's own course of a batch.

Batches of decode rows only, with drafts or without, are served here.  In a batch that holds prefills vLLM's code runs, and
the one function it calls for the decode rows of such a batch is exchanged for the time of that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as vllm_gdn
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op
from wrapt import wrap_function_wrapper

from ...gdn import cuda
from ...kernels import compile as kernels
from .settings import name_graphs, plugin_config

logger = init_logger("vllm.moe_backend_plugin")
_exchanged: ContextVar[bool] = ContextVar("_exchanged", default=False)


def unsupported_reason(layer: vllm_gdn.QwenGatedDeltaNetAttention, vllm_config: VllmConfig) -> str | None:
    """Why the kernels cannot serve this layer, or None."""
    return cuda.unsupported_reason(
        head_k=layer.head_k_dim,
        head_v=layer.head_v_dim,
        key_heads=layer.num_k_heads // layer.tp_size,
        value_heads=layer.num_v_heads // layer.tp_size,
        state=layer.get_state_dtype()[1],
        tokens=vllm_config.model_config.dtype,
    ) or (
        f"num_speculative_tokens {layer.num_spec}; the kernels serve up to {cuda.MAX_TOKENS - 1}"
        if layer.num_spec >= cuda.MAX_TOKENS
        else None
    )


NORM_WORK = 64
"""Rows x value heads up to which the decode kernel's own norm costs less than a launch behind it (integration/bench/NOTES.md)."""


def prepare(layer: vllm_gdn.QwenGatedDeltaNetAttention, vllm_config: VllmConfig) -> bool:
    """Compile or load every kernel that this layer can launch, before the first request; returns whether its gated norm is among them,
    and so belongs to the op that ``core_gated`` serves."""
    kernels.use_cache_folder(plugin_config().kernel_cache)
    gated = _norm_can_be_folded(layer, vllm_config)
    # vLLM's fused kernel for drafts bypasses _forward_core, where this package comes in. It is of the traced graph.
    if layer.enable_fused_gdn_spec_decode:
        layer.enable_fused_gdn_spec_decode = False
        name_graphs("gated-delta-net layers", "cutedsl")
    norm = layer.norm
    kinds = cuda.Layer(
        state=layer.get_state_dtype()[1],
        tokens=vllm_config.model_config.dtype,
        bias=layer.dt_bias.dtype,
        heads_per_group=layer.num_v_heads // layer.num_k_heads,
        **({"norm": norm.activation, "norm_weight": norm.weight.dtype} if gated else {}),
    )
    device = torch.device("cuda", torch.accelerator.current_device_index())
    if compiled := cuda.prepare(kinds, device, speculative=layer.num_spec > 0):
        logger.info_once("Compiled %d gated-delta-net kernels; they are kept in %s", compiled, str(kernels.cache_folder()))
    return gated


def _norm_can_be_folded(layer: vllm_gdn.QwenGatedDeltaNetAttention, vllm_config: VllmConfig) -> bool:
    """Whether the layer's norm is the kernel's, and no compiler would fuse it with what is around it."""
    norm = layer.norm
    return (
        vllm_config.compilation_config.mode == CompilationMode.NONE
        and norm.activation in ("silu", "sigmoid")
        and norm.norm_before_gate
        and norm.group_size in (None, layer.head_v_dim)
        and norm.bias is None
        and norm.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def _metadata(layer: Any) -> Any:
    """Of the batch that is run, for this layer; None while vLLM measures its memory."""
    attn_metadata = get_forward_context().attn_metadata
    return attn_metadata.get(layer.prefix) if isinstance(attn_metadata, dict) else None


def step(
    layer: Any, mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor, gate: torch.Tensor | None = None
) -> bool:
    """Serve a batch that is all decode rows; False, and nothing done, for any other.

    ``gate`` [tokens, HV, V]: ``out`` gets the gated norm of the result.
    """
    m = _metadata(layer)
    if m is None or m.num_prefills > 0:
        return False
    tokens = m.num_actual_tokens
    mixed_qkv, b, a, out = mixed_qkv[:tokens], b[:tokens], a[:tokens], out[:tokens]
    if m.spec_sequence_masks is not None and m.num_decodes == 0:
        rows = m.num_spec_decodes
        slots, starts, accepted = m.spec_state_indices_tensor[:rows], m.spec_query_start_loc[: rows + 1], m.num_accepted_tokens[:rows]
        x = _convolve(
            layer,
            mixed_qkv,
            conv_state_indices=slots[:, 0],
            num_accepted_tokens=accepted,
            query_start_loc=starts,
            max_query_len=slots.shape[1],
        )
        _decode_drafts(x, a, b, layer.A_log, layer.dt_bias, layer.kv_cache[1], slots, starts, accepted, out)
    elif m.spec_sequence_masks is None and m.num_decodes > 0:
        # One token a row; under a full CUDA graph the rows past the last request hold the null slot.
        slots = m.non_spec_state_indices_tensor[:tokens]
        x = _convolve(layer, mixed_qkv, conv_state_indices=slots)
        folded, norm = gate is not None and tokens * out.shape[1] <= NORM_WORK, {}
        if folded:
            norm = {
                "gate": gate[:tokens],
                "norm_weight": layer.norm.weight,
                "norm_eps": layer.norm.eps,
                "activation": layer.norm.activation,
            }
        cuda.decode(x, a, b, layer.A_log, layer.dt_bias, layer.kv_cache[1], _side_by_side(slots), out, **norm)
        if folded:
            return True
    else:
        return False
    if gate is not None:
        normalise(layer, out, gate)
    return True


def normalise(layer: Any, out: torch.Tensor, gate: torch.Tensor) -> None:
    """vLLM's gated norm of the batch's tokens, in place."""
    m = _metadata(layer)
    if m is not None:
        out, gate = out[: m.num_actual_tokens], gate[: m.num_actual_tokens]
        layer._rms_norm_gated_cuda(out, gate, out)


@eager_break_during_capture
def _gated(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, z: torch.Tensor, out: torch.Tensor, layer_name: LayerNameType
) -> None:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    layer.core_gated(mixed_qkv, b, a, z, out)


direct_register_custom_op(op_name="moe_backend_plugin_gdn_gated", op_func=_gated, mutates_args=["out"])


@contextmanager
def rows_of_mixed_batches() -> Iterator[None]:
    """While open, the decode rows that vLLM's own code meets in a batch with prefills are this package's."""
    token = _exchanged.set(True)
    try:
        yield
    finally:
        _exchanged.reset(token)


def _decode_drafts(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    accepted: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Rows of one token and its drafts; the state after each goes to a slot of its own, ``slots`` [rows, columns]."""
    cuda.decode(x, a, b, A_log, dt_bias, pool, slots, out, write=slots, cu_seqlens=starts, num_accepted=accepted, max_tokens=slots.shape[1])


def _side_by_side(slots: torch.Tensor) -> torch.Tensor:
    """``slots`` [rows] as the kernels read them, with unit stride.

    Where drafts are configured and a batch has none, vLLM gives a column of its block table. Not under a full graph: vLLM fills a
    buffer for that, which is returned as it is.
    """
    return slots if slots.stride(0) == 1 else slots.clone(memory_format=torch.contiguous_format)


def _convolve(layer: Any, x: torch.Tensor, **rows: Any) -> torch.Tensor:
    """vLLM's convolution of packed tokens [tokens, channels], its rolling buffers updated."""
    pool = layer.kv_cache[0]
    return causal_conv1d_update(
        x,
        pool if is_conv_state_dim_first() else pool.transpose(-1, -2),
        layer.conv1d.weight.view(layer.conv1d.weight.size(0), layer.conv1d.weight.size(2)),
        layer.conv1d.bias,
        layer.activation,
        validate_data=False,
        **rows,
    )


def _decode_rows(wrapped: Any, _instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """In place of vLLM's ``fused_sigmoid_gating_delta_rule_update``: same arguments, same result, in this package's layers."""
    if not _exchanged.get():
        return wrapped(*args, **kwargs)
    return _update(*args, **kwargs)


def _update(
    *,
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    inplace_final_state: bool,
    cu_seqlens: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    num_accepted_tokens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [1, tokens, HQ, K], v [1, tokens, HV, V] -> (out [1, tokens, HV, V], the pool)."""
    assert inplace_final_state and use_qk_l2norm_in_kernel
    tokens, rows = q.shape[1], cu_seqlens.shape[0] - 1
    packed = torch.cat([part.reshape(tokens, -1) for part in (q, k, v)], dim=-1)
    out = torch.zeros_like(v)
    if num_accepted_tokens is None:
        # vLLM hands over the slots of the prefills as well; decode rows come first.
        cuda.decode(packed, a, b, A_log, dt_bias, initial_state, _side_by_side(ssm_state_indices[:rows]), out[0])
    else:
        slots, accepted = ssm_state_indices[:rows], num_accepted_tokens[:rows]
        _decode_drafts(packed, a, b, A_log, dt_bias, initial_state, slots, cu_seqlens, accepted, out[0])
    return out, initial_state


wrap_function_wrapper(vllm_gdn, "fused_sigmoid_gating_delta_rule_update", _decode_rows)
