"""One NVFP4 MoE layer on a Hopper GPU: routing, gate and up with the activation, down, and the sum over a token's experts.

Four launches (three up to 128 pairs in tiles of 8 tokens, five from 4097 pairs on), each set up while the one before it still runs. The
calls here are the steady state of a server: no allocation, no synchronisation, no question to the device; all that lies between the
launches is in the arena.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import compile as kernels
from ..nvfp4 import hopper
from . import route, tactics, tiles, workspace
from .problem import MoEProblem

GEMM = "moe_gemm"
ARCHITECTURES = ("sm_90a",)
TOKEN_TYPES = (torch.bfloat16, torch.float16)
HIDDEN, WIDTH = range(256, 16385), range(16, 8193)
FEW_PAIRS = 32, 128
"""Up to so many pairs the expert kernels with tiles of 8 tokens sort for themselves: in every block of both, which costs less than a
launch."""


class Weights(NamedTuple):
    """The experts of one layer on this rank.

    w13: uint8 ``hopper.packed_shape(E, 2I or I, H)``; w13_scale_2: float32 [E, 2] (gate, up), [E, 1] without gate.
    w2: uint8 ``hopper.packed_shape(E, H, I)``; w2_scale_2: float32 [E].
    """

    w13: Tensor
    w13_scale_2: Tensor
    w2: Tensor
    w2_scale_2: Tensor


def pack(
    problem: MoEProblem, w13: Tensor, w13_scale: Tensor, w13_scale_2: Tensor, w2: Tensor, w2_scale: Tensor, w2_scale_2: Tensor
) -> Weights:
    """A checkpoint's experts, with shapes as in :func:`.reference.fused_moe`, for many calls."""
    first = hopper.pack(w13, w13_scale, gated=problem.activation.gated)
    return Weights(first, w13_scale_2, hopper.pack(w2, w2_scale, gated=False), w2_scale_2)


class Ids(NamedTuple):
    """How calls name their experts: dtype of the ids, and whether an expert map comes with them."""

    index: torch.dtype = torch.int32
    mapped: bool = False


IDS = Ids()


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
def multiprocessors_of(device: int) -> int:
    """Of this process's GPU number ``device``."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def sorted_pairs(choice: tiles.Choice, pairs: int) -> int:
    """The most pairs that kernels which sort for themselves are made for, in a call of ``pairs``; 0 where a kernel in front sorts."""
    if choice.tile_tokens != tiles.FEW.tile_tokens:
        return 0
    return next((most for most in FEW_PAIRS if pairs <= most), 0)


def variant_fields(problem: MoEProblem, use: str, shape: tiles.Shape, tokens: torch.dtype, pairs: int = 0, ids: Ids = IDS) -> dict:
    """Of the kernel's ``Variant``; ``pairs`` as :func:`sorted_pairs` says, ``ids`` only matters then."""
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
        "short": shape.short,
        "limited": gate_up and problem.activation.gated and problem.activation.limit is not None,
        "ragged": columns % shape.stage_blocks != 0,
        "weighted": gate_up == problem.apply_router_weight_on_input,
        "tokens": kernels.name_of(tokens),
        "warp_mma": shape.warp_mma,
        **({"pairs": pairs, "index": kernels.name_of(ids.index), "mapped": ids.mapped} if pairs else {}),
    }


