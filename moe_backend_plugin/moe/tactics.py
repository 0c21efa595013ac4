"""Ways to run one MoE call, as data: their names, which of them a problem can have, and which one a call of some size gets.

A tactic of Hopper's is a :class:`.tiles.Choice`: how each of the two projections is cut up, on one list of token tiles. Its name says
all of it: ``t8.r1x1k2x2b2w.r2x1k1x4b2w`` is 8 tokens a tile, then gate and up, then down, each with row groups x row blocks, k groups x
k blocks, thread blocks a multiprocessor, and ``w`` where each warp multiplies by itself. Nothing here launches, compiles or asks a device.

Blackwell's are :class:`.blackwell.Tactic`; what was tuned is held here for both (:class:`Table`).
:func:`chosen` answers from a table that :func:`load` read when the kernels were prepared, else as :func:`.tiles.choose` does.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import PluginError
from . import tiles, workspace
from .problem import MoEProblem
from .tiles import Choice, Shape

if TYPE_CHECKING:
    from .families import Tactic

logger = logging.getLogger("moe_backend_plugin.tactics")

THREADS = 1024
REGISTERS = 65536
"""Of a multiprocessor; at most 255 a thread."""
WARPGROUP = 128
PRODUCER = 48
"""Registers of a thread that loads, where the kernel hands the others over."""
FRAGMENTS = 64
"""Registers of a consumer thread beside its sums: two units of dequantised weights, and addresses."""
LARGEST_TILE = 256
"""Of a wgmma."""

# --- names ------------------------------------------------------------------------------------------------------------

_SHAPE = r"r(\d+)x(\d+)k(\d+)x(\d+)b(\d+)(w?)"
_NAME = re.compile(rf"t(\d+)\.{_SHAPE}\.{_SHAPE}")


def name(tactic: Choice) -> str:
    """The tactic's name, which :func:`parse` reads back."""

    def text(s: Shape) -> str:
        return f"r{s.row_groups}x{s.row_blocks}k{s.k_groups}x{s.k_blocks}b{s.blocks}{'w' if s.warp_mma else ''}"

    return f"t{tactic.tile_tokens}.{text(tactic.gate_up)}.{text(tactic.down)}"


def parse(text: str) -> Choice:
    """The tactic of a name. Raises PluginError (a ValueError) if it is no name; whether the tactic is valid :func:`validity` says."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise PluginError("tactic", repr(text), "a name such as " + name(Choice(tiles.FEW, tiles.SOME)))
    tile, *rest = found.groups()

    def shape(groups: list[str]) -> Shape:
        row_groups, row_blocks, k_groups, k_blocks, blocks = map(int, groups[:5])
        return Shape(int(tile), row_groups, k_groups, row_blocks, k_blocks, blocks, warp_mma=bool(groups[5]))

    return Choice(shape(rest[:6]), shape(rest[6:]))


# --- which there are --------------------------------------------------------------------------------------------------


def shape_reason(shape: Shape) -> str | None:
    """Why no kernel can be cut up like this, or None: the rules of ``kernels.moe_gemm.Variant``, and what a multiprocessor has."""
    s, tile = shape, shape.tile_tokens
    if not 8 <= tile <= LARGEST_TILE or (tile > 8 and tile % 16):
        return f"{tile} tokens a tile (allowed: 8 or a multiple of 16 up to {LARGEST_TILE})"
    if min(s.row_groups, s.row_blocks, s.k_groups, s.k_blocks, s.blocks) < 1:
        return "a count below 1"
    if s.k_blocks * s.row_blocks % 2:
        return f"{s.k_blocks} x {s.row_blocks} units of a warpgroup's stage (allowed: an even number)"
    if tile == 8 and s.stage_blocks % 2:
        return f"{s.stage_blocks} blocks a stage (allowed with 8 tokens: an even number)"
    if s.warp_mma and tile != 8:
        return f"warps that multiply by themselves, and {tile} tokens a tile (allowed: 8)"
    if s.blocks > 2:
        return f"{s.blocks} thread blocks a multiprocessor (allowed: 1, 2)"
    groups = s.row_groups * s.k_groups
    needed = tile * s.row_blocks // 2 + FRAGMENTS
    regroup = needed > REGISTERS // ((groups + 2) * WARPGROUP) // 8 * 8
    threads = groups * WARPGROUP + WARPGROUP + (WARPGROUP if regroup else 32)
    if threads > THREADS:
        return f"{threads} threads (allowed: up to {THREADS})"
    if regroup:
        if s.blocks > 1:
            return f"{groups} warpgroups that take registers from the rest, {s.blocks} blocks (allowed: 1)"
        launched = REGISTERS // threads // 8 * 8 * threads
        available = min(255, (launched - 2 * WARPGROUP * PRODUCER) // (groups * WARPGROUP) // 8 * 8)
    else:
        available = min(255, REGISTERS // (threads * s.blocks) // 8 * 8)
    if needed > available:
        return f"{tile} tokens x {s.row_blocks} row blocks need {needed} registers a thread (allowed: {available} with {threads} threads)"
    if s.stages < 2:
        return f"{max(s.stages, 0)} stages fit in shared memory (allowed: 2 or more)"
    return None


def validity(problem: MoEProblem, tactic: Choice) -> str | None:
    """Why calls of this problem cannot run this way, or None. Never launches anything, and says the same on every machine."""
    if tactic.gate_up.tile_tokens != tactic.down.tile_tokens:
        return f"tiles of {tactic.gate_up.tile_tokens} and {tactic.down.tile_tokens} tokens (allowed: one size for both projections)"
    for use, shape, rows in (("gate_up", tactic.gate_up, problem.w13_rows), ("down", tactic.down, problem.hidden)):
        if reason := shape_reason(shape):
            return f"{use}: {reason}"
        # A tile of twice the rows that there are would leave half of its warpgroups without work.
        if shape not in SHIPPED and shape.rows >= 2 * max(rows, tiles.ROWS):
            return f"{use}: {shape.rows} rows a tile, and {rows} rows of weights"
    return None


SHIPPED = (tiles.FEW, tiles.SOME, tiles.ALONE, *tiles.TILES.values(), *filter(None, map(tiles.narrow, tiles.TILES.values())))
"""What the heuristic can choose."""


@cache
def shapes(tile_tokens: int) -> tuple[Shape, ...]:
    """Every shape that is worth a try with tiles of so many tokens, the heuristic's first; in an order that never changes."""
    found = [shape for shape in SHIPPED if shape.tile_tokens == tile_tokens]
    if tile_tokens == 8:
        cuts = product((1, 2, 4), (1, 2), (1,), (2, 4), (1, 2))
    elif tile_tokens <= 32:
        cuts = product((2, 4), (1,), (1, 2), (2, 4), (1, 2))
    else:
        cuts = product((1, 2), (1,), (1, 2), (2, 4), (1, 2))
    for row_groups, k_groups, row_blocks, k_blocks, blocks in cuts:
        shape = Shape(tile_tokens, row_groups, k_groups, row_blocks, k_blocks, blocks, warp_mma=tile_tokens == 8)
        # One block of few rows leaves a multiprocessor with little under way; nothing was ever gained by it.
        if shape_reason(shape) is None and (shape.blocks > 1 or shape.row_groups * shape.k_groups * shape.row_blocks >= 2):
            found.append(shape)
    return tuple(dict.fromkeys(found))


