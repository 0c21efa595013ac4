"""E2M1 times its block scale, without the global scale: the inner loop of every NVFP4 layer on a CPU.

The product is exact in bfloat16 (two mantissa bits times four), so either output type loses nothing, and the float32
``scale_2`` can be applied to the accumulated result of a matrix product instead of to every weight.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .values import BLOCK, E2M1_VALUES, unpack

# Two lookups (a byte -> its two float32 values moved as one int64; a scale byte -> float32), one multiply in place.
# First quartile of 15 to 20 calls in ms, 2 AVX-512 cores without a bf16 unit and not quite idle, for 1 M / 4 M values.
# Into a buffer that is reused, in chunks:
#   float32:  this 0.8 / 4.7; torch.gather in 64 rows for the first lookup 1.1 / 4.2; one lookup by (scale, byte) in a
#             512 KiB table 1.6 / 5.6
#   bfloat16: this, a float32 chunk then a cast, 1.2 / 4.5; one lookup by (scale, byte) 1.5 / 5.8
# Into a fresh buffer, whole:
#   float32:  this 1.5 / 6.9; with Tensor.to for the scales 1.8 / 7.7; 16-bit words in a 1 MiB table 2.5 / 9.8; F.embedding
#             2.2 / 9.6; torch.take 2.0 / 19; shifts and masks that build fp16 bits 3.4 / 13, fp32 bits 3.9 / 18 (the last
#             before its scale, beyond float32's range, was split in two)
#   bfloat16: bfloat16 pairs and a bfloat16 multiply 2.9 / 16 (eager bfloat16 arithmetic is what costs)
# With 1 thread: 1.2 / 5.5; the lookup is serial inside torch either way.
# A chunk of 2^15 blocks (256 KiB of bytes, 2 MiB of float32) keeps the passes within a core's L2; 2^11 took 2 to 4 times as long.
_CHUNK = 1 << 15


def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 pair of each packed byte, as int64 ``[256]``; float32 value of each scale byte ``[256]``."""
    # Nothing stays on a GPU: see hopper.py.
    pairs, scales = (table.to(device, non_blocking=True) for table in _host_tables())
    return pairs, scales


@cache
def _host_tables() -> tuple[Tensor, Tensor]:
    """:func:`_tables` on the CPU, whatever torch's default device is."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device="cpu")
        values = torch.tensor(E2M1_VALUES, device="cpu")
        pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1).contiguous().view(torch.int64).flatten()
        return pairs, byte.to(torch.uint8).view(torch.float8_e4m3fn).float()


def check_shapes(packed: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless ``packed`` is uint8 ``[..., K/2]`` and ``scale`` float8_e4m3fn ``[..., K/16]`` of the same K."""
    if packed.dtype != torch.uint8 or scale.dtype != torch.float8_e4m3fn:
        raise ValueError(f"packed, scale: found {packed.dtype}, {scale.dtype}; allowed: torch.uint8, torch.float8_e4m3fn")
    if packed.ndim == 0 or packed.shape[:-1] != scale.shape[:-1] or packed.shape[-1] * 2 != scale.shape[-1] * BLOCK:
        raise ValueError(f"packed, scale: found shapes {list(packed.shape)}, {list(scale.shape)}; allowed: [..., K/2], [..., K/16]")


