"""Where weights are dequantised on a CPU: one small float32 buffer a thread, used again by every layer."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

SCRATCH_VALUES = 1 << 20
"""float32 values of the buffer (4 MiB): what is dequantised at a time, whatever the size of the layer or the model.

Measured on 2 cores with 1.25 MiB of L2 each: 1 to 4 MiB are alike, 32 MiB is slower (the product then reads from memory
what the dequantisation just wrote there), and below 1 MiB the calls themselves cost.
"""

_local = threading.local()


def scratch(count: int) -> Tensor:
    """Uninitialised float32 ``[count]``, valid until this thread's next call.

    A view of the thread's buffer up to ``SCRATCH_VALUES``; beyond that a tensor of its own, freed with its last use.
    """
    if count > SCRATCH_VALUES:
        return torch.empty(count)
    buffer = getattr(_local, "buffer", None)
    if buffer is None:
        # A buffer made in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            buffer = _local.buffer = torch.empty(SCRATCH_VALUES)
    return buffer[:count]