TILE_TOKENS = (8, 16, 32, 48, 64, 80, 96, 112, 128, 144)


@cache
def every(problem: MoEProblem) -> tuple[Choice, ...]:
    """All tactics of a problem, each of them valid."""
    pairs = (pair for tile in TILE_TOKENS for pair in product(shapes(tile), repeat=2))
    return tuple(tactic for gate_up, down in pairs if validity(problem, tactic := Choice(gate_up, down)) is None)


def alike(problem: MoEProblem) -> list[Choice]:
    """The valid tactics that cut both projections up in the same way: every shape that either can have, once."""
    pairs = (Choice(shape, shape) for tile in TILE_TOKENS for shape in shapes(tile))
    return [tactic for tactic in pairs if validity(problem, tactic) is None]


def fullest(problem: MoEProblem, tokens: int) -> float:
    """Tokens of the fullest experts if routing is even: the mean, and twice its square root."""
    mean = tiles.mean_tokens(problem, tokens)
    return mean + 2 * mean**0.5


def candidates(problem: MoEProblem, tokens: int, multiprocessors: int) -> list[Choice]:
    """The tactics to time first for calls of ``tokens`` tokens, the heuristic's in front: for each size of tile one projection at a time
    is cut up in every way. The two are launches of their own, so what is best for each is best together, or nearly: :func:`crossed`.

    Left out are tiles below a quarter of the fullest expert's tokens (its weights would be dequantised five times; the largest always
    stay) and above two and a half times them (most of it padding).
    """
    load = fullest(problem, tokens)
    low, high = min(load / 4, 64), max(2.5 * load, 16)
    heuristic = tiles.choose(problem, tokens, multiprocessors)
    found = [heuristic]
    for tile in TILE_TOKENS:
        if not low <= tile <= high:
            continue
        centre = heuristic
        if tile != heuristic.tile_tokens:
            centre = Choice(tiles.SOME, tiles.SOME) if tile == 8 else Choice(shapes(tile)[0], shapes(tile)[0])
        found += [Choice(shape, centre.down) for shape in shapes(tile)] + [Choice(centre.gate_up, shape) for shape in shapes(tile)]
    return [tactic for tactic in dict.fromkeys(found) if validity(problem, tactic) is None]


