"""The torch operators of gated-delta-net decode, and the calls that the engine layers make.

``moe_backend_plugin::gdn_decode`` and ``gdn_conv_update`` work on packed tokens, one schema for one token a row and for
speculative rows. Importing this module defines them and their CPU kernels; other providers add theirs with
``LIBRARY.impl``. They are declared with what they mutate, so they can be compiled and captured.
"""

from __future__ import annotations

import torch

from . import cpu
from .slots import Slots

NAMESPACE = "moe_backend_plugin"

# The pool is logical, [slots, HV, V, K]: its strides, not an argument, say whether [V, K] or [K, V] lies in memory.
_DECODE = (
    "(Tensor mixed_qkv, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) pool, Tensor read, Tensor write, "
    "Tensor? cu_seqlens, Tensor(b!)? intermediate, int live_begin, int live_end, bool update_state"
)
_CONV = (
    "(Tensor x, Tensor(a!) conv_pool, Tensor weight, Tensor? bias, Tensor read, Tensor? cu_seqlens, Tensor? num_accepted, "
    "int live_begin, int live_end, bool silu"
)

# FRAGMENT: other modules of the package define operators in the same namespace.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LIBRARY.define("gdn_decode" + _DECODE + ", bool as_vllm=False) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define("gdn_decode_out" + _DECODE + ", Tensor(c!) out, bool as_vllm=False) -> ()", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define("gdn_conv_update" + _CONV + ") -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _new_out(mixed_qkv: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    return mixed_qkv.new_empty(mixed_qkv.shape[0], pool.shape[1], pool.shape[2])


def _decode_cpu(mixed_qkv, a, b, A_log, dt_bias, pool, read, write, cu_seqlens, intermediate, begin, end, update_state, as_vllm=False):
    out = _new_out(mixed_qkv, pool)
    args = (mixed_qkv, a, b, A_log, dt_bias, pool, read, write, cu_seqlens, intermediate, begin, end, update_state)
    cpu.gdn_decode_out(*args, out, as_vllm)
    return out


def _conv_cpu(x, *rest):
    out = x.new_empty(x.shape)
    cpu.conv_update_out(x, *rest, out)
    return out


LIBRARY.impl("gdn_decode", _decode_cpu, "CPU")
LIBRARY.impl("gdn_decode_out", cpu.gdn_decode_out, "CPU")
LIBRARY.impl("gdn_conv_update", _conv_cpu, "CPU")
torch.library.register_fake(f"{NAMESPACE}::gdn_decode", lambda qkv, a, b, A, dt, pool, *rest: _new_out(qkv, pool), lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::gdn_decode_out", lambda *args: None, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::gdn_conv_update", lambda x, *rest: x.new_empty(x.shape), lib=LIBRARY)

_ops = getattr(torch.ops, NAMESPACE)


def gdn_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    slots: Slots,
    *,
    intermediate: torch.Tensor | None = None,
    update_state: bool = True,
    out: torch.Tensor | None = None,
    as_vllm: bool = False,
) -> torch.Tensor:
    """Decode packed tokens and update the pool in place; returns out [tokens, HV, V] in mixed_qkv's dtype.

    mixed_qkv: [tokens, 2 HQ K + HV V], straight from the convolution, unit stride in the last dimension. a, b: [tokens, HV].
    A_log, dt_bias: [HV]. pool: [slots, HV, V, K] as the engine declares it; fp32, bf16 or fp16; any stride between slots.
    HQ follows from the shapes. ``slots.cu_seqlens`` says which tokens belong to which row; without it row i is token i.
    intermediate: [B >= rows, T, HV, V, K], a batch-scoped buffer. out: written instead of a new tensor.
    as_vllm: with the rounding of vLLM's own CPU kernel, for equal texts there: the step size in the inputs' type, 1e-5 in the
    norm of q and k, and its order of sums.

    Tokens of null rows, and tokens of no row, get zeros. Otherwise as ``reference.gdn_decode``.
    """
    store = slots.pool.view(pool)
    args = (mixed_qkv, a, b, A_log, dt_bias, store, slots.read, slots.write, slots.cu_seqlens, intermediate)
    if out is None:
        return _ops.gdn_decode(*args, slots.live_begin, slots.live_end, update_state, as_vllm)
    _ops.gdn_decode_out(*args, slots.live_begin, slots.live_end, update_state, out, as_vllm)
    return out


def gdn_conv_update(
    x: torch.Tensor,
    conv_pool: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slots: Slots,
    *,
    num_accepted: torch.Tensor | None = None,
    activation: str | None = "silu",
) -> torch.Tensor:
    """The causal convolution of packed tokens x [tokens, C] and its rolling buffers; returns [tokens, C] in x's dtype.

    conv_pool: [slots, C, columns], any strides; weight: [C, width]; one slot a row, in place; as ``reference.conv_update``.
    """
    silu = activation in ("silu", "swish")
    return _ops.gdn_conv_update(
        x, conv_pool, weight, bias, slots.read, slots.cu_seqlens, num_accepted, slots.live_begin, slots.live_end, silu
    )
