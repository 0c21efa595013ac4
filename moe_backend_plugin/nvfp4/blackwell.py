"""NVFP4 experts as FlashInfer's CuTe DSL MoE kernels read them on a Blackwell GPU: rows, block scales, and scales of whole tensors.

Source of the conventions: FlashInfer 0.7.0 and 0.7.2, ``fused_moe/cute_dsl``. A tile of the first projection's output must hold gate and
up of the same columns, so rows come in groups of 64: up, gate, up, gate. Block scales lie in the tiled order of :mod:`.layout`. A kernel
multiplies its sums with one float32 number an expert (alpha) and rounds its own output with one number for all of them, while a
checkpoint has a scale for gate and another for up, and one for each expert's input; :func:`resolve` makes the former of the latter.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import PluginError
from .layout import COLUMNS, LANES, ROWS, interleave_gate_up, split_gate_up, swizzle_scales, unswizzle_scales
from .values import BLOCK, E2M1_MAX, E4M3_MAX

GROUP = 64
"""Rows of up, then as many of gate."""
TOKEN_SCALE = 1.0 / (E2M1_MAX * E4M3_MAX)
"""With a scale a token: that scale over the token's largest magnitude."""
ActivationScales = Literal["static", "token"]


def padded_width(intermediate: int, gated: bool) -> int:
    """Expert width as the kernels take it: with a gate a multiple of 64, without one of 128 (the first projection's rows in full tiles)."""
    step = GROUP if gated else ROWS
    return -(-intermediate // step) * step


def pack_first(codes: Tensor, scale: Tensor, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The first projection: codes uint8 [E, R, H/2] and scales float8_e4m3fn [E, R, H/16] (R = 2I, gate then up; I without a gate).

    Returns codes uint8 [E, R', H/2] and scales float8_e4m3fn [E, R', H/16 padded to 4], tiled, with I padded by rows of zeros to
    :func:`padded_width`. Raises ValueError on shapes that disagree.
    """
    _check(codes, scale)
    rows = codes.shape[1]
    width = rows // 2 if gated else rows
    more = padded_width(width, gated) - width
    if gated:
        codes, scale = (_pad_rows(torch.cat((t[:, width:], t[:, :width]), 1), 2, more) for t in (codes, scale.view(torch.uint8)))
        codes, scale = interleave_gate_up(codes, GROUP), interleave_gate_up(scale, GROUP)
    else:
        codes, scale = (_pad_rows(t, 1, more) for t in (codes, scale.view(torch.uint8)))
    return codes.contiguous(), swizzle_scales(scale).view(torch.float8_e4m3fn)


def unpack_first(codes: Tensor, scale: Tensor, intermediate: int, *, gated: bool) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_first`; ``intermediate``: I before padding."""
    plain = unswizzle_scales(scale, codes.shape[1], codes.shape[2] * 2 // BLOCK).view(torch.uint8)
    if not gated:
        return codes[:, :intermediate].contiguous(), plain[:, :intermediate].contiguous().view(torch.float8_e4m3fn)
    codes, plain = split_gate_up(codes, GROUP), split_gate_up(plain, GROUP)
    half = codes.shape[1] // 2
    codes, plain = (torch.cat((t[:, half : half + intermediate], t[:, :intermediate]), 1) for t in (codes, plain))
    return codes, plain.view(torch.float8_e4m3fn)


def pack_second(codes: Tensor, scale: Tensor, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The second projection: codes uint8 [E, H, I/2] and scales float8_e4m3fn [E, H, I/16], to [E, H, I'/2] and tiled [E, H', I'/16].

    ``gated`` says how far I is padded (with zeros): see :func:`padded_width`. Raises ValueError on shapes that disagree.
    """
    _check(codes, scale)
    width = codes.shape[2] * 2
    more = padded_width(width, gated) - width
    raw = torch.nn.functional.pad(scale.view(torch.uint8), (0, more // BLOCK))
    return torch.nn.functional.pad(codes, (0, more // 2)).contiguous(), swizzle_scales(raw).view(torch.float8_e4m3fn)


def unpack_second(codes: Tensor, scale: Tensor, intermediate: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_second`; ``intermediate``: I before padding."""
    plain = unswizzle_scales(scale, codes.shape[1], codes.shape[2] * 2 // BLOCK)
    return codes[..., : intermediate // 2].contiguous(), plain[..., : intermediate // BLOCK].contiguous()


def scale_view(scale: Tensor) -> Tensor:
    """Tiled scales [E, N', G'] as the kernels index them: [32, 4, N'/128, 4, G'/4, E], a view of the same memory."""
    experts, rows, columns = scale.shape
    tiles = scale.view(experts, rows // ROWS, columns // COLUMNS, LANES, ROWS // LANES, COLUMNS)
    return tiles.permute(3, 4, 1, 5, 2, 0)


def _check(codes: Tensor, scale: Tensor) -> None:
    if codes.ndim != 3 or codes.dtype != torch.uint8 or scale.dtype != torch.float8_e4m3fn:
        raise ValueError(f"found {codes.dtype} {list(codes.shape)}, {scale.dtype}; allowed: uint8 [E, N, K/2], float8_e4m3fn")
    if scale.shape != (*codes.shape[:2], codes.shape[2] * 2 // BLOCK):
        raise ValueError(f"found codes {list(codes.shape)}, scales {list(scale.shape)}; allowed: [E, N, K/2], [E, N, K/16]")


def _pad_rows(rows: Tensor, parts: int, more: int) -> Tensor:
    """``more`` rows of zeros after each of ``parts`` equal parts of [E, N, X]."""
    if not more:
        return rows
    return torch.nn.functional.pad(rows.unflatten(1, (parts, -1)), (0, 0, 0, more)).flatten(1, 2)


# --- scales of whole tensors ------------------------------------------------------------------------------------------


class Scales(NamedTuple):
    """What the kernels multiply with.

    x: float32 [1], what the layer's input is multiplied by before its block scales are taken; None with a scale a token.
    w13_alpha, w2_alpha: float32 [E]. h: float32 [1], as ``x`` for the second projection's input; with a scale a token, that scale over
    the token's largest magnitude.
    """

    x: Tensor | None
    w13_alpha: Tensor
    h: Tensor
    w2_alpha: Tensor


def resolve(
    w13_scale_2: Tensor,
    w2_scale_2: Tensor,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
    *,
    linear_in_up: bool,
) -> Scales:
    """The kernels' scales from a checkpoint's: ``w13_scale_2`` float32 [E, 2] (gate, up) or [E, 1], ``w2_scale_2`` float32 [E].

    ``w13_input_scale`` float32 [E, 2], [E, 1] or [E] and ``w2_input_scale`` float32 [E] in ModelOpt's convention (amax / 2688) give static
    activation scales; without both every token has its own. The kernels round with one number for all experts: the largest, so that
    nothing saturates that would not have. What it stands for returns in each expert's alpha.

    Gate and up may differ if the activation is linear in up (``linear_in_up``: no clamp, no offset): then up carries the gate's scale
    through the activation, and the second projection's alpha makes up for it, exactly. Else PluginError (a ValueError) is raised,
    as it is for scales that are not finite and positive or of which only one is given.
    """
    experts = w2_scale_2.numel()
    if (w13_input_scale is None) != (w2_input_scale is None):
        raise PluginError("w13_input_scale, w2_input_scale", "one of them", "both, or none")
    parts = w13_scale_2.float().reshape(experts, -1)
    for name, found in (("w13_scale_2", parts), ("w2_scale_2", w2_scale_2), ("input scales", w13_input_scale), ("", w2_input_scale)):
        if found is not None and not bool((torch.isfinite(found) & (found > 0)).all()):
            raise PluginError(name or "input scales", "a value that is not finite and positive", "finite float32 values above 0")
    alpha, ratio = parts[:, 0], parts[:, -1] / parts[:, 0]
    if not linear_in_up and bool((ratio != 1).any()):
        worst = float(torch.maximum(ratio, 1 / ratio).max())
        found = f"gate and up of an expert apart by a factor of {worst:.3g}, under an activation with a clamp or an offset"
        raise PluginError("weight_scale_2", found, "one scale for gate and up (these kernels have one), or moe.provider: engine")
    second = w2_scale_2.float() * ratio
    if w13_input_scale is None:
        return Scales(None, alpha.contiguous(), torch.full((1,), TOKEN_SCALE, device=alpha.device), second.contiguous())
    x_scale = w13_input_scale.float().max()
    # The rounded values are smaller by the ratio than what the checkpoint's scale was measured on.
    h_scale = (w2_input_scale.float() / ratio).max()
    return Scales(x_scale.reciprocal().view(1), alpha * x_scale, h_scale.reciprocal().view(1), second * h_scale)
