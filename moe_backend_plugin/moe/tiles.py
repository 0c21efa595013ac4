"""Which kernel serves how many tokens: the choice to start with, from shapes and counts alone.

What decides is how many tokens an expert gets. A tile of fewer tokens than that streams the expert's weights several times; one of more
multiplies padding, and brings it from the L2 cache. How the work is cut up for few, some and many thread blocks follows the
measurements in integration/bench/NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .problem import MoEProblem

ROWS = 64
"""Rows and columns of a unit of packed weights."""
UNIT_BYTES = 2304
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
    def stages(self) -> int:
        """As many as fit, 12 at most."""
        stage = self.stage_blocks * (self.row_groups * self.row_blocks * UNIT_BYTES + self.tile_tokens * 2 * ROWS)
        sums = 2 * (self.k_groups - 1) * self.rows * self.tile_tokens * 4
        fixed = sums + 8 * self.tile_tokens + 2048 + (1024 if self.blocks > 1 else 0)
        return min(12, (SHARED_BYTES // self.blocks - fixed) // (stage + 16))


FEW = Shape(8, row_groups=1, k_groups=2, k_blocks=2, blocks=2, warp_mma=True)
"""Fewer tiles than thread blocks: small ones, two warpgroups to the columns of each."""
SOME = Shape(8, row_groups=2, k_blocks=4, blocks=2, warp_mma=True)
MANY = Shape(8, row_groups=4, k_blocks=4, warp_mma=True)
TILES = {
    16: Shape(16, row_groups=4, row_blocks=2),
    32: Shape(32, row_groups=4, k_blocks=4),
    48: Shape(48, row_groups=2, row_blocks=2),
    64: Shape(64, row_groups=2, row_blocks=2),
    80: Shape(80, row_groups=2, row_blocks=2),
    96: Shape(96, row_groups=2, row_blocks=2),
    128: Shape(128, row_groups=2, row_blocks=2),
}
SPREAD = 2.0
"""Even routing gives an expert its mean number of tokens, give or take its square root: a tile should hold all but the fullest experts'."""


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
    return problem.num_local_experts * (1 - (1 - problem.top_k / problem.num_experts) ** tokens)


@lru_cache(4096)
def choose(problem: MoEProblem, tokens: int, multiprocessors: int) -> Choice:
    """The kernels for a call of ``tokens`` tokens (1 or more) on a GPU of so many multiprocessors."""
    active = active_experts(problem, tokens)
    mean = tokens * problem.top_k * problem.num_local_experts / problem.num_experts / active
    most = mean + SPREAD * mean**0.5
    if most > 11.5:
        tile = next((tile for tile in TILES if most <= tile), 128)
        return Choice(TILES[tile], TILES[tile])

    def of(rows: int, many: Shape) -> Shape:
        if active * rows < SOME.rows * SOME.blocks * multiprocessors:
            return FEW
        return many if active * rows >= 4 * many.rows * many.blocks * multiprocessors else SOME

    return Choice(of(problem.w13_rows, MANY), of(problem.hidden, SOME))


def choices(problem: MoEProblem, max_tokens: int, multiprocessors: int) -> dict[Choice, int]:
    """Every choice that calls of 1 .. ``max_tokens`` tokens can meet, with the most tokens that it serves."""
    found: dict[Choice, int] = {}
    for tokens in range(1, max_tokens + 1):
        found[choose.__wrapped__(problem, tokens, multiprocessors)] = tokens
    return found
