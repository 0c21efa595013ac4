"""Memory between the kernels of one MoE call: what a call needs, as a pure function, and one arena that all layers share.

A call has some tokens, in tiles of some size (:class:`Call`), from which follow the regions of its memory (:func:`plan`). Small tiles
make long tile lists, large calls make many rows. So the arena gets the most that any call needs (:func:`largest`), and every call lays
its own regions out from the arena's start: the arena is exactly as large as the largest single call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import PluginError
from .problem import MoEProblem

ALIGNMENT = 256
"""Bytes; regions begin at multiples of it."""
ROW_SLACK = 256
"""Rows after the last one of ``h`` and ``y``: a kernel may read or write the largest tile whole from any position."""
WIDTH = 64
"""The expert width is padded to a multiple of this, as in ``nvfp4.hopper``."""
EVERY_STREAM = 0
"""Key of an arena that an engine's layers share: it runs those of a device one after another, whichever of its streams is current."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_PLANS = 512


@dataclass(frozen=True)
class Call:
    """How a call is cut up.

    tile_tokens: most tokens of a tile. y: type of the down projection's output.
    Raises PluginError (a ValueError) on a tile of no token or another type.
    """

    tile_tokens: int
    y: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.tile_tokens < 1:
            raise PluginError("Call.tile_tokens", str(self.tile_tokens), "1 or more")
        if self.y not in _TYPES:
            raise PluginError("Call.y", str(self.y), ", ".join(map(str, _TYPES)))


@dataclass(frozen=True)
class TokenRange:
    """All the ways to cut up a call of at most ``tokens`` tokens, and of more than the range in front has."""

    tokens: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Region:
    """A tensor in the arena: ``bytes`` from ``offset``, seen as a contiguous ``dtype`` tensor of ``shape``."""

    name: str
    offset: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """The regions of a call of at most ``tokens`` tokens, and the ``bytes`` that hold them all. Plans are equal only to themselves,
    which makes them quick keys."""

    problem: MoEProblem
    tokens: int
    call: Call
    regions: tuple[Region, ...]
    bytes: int

    def __getitem__(self, name: str) -> Region:
        """Raises KeyError if the call has no such region."""
        for region in self.regions:
            if region.name == name:
                return region
        raise KeyError(f"{name}: found regions {', '.join(region.name for region in self.regions)}")

    def __str__(self) -> str:
        lines = [
            f"{r.name:<10}{r.bytes:>14,} B at {r.offset:>14,}  {str(r.dtype).removeprefix('torch.')} {list(r.shape)}" for r in self.regions
        ]
        return "\n".join([f"{self.tokens} tokens, {self.bytes:,} B", *lines])


def max_tiles(pairs: int, experts: int, tile_tokens: int) -> int:
    """A bound on the tiles of any routing of ``pairs`` (token, slot) pairs to ``experts`` local experts: each may leave one unfilled."""
    return min(pairs, experts) + pairs // tile_tokens


def no_scratch(pairs: int, experts: int) -> int:
    """For a routing kernel that needs none."""
    return 0


