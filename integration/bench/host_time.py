"""Microseconds of Python in front of a launch: calls of the kernels with a function that does nothing in the kernels' place.

    python integration/bench/host_time.py

Needs no GPU. What a launch itself takes, and torch's dispatch of a custom op, are not in it. Prints the fastest of five rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import torch

from moe_backend_plugin.gdn import cuda as gdn
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.linear import cuda as linear
from moe_backend_plugin.moe import cuda as moe
from moe_backend_plugin.moe.problem import MoEProblem

CALLS, ROUNDS = 2000, 5
TOKENS, HEADS, HIDDEN, WIDTH = 64, 32, 256, 128
PROBLEM = MoEProblem(8, 8, HIDDEN, WIDTH, 2)


def gdn_decode() -> Callable[[], None]:
    bf16 = torch.bfloat16
    rows = dict(mixed_qkv=torch.empty(TOKENS, (32 + HEADS) * 128, dtype=bf16), out=torch.empty(TOKENS, HEADS, 128))
    gates = dict(a=torch.empty(TOKENS, HEADS), b=torch.empty(TOKENS, HEADS), A_log=torch.empty(HEADS), dt_bias=torch.empty(HEADS))
    state = dict(pool=torch.empty(2, HEADS, 128, 128), read=torch.ones(TOKENS, dtype=torch.int32))
    return lambda: gdn.decode(**rows, **gates, **state)


def experts(tokens: int) -> Callable[[], None]:
    x, out = torch.empty(2, tokens, HIDDEN, dtype=torch.bfloat16)
    weights = moe.Weights(*(torch.empty(8, 1) for _ in range(4)))
    router, ids = torch.empty(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32)
    return lambda: moe.fused_moe(x, weights, router, ids, PROBLEM, out)


def dense() -> Callable[[], None]:
    x, out = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16), torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)
    weights = linear.Weights(torch.empty(1, WIDTH // 64, HIDDEN // 64, 2304, dtype=torch.uint8), torch.ones(1, 1))
    return lambda: linear.nvfp4_linear(x, weights, out)


def microseconds(call: Callable[[], None]) -> float:
    def once() -> float:
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - begin) / CALLS * 1e6

    once()
    return min(once() for _ in range(ROUNDS))


def main() -> None:
    cases = {
        "GDN decode, one launch": gdn_decode,
        "experts, 32 tokens, three launches": lambda: experts(32),
        "experts, 512 tokens, four launches": lambda: experts(512),
        "a dense layer, one launch": dense,
    }
    nothing = dict(load=lambda *which: lambda *arguments: None, device_architecture=lambda *which: "sm_90a")
    with patch.multiple(kernels, **nothing), patch.object(moe, "multiprocessors_of", lambda device: 132):
        for name, make in cases.items():
            print(f"{name}: {microseconds(make()):.1f} us")


if __name__ == "__main__":
    main()
