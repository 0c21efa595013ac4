"""What the benchmarks share."""

from __future__ import annotations

import gc

import torch


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    torch.cuda.empty_cache()
