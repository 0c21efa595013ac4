"""Where weights are dequantised on a CPU: two small buffers a thread, used again by every layer."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SCRATCH_VALUES = 1 << 20
"""float32 values of the buffer (4 MiB): what is dequantised at a time, whatever the size of the layer or the model.

Two runs with one AVX-512 core of 1.25 MiB L2 on a shared machine, fastest call in ms, 8 tokens:

=============================================  ==========  ==========  ==========  ==========  ==========
layer                                          0.5 MiB     1 MiB       2 MiB       4 MiB       32 MiB
=============================================  ==========  ==========  ==========  ==========  ==========
hidden 256, 14 experts of width 128            3.4 to 3.7  2.8 to 3.1  2.8 to 2.9  2.6 to 3.0  2.6 to 2.7
hidden 2048, 15 experts of width 768           110 to 118  102 to 109  96 to 105   108 to 117  116 to 142
=============================================  ==========  ==========  ==========  ==========  ==========

Past the cache the product reads from further away what was just written; with less, the number of calls costs. At 4 MiB all
active experts of a small layer fit at once, which saves the calls of a second chunk.
"""

_local = threading.local()


def scratch(count: int) -> Tensor:
    """Uninitialised float32 ``[count]``, valid until this thread's next call.

    A view of the thread's buffer up to ``SCRATCH_VALUES``; beyond that a tensor of its own, freed with its last use.
    """
    return _buffer("values", count, torch.float32)


def scratch_bits(count: int) -> Tensor:
    """As :func:`scratch`, int16, in a buffer of its own (2 MiB): the step between packed weights and float32."""
    return _buffer("bits", count, torch.int16)


def _buffer(name: str, count: int, dtype: torch.dtype) -> Tensor:
    if count > SCRATCH_VALUES:
        return torch.empty(count, dtype=dtype)
    buffer = getattr(_local, name, None)
    if buffer is None:
        # A buffer made in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            buffer = torch.empty(SCRATCH_VALUES, dtype=dtype)
        setattr(_local, name, buffer)
    return buffer[:count]
