"""Sorting pairs by expert and summing their rows, on an NVIDIA GPU: the reference, the sizes, the choice of kernel, one launch each.

A pair is one slot of one token, number ``token * k + slot``; P = M k. The launches are the steady state of a server: no allocation,
no synchronisation, no question to the device, and safe inside a CUDA graph. Importing this module needs no CuTe DSL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from ..errors import PluginError
from ..kernels import compile as kernels
from ..kernels.compile import name_of
from .routing import local_ids
from .workspace import max_tiles

ROUTE, COMBINE = "moe_route", "moe_combine"
INDEX_TYPES = (torch.int32, torch.int64)
TOKEN_TYPES = (torch.bfloat16, torch.float16)
MAX_EXPERTS = 1024
"""Local experts: a block keeps a few words for each in shared memory."""
TILE_TOKENS = range(4, 1025)
ONE_BLOCK = 4096
"""The most pairs that one block sorts."""
SHARE = 1024
"""Pairs that a block of the many-block kernels takes at a time: one a thread."""
MAX_BLOCKS = 128
"""Blocks of the many-block kernels; each adds up what all of them counted, so more would cost more than they bring."""
FEW_WARPS = 2112
"""Warps of a combine call below which it is a matter of latency: small blocks (as many multiprocessors as possible), all loads at once."""


def route_reference(
    topk_ids: Tensor, experts: int, tile_tokens: int, expert_map: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order, position, tiles, counts), int32, new tensors on the ids' device; waits for the ids.

    order ``[valid]``: sorted position -> pair, experts ascending, pairs of an expert ascending (the kernels leave that order open).
    position ``[P]``: pair -> sorted position, -1 where no local expert answers; the rules are those of :func:`.routing.local_ids`.
    tiles ``[tiles, 4]``: (expert, first position, 1 to ``tile_tokens`` positions, 0), in the order of positions.
    counts ``[4]``: tiles, valid pairs, experts with a pair, 0.
    """
    local = local_ids(topk_ids, experts, expert_map).reshape(-1)
    valid = int((local < experts).sum())
    order = local.argsort(stable=True)[:valid]
    position = torch.full_like(local, -1)
    position[order] = torch.arange(valid, device=local.device)
    tiles = []
    first = 0
    for expert, count in enumerate(torch.bincount(local[order], minlength=experts).tolist()):
        tiles += [(expert, first + start, min(tile_tokens, count - start), 0) for start in range(0, count, tile_tokens)]
        first += count
    counts = (len(tiles), valid, len({tile[0] for tile in tiles}), 0)
    table, counts = (torch.tensor(x, dtype=torch.int32, device=local.device) for x in (tiles, counts))
    return order.int(), position.int(), table.reshape(-1, 4), counts


