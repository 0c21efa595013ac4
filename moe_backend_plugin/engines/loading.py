"""Weights on their way in: every tensor is checked by its checkpoint name before it lands in a parameter.

A local checkpoint has been checked as a whole before (:func:`moe_backend_plugin.nvfp4.checkpoint.check_checkpoint`);
these checks also cover a checkpoint that is downloaded while the engine starts, and a loader that skips a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from ..errors import CheckpointError
from ..kernels.compile import name_of

E4M3_NAN = 0x7F
SCALE_ALLOWED = "finite float8_e4m3fn values >= 0"
GLOBAL_ALLOWED = "a finite positive float32"
WEIGHT_ALLOWED = "a uint8 tensor of packed NVFP4 values"
MISSING = "no such tensor in the checkpoint"


def checked(loader: Callable, where: Callable[..., str], on_load: Callable[..., None]) -> Callable:
    """Wrap a weight loader of an engine: refuse a tensor of another dtype, and note what was loaded.

    The engines' loaders copy into the parameter, which converts silently: bf16 weights would become garbage bytes.

    Args:
        loader: the engine's ``weight_loader(param, loaded_weight, ...)``.
        where: gives the checkpoint name of the tensor from the loader's remaining arguments.
        on_load: called with the same arguments after each tensor.
    """

    @functools.wraps(loader)
    def load(param: torch.Tensor, loaded_weight: torch.Tensor, *args, **kwargs):
        if loaded_weight.dtype != param.dtype:
            raise CheckpointError(where(*args, **kwargs), f"dtype {name_of(loaded_weight.dtype)}", name_of(param.dtype))
        result = loader(param, loaded_weight, *args, **kwargs)
        on_load(*args, **kwargs)
        return result

    return load


def nan_filled(shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
    """A scale that says "never loaded" until it is."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    if dtype is torch.float8_e4m3fn:
        tensor.view(torch.uint8).fill_(E4M3_NAN)
    else:
        tensor.fill_(float("nan"))
    return tensor


def check_block_scales(scales: torch.Tensor, name: Callable[[int, int], str]) -> None:
    """Refuse NaN and negative block scales.

    Args:
        scales: float8_e4m3fn [E, rows, blocks] (E = 1 for a dense layer).
        name: checkpoint name from (expert, row).
    """
    raw = scales.view(torch.uint8)
    bad = raw >= E4M3_NAN  # 0x7F is NaN, everything above has the sign bit
    if not bad.any():
        return
    expert, row, column = torch.nonzero(bad)[0].tolist()
    value = int(raw[expert, row, column])
    found = "NaN, or the tensor is missing" if value & 0x7F == E4M3_NAN else "a negative scale"
    raise CheckpointError(name(expert, row), f"{found} (row {row}, block {column})", SCALE_ALLOWED)


def check_global_scales(scales: torch.Tensor, name: Callable[..., str]) -> None:
    """Refuse global scales that are missing, not finite or not positive.

    Args:
        scales: float32 of any shape.
        name: checkpoint name from the index of the scale.
    """
    bad = ~(torch.isfinite(scales) & (scales > 0))
    if not bad.any():
        return
    index = torch.nonzero(bad)[0].tolist()
    value = float(scales[tuple(index)])
    found = "NaN, or the tensor is missing" if value != value else f"{value:g}"
    raise CheckpointError(name(*index), found, GLOBAL_ALLOWED)
