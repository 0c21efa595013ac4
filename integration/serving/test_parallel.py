"""Tensor and expert parallelism over two processes of one machine give the perplexity of one process."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .engines import EngineHost

TOKENS = 12_000
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def two_workers() -> dict[str, str]:
    """A core for each worker: vLLM's automatic binding wants a NUMA node for each, which small machines do not have."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("moe_model", {}),
        ("moe_model", {"enable_expert_parallel": True}),
        ("next_model", {}),
        ("next_model", {"enable_expert_parallel": True}),
    ],
    ids=["moe-tensor", "moe-expert", "next-tensor", "next-expert"],
)
def test_two_ranks_score_as_one(model: str, options: dict, engines: EngineHost, once: Callable, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(model)
    # Each token's log-probability differs by 0.02 or so, at random: below 10,000 tokens that alone can make 0.1 %.
    one = once(("score", model), lambda: engines.score(path, tokens=TOKENS))
    two = engines.score(path, tokens=TOKENS, tensor_parallel_size=2, env=two_workers(), **options)
    ratio = math.exp(one.mean - two.mean)
    print(f"perplexity {math.exp(-one.mean):.4f} and {math.exp(-two.mean):.4f}, logprob difference {one.difference(two):.5f}")
    assert abs(ratio - 1) < 0.001, f"perplexity of two ranks is {ratio:.5f} times that of one"
    assert one.difference(two) < 0.02
