"""The order of NVFP4 weights that the Hopper kernels stream: values and scales side by side, two integer operations a weight to unpack.

One projection of E experts is uint8 ``[E, RB, KB, 2304]``: units of 64 rows by 64 columns (along K), row blocks outermost. KB is
``ceil(K / 64)``; RB is the number of rows padded to a multiple of 128, over 64. A unit is 4 times 512 bytes of codes, for its four
slices of 16 rows, then 4 times 64 bytes of scales.

**Rows.** With a gate (I gate rows, then I up rows), slice b of 16 rows holds gate rows ``8 b .. 8 b + 7``, then up rows
``8 b .. 8 b + 7``, so that a thread of the tensor core finds gate and up of the same column in one accumulator fragment. Without one,
slice b holds rows ``16 b + 0, 2, 4, .. 14``, then ``16 b + 1, 3, 5, .. 15``: a thread then has two outputs side by side. Rows and
columns beyond the matrix have zero codes.

**Codes.** Lane l of a warp (``g = l // 4``, ``t = l % 4``) reads 16 bytes of a slice: four little-endian words, word s for columns
``16 s .. 16 s + 15``, each with the eight values of its m16n8k16 A fragment (two columns a register, the first in the low half)::

    A0 = row g,     columns 2t, 2t + 1        A2 = row g,     columns 2t + 8, 2t + 9
    A1 = row g + 8, columns 2t, 2t + 1        A3 = row g + 8, columns 2t + 8, 2t + 9

As bf16 bits a code has its sign at bit 15 and its magnitude at bits 8 .. 6, which is its value times 2^-126. The word interleaves
the four registers so that, with ``M = 0x81C081C0``::

    A0 = x & M          A2 = rotr(x, 4) & M
    A1 = (x << 6) & M   A3 = ((x << 2) & 0x00400040) | (rotr(x, 6) & 0x81808180)

**Scales.** 64 bytes a slice: for g = 0 .. 7 the word of row g, then the word of row g + 8, each with the scales of the four column
groups. A scale ``2^e (1 + m / 8)``, E4M3's subnormals normalised, is the byte ``(e + 19) << 3 | m``, e from -9 to 8, and::

    scales 0, 1 = (x & 0x0FF00FF0) | 0x70007000
    scales 2, 3 = (rotr(x, 8) & 0x0FF00FF0) | 0x70007000

are two bf16 each, the scale times 2^116. The product of code and scale is the weight times 2^-10 (:data:`PRODUCT_EXPONENT`), exact in
bf16. A zero scale has no byte: its 16 codes become zero and the byte says 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..errors import PluginError
from .unscaled import check_shapes, unscaled
from .values import BLOCK

ROWS, COLUMNS = 64, 64
"""Rows and columns of a unit."""
CODE_BYTES, SCALE_BYTES = 2048, 256
BYTES = CODE_BYTES + SCALE_BYTES
"""Bytes of a unit."""
ROW_PADDING = 128
"""Rows are padded to a multiple of this."""
PRODUCT_EXPONENT = -10
"""Code times scale, as the kernel multiplies them in bf16, is the weight times two to this power."""

_SLICES = 4
_BYTE_BITS = 0xFF
_NAN = 0x7F
# Words handled at a time: 16 bytes of memory each, and few enough launches to keep a GPU busy.
_CHUNK = 1 << 22


def packed_shape(experts: int, rows: int, columns: int, gated: bool) -> tuple[int, int, int, int]:
    """Shape of a packed projection ``[E, N, K]``: ``(E, RB, KB, BYTES)``; ``rows`` N counts gate and up rows together.

    Raises ValueError unless ``rows`` and ``columns`` are positive multiples of 16.
    """
    if rows <= 0 or rows % BLOCK or columns <= 0 or columns % BLOCK or experts < 0:
        raise PluginError("packed_shape", f"[{experts}, {rows}, {columns}]", f"[E, N, K], N a multiple of {BLOCK}, K of {BLOCK}")
    return experts, -(-rows // ROW_PADDING) * (ROW_PADDING // ROWS), -(-columns // COLUMNS), BYTES


def _rotl(x: int, by: int) -> int:
    return (x << by | x >> 32 - by) & 0xFFFFFFFF


def _canonical(byte: int) -> int:
    """The bf16 bits of the two codes of a byte, the low nibble in the low half."""
    low, high = byte & 15, byte >> 4
    return (low & 8) << 12 | (low & 7) << 6 | (high & 8) << 28 | (high & 7) << 22


def _scale_byte(byte: int) -> int:
    """The layout's byte for an E4M3 byte; NaN and negative numbers, which have none, become the largest."""
    if byte & 0x7F == 0:
        byte = 0x38  # a zero scale is written as 1; its codes are zero
    if byte >= _NAN:
        return _BYTE_BITS
    exponent, mantissa = byte >> 3, byte & 7
    if exponent:
        return exponent - 7 + 19 << 3 | mantissa
    lead = mantissa.bit_length() - 1  # mantissa * 2^-9
    return lead - 9 + 19 << 3 | (mantissa << 3 - lead) & 7


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What each byte adds to a word: int32 ``[4, 256]`` for registers A0 .. A3, int32 ``[4, 256]`` for scales 0 .. 3; and the
    E4M3 byte of each of the layout's scale bytes, uint8 ``[256]``."""
    # 8 KB a call, and nothing that stays on a GPU: engines take what lies there while a model loads for weights, which they give up
    # when they are put to sleep and then load anew.
    code_tables, scale_tables, inverse = (table.to(device, non_blocking=True) for table in _host_tables())
    return code_tables, scale_tables, inverse


