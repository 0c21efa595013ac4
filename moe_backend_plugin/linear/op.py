"""The torch operators of one dense NVFP4 layer call, opaque to torch.compile.

``moe_backend_plugin::nvfp4_linear`` runs on a CPU, on the planes of codes that :func:`prepare` makes;
``moe_backend_plugin::nvfp4_linear_packed`` on a Hopper GPU, on the order of :mod:`..nvfp4.hopper`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import PluginError
from ..nvfp4.format import quantize_activations
from ..nvfp4.unscaled import check_shapes, to_planes, unscaled_planes
from .scratch import SCRATCH_VALUES, scratch, scratch_bits

if TYPE_CHECKING:
    from .cuda import Weights

SCHEMA = "nvfp4_linear(Tensor x, Tensor words, Tensor scale, Tensor row_scale, Tensor? bias=None, Tensor? input_scale=None) -> Tensor"
PACKED_SCHEMA = "nvfp4_linear_packed(Tensor x, Tensor packed, Tensor scale_2, int rows, Tensor? bias=None) -> Tensor"

_library = torch.library.Library("moe_backend_plugin", "FRAGMENT")
_library.define(SCHEMA)
_library.define(PACKED_SCHEMA)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16
"""Bytes; the kernels' rows begin at multiples of it."""


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


def _packed(x: Tensor, packed: Tensor, scale_2: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    # A machine without the kernels' compiler still imports this module.
    from .cuda import Weights
    from .cuda import nvfp4_linear as launch

    if x.ndim == 0 or (bias is not None and bias.shape != (rows,)):
        found = f"{list(x.shape)}, {None if bias is None else list(bias.shape)}"
        raise PluginError("x, bias", found, f"[..., K], [{rows}] or none")
    inputs = x.reshape(-1, x.shape[-1])
    if inputs.stride(1) != 1 or inputs.stride(0) * inputs.element_size() % ALIGNMENT or inputs.data_ptr() % ALIGNMENT:
        # Not contiguous(), which leaves what begins at another address where it is.
        inputs = inputs.clone(memory_format=torch.contiguous_format)
    out = torch.empty(inputs.shape[0], rows, dtype=x.dtype, device=x.device)
    launch(inputs, Weights(packed, scale_2), out)
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], rows)


def _packed_fake(x: Tensor, packed: Tensor, scale_2: Tensor, rows: int, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


_library.impl("nvfp4_linear_packed", _packed, "CUDA")
torch.library.register_fake("moe_backend_plugin::nvfp4_linear_packed", _packed_fake, lib=_library)

_packed_op = torch.ops.moe_backend_plugin.nvfp4_linear_packed.default


def nvfp4_linear_packed(x: Tensor, weights: Weights, rows: int, bias: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` on a Hopper GPU, ``x`` bf16 or fp16 ``[..., K]``, with weights from :func:`.cuda.pack`: a new tensor
    ``[..., rows]`` in ``x``'s dtype.

    ``bias`` ``[rows]`` is added to the rounded product, and the sum rounded again. Nothing is allocated but the result, and a copy of
    ``x`` where its rows are not of unit stride and 16-byte aligned. The layer is one that :func:`.cuda.unsupported_reason` lets through
    and that :func:`.cuda.prepare` has seen. Raises PluginError (a ValueError) on shapes that disagree.
    """
    return (_packed if is_eager(x) else _packed_op)(x, *weights, rows, bias)
