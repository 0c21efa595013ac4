"""What the roles of the expert kernel share: the size of a unit of weights, and the values that go from hand to hand together.

The groups are named tuples because the compiler takes these apart: one may be carried through a loop that is not unrolled.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

UNIT = 2304
"""Bytes of a 64 x 64 unit of packed weights: 2048 of codes, 256 of block scales."""
WARPGROUP = 128


class Routing(NamedTuple):
    """What kernels that sort for themselves sort by, and what "gate_up" then writes; of None in the others."""

    ids: cute.Tensor | None  # [tokens, top_k]
    expert_map: cute.Tensor | None  # int32 [G]
    position: cute.Tensor | None  # int32 [pairs]


class Lists(NamedTuple):
    """Sorted pairs and their tiles as ``moe_route`` lists them: in global memory, or in shared memory where this kernel sorts."""

    order: cute.Tensor | None  # int32 [pairs]
    tiles: cute.Tensor | None  # int32 [tiles, 4]
    counts: cute.Tensor | None  # int32 [4]


class Ring(NamedTuple):
    """Stages of shared memory on the way from loads to products, with two barriers each."""

    tokens: cute.Tensor  # [tile_tokens, 64, blocks of columns of all stages], swizzled
    weights: cute.Pointer
    full: cute.Pointer  # int64 [stages]
    empty: cute.Pointer  # int64 [stages]


class RouterWeights(NamedTuple):
    """Router weights of a tile's tokens, in two buffers that take turns, with two barriers each."""

    smem: cute.Pointer  # fp32 [2, tile_tokens]
    full: cute.Pointer  # int64 [2]
    empty: cute.Pointer  # int64 [2]


class Work(NamedTuple):
    """All that is to be done: piece ``i`` is row tile ``i % row_tiles`` of listed tile ``i // row_tiles``."""

    tiles: cute.Tensor  # int32 [tiles, 4]
    total: Int32  # pieces
    row_blocks: Int32  # of 64 rows, of an expert
    column_blocks: Int32  # of 64 columns
    row_tiles: Int32
    steps: Int32  # stages of a piece


class Tile(NamedTuple):
    """A row of the tile list: positions ``first`` to ``first + count`` of the sorted pairs are of this expert."""

    expert: Int32
    first: Int32
    count: Int32


class Gate(NamedTuple):
    """Constants of the activation."""

    alpha: Float32
    beta: Float32
    limit: Float32


class Place(NamedTuple):
    """Where a thread of the warpgroups that multiply stands."""

    row_group: Int32
    k_group: Int32
    thread: Int32  # of the warpgroup
    lane: Int32
    slice: Int32  # of 16 rows: its warp