@cache
def _host_tables() -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_tables` on the CPU, whatever torch's default device is."""
    canonical = [_canonical(byte) for byte in range(256)]
    codes = [
        canonical,
        [c >> 6 for c in canonical],
        [_rotl(c, 4) for c in canonical],
        [(c & 0x00400040) >> 2 | _rotl(c & 0x81808180, 6) for c in canonical],
    ]
    scale_bytes = [_scale_byte(byte) for byte in range(256)]
    scales = [[_rotl(u, shift) for u in scale_bytes] for shift in (4, 20, 12, 28)]
    inverse = [_NAN] * 256
    for byte in range(1, _NAN):
        inverse[scale_bytes[byte]] = byte
    with torch.inference_mode(False):
        words = torch.tensor([codes, scales], dtype=torch.int64, device="cpu").to(torch.int32)  # wraps: the bits are what counts
        return words[0], words[1], torch.tensor(inverse, dtype=torch.uint8, device="cpu")


def _chunks(experts: int, row_blocks: int, column_blocks: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of experts and row blocks that cover all: ``_CHUNK`` words each, or an eighth of the layer if that is less, and one
    row block at least."""
    words = column_blocks * CODE_BYTES // 4
    most = max(1, min(_CHUNK, experts * row_blocks * words // 8) // words)
    if most >= row_blocks:
        for e in range(0, experts, most // row_blocks):
            yield slice(e, min(experts, e + most // row_blocks)), slice(0, row_blocks)
    else:
        for e in range(experts):
            for r in range(0, row_blocks, most):
                yield slice(e, e + 1), slice(r, min(row_blocks, r + most))


def _pairs(matrix: Tensor, padded: Tensor, blocks: slice, gated: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Views ``(part of the matrix, its place)`` of ``matrix [e, N, X]`` in the row order of the layout.

    ``padded [e, B, 16, X']``, X' >= X, are the slices of the row blocks in ``blocks``. The views have the same shape and leave out
    what is padding.
    """
    first, last = blocks.start * _SLICES, blocks.stop * _SLICES
    if not gated:
        part = matrix[:, first * 16 : last * 16]
        place = padded[:, : part.shape[1] // 16, :, : part.shape[2]]
        # Rows take turns between the slice's halves.
        yield part.unflatten(1, (-1, 8, 2)).transpose(2, 3), place.unflatten(2, (2, 8))
        return
    for half, part in enumerate(matrix.chunk(2, dim=1)):
        part = part[:, first * 8 : last * 8]
        yield part.unflatten(1, (-1, 8)), padded[:, : part.shape[1] // 8, half * 8 : half * 8 + 8, : part.shape[2]]


def _code_registers(padded: Tensor, column_blocks: int) -> list[Tensor]:
    """Views of the code bytes ``[e, B, 16, KB * 32]`` for A0 .. A3, each ``[e, R, KB, slice, g, t, s]``."""
    # e, R, slice, row half, g, KB, s, column half, t
    parts = padded.view(padded.shape[0], -1, _SLICES, 2, 8, column_blocks, 4, 2, 4)
    return [parts[:, :, :, i % 2, :, :, :, i // 2].permute(0, 1, 4, 2, 3, 6, 5) for i in range(4)]


def _scale_groups(padded: Tensor, column_blocks: int) -> list[Tensor]:
    """Views of the scale bytes ``[e, B, 16, KB * 4]`` for groups 0 .. 3, each ``[e, R, KB, slice, g, row half]``."""
    parts = padded.view(padded.shape[0], -1, _SLICES, 2, 8, column_blocks, 4)
    return [parts[..., i].permute(0, 1, 5, 2, 4, 3) for i in range(4)]


def _code_words(units: Tensor) -> Tensor:
    """int32 view ``[e, R, KB, slice, g, t, s]`` of the codes of ``units [e, R, KB, BYTES]``."""
    return units[..., :CODE_BYTES].view(torch.int32).unflatten(-1, (_SLICES, 8, 4, 4))


def _scale_words(units: Tensor) -> Tensor:
    """int32 view ``[e, R, KB, slice, g, row half]`` of the scales of ``units [e, R, KB, BYTES]``."""
    return units[..., CODE_BYTES:].view(torch.int32).unflatten(-1, (_SLICES, 8, 2))


def _assemble(tables: Tensor, parts: list[Tensor], out: Tensor) -> None:
    """``out`` (int32) ``= tables[0][parts[0]] | .. | tables[3][parts[3]]``; the parts are uint8 of ``out``'s shape."""
    index = torch.empty(out.shape, dtype=torch.int32, device=out.device)
    word = None
    for table, part in zip(tables, parts, strict=True):
        found = table.index_select(0, index.copy_(part).view(-1))
        word = found if word is None else word.bitwise_or_(found)
    out.copy_(word.view(out.shape))


def pack(codes: Tensor, scales: Tensor, *, gated: bool, out: Tensor | None = None) -> Tensor:
    """Checkpoint tensors of one projection to the kernels' order, on their device.

    ``codes`` uint8 ``[E, N, K/2]`` (low nibble first), ``scales`` float8_e4m3fn ``[E, N, K/16]``; with ``gated`` the N rows are I gate
    rows, then I up rows. ``out``: a contiguous uint8 tensor of :func:`packed_shape` that shares no memory with the inputs, filled
    and returned; new if None.

    Works in chunks: beyond the result it takes about 100 MB, and for a small layer less than the result takes. Does not synchronise,
    and so does not look at the scales: loading a checkpoint does. A scale that is NaN or negative becomes 7680 here, and NaN in
    :func:`unpack`.
    Raises ValueError if dtypes, shapes or devices disagree.
    """
    check_shapes(codes, scales)
    if codes.ndim != 3:
        raise PluginError("codes", f"shape {list(codes.shape)}", "[E, N, K/2]")
    experts, rows, columns = codes.shape[0], codes.shape[1], codes.shape[2] * 2
    shape = packed_shape(experts, rows, columns, gated)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=codes.device)
    _check_packed("out", out, shape)
    if not codes.device == scales.device == out.device:
        raise PluginError("codes, scales, out", f"{codes.device}, {scales.device}, {out.device}", "one device")

    code_tables, scale_tables, _ = _tables(codes.device)
    scale_bits = scales.view(torch.uint8)
    _, row_blocks, column_blocks, _ = shape
    for e, r in _chunks(experts, row_blocks, column_blocks):
        lead = (e.stop - e.start, (r.stop - r.start) * _SLICES, 16)
        code_bytes = torch.zeros(*lead, column_blocks * COLUMNS // 2, dtype=torch.uint8, device=codes.device)
        scale_bytes = torch.zeros(*lead, column_blocks * COLUMNS // BLOCK, dtype=torch.uint8, device=codes.device)
        for padded, matrix in ((code_bytes, codes), (scale_bytes, scale_bits)):
            for part, place in _pairs(matrix[e], padded, r, gated):
                place.copy_(part)
        # The 16 codes of a block are one int64.
        code_bytes.view(torch.int64).masked_fill_((scale_bytes & 0x7F) == 0, 0)
        units = out[e, r]
        _assemble(code_tables, _code_registers(code_bytes, column_blocks), _code_words(units))
        _assemble(scale_tables, _scale_groups(scale_bytes, column_blocks), _scale_words(units))
    return out


def _check_packed(name: str, packed: Tensor, shape: tuple[int, ...]) -> None:
    if packed.dtype != torch.uint8 or packed.shape != shape or not packed.is_contiguous():
        found = f"{packed.dtype} {list(packed.shape)}, strides {packed.stride()}"
        raise PluginError(name, found, f"a contiguous uint8 tensor of shape {list(shape)}")


def _rotr_words(x: Tensor, by: int) -> Tensor:
    # Right shifts of int32 bring in copies of the sign.
    return (x >> by) & ((1 << 32 - by) - 1) | x << 32 - by


def _signed(mask: int) -> int:
    return mask - (1 << 32) if mask >> 31 else mask


def _registers(words: Tensor) -> Iterator[Tensor]:
    """A0 .. A3 of int32 words, as the kernel takes them out."""
    mask = _signed(0x81C081C0)
    yield words & mask
    yield (words << 6) & mask
    yield _rotr_words(words, 4) & mask
    yield (words << 2) & 0x00400040 | _rotr_words(words, 6) & _signed(0x81808180)


def unpack(packed: Tensor, rows: int, columns: int, gated: bool) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack`: codes uint8 ``[E, rows, columns/2]`` and scales float8_e4m3fn ``[E, rows, columns/16]``.

    Exact, but for blocks whose scale was zero: they come back with scale 1 and codes 0. ``packed`` is contiguous.
    Raises ValueError if its shape is not the one ``rows`` and ``columns`` need.
    """
    shape = packed_shape(packed.shape[0] if packed.ndim == 4 else 0, rows, columns, gated)
    _check_packed("packed", packed, shape)
    experts, row_blocks, column_blocks, _ = shape
    device = packed.device
    codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=device)
    scale_bits = torch.empty(experts, rows, columns // BLOCK, dtype=torch.uint8, device=device)
    inverse = _tables(device)[2]
    for e, r in _chunks(experts, row_blocks, column_blocks):
        units = packed[e, r]
        lead = (e.stop - e.start, (r.stop - r.start) * _SLICES, 16)
        code_bytes = torch.empty(*lead, column_blocks * COLUMNS // 2, dtype=torch.uint8, device=device)
        scale_bytes = torch.empty(*lead, column_blocks * COLUMNS // BLOCK, dtype=torch.uint8, device=device)
        for register, place in zip(_registers(_code_words(units)), _code_registers(code_bytes, column_blocks), strict=True):
            place.copy_((register >> 6) & 7 | (register >> 12) & 8 | (register >> 18) & 0x70 | (register >> 24) & 0x80)
        words = _scale_words(units)
        for shift, place in zip((4, 20, 12, 28), _scale_groups(scale_bytes, column_blocks), strict=True):
            u = _rotr_words(words, shift) & _BYTE_BITS
            place.copy_(inverse.index_select(0, u.flatten()).view(u.shape))
        for padded, matrix in ((code_bytes, codes), (scale_bytes, scale_bits)):
            for part, place in _pairs(matrix[e], padded, r, gated):
                part.copy_(place)
    return codes, scale_bits.view(torch.float8_e4m3fn)


def dequantise(packed: Tensor, rows: int, columns: int, gated: bool) -> Tensor:
    """The weights without their ``scale_2``: float32 ``[E, rows, columns]`` in checkpoint order. Raises ValueError as :func:`unpack`."""
    return unscaled(*unpack(packed, rows, columns, gated))
