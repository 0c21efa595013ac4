"""The torch operator ``moe_backend_plugin::nvfp4_linear``: one dense NVFP4 layer, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nvfp4.format import quantize_activations
from ..nvfp4.unscaled import unscaled
from .reference import check
from .scratch import SCRATCH_VALUES, scratch

SCHEMA = "nvfp4_linear(Tensor x, Tensor packed, Tensor scale, Tensor row_scale, Tensor? bias=None, Tensor? input_scale=None) -> Tensor"

_library = torch.library.Library("moe_backend_plugin", "FRAGMENT")
_library.define(SCHEMA)


def _cpu(
    x: Tensor, packed: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    check(x, packed, scale, row_scale, bias)
    rows, columns = packed.shape[0], packed.shape[1] * 2
    inputs = x.reshape(-1, columns).float()
    if input_scale is not None:
        inputs = quantize_activations(inputs, input_scale)
    out = torch.empty(inputs.shape[0], rows)
    step = max(1, SCRATCH_VALUES // columns)
    for first in range(0, rows, step):
        part = packed[first : first + step]
        w = unscaled(part, scale[first : first + step], out=scratch(part.numel() * 2).view(-1, columns))
        torch.mm(inputs, w.t(), out=out[:, first : first + step])
    if bias is None:
        out.mul_(row_scale)
    else:
        torch.addcmul(bias.float(), out, row_scale.float(), out=out)
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def _fake(x: Tensor, packed: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


_library.impl("nvfp4_linear", _cpu, "CPU")
torch.library.register_fake("moe_backend_plugin::nvfp4_linear", _fake, lib=_library)

_op = torch.ops.moe_backend_plugin.nvfp4_linear.default


def nvfp4_linear(
    x: Tensor, packed: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
) -> Tensor:
    """``x @ w.T + bias``; arguments, precision and errors are those of :func:`.reference.nvfp4_linear`. Returns a new tensor."""
    return _op(x, packed, scale, row_scale, bias, input_scale)
