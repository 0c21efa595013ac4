"""When an output is right: how far it may lie from the reference's."""

from __future__ import annotations

import math

from torch import Tensor

W4A16, W4A4 = (4e-3, 3e-2), (5e-2, 2e-1)
"""Largest relative errors in the norm: of all rows, and of any single one. A kernel may divide approximately, and a value that lies between
two of E2M1's then goes to the other, a third away, so W4A4 has wider ones; a layout, scale or row that is wrong is off by far more."""

Found = tuple[str | None, float, float]
"""Why an output is wrong, or None; the largest error of an element; the relative error of all in the norm."""


def compare(out: Tensor, right: Tensor, bounds: tuple[float, float], rows: Tensor | None = None) -> Found:
    """What is wrong with ``out`` [M, H] beside ``right`` float32 [M, H], or [R, H] of ``rows`` (int64 [R]) alone.

    All of ``out`` has to be finite; both errors are NaN if it is not.
    """
    if bad := int((~out.isfinite()).sum()):
        return f"not finite: {bad} of {out.numel()} values", math.nan, math.nan
    error, norm = (out if rows is None else out[rows]).float() - right, right.norm(dim=1)
    typical = norm.square().mean().sqrt().clamp_min(1e-30)
    relative = float(error.norm() / right.norm().clamp_min(1e-30))
    worst = float((error.norm(dim=1) / norm.clamp_min(0.1 * typical)).max())
    if relative <= bounds[0] and worst <= bounds[1]:
        return None, float(error.abs().max()), relative
    found = f"wrong: relative error {relative:.1e}, of the worst row {worst:.1e}; allowed {bounds[0]:.0e}, {bounds[1]:.0e}"
    return found, float(error.abs().max()), relative
