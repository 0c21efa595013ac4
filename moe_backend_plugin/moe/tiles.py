"""Which kernel serves how many tokens: the choice to start with, from shapes and counts alone.

What decides is how many tokens an expert gets. A tile of fewer tokens than that streams the expert's weights several times; one of more
multiplies padding, and brings it from the L2 cache. How the work is cut up for few, some and many thread blocks follows the
measurements in integration/bench/NOTES.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

from ..nvfp4.hopper import BYTES, ROWS
from .problem import MoEProblem

SHARED_BYTES = 227 * 1024
"""Shared memory of a thread block; two blocks of a multiprocessor share it, less 1 KB each."""


@dataclass(frozen=True)
class Shape:
    """How a tile is cut up: see ``kernels.moe_gemm.Variant``. ``blocks``: thread blocks a multiprocessor."""

    tile_tokens: int
    row_groups: int
    k_groups: int = 1
    row_blocks: int = 1
    k_blocks: int = 2
    blocks: int = 1
    warp_mma: bool = False

    @property
    def rows(self) -> int:
        return ROWS * self.row_groups * self.row_blocks

    @property
    def stage_blocks(self) -> int:
        return self.k_groups * self.k_blocks

    @property
    def short(self) -> int:
        """Tiles with at most so many tokens are multiplied by so many; 0 where all are multiplied by all."""
        return self.tile_tokens // 2 if self.tile_tokens in HALVES and self.row_blocks == 2 else 0

    @property
    def stages(self) -> int:
        """As many as fit, 12 at most."""
        stage = self.stage_blocks * (self.row_groups * self.row_blocks * BYTES + self.tile_tokens * 2 * ROWS)
        sums = 2 * (self.k_groups - 1) * self.rows * self.tile_tokens * 4
        fixed = sums + 8 * self.tile_tokens + 2048 + (1024 if self.blocks > 1 else 0)
        return min(12, (SHARED_BYTES // self.blocks - fixed) // (stage + 16))


FEW = Shape(8, row_groups=1, k_groups=2, k_blocks=2, blocks=2, warp_mma=True)
"""Fewer tiles than thread blocks: small ones, two warpgroups to the columns of each."""
ALONE = replace(FEW, blocks=1)
"""Each has a multiprocessor to itself, and twice the weights on their way to it."""
SOME = Shape(8, row_groups=2, k_blocks=4, blocks=2, warp_mma=True)
TILES = {
    16: Shape(16, row_groups=4, row_blocks=2, k_blocks=4),
    32: Shape(32, row_groups=4, row_blocks=2, k_blocks=4),
    48: Shape(48, row_groups=2, row_blocks=2, k_blocks=4),
    64: Shape(64, row_groups=2, row_blocks=2, k_blocks=4),
    80: Shape(80, row_groups=2, row_blocks=2),
    96: Shape(96, row_groups=2, row_blocks=2),
    112: Shape(112, row_groups=2, row_blocks=2),
    128: Shape(128, row_groups=2, row_blocks=2),
    144: Shape(144, row_groups=2, row_blocks=2, k_blocks=1),
}
NARROW_ROWS = 2 * ROWS
"""Rows of the tiles that are taken where even pieces as small as that find a multiprocessor each: with few experts on a rank, more blocks
stream weights at once."""
COSTS = {8: 92, 16: 103, 32: 110, 48: 140, 64: 160, 80: 185, 96: 208, 112: 229, 128: 246, 144: 270}
"""Microseconds of both projections of a layer whose every expert has one tile of so many tokens (Qwen3-30B-A3B on an H200; from 96 tokens
on 4 to 7 % more than measured there, as the recorded times of DeepSeek-V3's layer ask for)."""
MEASURED = (128, (1536, 2048), (2048, 768), 132)
"""That layer: its experts, the rows and columns of its projections, and the multiprocessors."""
HALVES, HALF_COST = (80, 96, 128), 0.8
"""Tiles that have a path of half as many tokens, and what a tile that takes it costs."""
TILE_COST, LAST_ROUND = 16384, 0.6
"""What begins and ends a tile of 8 tokens, in weights that could be read meanwhile; the least a round takes, in full rounds."""
SECOND = 0.08
"""Experts with a second tile of 8 tokens, up to which such tiles are taken: a few tokens wait for weights, and wider tiles for more."""
LARGE, LARGE_TILE = 384, 128
"""Mean tokens of an expert from which tiles of this size are taken without counting: the last tile of many no longer matters, and a tile
with a path of half its size reads tokens in longer steps."""


def narrow(shape: Shape) -> Shape | None:
    """A tile of as many tokens by :data:`NARROW_ROWS` rows, or None where stages cannot be cut up for it."""
    return None if shape.k_blocks % 2 else replace(shape, row_groups=NARROW_ROWS // ROWS, row_blocks=1)


@dataclass(frozen=True)
class Choice:
    """Both projections walk one list of token tiles, so they share ``tile_tokens``."""

    gate_up: Shape
    down: Shape

    @property
    def tile_tokens(self) -> int:
        return self.gate_up.tile_tokens


def active_experts(problem: MoEProblem, tokens: int) -> float:
    """Local experts that ``tokens`` tokens reach if routing is even."""
    return problem.num_local_experts * (1 - max(0.0, 1 - problem.top_k / problem.num_experts) ** tokens)


def mean_tokens(problem: MoEProblem, tokens: int) -> float:
    """Tokens of an active expert, on average, if routing is even."""
    return tokens * problem.top_k * problem.num_local_experts / problem.num_experts / active_experts(problem, tokens)


def expected_tiles(mean: float, tile: int) -> float:
    """What the tiles of an active expert cost, on average, in full ones, if even routing gives it ``mean`` tokens, give or take their
    square root: a tile that is at most half full counts less where there is a path for it."""

    def more_than(tokens: float) -> float:
        return 0.5 * math.erfc((tokens + 0.5 - mean) / (2 * mean) ** 0.5) if tokens else 1.0

    found, before = 0.0, 0
    while not before or before < mean + 4 * mean**0.5:
        if tile in HALVES:
            found += HALF_COST * more_than(before) + (1 - HALF_COST) * more_than(before + tile / 2)
        else:
            found += more_than(before)
        before += tile
    return found


def busiest(shape: Shape, tiles: float, rows: int, columns: int, multiprocessors: int) -> float:
    """Weights that a thread block goes through, at most, where ``tiles`` tiles of tokens meet ``rows`` x ``columns`` weights each: rounds
    of pieces of all thread blocks, times what a piece reads. A last round of few blocks is faster than a full one."""
    rounds, last = divmod(tiles * math.ceil(rows / shape.rows) / (multiprocessors * shape.blocks), 1)
    return (rounds + (last and max(last, LAST_ROUND))) * (shape.rows * columns + TILE_COST)


def _pace(tile: int) -> float:
    """Microseconds a weight of the busiest thread block, as measured."""
    experts, *projections, multiprocessors = MEASURED
    return COSTS[tile] / sum(busiest(TILES[tile], experts, rows, columns, multiprocessors) for rows, columns in projections)


PACE = {tile: _pace(tile) for tile in TILES}


@lru_cache(4096)
def choose(problem: MoEProblem, tokens: int, multiprocessors: int) -> Choice:
    """The kernels for a call of ``tokens`` tokens (1 or more) on a GPU of so many multiprocessors."""
    active, mean = active_experts(problem, tokens), mean_tokens(problem, tokens)
    if mean >= LARGE:
        return Choice(TILES[LARGE_TILE], TILES[LARGE_TILE])
    projections = (problem.w13_rows, problem.hidden), (problem.hidden, problem.intermediate)

    def of_few(rows: int, columns: int) -> Shape:
        if 2 * max(1, active) * math.ceil(rows / ALONE.rows) <= multiprocessors:
            return ALONE
        return min(FEW, SOME, key=lambda shape: busiest(shape, active, rows, columns, multiprocessors))

    if mean < FEW.tile_tokens:
        few = expected_tiles(mean, FEW.tile_tokens)
        if few <= 1 + SECOND:
            return Choice(*(of_few(*projection) for projection in projections))
        if all(active * few * math.ceil(rows / SOME.rows) <= multiprocessors * SOME.blocks for rows, _ in projections):
            return Choice(SOME, SOME)  # blocks that would be idle take the second tiles

    def shape_of(tile: int, tiles: float, rows: int) -> Shape:
        less = narrow(TILES[tile])
        return less if less and tiles * math.ceil(rows / less.rows) <= multiprocessors else TILES[tile]

    def shapes(tile: int) -> tuple[float, list[Shape]]:
        tiles = active * expected_tiles(mean, tile)
        return tiles, [shape_of(tile, tiles, rows) for rows, _ in projections]

    def us(tile: int) -> float:
        tiles, found = shapes(tile)
        parts = zip(found, projections, strict=True)
        return PACE[tile] * sum(busiest(shape, tiles, *projection, multiprocessors) for shape, projection in parts)

    return Choice(*shapes(min(TILES, key=us))[1])


@lru_cache(64)  # a server asks for its kernels, and again for its arena
def choices(problem: MoEProblem, max_tokens: int, multiprocessors: int) -> Mapping[Choice, int]:
    """Every choice that calls of 1 .. ``max_tokens`` tokens can meet, with the most tokens that it serves."""
    found: dict[Choice, int] = {}
    for tokens in range(1, max_tokens + 1):
        found[choose.__wrapped__(problem, tokens, multiprocessors)] = tokens
    return MappingProxyType(found)
