"""An NVFP4 projection's weights and block scales, in the memory that the Hopper kernels' order of them will take, and back again."""

from __future__ import annotations

import math

import torch

from ..nvfp4 import hopper
from ..nvfp4.format import BLOCK
from .loading import E4M3_NAN

_PART_BYTES = 256 << 20


def allocate(experts: int, rows: int, columns: int, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [E, N, K/2] and scales float8_e4m3fn [E, N, K/16], all NaN, in the memory that the packed projection will take.

    Buffers of the checkpoint's sizes, freed layer by layer, would leave holes that packed projections do not fit into.
    """
    memory = torch.empty(math.prod(hopper.packed_shape(experts, rows, columns, gated)), dtype=torch.uint8)
    values = experts * rows * columns
    codes = memory[: values // 2].view(experts, rows, columns // 2)
    scales = memory[values // 2 : values // 2 + values // BLOCK].fill_(E4M3_NAN)
    return codes, scales.view(torch.float8_e4m3fn).view(experts, rows, columns // BLOCK)


def rearrange(codes: torch.Tensor, scales: torch.Tensor, *, gated: bool, interleaved: bool = False) -> torch.Tensor:
    """A checkpoint's projection in the kernels' order: uint8 of ``hopper.packed_shape``, in place of tensors from :func:`allocate`.

    ``gated``: the rows are gates, then ups; with ``interleaved`` they alternate. Beyond the result this takes the scales once more
    and some experts' weights, 256 MiB or one expert if that is more. Tensors from elsewhere (moved, to offload them) stay whole.
    """
    experts, rows, half = codes.shape
    shape = hopper.packed_shape(experts, rows, half * 2, gated)
    memory = codes.untyped_storage()
    if memory.data_ptr() == scales.untyped_storage().data_ptr() and memory.nbytes() == math.prod(shape):
        packed = torch.empty(0, dtype=torch.uint8, device=codes.device).set_(memory, 0, shape)
        scales = scales.clone()
    else:
        packed = torch.empty(shape, dtype=torch.uint8, device=codes.device)
    step = max(1, _PART_BYTES // math.prod(shape[1:]))
    # A packed expert is no smaller than its codes: from the last one on, each lands on codes that have been read.
    for first in reversed(range(0, experts, step)):
        part_codes, part_scales = codes[first : first + step], scales[first : first + step]
        if interleaved:
            part_codes = _halves(part_codes)
            part_scales = _halves(part_scales.view(torch.uint8)).view(scales.dtype)
        packed[first : first + step] = hopper.pack(part_codes, part_scales, gated=gated)
    return packed


def restore(packed: torch.Tensor, rows: int, columns: int, *, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`rearrange`: codes and scales as :func:`allocate` lays them out, in the memory of ``packed``.

    What is rearranged from them lies where ``packed`` lay, so that graphs which hold its address stay valid. Gate and up rows come
    back in halves. A block whose scale was zero comes back with scale 1 and codes 0. Beyond ``packed`` this takes the scales once
    more and some experts' weights.
    """
    experts = packed.shape[0]
    memory = packed.view(-1)
    values = experts * rows * columns
    codes = memory[: values // 2].view(experts, rows, columns // 2)
    scales = torch.empty(experts, rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=packed.device)
    step = max(1, _PART_BYTES // (packed[0].numel() or 1))
    # An expert's codes end before its packed form does: from the first one on, each lands on units that have been read.
    for first in range(0, experts, step):
        part = slice(first, first + step)
        part_codes, part_scales = hopper.unpack(packed[part], rows, columns, gated)
        codes[part], scales.view(torch.uint8)[part] = part_codes, part_scales.view(torch.uint8)
    place = memory[values // 2 : values // 2 + values // BLOCK].view(experts, rows, columns // BLOCK)
    place.copy_(scales.view(torch.uint8))
    return codes, place.view(torch.float8_e4m3fn)


def _halves(rows: torch.Tensor) -> torch.Tensor:
    """[E, N, X] with rows of two kinds that alternate -> the first kind, then the second."""
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)
