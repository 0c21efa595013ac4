"""The torch operators of one NVFP4 MoE layer call, opaque to torch.compile.

``moe_backend_plugin::nvfp4_moe`` runs on a CPU, on the planes of codes that :func:`prepare` makes;
``moe_backend_plugin::nvfp4_moe_packed`` on a Hopper GPU, on the order of :mod:`..nvfp4.hopper`;
``moe_backend_plugin::nvfp4_moe_flashinfer`` on a Blackwell GPU, on that of :mod:`..nvfp4.blackwell`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PluginError
from ..linear.op import is_eager
from ..nvfp4.unscaled import to_planes
from .cpu import fused_moe_cpu
from .problem import Activation, MoEProblem

if TYPE_CHECKING:
    from . import blackwell
    from .cuda import Weights

SCHEMA = (
    "nvfp4_moe(Tensor x, Tensor w13, Tensor w13_scale, Tensor w13_scale_2, Tensor w2, Tensor w2_scale, Tensor w2_scale_2, "
    "Tensor topk_weights, Tensor topk_ids, str activation, float alpha, float beta, float? limit, "
    "bool apply_router_weight_on_input=False, Tensor? expert_map=None, Tensor? w13_input_scale=None, Tensor? w2_input_scale=None"
    ") -> Tensor"
)
PACKED_SCHEMA = (
    "nvfp4_moe_packed(Tensor x, Tensor w13, Tensor w13_scale_2, Tensor w2, Tensor w2_scale_2, Tensor topk_weights, Tensor topk_ids, "
    "int num_experts, int intermediate, str activation, float alpha, float beta, float? limit, "
    "bool apply_router_weight_on_input=False, Tensor? expert_map=None) -> Tensor"
)
FLASHINFER_SCHEMA = (
    "nvfp4_moe_flashinfer(Tensor x, Tensor w13, Tensor w13_scale, Tensor w13_alpha, Tensor w2, Tensor w2_scale, Tensor w2_alpha, "
    "Tensor h_scale, Tensor? x_scale, Tensor topk_weights, Tensor topk_ids, int num_experts, int intermediate, str activation, "
    "float alpha, float beta, float? limit, bool apply_router_weight_on_input=False, Tensor? expert_map=None, int first=0) -> Tensor"
)

# define/impl instead of torch.library.custom_op: its Python wrapper costs tens of microseconds a call, in every layer.
_library = torch.library.Library("moe_backend_plugin", "FRAGMENT")
_library.define(SCHEMA)
_library.define(PACKED_SCHEMA)
_library.define(FLASHINFER_SCHEMA)

_activation = lru_cache(Activation)
_problem = lru_cache(MoEProblem)


def prepare(w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A checkpoint's weights and block scales, once, for many calls of :func:`nvfp4_moe`; shapes as in :func:`.reference.fused_moe`.

    Each projection becomes what :func:`..nvfp4.unscaled.to_planes` returns. Raises ValueError if dtypes or shapes disagree.
    """
    return (*to_planes(w13, w13_scale), *to_planes(w2, w2_scale))


