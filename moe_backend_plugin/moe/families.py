"""The two families of tactics, as the tuner and the file of tuned tactics see them: this package's Hopper kernels, and FlashInfer's.

What a tactic is differs from one to the other, and so does which there are and when an output is right. Buckets, races, vetting and the
file are the same for both. A device has one family: :func:`of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch

from ..errors import PluginError
from . import blackwell, compare, route, tactics, tiles, workspace
from .problem import MoEProblem
from .tiles import Choice

Tactic = Choice | blackwell.Tactic
"""Hopper's, Blackwell's. Any is hashable, and belongs to one family."""


class Family(Protocol):
    """What has to be known of a family's tactics to tune and to keep them.

    gpu: what it is called in messages. tactic: the class of its tactics. activations: the precision that the kernels multiply, as
    ``MoEProblem`` has it. bounds: the largest errors of a right output, as :func:`.compare.compare` takes them. failures: errors of a
    launch that strike its tactic out.
    """

    gpu: str
    tactic: type[Tactic]
    activations: Literal["bf16", "nvfp4"]
    bounds: tuple[float, float]
    failures: tuple[type[Exception], ...]

    def name(self, tactic: Any) -> str:
        """The tactic's name, which :meth:`parse` reads back."""

    def parse(self, text: str) -> Any:
        """The tactic of a name. Raises PluginError (a ValueError) if it is no name of this family."""

    def validity(self, problem: MoEProblem, tactic: Any) -> str | None:
        """Why calls of this problem cannot run this way, or None."""

    def heuristic(self, problem: MoEProblem, tokens: int, multiprocessors: int) -> Any:
        """What calls of ``tokens`` tokens run where nothing was tuned. Nothing is kept: a scan over all token counts costs no memory."""

    def candidates(self, problem: MoEProblem, tokens: int, multiprocessors: int) -> list[Any]:
        """The tactics to time for calls of ``tokens`` tokens, the heuristic's first."""

    def crossed(self, times: Mapping[Any, float]) -> list[Any]:
        """What is still to time once the candidates took ``times`` microseconds."""

    def repeatable(self, tactic: Any) -> bool:
        """Whether the same call gives the same bits every time."""

    def workspace_bytes(self, problem: MoEProblem, tokens: int, tactic: Any, dtype: torch.dtype) -> int:
        """Memory of a call beside its input and output."""


class Hopper:
    """This package's kernels: :mod:`.tactics`."""

    gpu = "Hopper"
    tactic = Choice
    activations = "bf16"
    bounds = compare.W4A16
    failures = (RuntimeError, ValueError)

    def name(self, tactic: Choice) -> str:
        return tactics.name(tactic)

    def parse(self, text: str) -> Choice:
        return tactics.parse(text)

    def validity(self, problem: MoEProblem, tactic: Choice) -> str | None:
        return tactics.validity(problem, tactic)

    def heuristic(self, problem: MoEProblem, tokens: int, multiprocessors: int) -> Choice:
        return tiles.choose.__wrapped__(problem, tokens, multiprocessors)

    def candidates(self, problem: MoEProblem, tokens: int, multiprocessors: int) -> list[Choice]:
        return tactics.candidates(problem, tokens, multiprocessors)

    def crossed(self, times: Mapping[Choice, float]) -> list[Choice]:
        return tactics.crossed(times)

    def repeatable(self, tactic: Choice) -> bool:
        return True

    def workspace_bytes(self, problem: MoEProblem, tokens: int, tactic: Choice, dtype: torch.dtype) -> int:
        return workspace.plan(problem, tokens, workspace.Call(tactic.tile_tokens, y=dtype), dtype, route.scratch_ints).bytes


class Blackwell:
    """FlashInfer's kernels: :mod:`.blackwell`. They are few, so every one is a candidate and none is left to pair.

    Layers are tuned with static activation scales. Those with a scale a token run the same tactics: the kernels are the same but for
    what the first projection writes.
    """

    gpu = "Blackwell"
    tactic = blackwell.Tactic
    activations = "nvfp4"
    bounds = compare.W4A4
    failures = (Exception,)  # its compiler's have no class in common with anything
    scales = "static"

    def name(self, tactic: blackwell.Tactic) -> str:
        return tactic.name

    def parse(self, text: str) -> blackwell.Tactic:
        return blackwell.parse(text)

    def validity(self, problem: MoEProblem, tactic: blackwell.Tactic) -> str | None:
        return blackwell.validity(problem, tactic)

    def heuristic(self, problem: MoEProblem, tokens: int, multiprocessors: int) -> blackwell.Tactic:
        return blackwell.choose.__wrapped__(problem, tokens)

    def candidates(self, problem: MoEProblem, tokens: int, multiprocessors: int) -> list[blackwell.Tactic]:
        return list(dict.fromkeys([self.heuristic(problem, tokens, multiprocessors), *blackwell.every(problem)]))

    def crossed(self, times: Mapping[blackwell.Tactic, float]) -> list[blackwell.Tactic]:
        return []

    def repeatable(self, tactic: blackwell.Tactic) -> bool:
        return tactic.ordered

    def workspace_bytes(self, problem: MoEProblem, tokens: int, tactic: blackwell.Tactic, dtype: torch.dtype) -> int:
        return blackwell.plan(problem, tokens, tactic, self.scales, dtype).bytes


HOPPER: Family = Hopper()
BLACKWELL: Family = Blackwell()


def of(capability: tuple[int, int]) -> Family:
    """The family of a GPU of this compute capability."""
    return BLACKWELL if capability[0] == 10 else HOPPER


def parse(text: str) -> tuple[Family, Tactic]:
    """The tactic of a name, and its family. Raises PluginError (a ValueError) if no family has such names."""
    allowed = []
    for family in (HOPPER, BLACKWELL):
        try:
            return family, family.parse(text)
        except PluginError as error:
            allowed.append(f"{error.allowed} on {family.gpu}")
    raise PluginError("tactic", repr(text), ", ".join(allowed))
