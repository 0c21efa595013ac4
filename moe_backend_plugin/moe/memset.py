"""Zeroes a call's output beside its first projection, for a second projection that adds into it.

The side stream waits for what came before on the main one, the main one for the zeros before it adds: two events, made before any graph
is captured, so that a captured call forks and joins as a call by hand does. All rows are zeroed: any of them may be added to, and one
that no expert here answers has to be zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Memset:
    """One a device: calls on it follow one another. ``zero``: what writes the zeros, on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._side = torch.cuda.Stream(device)
                self._before, self._after = torch.cuda.Event(), torch.cuda.Event()

    def begin(self, out: Tensor, zero: Callable[[Tensor], object] = Tensor.zero_) -> None:
        """Start to zero ``out`` once all that was launched so far is done with it; returns at once."""
        if self.device.type != "cuda":
            zero(out)
            return
        self._before.record()
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._before)
            zero(out)
            self._after.record()

    def end(self) -> None:
        """What is launched from here on sees the zeros."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self._after)


_memsets: dict[torch.device, Memset] = {}


def of(device: torch.device) -> Memset:
    """The device's. Raises RuntimeError if it would have to be made while a graph is captured: call it before."""
    found = _memsets.get(device)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"memset on {device}: found a graph under capture; allowed: making its stream and events before")
        found = _memsets[device] = Memset(device)
    return found