def _check(x, w13, w13_scale_2, w2, w2_scale_2, topk_weights, topk_ids, gated, w13_input_scale, w2_input_scale) -> None:
    """What may differ from call to call, and what ties the tensors together; each projection's parts fit, prepare saw to that."""
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise PluginError("x", f"{x.dtype} {list(x.shape)}", "bfloat16, float16 or float32 [M, H]")
    (experts, quarter, columns), (tokens, hidden) = w2.shape, x.shape
    halves = 2 if gated else 1
    if quarter * 4 != hidden or w13.shape != (experts, halves * columns // 8, hidden * 2):
        allowed = f"[E, {halves}I/4, 2H] and [E, H/4, 2I] with H = {hidden}"
        raise PluginError("w13, w2", f"{list(w13.shape)}, {list(w2.shape)}", allowed)
    if w13_scale_2.numel() != experts * halves or w2_scale_2.numel() != experts:
        allowed = f"[{experts}, {halves}], [{experts}]"
        raise PluginError("w13_scale_2, w2_scale_2", f"{list(w13_scale_2.shape)}, {list(w2_scale_2.shape)}", allowed)
    if topk_ids.ndim != 2 or topk_ids.shape[0] != tokens or topk_weights.shape != topk_ids.shape:
        raise PluginError("topk_weights, topk_ids", f"{list(topk_weights.shape)}, {list(topk_ids.shape)}", f"[{tokens}, k], both")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise PluginError("topk_ids", str(topk_ids.dtype), "int32, int64")
    if (w13_input_scale is None) != (w2_input_scale is None):
        raise PluginError("w13_input_scale, w2_input_scale", "one of them", "both, or none")


def _cpu(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w13_scale_2: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_scale_2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
) -> Tensor:
    function = _activation(activation, alpha, beta, limit)
    weights = (w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2)
    _check(x, w13, w13_scale_2, w2, w2_scale_2, topk_weights, topk_ids, function.gated, w13_input_scale, w2_input_scale)
    return fused_moe_cpu(
        *(x, *weights, topk_weights, topk_ids, function),
        *(apply_router_weight_on_input, expert_map, w13_input_scale, w2_input_scale),
    )


def _fake(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


_library.impl("nvfp4_moe", _cpu, "CPU")
torch.library.register_fake("moe_backend_plugin::nvfp4_moe", _fake, lib=_library)

_op = torch.ops.moe_backend_plugin.nvfp4_moe.default


def nvfp4_moe(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w13_scale_2: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_scale_2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Activation,
    *,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
) -> Tensor:
    """One MoE layer, on weights and block scales from :func:`prepare`.

    The other shapes, dtypes and the rules for bad input are those of :func:`.reference.fused_moe`.

    With both input scales, activations are rounded to NVFP4 too (W4A4). Without ``expert_map`` the ids are those of the
    E experts given. Returns a new tensor like ``x``. Raises PluginError (a ValueError) on shapes or dtypes that disagree.
    """
    return (_cpu if is_eager(x) else _op)(
        *(x, w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, topk_weights, topk_ids),
        *(activation.kind, activation.alpha, activation.beta, activation.limit),
        *(apply_router_weight_on_input, expert_map, w13_input_scale, w2_input_scale),
    )


def _packed(
    x: Tensor,
    w13: Tensor,
    w13_scale_2: Tensor,
    w2: Tensor,
    w2_scale_2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    intermediate: int,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
) -> Tensor:
    function = _activation(activation, alpha, beta, limit)
    sizes = (num_experts, w13.shape[0], x.shape[-1], intermediate, topk_ids.shape[-1])
    problem = _problem(*sizes, function, "bf16", apply_router_weight_on_input)
    return _launch(x, (w13, w13_scale_2, w2, w2_scale_2), topk_weights, topk_ids, problem, expert_map)


def _launch(
    x: Tensor, weights: tuple[Tensor, ...], topk_weights: Tensor, topk_ids: Tensor, problem: MoEProblem, expert_map: Tensor | None
) -> Tensor:
    # A machine without the kernels' compiler still imports this module.
    from .cuda import Weights, fused_moe

    if x.ndim != 2 or x.shape[1] != problem.hidden:
        raise PluginError("x", str(list(x.shape)), f"[M, {problem.hidden}]")
    allowed = (x.shape[0], problem.top_k)
    if topk_ids.shape != allowed or topk_weights.shape != allowed:
        found = f"{list(topk_weights.shape)}, {list(topk_ids.shape)}"
        raise PluginError("topk_weights, topk_ids", found, f"{list(allowed)}, both")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        fused_moe(x, Weights(*weights), topk_weights, topk_ids, problem, out, expert_map)
    return out


_library.impl("nvfp4_moe_packed", _packed, "CUDA")
torch.library.register_fake("moe_backend_plugin::nvfp4_moe_packed", _fake, lib=_library)

_packed_op = torch.ops.moe_backend_plugin.nvfp4_moe_packed.default


def nvfp4_moe_packed(
    x: Tensor, weights: Weights, topk_weights: Tensor, topk_ids: Tensor, problem: MoEProblem, expert_map: Tensor | None = None
) -> Tensor:
    """One MoE layer on a Hopper GPU: a new tensor like ``x`` ``[M, H]``; arguments as :func:`.cuda.fused_moe`'s.

    Nothing is allocated but the result. ``problem`` is one that :func:`.cuda.unsupported_reason` lets through and that
    :func:`.cuda.prepare` has seen. Raises PluginError (a ValueError) on shapes that disagree.
    """
    if is_eager(x):
        return _launch(x, weights, topk_weights, topk_ids, problem, expert_map)
    a = problem.activation
    return _packed_op(
        *(x, *weights, topk_weights, topk_ids, problem.num_experts, problem.intermediate, a.kind, a.alpha, a.beta, a.limit),
        *(problem.apply_router_weight_on_input, expert_map),
    )


def _flashinfer(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w13_alpha: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_alpha: Tensor,
    h_scale: Tensor,
    x_scale: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    intermediate: int,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    from .blackwell import Weights, fused_moe

    function = _activation(activation, alpha, beta, limit)
    sizes = (num_experts, w13.shape[0], x.shape[-1], intermediate, topk_ids.shape[-1])
    weights = Weights(w13, w13_scale, w13_alpha, w2, w2_scale, w2_alpha, h_scale, x_scale)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    fused_moe(
        x, weights, topk_weights, topk_ids, _problem(*sizes, function, "nvfp4", apply_router_weight_on_input), out, expert_map, first=first
    )
    return out


_library.impl("nvfp4_moe_flashinfer", _flashinfer, "CUDA")
torch.library.register_fake("moe_backend_plugin::nvfp4_moe_flashinfer", _fake, lib=_library)

_flashinfer_op = torch.ops.moe_backend_plugin.nvfp4_moe_flashinfer.default


def nvfp4_moe_flashinfer(
    x: Tensor,
    weights: blackwell.Weights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    problem: MoEProblem,
    expert_map: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """One MoE layer on a Blackwell GPU: a new tensor like ``x`` ``[M, H]``; arguments as :func:`.blackwell.fused_moe`'s."""
    a = problem.activation
    return (_flashinfer if is_eager(x) else _flashinfer_op)(
        *(x, *weights, topk_weights, topk_ids, problem.num_experts, problem.intermediate, a.kind, a.alpha, a.beta, a.limit),
        *(problem.apply_router_weight_on_input, expert_map, first),
    )
