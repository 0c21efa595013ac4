"""Which head sizes and ratios the GPU kernels serve; imports nothing, so that a checkpoint can be judged without CuTe DSL."""

from __future__ import annotations

HEAD = 128
"""K and V."""
HEADS_PER_GROUP = (1, 2, 3, 4, 8)
"""Ratios HV / HQ that are compiled and tested."""


def heads_reason(*, head_k: int, head_v: int, key_heads: int, value_heads: int) -> str | None:
    """Why the kernels cannot serve such heads, or None if they can."""
    if (head_k, head_v) != (HEAD, HEAD):
        return f"head sizes K={head_k}, V={head_v}; the kernels serve K=V={HEAD}"
    if key_heads <= 0 or value_heads % key_heads or value_heads // key_heads not in HEADS_PER_GROUP:
        return f"{value_heads} value heads on {key_heads} key heads; the kernels serve ratios {', '.join(map(str, HEADS_PER_GROUP))}"
    return None
