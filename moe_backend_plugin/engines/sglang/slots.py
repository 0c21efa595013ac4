"""SGLang's tables for gated-delta-net states, in the terms of :func:`moe_backend_plugin.gdn.cuda.decode`; imports no SGLang.

A pool has ``size + 1`` slots. Requests own 1 .. size, so the last slot is a request's. Padded rows of a graph have -1. Padded rows of
an eager batch have slot 0, which no request ever owns: null is ``index <= 0``, ``NullRule.BLOCK_ZERO``.
"""

from __future__ import annotations

import torch

LIVE_BEGIN = 1
"""From 0 on, padded rows of an eager batch would write states of drafts to rows that the buffer may not have."""


def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q, k [1, tokens, HQ, K] and v [1, tokens, HV, V] as one [tokens, 2 HQ K + HV V]: the tensor they were cut from, else a copy."""
    parts = [part.reshape(part.shape[1], -1) if _dense(part) else part.flatten(2)[0] for part in (q, k, v)]
    tokens, widths = parts[0].shape[0], [part.shape[1] for part in parts]
    width = sum(widths)
    # Of one row the stride says nothing; of several, the parts must lie inside one row.
    stride = width if tokens == 1 else parts[0].stride(0)
    adjacent = stride >= width and all(
        part.stride(1) == 1
        and (tokens == 1 or part.stride(0) == stride)
        and part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        and part.storage_offset() == parts[0].storage_offset() + sum(widths[:index])
        for index, part in enumerate(parts)
    )
    if adjacent:
        return parts[0].as_strided((tokens, width), (stride, 1), parts[0].storage_offset())
    return torch.cat(parts, dim=-1)


def _dense(part: torch.Tensor) -> bool:
    """Heads and their elements lie side by side, so that flattening them copies nothing."""
    return part.stride(3) == 1 and part.stride(2) == part.shape[3]


def table(indices: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """A table as the kernels take it: contiguous, int32 or int64, all tables of a call of one type."""
    if like is not None and indices.dtype != like.dtype:
        indices = indices.to(like.dtype)
    return indices.contiguous()


def rows_of_verify(query_start_loc: torch.Tensor, cache_indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(slots [rows], first tokens [rows + 1]); the table of slots may be longer than the batch, never shorter."""
    rows = query_start_loc.shape[0] - 1
    slots = table(cache_indices[:rows])
    return slots, table(query_start_loc, slots)


def engine_reason(max_tokens: int, steps: int, stable_rows: bool, intermediate: torch.Tensor | None, tree: bool = False) -> str | None:
    """Why SGLang's kernel has to verify these drafts, or None. ``steps``: tokens a row."""
    if tree:
        return "trees of drafts; the kernels verify chains"
    if steps > max_tokens:
        return f"{steps} tokens a row; the kernels serve up to {max_tokens}"
    if stable_rows:
        return "SGLANG_ENABLE_PP_SPEC, under which intermediate states go by request and not by row"
    if intermediate is None:
        return "no buffer for intermediate states"
    return None
