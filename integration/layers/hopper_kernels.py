"""The GPU kernels' interface (``moe.cuda``) over the reference, on CPU tensors in the kernels' own order of weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from moe_backend_plugin.moe import reference
from moe_backend_plugin.moe.problem import MoEProblem
from moe_backend_plugin.nvfp4 import hopper

MULTIPROCESSORS = 78


class Weights(NamedTuple):
    w13: torch.Tensor
    w13_scale_2: torch.Tensor
    w2: torch.Tensor
    w2_scale_2: torch.Tensor


@dataclass
class Kernels:
    """What was asked of the kernels."""

    prepared: list[tuple] = field(default_factory=list)
    calls: list[MoEProblem] = field(default_factory=list)
    reason: str | None = None

    def unsupported_reason(self, problem: MoEProblem, tokens: torch.dtype) -> str | None:
        if problem.activation_precision != "bf16":
            return f"activation precision {problem.activation_precision}"
        return self.reason

    def prepare(self, *arguments) -> int:
        self.prepared.append(arguments)
        return 3

    def arena_bytes(self, problem: MoEProblem, max_tokens: int, tokens: torch.dtype, multiprocessors: int) -> int:
        assert multiprocessors == MULTIPROCESSORS
        return max_tokens << 10

    def fused_moe(self, x, weights, topk_weights, topk_ids, problem, out, expert_map=None) -> None:
        self.calls.append(problem)
        assert topk_ids.dtype is torch.int32 and topk_weights.dtype is torch.float32 and out.is_contiguous()
        w13 = hopper.unpack(weights.w13, problem.w13_rows, problem.hidden, problem.activation.gated)
        w2 = hopper.unpack(weights.w2, problem.hidden, problem.intermediate, False)
        scaled = (*w13, weights.w13_scale_2, *w2, weights.w2_scale_2)
        out.copy_(reference.fused_moe(x, *scaled, topk_weights, topk_ids, problem, expert_map))


def install(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Put :class:`Kernels` in place of ``moe.cuda``'s functions."""
    from moe_backend_plugin import moe

    name, kernels = "moe_backend_plugin.moe.cuda", Kernels()
    module = ModuleType(name)
    module.Weights = Weights
    for function in ("unsupported_reason", "prepare", "arena_bytes", "fused_moe"):
        setattr(module, function, getattr(kernels, function))
    module.multiprocessors_of = lambda device: MULTIPROCESSORS
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(moe, "cuda", module, raising=False)
    # The adapter may have been imported with another one.
    from moe_backend_plugin.engines import experts
    from moe_backend_plugin.engines.vllm import moe_cuda

    for adapter in (experts, moe_cuda):
        monkeypatch.setattr(adapter, "cuda", module)
    return kernels
