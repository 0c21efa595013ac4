"""E2M1 values: the table, two codes a byte, rounding to nearest even."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""Smallest positive E4M3 number (a subnormal)."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code: bit 3 is the sign, bits 2..0 the magnitude in ascending order."""

# Midpoints of neighbouring magnitudes, and whether a tie there goes up (to the even, that is mantissa-0, code).
_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte: uint8 ``[..., K]`` (values 0..15) to uint8 ``[..., K/2]``.

    Raises ValueError if K is odd or the dtype is not uint8. Values above 15 are not checked.
    """
    if codes.dtype != torch.uint8 or codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes: found {codes.dtype} {list(codes.shape)}; allowed: uint8 with an even last dimension")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack`: uint8 ``[..., K/2]`` to uint8 codes ``[..., K]``. Raises ValueError on another dtype."""
    if packed.dtype != torch.uint8 or packed.ndim == 0:
        raise ValueError(f"packed: found {packed.dtype} {list(packed.shape)}; allowed: uint8 of one dimension or more")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes: integer ``[...]`` in 0..15 to ``dtype`` ``[...]`` (exact in every float type of 8 bits or more)."""
    table = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)
    return table[codes.long()]


def encode(x: Tensor) -> Tensor:
    """Nearest E2M1 codes of a float tensor: ``[...]`` to uint8 ``[...]``.

    Ties go to even, magnitudes beyond 6 (infinity too) to 6, NaN to +6 (the type has no NaN; hardware conversions agree).
    A negative number that rounds to zero keeps its sign (code 8), but -0.0 becomes code 0: ModelOpt 0.47 and
    compressed-tensors 0.17 both take the sign from ``x < 0``, and so bytes can be compared with theirs.
    Raises ValueError if ``x`` is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: found {x.dtype}; allowed: a floating-point tensor")
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    mids = torch.tensor([m for m, _ in _MIDPOINTS], dtype=x.dtype)
    # bucketize counts boundaries strictly below |x|; a boundary one ulp lower makes its tie count as above.
    lower = torch.nextafter(mids, torch.zeros_like(mids))
    bounds = torch.where(torch.tensor([up for _, up in _MIDPOINTS]), lower, mids).to(x.device)
    magnitude = torch.bucketize(x.abs(), bounds, out_int32=True).to(torch.uint8)
    return magnitude | ((x < 0).to(torch.uint8) << 3)


def round_e2m1(x: Tensor) -> Tensor:
    """``decode(encode(x))`` for float32 without the codes, and NaN stays NaN: float32 ``[...]`` to float32 ``[...]``."""
    # The grid's step is half the power of two below |x|, and never less than one half.
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp_(1.0, 4.0).mul_(0.5)
    # A NaN's exponent field is infinity, clamped above: the division keeps the NaN.
    return torch.div(x, step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)
