"""A made-up GPU for the tuner: times from a formula, with noise and drift, and outputs that are right unless a test says otherwise."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

from moe_backend_plugin.moe import balanced, workspace
from moe_backend_plugin.moe.families import HOPPER, Family, Tactic
from moe_backend_plugin.moe.problem import MoEProblem
from moe_backend_plugin.moe.tiles import Choice, Shape
from moe_backend_plugin.moe.tuner import Conditions

HIDDEN = 4
MULTIPROCESSORS = 132
SMALL = MoEProblem(16, 16, 256, 64, 4)


@cache
def shape_factor(shape: Shape) -> float:
    """1 to 1.25, the same in every run."""
    return 1 + zlib.crc32(repr(shape).encode()) % 1000 / 4000


@cache
def loads_of(problem: MoEProblem, tokens: int) -> list[int]:
    """Of the experts that have any."""
    return [load for load in balanced.quotas(problem, tokens)[: problem.num_local_experts] if load]


@cache
def right_output(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def formula(problem: MoEProblem) -> Callable[[Choice, Conditions], float]:
    """Microseconds: an expert's weights once a tile (cheaper the second time), and its columns; both projections by their shapes."""

    def us(tactic: Choice, conditions: Conditions) -> float:
        tile = tactic.tile_tokens
        loads = loads_of(problem, conditions.tokens)
        tiles = sum(-(-load // tile) for load in loads)
        own = len(loads) * 4.0 + (tiles - len(loads)) * 2.0 + tiles * tile * 0.05
        return 5 + own * (0.6 * shape_factor(tactic.gate_up) + 0.4 * shape_factor(tactic.down))

    return us


@dataclass
class FakeGpu:
    """``us``: the true times. noise: standard deviation of the logarithm of a time; drift: growth from one timing to the next."""

    us: Callable[[Tactic, Conditions], float]
    noise: float = 0.0
    drift: float = 0.0
    seed: int = 0
    wrong: dict[str, str] = field(default_factory=dict)
    """What is wrong with a tactic, by name: "wrong", "wrong later", "nan", "unsteady" or "raises"."""
    timed: list[tuple[Tactic, Conditions]] = field(default_factory=list)
    replayed: list[str] = field(default_factory=list)
    family: Family = HOPPER

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def make(self, conditions: Conditions) -> FakeCase:
        return FakeCase(self, conditions)


@dataclass
class FakeCase:
    gpu: FakeGpu
    conditions: Conditions

    def time(self, tactic: Tactic, conditions: Conditions) -> float:
        assert conditions.tokens == self.conditions.tokens
        gpu = self.gpu
        gpu.timed.append((tactic, conditions))
        factor = (1 + gpu.drift) ** len(gpu.timed) * 2.718281828 ** gpu.chance.gauss(0, gpu.noise)
        return gpu.us(tactic, conditions) * factor

    def replay(self, tactic: Tactic) -> torch.Tensor:
        name = self.gpu.family.name(tactic)
        self.gpu.replayed.append(name)
        out, fault = right_output(self.conditions.tokens).bfloat16(), self.gpu.wrong.get(name)
        if fault == "wrong" or (fault == "wrong later" and self.gpu.replayed.count(name) > 2):
            out[-1] += 0.5
        elif fault == "nan":
            out[0, 0] = float("nan")
        elif fault == "unsteady":
            out[0, 0] *= 1 + 0.004 * (self.gpu.replayed.count(name) > 2)
        elif fault == "raises":
            raise RuntimeError("too many resources requested for launch\nmore")
        return out

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(self.conditions.tokens), right_output(self.conditions.tokens)


# --- bench.tactics on a CPU -------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, device):
        self.asked = []

    def replayed(self, graphs, *, cold, replays, warm_ups, sleep):
        self.asked.append((graphs.launches, replays, warm_ups, cold))
        graphs.run_in.replay()
        graphs.timed.replay()
        return 5.0


class Graph:
    captured = 0

    def __init__(self, launch, which, pool):
        Graph.captured += 1
        self.replay = lambda: [launch(i) for i in which]


def without_a_gpu(monkeypatch, bench) -> None:
    """The module ``bench.tactics`` runs on the CPU: nothing is timed, graphs are calls, and memory is what a small layer needs."""
    monkeypatch.setattr(bench, "Clock", Clock)
    monkeypatch.setattr(bench, "capture", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(bench, "RESERVE", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(workspace.Arena, "_arenas", {})
