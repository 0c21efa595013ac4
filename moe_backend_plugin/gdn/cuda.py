"""Gated-delta-net decode on an NVIDIA GPU: the choice of kernel, and one launch.

The calls here are the steady state of a server: no allocation, no synchronisation, no question to the device. The kernel
takes the engine's int32 or int64 tables as they are and widens them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ..kernels import compile as kernels
from ..kernels.compile import name_of
from ..kernels.gdn_decode import HEAD, MAX_TOKENS, Variant
from .support import heads_reason

FAMILY = "gdn_decode"
STATE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKEN_TYPES = (torch.bfloat16, torch.float16)


def unsupported_reason(
    *, head_k: int, head_v: int, key_heads: int, value_heads: int, state: torch.dtype, tokens: torch.dtype
) -> str | None:
    """Why the kernels cannot serve a layer with these heads and types, or None if they can."""
    if reason := heads_reason(head_k=head_k, head_v=head_v, key_heads=key_heads, value_heads=value_heads):
        return reason
    if state not in STATE_TYPES:
        return f"state dtype {state}; the kernels serve {', '.join(map(name_of, STATE_TYPES))}"
    if tokens not in TOKEN_TYPES:
        return f"activation dtype {tokens}; the kernels serve {', '.join(map(name_of, TOKEN_TYPES))}"
    return None


def tile_for(state_bytes: int, work: int, ragged: bool) -> tuple[int, int]:
    """(tile_v, warps) for ``work`` = rows x value heads. See integration/bench/NOTES.md for the sweep behind it.

    Blocks of 32 rows fill the GPU soonest. Rows of several tokens do more with a state once it is loaded, and larger blocks
    share the preparation of their tokens.
    """
    if not ragged or work < 128:
        return 32, 4
    return (64, 8) if state_bytes == 4 or work < 512 else (64, 4)


def tiles(state_bytes: int, ragged: bool) -> list[tuple[int, int]]:
    """All that ``tile_for`` can answer."""
    return list(dict.fromkeys(tile_for(state_bytes, work, ragged) for work in (1, 128, 512)))


MAX_ROWS = 65535
"""Rows are the third dimension of the grid."""
AHEAD_BYTES = 5 << 19
"""How far ahead blocks ask for the state of later ones. Half of it or twice as much is within a percent; from 8 MB on the
cache drops what was asked for, and the call gets slower by up to a third."""


def rows_ahead(row_bytes: int) -> int:
    return max(1, round(AHEAD_BYTES / row_bytes))


@dataclass(frozen=True)
class Layer:
    """What a model fixes: the types of state, activations, dt_bias and slot tables, the head ratio, and the norm behind it."""

    state: torch.dtype
    tokens: torch.dtype
    bias: torch.dtype
    heads_per_group: int
    index: torch.dtype = torch.int32
    norm: str = ""
    norm_weight: torch.dtype = torch.bfloat16

    def variants(self, *, speculative: bool, verify: bool = False) -> Iterator[Variant]:
        """Every variant that a server of this model can launch: one token a row, with the norm and without, and with drafts, accepted rows.

        ``verify``: drafts whose states go to an intermediate buffer, and no slot is written (SGLang).
        """
        plain = replace(self, norm="")
        modes = [(plain, {}), *([(self, {})] if self.norm else [])]
        modes += [(plain, {"ragged": True, "write": "each", "accepted": True})] if speculative else []
        modes += [(plain, {"ragged": True, "write": "none", "intermediate": True})] if verify else []
        for layer, mode in modes:
            for tile in tiles(self.state.itemsize, "ragged" in mode):
                yield layer.variant(tile, **mode)

    def variant(self, tile: tuple[int, int], **mode: Any) -> Variant:
        """The variant with this norm. ``tile``: (tile_v, warps); ``mode``: the fields of Variant that say what a call gives."""
        tile_v, warps = tile
        return Variant(
            state=name_of(self.state),
            tokens=name_of(self.tokens),
            bias=name_of(self.bias),
            index=name_of(self.index),
            heads_per_group=self.heads_per_group,
            norm=self.norm,
            norm_weight=name_of(self.norm_weight) if self.norm else "bfloat16",
            tile_v=tile_v,
            warps=warps,
            **mode,
        )


@cache
def prepare(layer: Layer, device: torch.device, *, speculative: bool, verify: bool = False) -> int:
    """Compile and load whatever a server of this model can launch (see :meth:`Layer.variants`); returns how many had to be compiled."""
    return kernels.prepare(FAMILY, layer.variants(speculative=speculative, verify=verify), kernels.device_architecture(device.index or 0))


@cache
def _kernel(
    device: int, tile: tuple[int, int], ragged: bool, write: str, accepted: bool, split: bool, intermediate: bool, *layer: Any
) -> Callable:
    """``layer``: the fields of :class:`Layer`, which is made here so that a call whose kernel is known makes none."""
    variant = Layer(*layer).variant(tile, ragged=ragged, write=write, accepted=accepted, split=split, intermediate=intermediate)
    return kernels.load(FAMILY, variant, kernels.device_architecture(device))


def decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    read: torch.Tensor,
    out: torch.Tensor,
    *,
    write: torch.Tensor | None = None,
    write_pool: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    num_accepted: torch.Tensor | None = None,
    max_tokens: int = 1,
    intermediate: torch.Tensor | None = None,
    update_state: bool = True,
    live_begin: int = 1,
    live_end: int | None = None,
    gate: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    activation: str = "silu",
) -> None:
    """Decode packed tokens, update the pool in place, write ``out`` [tokens, HV, V]. One launch on the current stream.

    mixed_qkv: [tokens, 2 HQ K + HV V], 16-byte aligned rows of unit stride. a, b: [tokens, HV], unit stride in the heads.
    A_log: fp32 [HV]; dt_bias: [HV]. pool: [slots, HV, V, K], each slot contiguous, any stride between slots that is a
    multiple of 16 bytes; fp32, bf16 or fp16. All tables share one type, int32 or int64, on the pool's device.

    read: [rows], or [rows, columns] with ``num_accepted`` [rows]: row r then resumes from ``read[r, num_accepted[r] - 1]``.
    Slots outside ``live_begin <= slot < live_end`` (default: the pool's size), and accepted counts outside 1..columns, are
    skipped: zeros in ``out``, no memory touched. write: None for the read slot; [rows] for the state after a row's last
    token; [rows, columns] for the state after each token (entries that are not live are not written). write_pool: written
    instead of ``pool``, which then stays as it is. cu_seqlens: [rows + 1]; rows of more than ``max_tokens`` (at most 8)
    tokens are skipped as well. Tokens that belong to no row are not written. intermediate: [>= rows, >= max_tokens, HV, V, K] gets the
    state after each token, by row. update_state=False writes no slot.

    gate [tokens, HV, V] and norm_weight [V]: ``out`` is RMSNorm(o) * norm_weight * activation(gate), as in Qwen3-Next.
    """
    slots, heads = pool.shape[0], pool.shape[1]
    mode = "none" if not update_state else "same" if write is None else "last" if write.dim() == 1 else "each"
    if max_tokens > MAX_TOKENS:
        raise ValueError(f"max_tokens: found {max_tokens}, allowed 1..{MAX_TOKENS}")
    rows = read.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows == 0:
        return
    if rows > MAX_ROWS:
        raise ValueError(f"rows: found {rows}, allowed up to {MAX_ROWS}")
    kernel = _kernel(
        pool.device.index,
        tile_for(pool.element_size(), rows * heads, cu_seqlens is not None),
        cu_seqlens is not None,
        mode,
        num_accepted is not None,
        write_pool is not None,
        intermediate is not None,
        pool.dtype,
        mixed_qkv.dtype,
        dt_bias.dtype,
        heads * HEAD * 2 // (mixed_qkv.shape[1] - heads * HEAD),
        read.dtype,
        "" if gate is None else activation,
        torch.bfloat16 if norm_weight is None else norm_weight.dtype,
    )
    kernel(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        pool,
        write_pool,
        read,
        write if mode in ("last", "each") else None,
        cu_seqlens,
        num_accepted,
        intermediate,
        gate,
        norm_weight,
        out,
        rows,
        max_tokens,
        rows_ahead(heads * HEAD * HEAD * pool.element_size()),
        live_begin,
        slots if live_end is None else live_end,
        norm_eps,
    )
