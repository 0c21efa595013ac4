"""Triton kernels of ``grouped_gemm.py``, bound by memory: weights from NVFP4 to bf16, the activation, and the sum over a token's experts.

Each function has a twin of the same name in plain torch there, which says what it computes. Sizes are constants of a kernel, so that
divisions are multiplications and rows are known to be aligned.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor, int32

from moe_backend_plugin.moe.problem import Activation

THREADS, WORDS = 128, 4
"""Of a block that dequantises: each thread takes four words of eight codes, 16 bytes."""
COLUMNS = 1024
"""Of a block that combines: 16 bytes a thread a row."""


@triton.jit
def _spread(word, scale, out, at):
    """Eight weights of each word, the lowest bits first."""
    code = word[:, None] >> (4 * tl.arange(0, 8))[None, :]
    # Sign, exponent and mantissa where fp16 has them: the value times 2^-14, also where E2M1 and fp16 have no leading one.
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(out + at.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :], value.to(tl.bfloat16))


@triton.jit
def _dequantise(codes, scales, scale_2, out, BLOCKS_A_SCALE: tl.constexpr, THREADS: tl.constexpr):
    # Stores are four fifths of the bytes. Neighbouring threads take neighbouring words, so a warp stores 512 bytes in one piece and
    # loads 128; a thread that took 16 bytes in a row would store in four pieces 64 bytes apart. All loads are asked for before the
    # first store, which the compiler may not do by itself: out might be the same memory.
    block = tl.program_id(0)
    first = block * (4 * THREADS) + tl.arange(0, THREADS)
    second, third, fourth = first + THREADS, first + 2 * THREADS, first + 3 * THREADS
    words_1, words_2, words_3, words_4 = tl.load(codes + first), tl.load(codes + second), tl.load(codes + third), tl.load(codes + fourth)
    scales_1, scales_2 = tl.load(scales + first // 2), tl.load(scales + second // 2)
    scales_3, scales_4 = tl.load(scales + third // 2), tl.load(scales + fourth // 2)
    whole = tl.load(scale_2 + block // BLOCKS_A_SCALE) * 16384.0
    _spread(words_1, scales_1.to(tl.float32) * whole, out, first)
    _spread(words_2, scales_2.to(tl.float32) * whole, out, second)
    _spread(words_3, scales_3.to(tl.float32) * whole, out, third)
    _spread(words_4, scales_4.to(tl.float32) * whole, out, fourth)


@triton.jit
def _activate(both, out, alpha, beta, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(both + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gate, up = tl.minimum(gate, limit), tl.maximum(tl.minimum(up, limit), -limit)
    value = gate / (1.0 + tl.exp(-alpha * gate)) * (up + beta)
    tl.store(out + row * WIDTH + column, value.to(tl.bfloat16), mask=inside)


@triton.jit
def _combine(y, position, weights, out, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for slot in tl.static_range(TOP_K):
        place = tl.load(position + token * TOP_K + slot).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + slot)
        here = column < tl.where(place >= 0, HIDDEN, 0)
        total += weight * tl.load(y + place * HIDDEN + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + column, total.to(tl.bfloat16), mask=inside)


def dequantise(packed: Tensor, scale: Tensor, scale_2: Tensor, out: Tensor) -> Tensor:
    blocks, rest = divmod(out.numel() // 8, THREADS * WORDS)
    blocks_a_scale, uneven = divmod(blocks, scale_2.numel())
    if rest or uneven:
        raise ValueError(f"out: found {list(out.shape)}; allowed: a multiple of {8 * THREADS * WORDS} weights for each global scale")
    _dequantise[(blocks,)](packed.view(int32), scale, scale_2, out, blocks_a_scale, THREADS, num_warps=THREADS // 32)
    return out


def activate(both: Tensor, activation: Activation, out: Tensor) -> Tensor:
    rows, width = out.shape
    limit = math.inf if activation.limit is None else activation.limit
    if rows:
        block = triton.next_power_of_2(width)
        warps = max(1, min(8, block // 256))  # 16 bytes a thread a load
        _activate[(rows,)](both, out, activation.alpha, activation.beta, limit, width, block, num_warps=warps)
    return out


def combine(y: Tensor, position: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    tokens, hidden = out.shape
    _combine[(tokens, triton.cdiv(hidden, COLUMNS))](y, position, weights, out, position.shape[1], hidden, COLUMNS)
    return out
