"""The NVFP4 MoE layer as its formula says: the truth that every faster implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PluginError
from ..nvfp4.format import E2M1_MAX, E4M3_MAX, quantize_activations
from ..nvfp4.unscaled import check_shapes, unscaled
from .problem import MoEProblem
from .routing import local_ids

_ROWS = 16


def fused_moe(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w13_scale_2: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_scale_2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    problem: MoEProblem,
    expert_map: Tensor | None = None,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
    by_token: bool = False,
) -> Tensor:
    """``out[m] = sum_j weight[m, j] * expert[id[m, j]](x[m])`` over the experts of this rank.

    Shapes, with E local experts, hidden H, expert width I, and R = 2I rows (gate, then up; R = I without a gate):

    ===============  ==============  ====================================================
    x                bf16/fp16/fp32  ``[M, H]``
    w13, w13_scale   uint8, e4m3     ``[E, R, H/2]``, ``[E, R, H/16]``
    w13_scale_2      float32         ``[E, 2]`` for gate and up, ``[E, 1]`` or ``[E]`` without a gate
    w2, w2_scale     uint8, e4m3     ``[E, H, I/2]``, ``[E, H, I/16]``
    w2_scale_2       float32         ``[E]``
    topk_weights     float           ``[M, k]``, used in float32
    topk_ids         int32/int64     ``[M, k]``, global expert ids
    expert_map       int32/int64     ``[num_experts]``: local expert or -1; None: all experts are here
    w13_input_scale  float32         ``[E, 2]`` or ``[E]``, with "nvfp4" activations only (gate and up share the larger)
    w2_input_scale   float32         ``[E]``, with "nvfp4" activations only
    ===============  ==============  ====================================================

    ``by_token``: "nvfp4" activations without input scales, each row of either projection's input with a scale of its own (its
    largest magnitude / 2688). Returns a new ``[M, H]`` in ``x``'s dtype.

    Precision: block-scaled weights exact, products summed in float32, the global scales applied to the sums in float32,
    the activation function in float32; its result is rounded to ``x``'s dtype before the second projection, as engines
    do. Router weights and the sum over the experts are float32, rounded once at the end. With
    ``apply_router_weight_on_input`` the weighted input is rounded to ``x``'s dtype, and outputs are only summed.

    Bad input stays where it is:

    * an id below 0 or >= num_experts, or one that ``expert_map`` sends to no local expert, adds nothing, whatever its
      router weight (NaN too);
    * an expert that is named twice in a row counts twice;
    * a NaN router weight, or NaN in a row of ``x``, makes that row NaN and touches no other;
    * M = 0 returns an empty tensor; any distribution over experts, down to all tokens on one, is served.

    A row's result does not depend on the other rows up to float32 rounding (and bit for bit where the matrix library's
    rows do not, since all products have the same shape).

    Raises PluginError (a ValueError) if shapes or dtypes disagree with ``problem``.
    """
    _check(x, w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, topk_weights, topk_ids, problem, expert_map)
    w4a4 = problem.activation_precision == "nvfp4"
    static = w4a4 and not by_token
    if static != (w13_input_scale is not None) or static != (w2_input_scale is not None):
        allowed = "both" if static else "none"
        raise PluginError("w13_input_scale, w2_input_scale", f"{w13_input_scale is not None}, {w2_input_scale is not None}", allowed)

    experts = problem.num_local_experts
    local = local_ids(topk_ids, experts, expert_map)
    weights = torch.where(local < experts, topk_weights.float(), 0.0)
    parts = torch.zeros(*topk_ids.shape, problem.hidden, dtype=torch.float32, device=x.device)

    for e in torch.unique(local).tolist():
        if e == experts:
            continue
        token, slot = torch.where(local == e)
        inputs = x[token].float()
        if problem.apply_router_weight_on_input:
            inputs = (inputs * weights[token, slot].unsqueeze(1)).to(x.dtype).float()
        if w4a4:
            inputs = quantize_activations(inputs, _row_scales(inputs) if by_token else w13_input_scale[e].max())
        h = _matmul(inputs, unscaled(w13[e], w13_scale[e]))
        # One global scale a half: gate and up keep their own.
        h = h * w13_scale_2[e].float().reshape(-1).repeat_interleave(problem.intermediate)
        h = problem.activation.apply(h).to(x.dtype).float()
        if w4a4:
            h = quantize_activations(h, _row_scales(h) if by_token else w2_input_scale[e])
        parts[token, slot] = _matmul(h, unscaled(w2[e], w2_scale[e])) * w2_scale_2[e].float()

    out = torch.zeros(x.shape[0], problem.hidden, dtype=torch.float32, device=x.device)
    for slot in range(problem.top_k):
        out += parts[:, slot] if problem.apply_router_weight_on_input else parts[:, slot] * weights[:, slot, None]
    return out.to(x.dtype)


def _row_scales(x: Tensor) -> Tensor:
    """float32 [m, 1] for x [m, K]; 1 for a row of zeros."""
    scale = x.abs().amax(-1, keepdim=True) / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, 1.0, scale)


def _matmul(x: Tensor, w: Tensor) -> Tensor:
    """``x [m, K] @ w [N, K].T`` in float32, by products of ``_ROWS`` rows each.

    Matrix libraries choose another summation order for another number of rows; a fixed number takes that choice away.
    """
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % _ROWS))
    return torch.cat([block @ w.t() for block in padded.split(_ROWS)])[: x.shape[0]]


def _check(x, w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, topk_weights, topk_ids, problem, expert_map) -> None:
    p = problem
    check_shapes(w13, w13_scale)
    check_shapes(w2, w2_scale)
    expected = {
        "x": (x, (x.shape[0], p.hidden)),
        "w13": (w13, (p.num_local_experts, p.w13_rows, p.hidden // 2)),
        "w2": (w2, (p.num_local_experts, p.hidden, p.intermediate // 2)),
        "w2_scale_2": (w2_scale_2, (p.num_local_experts,)),
        "topk_ids": (topk_ids, (x.shape[0], p.top_k)),
        "topk_weights": (topk_weights, (x.shape[0], p.top_k)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise PluginError(name, str(list(tensor.shape)), str(list(shape)))
    if w13_scale_2.numel() != p.num_local_experts * p.w13_rows // p.intermediate:
        raise PluginError("w13_scale_2", str(list(w13_scale_2.shape)), "[E, 2], or [E, 1] without a gate")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise PluginError("x", str(x.dtype), "bfloat16, float16, float32")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise PluginError("topk_ids", str(topk_ids.dtype), "int32, int64")
    experts = p.num_local_experts if expert_map is None else expert_map.numel()
    if experts != p.num_experts:
        raise PluginError("expert_map", f"{experts} experts", f"num_experts = {p.num_experts}")
