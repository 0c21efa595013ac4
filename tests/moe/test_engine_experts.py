"""What a server's log says of the experts' workspace, against what was allocated. No GPU is needed."""

from __future__ import annotations

import pytest
import torch

from moe_backend_plugin.config import PluginConfig
from moe_backend_plugin.engines import experts
from moe_backend_plugin.moe import cuda, tactics, tiles, workspace
from moe_backend_plugin.moe.problem import MoEProblem

PROBLEM = MoEProblem(128, 128, 256, 16, 8)
MOST = 16384
SMALL_TILES = tactics.Table([tactics.Bucket(1, MOST, tiles.Choice(tiles.SOME, tiles.SOME))])
"""So many that their list needs a larger workspace than the heuristic's large ones."""


@pytest.fixture
def allocated(monkeypatch):
    """``cuda.prepare`` for a GPU of 78 multiprocessors; nothing is compiled. Bytes asked of the arena."""
    sizes: list[int] = []
    monkeypatch.setattr(cuda, "multiprocessors_of", lambda device: 78)
    monkeypatch.setattr(cuda.kernels, "device_architecture", lambda *_: "sm_90a")
    monkeypatch.setattr(cuda.kernels, "prepare", lambda *_: 0)
    monkeypatch.setattr(cuda, "variants", lambda *_: ())
    monkeypatch.setattr(cuda, "prepare", cuda.prepare.__wrapped__)
    monkeypatch.setattr(workspace.Arena, "get", lambda device, bytes, stream: sizes.append(bytes))
    monkeypatch.setattr(experts.kernels, "use_cache_folder", lambda path: None)
    cuda.forget_choices()
    yield sizes
    tactics.set_table(PROBLEM, torch.float16, None)
    cuda.forget_choices()


def test_the_log_says_what_the_arena_takes(allocated, monkeypatch):
    """On this device, and for this type of tokens: what was tuned for one is not what another runs."""
    monkeypatch.setattr(
        tactics, "load", lambda problem, dtype, device: dtype is torch.float16 and tactics.set_table(problem, dtype, SMALL_TILES)
    )
    asked = []
    monkeypatch.setattr(cuda, "arena_bytes", lambda *arguments, right=cuda.arena_bytes: asked.append(arguments) or right(*arguments))
    lines: list[str] = []
    for dtype in (torch.bfloat16, torch.float16):
        experts.prepare(
            PluginConfig(), PROBLEM, dtype, torch.device("cuda", 0), MOST, False, lambda text, *values: lines.append(text % values)
        )
    assert asked == [(PROBLEM, MOST, dtype, 78) for dtype in (torch.bfloat16, torch.float16)]
    assert len(allocated) == len(lines) == len(set(lines)) == 2
    for size, line in zip(allocated, lines, strict=True):
        assert f"{size / 2**20:.1f} MiB for calls of up to {MOST} tokens" in line
