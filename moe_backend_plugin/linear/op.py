"""The torch operator ``moe_backend_plugin::nvfp4_linear``: one dense NVFP4 layer, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import PluginError
from ..nvfp4.format import quantize_activations
from ..nvfp4.unscaled import check_shapes, to_planes, unscaled_planes
from .scratch import SCRATCH_VALUES, scratch, scratch_bits

SCHEMA = "nvfp4_linear(Tensor x, Tensor words, Tensor scale, Tensor row_scale, Tensor? bias=None, Tensor? input_scale=None) -> Tensor"

_library = torch.library.Library("moe_backend_plugin", "FRAGMENT")
_library.define(SCHEMA)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def prepare(packed: Tensor, scale: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A checkpoint's weights, once, for many calls of :func:`nvfp4_linear`; arguments as :func:`.reference.nvfp4_linear`'s.

    Returns ``words`` and ``scale`` as :func:`..nvfp4.unscaled.to_planes` does, the N rows padded to a multiple of four with
    zeros, and ``row_scale`` float32 ``[N]`` (one value becomes N). Raises PluginError or ValueError if they do not fit together.
    """
    check_shapes(packed, scale)
    rows = packed.shape[0]
    if packed.ndim != 2:
        raise PluginError("packed", str(list(packed.shape)), "[N, K/2]")
    if row_scale.ndim > 1 or row_scale.numel() not in (1, rows):
        raise PluginError("row_scale", str(list(row_scale.shape)), f"[{rows}], or one value")
    missing = (0, 0, 0, -rows % 4)
    words, scale = to_planes(pad(packed, missing), pad(scale.view(torch.uint8), missing).view(scale.dtype))
    return words, scale, row_scale.float().expand(rows).contiguous()


def _cpu(
    x: Tensor, words: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    (quarter, columns), rows, dtype = words.shape, row_scale.shape[0], x.dtype
    columns //= 2
    if x.ndim == 0 or x.shape[-1] != columns or dtype not in _FLOATS:
        raise PluginError("x", f"{dtype} {list(x.shape)}", f"bfloat16, float16 or float32 [..., {columns}]")
    if bias is not None and bias.shape != (rows,):
        raise PluginError("bias", str(list(bias.shape)), f"[{rows}]")
    inputs = x.reshape(-1, columns).float()
    if input_scale is not None:
        inputs = quantize_activations(inputs, input_scale)
    count = 4 * quarter * columns
    if count <= SCRATCH_VALUES:
        w = unscaled_planes(words, scale, scratch_bits(count), scratch(count).view(1, -1, columns))
        out = torch.mm(inputs, w[0].t())
    else:
        out = project_by_rows(inputs, words, scale)
    if rows % 4:
        out = out[:, :rows].contiguous()
    if bias is None:
        out.mul_(row_scale)
    else:
        out = torch.addcmul(bias.float(), out, row_scale)
    return out.to(dtype).view(*x.shape[:-1], rows)


def project_by_rows(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """``x [M, K] @ w.T``, float32 ``[M, N]``, of one matrix that is larger than the scratch buffer, a few rows at a time."""
    quarter, columns = words.shape[0], words.shape[1] // 2
    scale = scale.view(4, quarter, -1)
    out = torch.empty(x.shape[0], 4, quarter)
    step = max(1, SCRATCH_VALUES // (4 * columns))
    for first in range(0, quarter, step):
        part = words[first : first + step]
        count = 4 * part.shape[0] * columns
        part_scale = scale[:, first : first + step].contiguous()
        w = unscaled_planes(part, part_scale, scratch_bits(count), scratch(count).view(1, -1, columns))
        out[:, :, first : first + step] = torch.mm(x, w[0].t()).view(x.shape[0], 4, -1)
    return out.view(x.shape[0], -1)


def _fake(x: Tensor, words: Tensor, scale: Tensor, row_scale: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


_library.impl("nvfp4_linear", _cpu, "CPU")
torch.library.register_fake("moe_backend_plugin::nvfp4_linear", _fake, lib=_library)

_op = torch.ops.moe_backend_plugin.nvfp4_linear.default


def is_eager(x: Tensor) -> bool:
    """Whether an op may call its function itself: through torch's dispatcher a small layer costs a tenth more."""
    return type(x) is Tensor and not x.requires_grad and not torch.compiler.is_compiling()


def nvfp4_linear(
    x: Tensor, words: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """``x @ w.T + bias`` with the weights that :func:`prepare` returned.

    The other arguments, precision and errors are those of :func:`.reference.nvfp4_linear`. Returns a new tensor.
    """
    return (_cpu if is_eager(x) else _op)(x, words, scale, row_scale, bias, input_scale)