def crossed(times: Mapping[Choice, float], within: float = 1.05, best: int = 3) -> list[Choice]:
    """The pairs still to time: the ``best`` shapes of either projection, of each size of tile ``within`` a factor of the fastest.

    ``times``: microseconds of those timed. A shape is judged by the fastest tactic that has it.
    """
    fastest: dict[int, float] = {}
    for tactic, us in times.items():
        fastest[tactic.tile_tokens] = min(us, fastest.get(tactic.tile_tokens, us))
    found = []
    for tile, us in fastest.items():
        if us > within * min(fastest.values()):
            continue
        own = sorted((t for t in times if t.tile_tokens == tile), key=times.__getitem__)
        gate_ups = list(dict.fromkeys(t.gate_up for t in own))[:best]
        downs = list(dict.fromkeys(t.down for t in own))[:best]
        found += [tactic for pair in product(gate_ups, downs) if (tactic := Choice(*pair)) not in times]
    return found


def largest_plan(
    problem: MoEProblem,
    max_tokens: int,
    tactics: Iterable[Choice],
    dtype: torch.dtype,
    scratch_ints: Callable[[int, int], int] = workspace.no_scratch,
) -> workspace.Plan:
    """The workspace that serves every one of ``tactics`` at every number of tokens up to ``max_tokens``."""
    sizes = sorted({tactic.tile_tokens for tactic in tactics})
    calls = tuple(workspace.Call(tile, y=dtype) for tile in sizes)
    return workspace.largest(problem, max_tokens, [workspace.TokenRange(max_tokens, calls)], dtype, scratch_ints)


# --- what was tuned ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Calls of ``first`` .. ``last`` tokens, tuned at ``last``."""

    first: int
    last: int
    tactic: Tactic


class Table:
    """The tuned buckets of one problem. They may leave gaps, where the heuristic answers, and overlap."""

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self.buckets = tuple(sorted(buckets, key=lambda bucket: bucket.last))
        self._lasts = [bucket.last for bucket in self.buckets]

    def of(self, tokens: int) -> Tactic | None:
        """Of the buckets that hold a call of ``tokens`` tokens the one tuned nearest to it (never at fewer tokens), or None."""
        for bucket in self.buckets[bisect_left(self._lasts, tokens) :]:
            if bucket.first <= tokens:
                return bucket.tactic
        return None


Mode = Literal["cache", "heuristic"]
_mode: Mode = "cache"
_tables: dict[tuple[MoEProblem, torch.dtype], Table] = {}


def use(mode: Mode) -> None:
    """What :func:`load` does from now on in this process: "cache" reads what was tuned for the device, "heuristic" nothing."""
    global _mode
    _mode = mode


def set_table(problem: MoEProblem, dtype: torch.dtype, table: Table | None) -> bool:
    """Answer from ``table`` from now on (None: as the heuristic does); returns whether that changes anything."""
    before = _tables.pop((problem, dtype), None)
    if table is not None:
        _tables[problem, dtype] = table
    return (before.buckets if before else ()) != (table.buckets if table else ())


def load(problem: MoEProblem, dtype: torch.dtype, device: int) -> bool:
    """Read what was tuned for this problem and CUDA device, if anything; returns whether that changes any choice.

    Call it before kernels are prepared, never from a call: it reads files. Whatever is wrong with them is a warning.
    """
    from . import tactic_cache

    table = tactic_cache.table(problem, dtype, tactic_cache.Kind.of(device)) if _mode == "cache" else None
    if table is not None:
        logger.info("tuned tactics for %d buckets of up to %d tokens", len(table.buckets), table.buckets[-1].last)
    return set_table(problem, dtype, table)


def tuned(problem: MoEProblem, tokens: int, dtype: torch.dtype) -> Any | None:
    """The tactic that was tuned for a call of ``tokens`` tokens, of this process's kind of device; None if none was. Reads no file."""
    table = _tables.get((problem, dtype))
    return None if table is None else table.of(tokens)


def tuned_buckets(problem: MoEProblem, dtype: torch.dtype) -> tuple[Bucket, ...]:
    """What :func:`tuned` answers from."""
    table = _tables.get((problem, dtype))
    return () if table is None else table.buckets


def chosen(problem: MoEProblem, tokens: int, multiprocessors: int, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """Hopper's tactic of a call of ``tokens`` tokens (1 or more): as tuned, else as :func:`.tiles.choose` says. Reads no file."""
    return tuned(problem, tokens, dtype) or tiles.choose(problem, tokens, multiprocessors)


def choices(problem: MoEProblem, max_tokens: int, multiprocessors: int, dtype: torch.dtype = torch.bfloat16) -> Mapping[Choice, int]:
    """Every tactic that calls of 1 .. ``max_tokens`` tokens can meet, with the most tokens that it serves."""
    if (problem, dtype) not in _tables:
        return tiles.choices(problem, max_tokens, multiprocessors)
    return dict(_met(problem, max_tokens, multiprocessors, _tables[problem, dtype]))


def _met(problem: MoEProblem, max_tokens: int, multiprocessors: int, table: Table) -> Iterator[tuple[Choice, int]]:
    for tokens in range(1, max_tokens + 1):
        yield table.of(tokens) or tiles.choose.__wrapped__(problem, tokens, multiprocessors), tokens
