"""One NVFP4 MoE layer on a Hopper GPU: routing, gate and up with the activation, down, and the sum over a token's experts.

Four launches (five from 4097 pairs on), each set up while the one before it still runs. The calls here are the steady state of a
server: no allocation, no synchronisation, no question to the device; all that lies between the launches is in the arena.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import compile as kernels
from . import route, tactics, tiles, workspace
from .problem import MoEProblem

GEMM = "moe_gemm"
ARCHITECTURES = ("sm_90a",)
TOKEN_TYPES = (torch.bfloat16, torch.float16)
HIDDEN, WIDTH = range(256, 16385), range(16, 8193)
EVERY_STREAM = 0
"""Key of the arena: an engine runs the layers of a device one after another, whichever of its streams is current."""


class Weights(NamedTuple):
    """The experts of one layer on this rank.

    w13: uint8 ``hopper.packed_shape(E, 2I or I, H)``; w13_scale_2: float32 [E, 2] (gate, up), [E, 1] without gate.
    w2: uint8 ``hopper.packed_shape(E, H, I)``; w2_scale_2: float32 [E].
    """

    w13: Tensor
    w13_scale_2: Tensor
    w2: Tensor
    w2_scale_2: Tensor


def unsupported_reason(problem: MoEProblem, tokens: torch.dtype) -> str | None:
    """Why the kernels cannot serve such a layer on a Hopper GPU, or None if they can."""
    if problem.activation_precision != "bf16":
        return f"activations in {problem.activation_precision}; the kernels multiply 16-bit activations"
    if tokens not in TOKEN_TYPES:
        return f"activation dtype {tokens}; the kernels serve {', '.join(map(str, TOKEN_TYPES))}"
    if problem.hidden not in HIDDEN or problem.hidden % 16:
        return f"hidden size {problem.hidden}; the kernels serve multiples of 16 from {HIDDEN[0]} to {HIDDEN[-1]}"
    if problem.intermediate not in WIDTH or problem.intermediate % 16:
        return f"expert width {problem.intermediate}; the kernels serve multiples of 16 from {WIDTH[0]} to {WIDTH[-1]}"
    if problem.num_local_experts > route.MAX_EXPERTS:
        return f"{problem.num_local_experts} experts on a rank; the kernels serve up to {route.MAX_EXPERTS}"
    if problem.top_k > 32:
        return f"{problem.top_k} experts a token; the kernels serve up to 32"
    return None


# --- the choice of kernels --------------------------------------------------------------------------------------------


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def variant_fields(problem: MoEProblem, use: str, shape: tiles.Shape, tokens: torch.dtype) -> dict:
    """Of the kernel's ``Variant``."""
    gate_up = use == "gate_up"
    columns = -(-(problem.hidden if gate_up else problem.intermediate) // tiles.ROWS)
    return {
        "use": use,
        "activation": problem.activation.kind if gate_up else "silu",
        "tile_tokens": shape.tile_tokens,
        "row_groups": shape.row_groups,
        "k_groups": shape.k_groups,
        "row_blocks": shape.row_blocks,
        "k_blocks": shape.k_blocks,
        "stages": shape.stages,
        "ragged": columns % shape.stage_blocks != 0,
        "weighted": gate_up == problem.apply_router_weight_on_input,
        "tokens": kernels.name_of(tokens),
        "warp_mma": shape.warp_mma,
    }


def variants(problem: MoEProblem, tokens: torch.dtype, max_tokens: int, multiprocessors: int) -> Iterator:
    """Every expert kernel that calls of up to ``max_tokens`` tokens can launch."""
    from ..kernels.moe_gemm import Variant

    for choice in tactics.choices(problem, max_tokens, multiprocessors, tokens):
        for use, shape in (("gate_up", choice.gate_up), ("down", choice.down)):
            yield Variant(**variant_fields(problem, use, shape, tokens))


@cache
def prepare(problem: MoEProblem, tokens: torch.dtype, index: torch.dtype, device: torch.device, max_tokens: int, mapped: bool) -> int:
    """Compile and load every kernel that calls of up to ``max_tokens`` tokens can launch, and make the arena large enough.

    What was tuned for this device is read here, and nowhere else: see :mod:`.tactics`.
    ``index``: dtype of the ids; ``mapped``: whether calls bring an expert map. Returns how many kernels had to be compiled.
    """
    architecture = kernels.device_architecture(device.index or 0, ARCHITECTURES)
    if tactics.load(problem, tokens, device.index or 0):
        forget_choices()
    compiled = kernels.prepare(GEMM, variants(problem, tokens, max_tokens, _multiprocessors(device.index or 0)), architecture)
    compiled += kernels.prepare(route.ROUTE, route.route_variants(index, mapped), architecture)
    compiled += kernels.prepare(route.COMBINE, route.combine_variants(tokens, tokens, problem.top_k), architecture)
    workspace.Arena.get(device, _largest(problem, max_tokens, tokens, _multiprocessors(device.index or 0)).bytes, EVERY_STREAM)
    return compiled


@cache
def _largest(problem: MoEProblem, max_tokens: int, tokens: torch.dtype, multiprocessors: int) -> workspace.Plan:
    ranges: list[workspace.TokenRange] = []
    most: dict[int, int] = {}
    for choice, last in tactics.choices(problem, max_tokens, multiprocessors, tokens).items():
        most[choice.tile_tokens] = max(last, most.get(choice.tile_tokens, 0))
    for tile, last in sorted(most.items(), key=lambda item: item[1]):
        ranges.append(workspace.TokenRange(last, (workspace.Call(tile, y=tokens),)))
    return workspace.largest(problem, max_tokens, ranges, tokens, route.scratch_ints)


def arena_bytes(problem: MoEProblem, max_tokens: int, tokens: torch.dtype = torch.bfloat16, multiprocessors: int = 132) -> int:
    """Bytes of the arena for calls of up to ``max_tokens`` tokens."""
    return _largest(problem, max_tokens, tokens, multiprocessors).bytes


@cache
def _gemm(device: int, problem: MoEProblem, use: str, shape: tiles.Shape, tokens: torch.dtype) -> Callable:
    from ..kernels.moe_gemm import Variant

    return kernels.load(GEMM, Variant(**variant_fields(problem, use, shape, tokens)), kernels.device_architecture(device, ARCHITECTURES))


class _Call(NamedTuple):
    """What calls of one size, run in one way, have in common."""

    plan: workspace.Plan
    tile_tokens: int
    gate_up: Callable
    down: Callable
    gate_up_blocks: int
    down_blocks: int


@lru_cache(4096)
def _call(device: int, problem: MoEProblem, tokens: int, dtype: torch.dtype, choice: tiles.Choice | None = None) -> _Call:
    multiprocessors = _multiprocessors(device)
    choice = choice or tactics.chosen(problem, tokens, multiprocessors, dtype)
    plan = workspace.plan(problem, tokens, workspace.Call(choice.tile_tokens, y=dtype), dtype, route.scratch_ints)
    token_tiles = workspace.max_tiles(tokens * problem.top_k, problem.num_local_experts, choice.tile_tokens)

    def blocks(shape: tiles.Shape, rows: int) -> int:
        return min(multiprocessors * shape.blocks, token_tiles * -(-rows // shape.rows))

    return _Call(
        plan,
        choice.tile_tokens,
        _gemm(device, problem, "gate_up", choice.gate_up, dtype),
        _gemm(device, problem, "down", choice.down, dtype),
        blocks(choice.gate_up, problem.w13_rows),
        blocks(choice.down, problem.hidden),
    )


def forget_choices() -> None:
    """Choose anew for every call from here on. Graphs keep what they were captured with."""
    _call.cache_clear()
    _largest.cache_clear()


# --- the call ---------------------------------------------------------------------------------------------------------


def fused_moe(
    x: Tensor,
    weights: Weights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    problem: MoEProblem,
    out: Tensor,
    expert_map: Tensor | None = None,
    choice: tiles.Choice | None = None,
) -> None:
    """``out`` [M, H] = the layer's output for ``x`` [M, H], bf16 or fp16, rows of unit stride and 16-byte aligned.

    topk_weights: float32 [M, k]; topk_ids: int32 or int64 [M, k]; both contiguous. Ids that no local expert answers (out of range, or
    not in ``expert_map``, int32 [num_experts]) add nothing. With the number of tokens fixed, a token's result does not depend on
    the other tokens. ``choice``: how to run it, instead of what was tuned or the heuristic says. Raises RuntimeError if the arena would
    have to grow while a graph is captured: see :func:`prepare`.
    """
    tokens = x.shape[0]
    if tokens == 0:
        return
    device, activation = x.device, problem.activation
    call = _call(device.index, problem, tokens, x.dtype, choice)
    memory = workspace.Arena.get(device, call.plan.bytes, EVERY_STREAM).views(call.plan)
    order, lists, counts = memory["order"], memory["tiles"], memory["counts"]
    route.route(
        *(topk_ids, problem.num_local_experts, call.tile_tokens, order, memory["position"], lists, counts),
        expert_map=expert_map,
        scratch=memory["scratch"],
    )
    router = topk_weights.view(-1)
    on_input = problem.apply_router_weight_on_input
    limit = math.inf if activation.limit is None else activation.limit
    h, y = memory["h"], memory["y"]
    call.gate_up(
        *(x, weights.w13, weights.w13_scale_2, router if on_input else None, order, lists, counts, h),
        *(problem.top_k, activation.alpha, activation.beta, limit, call.gate_up_blocks),
    )
    call.down(
        *(h, weights.w2, weights.w2_scale_2.view(-1, 1), None if on_input else router, order, lists, counts, y),
        *(problem.top_k, 1.0, 0.0, math.inf, call.down_blocks),
    )
    route.combine(y, memory["position"], out, problem.top_k)
