"""NVFP4 numbers in plain torch: values, packing, two-level scales, quantisation and its inverse.

A tensor ``w [..., N, K]`` is three tensors:

=========  ==============  ================  ===============================================
packed     uint8           ``[..., N, K/2]``   two E2M1 codes a byte, the even column in the low nibble
scale      float8_e4m3fn   ``[..., N, K/16]``  one scale for 16 neighbours along K
scale_2    float32         ``[]`` or ``[...]``     one scale for a matrix (an expert's projection)
=========  ==============  ================  ===============================================

and ``w ~ e2m1 * scale * scale_2``. Rounding is to nearest, ties to even, everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .unscaled import unscaled
from .values import BLOCK, E2M1_MAX, E2M1_VALUES, E4M3_MAX, E4M3_TINY, decode, encode, pack, round_e2m1, unpack

__all__ = [
    "BLOCK",
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "E4M3_TINY",
    "NVFP4Tensor",
    "decode",
    "dequantize",
    "encode",
    "global_scale",
    "pack",
    "quantize",
    "quantize_activations",
    "quantize_reciprocal",
    "round_e2m1",
    "unpack",
    "unscaled",
]


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantised tensor; fields and shapes as in the module's table."""

    packed: Tensor
    scale: Tensor
    scale_2: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor it stands for, ``[..., N, K]``."""
        return torch.Size((*self.packed.shape[:-1], self.packed.shape[-1] * 2))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The values ``[..., N, K]`` in ``dtype``; see :func:`dequantize`."""
        return dequantize(self.packed, self.scale, self.scale_2, dtype)


def _blocks(w: Tensor) -> Tensor:
    if not w.is_floating_point() or w.ndim < 2:
        raise ValueError(f"w: found {w.dtype} {list(w.shape)}; allowed: a floating-point tensor [..., N, K]")
    if w.shape[-1] == 0 or w.shape[-1] % BLOCK:
        raise ValueError(f"w: found K = {w.shape[-1]}; allowed: a positive multiple of {BLOCK}")
    return w.unflatten(-1, (-1, BLOCK))


def global_scale(w: Tensor) -> Tensor:
    """``scale_2`` of ``w [..., N, K]``: float32 ``[...]`` (``[]`` for a matrix), ``amax / (6 * 448)``.

    An all-zero matrix gets 1: ModelOpt's 0 would make its block scales NaN.
    """
    scale_2 = w.abs().amax(dim=(-2, -1)).float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale_2 == 0, 1.0, scale_2)


def quantize(w: Tensor, scale_2: Tensor | float | None = None) -> NVFP4Tensor:
    """Quantise ``w [..., N, K]`` (any float dtype) as ModelOpt's exporter does, bit for bit.

    ``scale_2``: float32 ``[]`` or ``[...]``; computed by :func:`global_scale` when None. Pass it to share one between
    tensors (gate and up). Block scales are ``amax / 6 / scale_2`` rounded to E4M3 within [2^-9, 448], so none is zero;
    a block of zeros gets the scale 1. Values are divided by the rounded scale.
    The one difference from ModelOpt 0.47: an all-zero matrix, for which it writes ``scale_2`` 0 and NaN block scales,
    becomes ``scale_2`` 1, block scales 1 and codes 0.
    Raises ValueError if ``w`` is not floating point or K is not a positive multiple of 16.
    """
    blocks = _blocks(w)
    if scale_2 is None:
        scale_2 = global_scale(w)
    scale_2 = torch.as_tensor(scale_2, dtype=torch.float32, device=w.device)
    per_matrix = scale_2.view(*scale_2.shape, 1, 1)
    scale = blocks.abs().amax(-1).float() / (E2M1_MAX * per_matrix)
    scale = torch.where(scale == 0, 1.0, scale).clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = encode(blocks / (scale.float() * per_matrix).unsqueeze(-1)).flatten(-2)
    return NVFP4Tensor(pack(codes), scale, scale_2)


