"""A dense NVFP4 layer as its formula says: the truth that faster implementations are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PluginError
from ..nvfp4.format import quantize_activations
from ..nvfp4.unscaled import check_shapes, unscaled


def nvfp4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    row_scale: Tensor | float,
    bias: Tensor | None = None,
    input_scale: Tensor | float | None = None,
) -> Tensor:
    """``x @ w.T + bias`` with ``w = e2m1 * scale * row_scale``.

    ``x`` bf16/fp16/fp32 ``[..., K]``, ``packed`` uint8 ``[N, K/2]``, ``scale`` float8_e4m3fn ``[N, K/16]``, ``row_scale``
    float32 ``[N]`` or a scalar: the global scale of each output row (the parts of a fused layer may differ), ``bias``
    ``[N]``. ``input_scale``, a float32 scalar in ModelOpt's convention (amax / (6 * 448)), rounds ``x`` to NVFP4 first (W4A4).
    Returns ``[..., N]`` in ``x``'s dtype.

    Block-scaled weights are exact; products are summed, scaled and biased in float32 and rounded once.
    NaN in a row of ``x`` stays in that row. Raises PluginError (a ValueError) if shapes or dtypes disagree.
    """
    check(x, packed, scale, row_scale, bias)
    inputs = x.reshape(-1, x.shape[-1]).float()
    if input_scale is not None:
        inputs = quantize_activations(inputs, input_scale)
    out = (inputs @ unscaled(packed, scale).t()) * row_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], packed.shape[0])


def check(x: Tensor, packed: Tensor, scale: Tensor, row_scale: Tensor | float, bias: Tensor | None) -> None:
    """Raise PluginError (or format's ValueError) unless the arguments fit together; shapes as in :func:`nvfp4_linear`."""
    check_shapes(packed, scale)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise PluginError("x", str(x.dtype), "bfloat16, float16, float32")
    if packed.ndim != 2 or x.ndim == 0 or packed.shape[1] * 2 != x.shape[-1]:
        raise PluginError("x, packed", f"{list(x.shape)}, {list(packed.shape)}", "[..., K], [N, K/2]")
    rows = packed.shape[0]
    if isinstance(row_scale, Tensor) and (row_scale.ndim > 1 or row_scale.numel() not in (1, rows)):
        raise PluginError("row_scale", str(list(row_scale.shape)), f"[{rows}], or one value")
    if bias is not None and bias.shape != (rows,):
        raise PluginError("bias", str(list(bias.shape)), f"[{rows}]")
