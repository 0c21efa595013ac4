"""What every engine's adapter does before the first request of a model whose experts run on the GPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..config import PluginConfig
from ..kernels import compile as kernels
from ..moe import cuda, tactics
from ..moe.problem import MoEProblem

INDEX = torch.int32
"""The engines' routers give ids of this type."""


def use(config: PluginConfig) -> None:
    """The folder of compiled kernels and of tuned tactics, and whether these are looked at, from here on in this process."""
    kernels.use_cache_folder(config.kernel_cache)
    tactics.use(config.moe.tactics)


def prepare(
    config: PluginConfig, problem: MoEProblem, tokens: torch.dtype, device: torch.device, max_tokens: int, mapped: bool, say: Callable
) -> None:
    """For Hopper: compile or load every kernel that layers of this problem launch, and make the arena large enough.

    ``say(format, *values)`` logs.
    """
    use(config)
    if compiled := cuda.prepare(problem, tokens, INDEX, device, max_tokens, mapped):
        say("Compiled %d NVFP4 MoE kernels; they are kept in %s", compiled, str(kernels.cache_folder()))
    mib = cuda.arena_bytes(problem, max_tokens, tokens, cuda.multiprocessors_of(device.index or 0)) / 2**20
    say("NVFP4 MoE workspace, shared by all layers: %.1f MiB for calls of up to %d tokens", mib, max_tokens)