def unscaled(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """``e2m1 * e4m3`` of every weight, exact: ``[..., K]`` in float32 or bfloat16, ``scale_2`` left out.

    ``packed`` uint8 ``[..., K/2]``, ``scale`` float8_e4m3fn ``[..., K/16]``, any leading dimensions (``[N]``, ``[E, N]``).
    ``out``: a contiguous tensor of the result's shape, aligned to 8 bytes, filled and returned; its dtype wins over
    ``dtype``. Reusing one saves the page faults of a fresh buffer. A NaN scale makes its whole block NaN.
    Raises ValueError if dtypes or shapes disagree.
    """
    check_shapes(packed, scale)
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    elif out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out: found {list(out.shape)}, strides {out.stride()}; allowed: a contiguous tensor of shape {list(shape)}")
    if out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out: found {out.dtype}; allowed: torch.float32, torch.bfloat16")

    pairs, scales = _tables(packed.device)
    bytes_, scale_bytes, rows = packed.reshape(-1), scale.view(torch.uint8).reshape(-1), out.view(-1, BLOCK)
    total = scale_bytes.numel()
    chunk = min(_CHUNK, total) if packed.device.type == "cpu" else total
    half = BLOCK // 2
    index = torch.empty(chunk * half, dtype=torch.int32, device=packed.device)
    # bfloat16 goes through a float32 chunk that stays in cache.
    scratch = None if out.dtype == torch.float32 else torch.empty(chunk, BLOCK, device=packed.device)
    for start in range(0, total, chunk or 1):
        end = min(total, start + chunk)
        count = end - start
        values = rows[start:end] if scratch is None else scratch[:count]
        where = index[: count * half].copy_(bytes_[start * half : end * half])
        torch.index_select(pairs, 0, where, out=values.view(torch.int64).view(-1))
        values.mul_(scales.index_select(0, scale_bytes[start:end].int()).unsqueeze(1))
        if scratch is not None:
            rows[start:end].copy_(values)
    return out


# The code of plane p is at bits 15-4p..12-4p of its 16-bit word. Shifted to the top and, with its sign, three bits down, it has
# its sign, exponent and mantissa bits where a float16 has them (a subnormal one where E2M1 has one): its value times 2^-14.
_PLANES = 4
_PLANE_MASK = 0x8E00 - 0x10000
_PLANE_EXPONENT = 14


def to_planes(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The form that :func:`unscaled_planes` reads, 0.625 byte a weight; ``packed`` and ``scale`` as in :func:`unscaled`.

    Returns uint8 ``[..., N/4, 2K]``, where 16 bits hold one code from each quarter of the N rows, so that a few whole-tensor
    operations unpack them in order; and bfloat16 ``[..., N, K/16]``, the scales times 2^14 (exact, and read without a lookup).
    Raises ValueError if dtypes or shapes disagree, or N is not a multiple of 4.
    """
    check_shapes(packed, scale)
    if packed.ndim < 2 or packed.shape[-2] % _PLANES:
        raise ValueError(f"packed: found shape {list(packed.shape)}; allowed: [..., N, K/2] with N a multiple of {_PLANES}")
    first, second, third, fourth = unpack(packed).chunk(_PLANES, dim=-2)
    # Little-endian words.
    words = torch.stack((fourth | (third << 4), second | (first << 4)), dim=-1).flatten(-2)
    return words, (scale.float() * 2.0**_PLANE_EXPONENT).bfloat16()


@cache
def _shifts() -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(0, 16, 4, dtype=torch.int16, device="cpu").view(_PLANES, 1)


def unscaled_planes(words: Tensor, scale: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """:func:`unscaled` of E matrices in the form of :func:`to_planes`: float32 ``out [E, N, K]``, contiguous, filled and returned.

    ``words`` uint8 ``[E, N/4, 2K]`` and ``scale`` bfloat16 ``[E, N, K/16]``, contiguous; ``bits`` int16, as many as ``out``'s
    values, is overwritten. Shapes are not checked. About half the time of :func:`unscaled`, whose lookup
    torch does one byte at a time; 1.4 M values with one AVX-512 core: 0.39 ms beside 0.66 ms.
    """
    codes = bits.view(out.shape[0], _PLANES, -1)
    torch.bitwise_left_shift(words.view(torch.int16).view(out.shape[0], 1, -1), _shifts(), out=codes)
    codes.bitwise_right_shift_(3).bitwise_and_(_PLANE_MASK)
    out.view(codes.shape).copy_(codes.view(torch.float16))
    out.view(-1, BLOCK).mul_(scale.view(-1, 1))
    return out
