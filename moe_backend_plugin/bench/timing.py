"""How a kernel is timed, and the ceilings that it is held against: one method for every provider.

Eight launches (long calls: fewer), each with inputs and states or weights of its own, are captured in one CUDA graph; the graph is
replayed, events around it, and the median over replays divided by eight is the time of a call.  Before each replay, outside the events:

1. the GPU sleeps a moment, so that the host is ahead and none of its time is measured;
2. a read of four times the L2 cache drives every state and weight out of it, also where a batch is so small that eight would stay;
3. what the kernel before would have left in the cache (tokens, gates, slot tables) is read back into it;
4. one more launch, with inputs of its own, brings the kernel's instructions in.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LAUNCHES = 8
"""Launches that are timed unless a call says otherwise; launch number ``LAUNCHES`` is the one before them."""
REPLAYS, WARM_UPS = 20, 3
SLEEP_CYCLES = 500_000  # about 0.3 ms
COPY_BLOCK = 1024
COPY_BYTES = 4 << 30
MATMUL = 8192


@triton.jit
def _empty(x):
    pass


@triton.jit
def _copy(source, target, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets))


class Recorded(NamedTuple):
    """Graphs of some launches, for :meth:`Clock.replayed`: the one before, and those that are timed."""

    run_in: torch.cuda.CUDAGraph
    timed: torch.cuda.CUDAGraph
    launches: int


class Clock:
    """Times launches on one device; holds the buffer that empties its L2 cache."""

    def __init__(self, device: torch.device) -> None:
        gc.freeze()  # a capture collects garbage; going through all that an engine and a compiler imported takes it a second
        self.device = device
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.ones(4 * self.l2_bytes // 8, dtype=torch.int64, device=device)
        self._copies: dict[int, float] = {}

    def time(
        self,
        launch: Callable[[int], object],
        warm: Iterable[torch.Tensor] = (),
        launches: int = LAUNCHES,
        *,
        replays: int = REPLAYS,
        cold: bool = True,
    ) -> float:
        """Microseconds a call of ``launch(i)``, i in 0 .. launches; ``warm`` are int64 tensors to be in the cache.

        ``cold`` False leaves step 2 out: what the launches before left stays in the cache, which is what a tuner must not do.
        """
        return self.replayed(self.record(launch, launches), warm, replays=replays, cold=cold)

    def record(self, launch: Callable[[int], object], launches: int = LAUNCHES) -> Recorded:
        """The graphs of ``launch(i)``, i in 0 .. launches, to be timed as often as is wanted."""
        for i in range(launches + 1):  # whatever compiles or loads at a first call stays out of the capture
            launch(i)
        return Recorded(capture(launch, [launches]), capture(launch, range(launches)), launches)

    def replayed(
        self,
        graphs: Recorded,
        warm: Iterable[torch.Tensor] = (),
        *,
        replays: int = REPLAYS,
        warm_ups: int = WARM_UPS,
        cold: bool = True,
        sleep: int = SLEEP_CYCLES,
    ) -> float:
        """Microseconds a call of recorded launches: the median of ``replays``, after some that are not counted; ``sleep``: cycles."""
        warm = list(warm)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(warm_ups + replays):
            torch.cuda._sleep(sleep)
            if cold:
                self._flush.sum()
            for tensor in warm:
                tensor.sum()
            graphs.run_in.replay()
            begin.record()
            graphs.timed.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times[warm_ups:]) * 1e3 / graphs.launches

    def empty_us(self) -> float:
        """Microseconds of a kernel that does nothing: what a launch costs."""
        return self.time(lambda i: _empty[(1,)](self._flush))

    def copy_us(self, pool: torch.Tensor, count: int) -> float | None:
        """Microseconds to read ``count`` bytes of ``pool`` and write as many to another part; None if it is too small."""
        words = pool.view(-1).view(torch.int32)
        half, size = words.numel() // 2 // COPY_BLOCK * COPY_BLOCK, count // 4
        if (LAUNCHES + 1) * size > half:
            return None
        if count not in self._copies:

            def launch(i: int) -> None:
                source, target = (words[start + i * size : start + (i + 1) * size] for start in (0, half))
                _copy[(size // COPY_BLOCK,)](source, target, BLOCK=COPY_BLOCK)

            self._copies[count] = self.time(launch)
        return self._copies[count]


def capture(launch: Callable[[int], object], which: Iterable[int], pool: tuple[int, int] | None = None) -> torch.cuda.CUDAGraph:
    """A graph of ``launch(i)`` for each i of ``which``. ``pool``: memory that graphs share of which one runs at a time."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # On the current stream where that can be: a kernel's workspace may belong to the stream that its first calls ran on.
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, pool, stream=None if stream == torch.cuda.default_stream() else stream):
        for i in which:
            launch(i)
    return graph


def copy_tb_s(device: torch.device) -> float:
    """TB/s, bytes read and bytes written, of torch's copy_ of 4 GiB."""
    source = torch.ones(COPY_BYTES // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_s(lambda: target.copy_(source)) / 1e12


def matmul_tflop_s(device: torch.device) -> float:
    """TFLOP/s of torch's product of two bf16 matrices of 8192 x 8192 random numbers."""
    a, b = (torch.randn(MATMUL, MATMUL, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * MATMUL**3 / _median_s(lambda: torch.mm(a, b, out=out)) / 1e12


def _median_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(WARM_UPS + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[WARM_UPS:]) * 1e-3