def quantize_reciprocal(w: Tensor, global_scale: Tensor | None = None) -> tuple[NVFP4Tensor, Tensor]:
    """Quantise ``w [..., N, K]`` as compressed-tensors 0.17 does, bit for bit, and return its ``weight_global_scale`` too.

    Differences from :func:`quantize`: the global scale is the reciprocal ``448 * 6 / amax`` (float32 ``[1]``, or ``[...]``
    with leading dimensions); block maxima are divided by 6, and the global scale formed, in ``w``'s own dtype (bfloat16
    rounds there); block scales that round to zero become 0.125, for blocks of zeros and underflows alike; an all-zero
    matrix gets the global scale 1. The result's ``scale_2`` is the reciprocal of what is returned beside it.
    Raises ValueError as :func:`quantize`.
    """
    blocks = _blocks(w)
    lead = w.shape[:-2]
    if global_scale is None:
        amax = w.abs().amax(dim=(-2, -1)).clamp(min=torch.finfo(w.dtype).tiny)
        global_scale = torch.nan_to_num((E4M3_MAX * E2M1_MAX) / amax, nan=1.0, posinf=1.0, neginf=1.0)
        global_scale = global_scale.float().reshape(lead or (1,))
    per_matrix = global_scale.reshape(*lead, 1, 1)
    scale = ((blocks.abs().amax(-1) / E2M1_MAX) * per_matrix).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, 0.125, scale)
    codes = encode(blocks / (scale / per_matrix).unsqueeze(-1)).flatten(-2)
    scale_2 = (1.0 / global_scale).reshape(lead)
    return NVFP4Tensor(pack(codes), scale.to(torch.float8_e4m3fn), scale_2), global_scale


def dequantize(packed: Tensor, scale: Tensor, scale_2: Tensor | float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values ``[..., N, K]`` in ``dtype``, rounded once: the E2M1 x E4M3 product is exact, ``scale_2`` multiplies in float32.

    ``packed`` uint8 ``[..., N, K/2]``, ``scale`` float8_e4m3fn ``[..., N, K/16]``, ``scale_2`` float32 ``[]``, ``[1]`` or ``[...]``.
    Raises ValueError if dtypes or shapes disagree.
    """
    product = unscaled(packed, scale, torch.float32)
    scale_2 = torch.as_tensor(scale_2, dtype=torch.float32, device=packed.device)
    if scale_2.numel() > 1:
        scale_2 = scale_2.reshape(*scale_2.shape, 1, 1)
    return product.mul_(scale_2).to(dtype)


def quantize_activations(x: Tensor, input_scale: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """What a W4A4 kernel sees of ``x``: quantised to NVFP4 with a static global scale and dequantised again.

    ``x [M, K]`` (any float dtype), ``input_scale`` float32 scalar in ModelOpt's convention (``amax / (6 * 448)``; the
    reciprocal of compressed-tensors' ``input_global_scale``). Returns ``[M, K]`` in ``dtype`` (``x``'s own when None).
    The order of operations is that of the activation kernels: block scale ``amax * (1/6) / input_scale`` saturated at 448
    and rounded to E4M3; a block whose scale rounds to zero becomes zeros (kernels do not raise it as weight exporters do).
    A NaN spreads over its own block of its own row and nowhere else.
    Raises ValueError if ``x`` is not floating point or K is not a positive multiple of 16.
    """
    blocks = _blocks(x).float()
    inverse = 1.0 / torch.as_tensor(input_scale, dtype=torch.float32, device=x.device)
    scale = (blocks.abs().amax(-1) * (1.0 / E2M1_MAX)).mul_(inverse).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    grow = torch.where(scale == 0, 0.0, inverse / scale).unsqueeze(-1)
    # Saturate before rounding: infinity has no grid step. (0 * infinity cannot occur: an infinite block has scale 448.)
    values = round_e2m1((blocks * grow).clamp_(-E2M1_MAX, E2M1_MAX))
    return values.mul_((scale / inverse).unsqueeze(-1)).flatten(-2).to(dtype or x.dtype)