def combine_reference(y: Tensor, position: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """``[M, H]``: for each token the fp32 sum of its rows of ``y [P, H]`` in slot order, rounded once."""
    rows = y.float()
    places = position.reshape(-1, top_k).long()
    out = torch.zeros(places.shape[0], y.shape[-1], dtype=torch.float32, device=y.device)
    for slot in range(top_k):
        found = places[:, slot] >= 0
        out[found] += rows[places[found, slot]]
    return out.to(dtype)


# --- sizes and choice of kernel -------------------------------------------------------------------------------------------


def route_shape(pairs: int) -> tuple[str, int, int]:
    """(method, threads, pairs a thread) of the kernel for ``pairs`` pairs; "scatter" stands for the two kernels of many blocks."""
    if pairs <= 32:
        return "ballot", 32, 1
    if pairs <= 128:
        return "ballot", 128, 1
    if pairs <= 1024:
        return "block", 256, 4
    if pairs <= ONE_BLOCK:
        return "block", 512, 8
    return "scatter", SHARE, 1


def shares(pairs: int) -> tuple[int, int]:
    """(blocks, pairs of a block) of the many-block kernels."""
    share = -(-pairs // (MAX_BLOCKS * SHARE)) * SHARE
    return -(-pairs // share), share


def scratch_ints(pairs: int, experts: int) -> int:
    """int32 words of scratch that calls of up to ``pairs`` pairs need; never falls as ``pairs`` grows."""
    return min(-(-pairs // SHARE), MAX_BLOCKS) * experts if pairs > ONE_BLOCK else 0


def combine_shape(tokens: int, hidden: int, row_bytes: int) -> tuple[int, int]:
    """(threads, loads on their way) of a combine call; ``row_bytes``: bytes of an element of y."""
    if tokens * -(-hidden * row_bytes // 512) <= FEW_WARPS:
        return 32, 32
    return 128, 8


def route_variants(index: torch.dtype, mapped: bool) -> Iterator:
    """Every route kernel that calls with such ids can launch."""
    from ..kernels.moe_route import Variant

    for method, threads, pairs in dict.fromkeys(route_shape(p) for p in (1, 128, 1024, ONE_BLOCK, ONE_BLOCK + 1)):
        for step in ("count", "scatter") if method == "scatter" else (method,):
            yield Variant(method=step, index=name_of(index), mapped=mapped, threads=threads, pairs=pairs)


def combine_variants(rows: torch.dtype, tokens: torch.dtype, top_k: int) -> Iterator:
    """Every combine kernel that calls with such rows can launch."""
    from ..kernels.moe_combine import Variant

    for threads, loads in dict.fromkeys(combine_shape(count, 256, rows.itemsize) for count in (1, 1 << 20)):
        yield Variant(rows=name_of(rows), tokens=name_of(tokens), top_k=top_k, threads=threads, loads=loads)


# --- launches -------------------------------------------------------------------------------------------------------------


@cache
def _route_kernel(device: int, method: str, index: torch.dtype, mapped: bool, threads: int, pairs: int) -> Callable:
    from ..kernels.moe_route import Variant

    variant = Variant(method=method, index=name_of(index), mapped=mapped, threads=threads, pairs=pairs)
    return kernels.load(ROUTE, variant, kernels.device_architecture(device))


@cache
def _combine_kernel(device: int, rows: torch.dtype, tokens: torch.dtype, top_k: int, threads: int, loads: int) -> Callable:
    from ..kernels.moe_combine import Variant

    variant = Variant(rows=name_of(rows), tokens=name_of(tokens), top_k=top_k, threads=threads, loads=loads)
    return kernels.load(COMBINE, variant, kernels.device_architecture(device))


@cache
def _plan(pairs: int, experts: int, tile_tokens: int) -> tuple[tuple[str, int, int], tuple[int, ...], int, int]:
    """(shape of the kernel, its numbers, the most tiles, words of scratch) of a call, or PluginError."""
    if not 1 <= experts <= MAX_EXPERTS:
        raise PluginError("experts", str(experts), f"1 to {MAX_EXPERTS}")
    if tile_tokens not in TILE_TOKENS:
        raise PluginError("tile_tokens", str(tile_tokens), f"{TILE_TOKENS[0]} to {TILE_TOKENS[-1]}")
    reciprocal = -(-(1 << 32) // tile_tokens)
    # The kernels divide by the upper half of a product. That is exact while what the rounding adds stays below one part in 2^32.
    if (pairs + tile_tokens) * (reciprocal * tile_tokens - (1 << 32)) >= 1 << 32 or pairs + tile_tokens >= 1 << 31:
        raise PluginError("topk_ids", f"{pairs} pairs in tiles of {tile_tokens}", "fewer pairs")
    shape = route_shape(pairs)
    numbers = (pairs, experts, tile_tokens, reciprocal, *(shares(pairs) if shape[0] == "scatter" else (1, pairs)))
    return shape, numbers, max_tiles(pairs, experts, tile_tokens), scratch_ints(pairs, experts)


def check(topk_ids: Tensor, expert_map: Tensor | None) -> None:
    """Raise PluginError (a ValueError) if a kernel cannot read such ids or such a map."""
    if not topk_ids.is_contiguous() or topk_ids.dtype not in INDEX_TYPES:
        raise PluginError("topk_ids", f"{topk_ids.dtype}, strides {topk_ids.stride()}", "int32 or int64, contiguous")
    if expert_map is not None and expert_map.numel() == 0:
        raise PluginError("expert_map", "0 experts", "1 or more")


def route(
    topk_ids: Tensor,
    experts: int,
    tile_tokens: int,
    order: Tensor,
    position: Tensor,
    tiles: Tensor,
    counts: Tensor,
    *,
    expert_map: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Sort the pairs by expert and list their tiles, on the current stream: one launch up to 4096 pairs, else two.

    topk_ids: int32 or int64 ``[M, k]``, contiguous. expert_map: int32 ``[G]``, local expert or -1. ``experts``: local experts, up to 1024.
    Written, all int32 and contiguous: order ``[>= P]`` (the first ``counts[1]`` words), position ``[>= P]`` (P words), tiles
    ``[>= max_tiles, 4]`` (the first ``counts[0]`` rows) and counts ``[4]``, both 16-byte aligned. What is in them: :func:`route_reference`.
    scratch: int32 ``[>= scratch_ints(P, experts)]``, for more than 4096 pairs.

    Raises PluginError (a ValueError) if a tensor is too small or a number is out of range.
    """
    pairs = topk_ids.numel()
    (method, threads, held), numbers, tiles_needed, scratch_needed = _plan(pairs, experts, tile_tokens)
    check(topk_ids, expert_map)
    if order.numel() < pairs or position.numel() < pairs:
        raise PluginError("order, position", f"{order.numel()}, {position.numel()} words", f"{pairs} or more")
    if tiles.shape[0] < tiles_needed:
        raise PluginError("tiles", f"{tiles.shape[0]} rows", f"{tiles_needed} or more")
    if scratch_needed and (scratch is None or scratch.numel() < scratch_needed):
        raise PluginError("scratch", "none" if scratch is None else f"{scratch.numel()} words", f"{scratch_needed} or more")
    if pairs == 0:
        counts.zero_()
        return
    device, index, mapped = topk_ids.device.index, topk_ids.dtype, expert_map is not None
    if method == "scatter":
        count = _route_kernel(device, "count", index, mapped, threads, held)
        count(topk_ids, expert_map, order, position, tiles, counts, scratch, *numbers)
    else:
        scratch = None
    _route_kernel(device, method, index, mapped, threads, held)(topk_ids, expert_map, order, position, tiles, counts, scratch, *numbers)


def combine(y: Tensor, position: Tensor, out: Tensor, top_k: int) -> None:
    """``out[m]`` = the sum of token m's rows in slot order, fp32, rounded once; zeros for a token without any. One launch.

    y: ``[>= P, H]`` bf16, fp16 or fp32; rows 16-byte aligned, of unit stride. position: int32 ``[>= M top_k]``, contiguous, 16-byte
    aligned, as :func:`route` writes it: its values are trusted.
    out: ``[M, H]`` bf16 or fp16, rows 16-byte aligned, of unit stride; H a multiple of 8.

    Raises PluginError (a ValueError) if sizes disagree.
    """
    tokens, hidden = out.shape
    if position.numel() < tokens * top_k:
        raise PluginError("position", f"{position.numel()} words", f"{tokens * top_k} or more")
    if y.shape[-1] != hidden or hidden % 8:
        raise PluginError("y, out", f"{y.shape[-1]} and {hidden} columns", "the same, a multiple of 8")
    if tokens == 0:
        return
    threads, loads = combine_shape(tokens, hidden, y.element_size())
    _combine_kernel(y.device.index, y.dtype, out.dtype, top_k, threads, loads)(y, position, out)
