"""The GPU's part of ``moe-backend tune``: the inputs of a bucket, tactics run and timed on them, and the reference to hold them against.

All tactics use one arena, sized before the first is timed for the one that needs most. The clock is that of the benchmarks
(:mod:`.timing`): CUDA-graph replays, and weights that come from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..moe import balanced, blackwell, cuda, kernel_check, reference
from ..moe.families import BLACKWELL, HOPPER, Tactic
from ..moe.problem import MoEProblem
from ..moe.tuner import Conditions
from .moe import RESERVE, random_checkpoint
from .shared import expert_map
from .timing import LAUNCHES, REPLAYS, Clock, Recorded, capture

ROWS_COMPARED = 1024
"""Rows of the output that the reference computes; whether all are finite, and repeat bit for bit where the tactic can, is looked at on
all of them."""
LONG = 1024
"""Calls above so many tokens are timed with two launches."""
VISIT = {"replays": 5, "warm_ups": 1, "sleep": 150_000}
"""How often a tactic is replayed each time that it has its turn, and how long the GPU sleeps before: what is close is visited in many
rounds, and since graphs are kept from one to the next a visit can be short."""


class Layer:
    """A layer with random weights, some sets of them, on the Hopper kernels; ``first``: the rank's first expert.

    Makes every kernel that ``found`` (tactics) can launch, and the arena. Raises RuntimeError where the kernels cannot serve it.
    """

    family = HOPPER

    def __init__(
        self, problem: MoEProblem, dtype: torch.dtype, first: int, device: torch.device, max_tokens: int, found: Sequence[Tactic]
    ) -> None:
        if reason := self._unsupported_reason(problem, dtype):
            raise RuntimeError(reason)
        self.problem, self.dtype, self.first, self.device = problem, dtype, first, device
        self.clock = Clock(device)
        self.expert_map = expert_map(problem, device, first)
        self._prepare(max_tokens, found)
        self.checkpoint = random_checkpoint(problem, device)
        packed = self._pack()
        size = packed.w13.numel() + packed.w2.numel()
        copies = max(1, min(LAUNCHES + 1, (torch.cuda.mem_get_info(device)[0] - RESERVE) // size))
        self.sets = [packed, *(type(packed)(*(part.clone() for part in packed)) for _ in range(copies - 1))]

    def _unsupported_reason(self, problem: MoEProblem, dtype: torch.dtype) -> str | None:
        return cuda.unsupported_reason(problem, dtype)

    def _prepare(self, max_tokens: int, found: Sequence[Tactic]) -> None:
        ids = cuda.Ids(mapped=self.expert_map is not None)
        cuda.prepare_tactics(self.problem, self.dtype, found, self.device, max_tokens, ids)

    def _pack(self) -> cuda.Weights | blackwell.Weights:
        """The checkpoint as the kernels read it."""
        return cuda.pack(self.problem, *self.checkpoint)

    def launch(self, number: int, x: Tensor, router: Tensor, ids: Tensor, out: Tensor, tactic: Tactic) -> None:
        """One call with weights number ``number``; ``x`` and ``out`` [M, H], ``router`` and ``ids`` [M, k]."""
        cuda.fused_moe(x, self.sets[number], router, ids, self.problem, out, expert_map=self.expert_map, choice=tactic)

    def right(self, x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
        """The right output of such a call, float32 [M, H]."""
        return reference.fused_moe(x, *self.checkpoint, router, ids, self.problem, self.expert_map).float()

    def workspace_bytes(self, tokens: int, tactic: Tactic) -> int:
        """Memory between the kernels of a call."""
        return self.family.workspace_bytes(self.problem, tokens, tactic, self.dtype)

    def case(self, conditions: Conditions) -> LayerCase:
        """The inputs of one bucket."""
        return LayerCase(self, conditions)


class BlackwellLayer(Layer):
    """The same on FlashInfer's kernels, with static activation scales. It has not run on a Blackwell GPU.

    FlashInfer compiles a tactic's kernels at its first launch, which is the one that is compared, never one that is timed.
    """

    family = BLACKWELL

    def _unsupported_reason(self, problem: MoEProblem, dtype: torch.dtype) -> str | None:
        return blackwell.unsupported_reason(problem, dtype)

    def _prepare(self, max_tokens: int, found: Sequence[Tactic]) -> None:
        blackwell.prepare(self.problem, self.dtype, self.device, max_tokens, "static")
        self.input_scales = kernel_check.input_scales(self.problem, self.device)

    def _pack(self) -> blackwell.Weights:
        return blackwell.pack(self.problem, *self.checkpoint, *self.input_scales)

    def launch(self, number: int, x: Tensor, router: Tensor, ids: Tensor, out: Tensor, tactic: Tactic) -> None:
        blackwell.fused_moe(x, self.sets[number], router, ids, self.problem, out, tactic=tactic, first=self.first)

    def right(self, x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
        # The kernels round the first projection's sums to NVFP4 as they are, so nothing is rounded to 16 bits in between.
        arguments = (x.float(), *self.checkpoint, router, ids, self.problem, self.expert_map)
        return reference.fused_moe(*arguments, *self.input_scales)


class LayerCase:
    """One bucket's inputs, a set a launch: see ``moe.tuner.Case``."""

    def __init__(self, layer: Layer, conditions: Conditions) -> None:
        self.layer, self.tokens = layer, conditions.tokens
        problem, device = layer.problem, layer.device
        self.launches = 2 if self.tokens > LONG else LAUNCHES
        generator = torch.Generator(device).manual_seed(conditions.seed * 1_000_003 + self.tokens)
        self.x, self.weights, self.ids = [], [], []
        for i in range(self.launches + 1):
            self.x.append(torch.randn(self.tokens, problem.hidden, device=device, generator=generator).to(layer.dtype))
            weights, ids = balanced.routing(problem, self.tokens, layer.first, conditions.loads, seed=conditions.seed + i)
            self.weights.append(weights.to(device))
            self.ids.append(ids.to(device))
        self.out = torch.empty_like(self.x[0])
        self._alone: dict[tuple[Tactic, bool], torch.cuda.CUDAGraph] = {}
        self._timed: dict[tuple[Tactic, bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def time(self, tactic: Tactic, conditions: Conditions) -> float:
        """Microseconds of one call. A tactic that is not preallocated takes its workspace anew, by hand, within the time."""
        cold = conditions.cold_l2
        if conditions.preallocated:
            graphs = Recorded(self._graph(self._alone, tactic, cold), self._graph(self._timed, tactic, cold), self.launches)
            return self.layer.clock.replayed(graphs, cold=cold, **VISIT)
        size = self.layer.workspace_bytes(self.tokens, tactic)
        launch = partial(self._launch, tactic, cold)
        return self._eager(lambda i: (torch.zeros(size, dtype=torch.uint8, device=self.layer.device), launch(i)))

    def _graph(self, kept: dict[tuple[Tactic, bool], torch.cuda.CUDAGraph], tactic: Tactic, cold: bool) -> torch.cuda.CUDAGraph:
        """The graph of the call that is compared, or of those that are timed; kept, since a tactic is asked for in many rounds."""
        if (tactic, cold) not in kept:
            launch = partial(self._launch, tactic, cold)
            which = [self.launches] if kept is self._alone else range(self.launches)
            launch(self.launches)  # whatever compiles or loads at a first call stays out of the capture
            kept[tactic, cold] = capture(launch, which, self._pool)
        return kept[tactic, cold]

    def _launch(self, tactic: Tactic, cold: bool, i: int) -> None:
        # The launch before the timed ones takes the first set; where the cache is to be warm, so do all.
        number = (i + 1) % (self.launches + 1) % len(self.layer.sets) if cold else 0
        i = i if cold else 0
        self.layer.launch(number, self.x[i], self.weights[i], self.ids[i], self.out, tactic)

    def _eager(self, launch: Callable[[int], object]) -> float:
        """The median without a graph, as a tuner that allocates has to time."""
        times = []
        for i in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch(i % self.launches)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return sorted(times)[len(times) // 2]

    def replay(self, tactic: Tactic) -> Tensor:
        """The output [M, H] of a graph of one call, replayed into memory full of NaN; the next replay overwrites it."""
        graph = self._graph(self._alone, tactic, True)
        self.out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize(self.layer.device)
        return self.out

    def reference(self) -> tuple[Tensor, Tensor]:
        """(int64 rows, their right output in float32) of the call that :meth:`replay` makes."""
        count, i = min(ROWS_COMPARED, self.tokens), self.launches
        rows = torch.arange(count, device=self.layer.device) * self.tokens // count
        return rows, self.layer.right(*(part[i][rows] for part in (self.x, self.weights, self.ids)))