def variants(problem: MoEProblem, tokens: torch.dtype, max_tokens: int, multiprocessors: int, ids: Ids = IDS) -> Iterator:
    """Every expert kernel that calls of up to ``max_tokens`` tokens can launch, once each."""
    from ..kernels.moe_gemm import Variant

    few = min(max_tokens, FEW_PAIRS[-1] // problem.top_k)
    met = [(tactics.chosen(problem, count, multiprocessors, tokens), count) for count in range(1, few + 1)]
    met += [(choice, last) for choice, last in tactics.choices(problem, max_tokens, multiprocessors, tokens).items() if last > few]
    for fields in dict.fromkeys(use for choice, count in met for use in _uses(problem, choice, count)):
        yield Variant(**variant_fields(problem, *fields[:2], tokens, fields[2], ids))


def variants_of(problem: MoEProblem, tokens: torch.dtype, choice: tiles.Choice, ids: Ids = IDS) -> Iterator:
    """Every expert kernel that :func:`fused_moe` can launch with this ``choice``, once each."""
    from ..kernels.moe_gemm import Variant

    counts = (*(pairs // problem.top_k for pairs in FEW_PAIRS), FEW_PAIRS[-1] + 1)
    for use, shape, pairs in dict.fromkeys(use for count in counts for use in _uses(problem, choice, count)):
        yield Variant(**variant_fields(problem, use, shape, tokens, pairs, ids))


def _uses(problem: MoEProblem, choice: tiles.Choice, tokens: int) -> Iterator[tuple[str, tiles.Shape, int]]:
    """(use, shape, pairs that it sorts) of both kernels of a call."""
    pairs = sorted_pairs(choice, tokens * problem.top_k)
    yield "gate_up", choice.gate_up, pairs
    yield "down", choice.down, pairs


@cache
def prepare(problem: MoEProblem, tokens: torch.dtype, index: torch.dtype, device: torch.device, max_tokens: int, mapped: bool) -> int:
    """Compile and load every kernel that calls of up to ``max_tokens`` tokens can launch, and make the arena large enough.

    What was tuned for this device is read here, and nowhere else: see :mod:`.tactics`.
    ``index``: dtype of the ids; ``mapped``: whether calls bring an expert map. Returns how many kernels had to be compiled.
    """
    architecture = kernels.device_architecture(device.index or 0, ARCHITECTURES)
    if tactics.load(problem, tokens, device.index or 0):
        forget_choices()
    needed = variants(problem, tokens, max_tokens, multiprocessors_of(device.index or 0), Ids(index, mapped))
    compiled = kernels.prepare(GEMM, needed, architecture)
    compiled += kernels.prepare(route.ROUTE, route.route_variants(index, mapped), architecture)
    compiled += kernels.prepare(route.COMBINE, route.combine_variants(tokens, tokens, problem.top_k), architecture)
    workspace.Arena.get(device, _largest(problem, max_tokens, tokens, multiprocessors_of(device.index or 0)).bytes, workspace.EVERY_STREAM)
    return compiled


def prepare_tactics(
    problem: MoEProblem, tokens: torch.dtype, found: Iterable[tiles.Choice], device: torch.device, max_tokens: int, ids: Ids = IDS
) -> int:
    """:func:`prepare`, and the same for calls that are told to use any of the tactics ``found``."""
    found = list(found)
    compiled = prepare(problem, tokens, ids.index, device, max_tokens, ids.mapped)
    needed = dict.fromkeys(variant for tactic in found for variant in variants_of(problem, tokens, tactic, ids))
    compiled += kernels.prepare(GEMM, needed, kernels.device_architecture(device.index or 0, ARCHITECTURES))
    workspace.Arena.get(device, tactics.largest_plan(problem, max_tokens, found, tokens, route.scratch_ints).bytes, workspace.EVERY_STREAM)
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
def gemm(device: int, problem: MoEProblem, use: str, shape: tiles.Shape, tokens: torch.dtype, pairs: int = 0, ids: Ids = IDS) -> Callable:
    """The kernel of one projection ("gate_up", "down") on GPU number ``device``; other arguments as in :func:`variant_fields`."""
    from ..kernels.moe_gemm import Variant

    variant = Variant(**variant_fields(problem, use, shape, tokens, pairs, ids))
    return kernels.load(GEMM, variant, kernels.device_architecture(device, ARCHITECTURES))


class _Call(NamedTuple):
    """What calls of one size, run in one way, have in common."""

    plan: workspace.Plan
    tile_tokens: int
    sorts: bool
    gate_up: Callable
    down: Callable
    gate_up_blocks: int
    down_blocks: int


@lru_cache(4096)
def _call(device: int, problem: MoEProblem, tokens: int, dtype: torch.dtype, ids: Ids, choice: tiles.Choice | None = None) -> _Call:
    multiprocessors = multiprocessors_of(device)
    choice = choice or tactics.chosen(problem, tokens, multiprocessors, dtype)
    plan = workspace.plan(problem, tokens, workspace.Call(choice.tile_tokens, y=dtype), dtype, route.scratch_ints)
    token_tiles = workspace.max_tiles(tokens * problem.top_k, problem.num_local_experts, choice.tile_tokens)

    pairs = sorted_pairs(choice, tokens * problem.top_k)

    def blocks(shape: tiles.Shape, rows: int) -> int:
        return min(multiprocessors * shape.blocks, token_tiles * -(-rows // shape.rows))

    return _Call(
        plan,
        choice.tile_tokens,
        pairs > 0,
        gemm(device, problem, "gate_up", choice.gate_up, dtype, pairs, ids),
        gemm(device, problem, "down", choice.down, dtype, pairs, ids),
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
    call = _call(device.index, problem, tokens, x.dtype, Ids(topk_ids.dtype, expert_map is not None), choice)
    memory = workspace.Arena.get(device, call.plan.bytes, workspace.EVERY_STREAM).views(call.plan)
    position = memory["position"]
    if call.sorts:
        route.check(topk_ids, expert_map)
        lists = None, None, None, topk_ids, expert_map, position
    else:
        order, listed, counts = memory["order"], memory["tiles"], memory["counts"]
        route.route(
            *(topk_ids, problem.num_local_experts, call.tile_tokens, order, position, listed, counts),
            expert_map=expert_map,
            scratch=memory["scratch"],
        )
        lists = order, listed, counts, None, None, None
    router = topk_weights.view(-1)
    on_input = problem.apply_router_weight_on_input
    limit = math.inf if activation.limit is None else activation.limit
    h, y = memory["h"], memory["y"]
    call.gate_up(
        *(x, weights.w13, weights.w13_scale_2, router if on_input else None, *lists, h),
        *(problem.top_k, activation.alpha, activation.beta, limit, call.gate_up_blocks),
    )
    call.down(
        *(h, weights.w2, weights.w2_scale_2.view(-1, 1), None if on_input else router, *lists, y),
        *(problem.top_k, 1.0, 0.0, math.inf, call.down_blocks),
    )
    route.combine(y, position, out, problem.top_k)