def _aligned(bytes: int) -> int:
    return -(-bytes // ALIGNMENT) * ALIGNMENT


@lru_cache(_PLANS)
def plan(
    problem: MoEProblem,
    tokens: int,
    call: Call,
    dtype: torch.dtype = torch.bfloat16,
    scratch_ints: Callable[[int, int], int] = no_scratch,
) -> Plan:
    """The memory of a call of up to ``tokens`` tokens (1 or more); any call of fewer, cut up alike, fits in it too.

    With P = tokens x top_k, E local experts, hidden H and W = the expert width I padded to 64:

    =========  ===========  ======================================================================================
    order      int32        ``[P]``
    position   int32        ``[P]``
    tiles      int32        ``[max_tiles, 4]``
    counts     int32        ``[4]``
    scratch    int32        ``[scratch_ints(P, E)]``, the routing kernel's; may be empty
    h          ``dtype``    ``[P + 256, W]``, the activations between the projections
    y          ``call.y``   ``[P + 256, H]``
    =========  ===========  ======================================================================================

    Regions do not overlap, so that a kernel may start while the one in front still runs. ``dtype``: of the tokens.
    ``scratch_ints`` must not fall as P grows. The same arguments give the same object (of the last 512).
    Raises PluginError (a ValueError) on fewer than 1 token.
    """
    if tokens < 1:
        raise PluginError("plan: tokens", str(tokens), "1 or more")
    experts, hidden = problem.num_local_experts, problem.hidden
    pairs = tokens * problem.top_k
    width = -(-problem.intermediate // WIDTH) * WIDTH
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("order", torch.int32, (pairs,)),
        ("position", torch.int32, (pairs,)),
        ("tiles", torch.int32, (max_tiles(pairs, experts, call.tile_tokens), 4)),
        ("counts", torch.int32, (4,)),
        ("scratch", torch.int32, (scratch_ints(pairs, experts),)),
        ("h", dtype, (pairs + ROW_SLACK, width)),
        ("y", call.y, (pairs + ROW_SLACK, hidden)),
    ]

    regions, end = [], 0
    for name, kind, shape in tensors:
        regions.append(Region(name, end, prod(shape) * kind.itemsize, kind, shape))
        end = _aligned(end + regions[-1].bytes)
    return Plan(problem, tokens, call, tuple(regions), end)


def largest(
    problem: MoEProblem,
    max_tokens: int,
    ranges: Sequence[TokenRange],
    dtype: torch.dtype = torch.bfloat16,
    scratch_ints: Callable[[int, int], int] = no_scratch,
) -> Plan:
    """The plan that takes the most bytes of all calls with 1 .. ``max_tokens`` tokens; other arguments as in :func:`plan`.

    ``ranges`` ascend and reach ``max_tokens``. A call cut up in one way needs more memory the more tokens it has, so the ends of the
    ranges are all that has to be looked at.
    Raises PluginError (a ValueError) if the ranges do not ascend, do not reach ``max_tokens``, or have no calls.
    """
    plans, first = [], 1
    for tokens, calls in ((r.tokens, r.calls) for r in ranges):
        if tokens < first or not calls:
            raise PluginError("token ranges", f"{tokens} tokens, {len(calls)} calls", f"{first} tokens or more, and a call")
        plans += [plan(problem, min(tokens, max_tokens), call, dtype, scratch_ints) for call in calls]
        first = tokens + 1
        if tokens >= max_tokens:
            return max(plans, key=lambda p: p.bytes)
    raise PluginError("token ranges", f"up to {first - 1} tokens", f"up to max_tokens = {max_tokens}")


class Arena:
    """The memory of the MoE calls on one stream of one device; all layers share it, since a stream runs them one after another.

    An adapter sizes it once at start, on the stream that it will use, for the largest call. It grows if a larger call comes all
    the same, but never during graph capture: memory taken there would belong to the graph. What it had before growing it
    keeps for good if any call took :meth:`views` of it, because graphs captured until then hold addresses in it; so growing costs the
    sum of the sizes that were used. Sizes that were only asked for, as models with several kinds of layers do at start, cost nothing.

    Nothing in it lasts from one call to the next: what kernels read there, the same call wrote. So an engine that sleeps may give up
    the contents, as it does with all that was allocated while the model was loaded.
    """

    _arenas: ClassVar[dict[tuple[torch.device, int], Arena]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device, name: str) -> None:
        self.device, self.name = device, name
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.retired: list[Tensor] = []
        self._views: dict[Plan, dict[str, Tensor]] = {}
        self._used = False
        """Whether views of the buffer were ever taken."""

    @classmethod
    def get(cls, device: torch.device, bytes: int = 0, stream: int | None = None) -> Arena:
        """The arena of a stream of ``device`` (with its index, as tensors name it), of at least ``bytes``.

        ``stream``: its handle, or any number that calls which never overlap share; None for the current stream.

        Raises RuntimeError if it would have to grow during graph capture.
        """
        stream = _stream(device) if stream is None else stream
        arena = cls._arenas.get((device, stream))
        if arena is None:
            with cls._lock:
                arena = cls._arenas.setdefault((device, stream), cls(device, f"MoE workspace of {device}, stream {stream:#x}"))
        if arena.buffer.numel() < bytes:
            with cls._lock:
                arena._grow(bytes)
        return arena

    @property
    def bytes(self) -> int:
        """Size of what it uses now."""
        return self.buffer.numel()

    @property
    def held(self) -> int:
        """Bytes with what is kept for graphs captured before it grew."""
        return self.bytes + sum(map(torch.Tensor.numel, self.retired))

    def _grow(self, bytes: int) -> None:
        if bytes <= self.bytes:
            return
        if _capturing(self.device):
            raise RuntimeError(
                f"{self.name}: found {self.bytes:,} bytes while a graph is captured, and a call that needs {bytes:,}; "
                f"allowed: growing before capture only, so size it for the largest call at start"
            )
        # A buffer made in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            new = torch.empty(bytes, dtype=torch.uint8, device=self.device)
        if self._used:
            self.retired.append(self.buffer)
        self.buffer, self._views, self._used = new, {}, False

    def views(self, plan: Plan) -> dict[str, Tensor]:
        """Every region of ``plan`` by name, made once: calls with the same plan get the same tensors until the arena grows.

        Raises RuntimeError if the arena is smaller than the plan.
        """
        found = self._views.get(plan)
        return self._make(plan) if found is None else found

    def view(self, plan: Plan, name: str) -> Tensor:
        """One of :meth:`views`. Raises KeyError if the plan has no such region."""
        return self.views(plan)[name]

    def _make(self, plan: Plan) -> dict[str, Tensor]:
        if plan.bytes > self.bytes:
            raise RuntimeError(f"{self.name}: found {self.bytes:,} bytes; allowed: {plan.bytes:,} or more for {plan.tokens} tokens")
        if len(self._views) >= _PLANS:
            self._views.clear()
        self._used = True
        with torch.inference_mode(False):
            views = {r.name: self.buffer[r.offset : r.offset + r.bytes].view(r.dtype).view(r.shape) for r in plan.regions}
        self._views[plan] = views
        return views


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
