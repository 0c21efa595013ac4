"""What the benchmarks share."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from ..moe.problem import MoEProblem


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def expert_map(problem: MoEProblem, device: torch.device, first: int = 0) -> Tensor | None:
    """int32 [experts]: local expert or -1, where this rank has those from ``first`` on; None where all are here."""
    if problem.num_local_experts == problem.num_experts:
        return None
    found = torch.full((problem.num_experts,), -1, dtype=torch.int32, device=device)
    found[first : first + problem.num_local_experts] = torch.arange(problem.num_local_experts, dtype=torch.int32, device=device)
    return found
