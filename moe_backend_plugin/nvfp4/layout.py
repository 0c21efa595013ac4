"""Orders of block scales and of fused rows that kernels want, and their inverses.

Tensor-core kernels (cuBLAS, CUTLASS, FlashInfer) read block scales in tiles of 128 rows by 4 columns: a 512-byte tile holds,
for each of 32 lanes, the 4 columns of rows ``lane``, ``lane + 32``, ``lane + 64`` and ``lane + 96``. With rows padded to
128 and columns to 4, entry ``(r, c)`` lies at

    ((r // 128) * (columns / 4) + c // 4) * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, COLUMNS, LANES = 128, 4, 32


def padded_scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of a swizzled scale matrix: rows rounded up to 128, columns to 4."""
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


def swizzle_scales(scale: Tensor) -> Tensor:
    """Block scales ``[N, G]`` or ``[E, N, G]`` (one-byte dtype) to the tiled order, ``[..., N', G']`` padded with zero bytes.

    The result keeps the padded matrix shape and the dtype; only its bytes are in tile order.
    Raises ValueError on another rank or an element size other than one byte.
    """
    if scale.ndim not in (2, 3) or scale.element_size() != 1:
        raise ValueError(f"scale: found {scale.dtype} {list(scale.shape)}; allowed: a one-byte dtype, [N, G] or [E, N, G]")
    raw = scale.view(torch.uint8)
    lead, (rows, columns) = raw.shape[:-2], raw.shape[-2:]
    rows_padded, columns_padded = padded_scale_shape(rows, columns)
    if (rows_padded, columns_padded) != (rows, columns):
        raw = torch.nn.functional.pad(raw, (0, columns_padded - columns, 0, rows_padded - rows))
    tiles = raw.reshape(*lead, rows_padded // ROWS, ROWS // LANES, LANES, columns_padded // COLUMNS, COLUMNS)
    tiles = tiles.movedim(-2, -4).transpose(-2, -3)  # tile row, tile column, lane, row group, column
    return tiles.reshape(*lead, rows_padded, columns_padded).contiguous().view(scale.dtype)


def unswizzle_scales(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`swizzle_scales`: ``[..., N', G']`` in tile order to ``[..., rows, columns]``, padding dropped.

    Raises ValueError if the padded shape is not the one ``rows`` and ``columns`` need.
    """
    padded = padded_scale_shape(rows, columns)
    if scale.ndim not in (2, 3) or scale.element_size() != 1 or tuple(scale.shape[-2:]) != padded:
        raise ValueError(f"scale: found {scale.dtype} {list(scale.shape)}; allowed: a one-byte dtype, [..., {padded[0]}, {padded[1]}]")
    lead = scale.shape[:-2]
    tiles = scale.view(torch.uint8).reshape(*lead, padded[0] // ROWS, padded[1] // COLUMNS, LANES, ROWS // LANES, COLUMNS)
    tiles = tiles.transpose(-2, -3).movedim(-4, -2)  # tile row, row group, lane, tile column, column
    return tiles.reshape(*lead, *padded)[..., :rows, :columns].contiguous().view(scale.dtype)


def interleave_gate_up(w13: Tensor, group: int = 1) -> Tensor:
    """Rows ``gate..., up...`` to alternating groups of ``group`` gate and ``group`` up rows: ``[..., 2I, X]``, same shape.

    Works on packed weights and on unswizzled scales alike. Raises ValueError unless the row count is a multiple of ``2 * group``.
    """
    rows = w13.shape[-2] if w13.ndim >= 2 else 0
    if rows == 0 or rows % (2 * group):
        raise ValueError(f"w13: found shape {list(w13.shape)}; allowed: [..., 2I, X] with I a multiple of {group}")
    return w13.unflatten(-2, (2, -1, group)).transpose(-3, -4).flatten(-4, -2).contiguous()


def split_gate_up(w13: Tensor, group: int = 1) -> Tensor:
    """Inverse of :func:`interleave_gate_up`. Raises ValueError as it does."""
    rows = w13.shape[-2] if w13.ndim >= 2 else 0
    if rows == 0 or rows % (2 * group):
        raise ValueError(f"w13: found shape {list(w13.shape)}; allowed: [..., 2I, X] with I a multiple of {group}")
    return w13.unflatten(-2, (-1, 2, group)).transpose(-3, -4).flatten(-4, -2).contiguous()
