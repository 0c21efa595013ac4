"""One NVFP4 MoE layer on a Blackwell GPU (SM100, SM103) through FlashInfer's CuTe DSL kernels, on this package's workspace and memset.

W4A4: the layer's input is rounded to NVFP4, the pairs are sorted into tiles by expert, the first projection gathers its rows and rounds
its own output, the second adds into the layer's output, weighted by the router, while that was zeroed beside the first. FlashInfer's
stages are called one by one, so that every buffer between them lies in the arena and a tactic is data; 0.7.0 and 0.7.2 have the same.

Nothing here has run on a Blackwell GPU: no such machine was at hand. What holds without one is in the tests, and :mod:`.kernel_check`
runs the rest wherever a server starts on one.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PluginError
from ..kernels.compile import name_of
from ..nvfp4 import blackwell as layout
from ..nvfp4.blackwell import ActivationScales
from . import memset, tactics, workspace
from .problem import MoEProblem
from .routing import local_ids
from .tiles import mean_tokens

TOKEN_TYPES = (torch.bfloat16,)
MAX_EXPERTS, MAX_TOP_K = 512, 22
"""Of FlashInfer's routing kernel: experts of the whole model, experts of a token."""
HIDDEN = 256
"""Before 0.7.2 the first projection reads its input in steps of so many columns, whatever comes after the row."""
TILE_TOKENS = (128, 256)
LARGE = 192
"""Mean tokens of an active expert from which tiles of 256 are taken. Not measured here."""
NO_LIMIT = torch.finfo(torch.float32).max


# --- tactics ----------------------------------------------------------------------------------------------------------


class Tactic(NamedTuple):
    """tile_tokens: 128, or 256 by two CTAs. gate_up_columns, down_columns: of an output tile, 128 or 256. down_cluster: CTAs that share
    the second projection's input, 1 or 2. ordered: expert outputs are written one a pair and summed in a fixed order, instead of
    added into the output as they come."""

    tile_tokens: int = 128
    gate_up_columns: int = 128
    down_columns: int = 128
    down_cluster: int = 1
    ordered: bool = False

    @property
    def name(self) -> str:
        """``s128.128.128x1``; with ``o`` at the end where sums have an order."""
        return f"s{self.tile_tokens}.{self.gate_up_columns}.{self.down_columns}x{self.down_cluster}{'o' if self.ordered else ''}"


_NAME = re.compile(r"s(\d+)\.(\d+)\.(\d+)x(\d+)(o?)")


def parse(text: str) -> Tactic:
    """The tactic of a name. Raises PluginError (a ValueError) if it is no name."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise PluginError("tactic", repr(text), f"a name such as {Tactic().name}")
    *numbers, ordered = found.groups()
    return Tactic(*map(int, numbers), ordered=bool(ordered))


def validity(problem: MoEProblem, tactic: Tactic) -> str | None:
    """Why calls of this problem cannot run this way, or None; nothing is launched."""
    for field, allowed in (
        ("tile_tokens", TILE_TOKENS),
        ("gate_up_columns", (128, 256)),
        ("down_columns", (128, 256)),
        ("down_cluster", (1, 2)),
    ):
        if getattr(tactic, field) not in allowed:
            return f"{field} {getattr(tactic, field)} (allowed: {', '.join(map(str, allowed))})"
    if first_rows(problem) % tactic.gate_up_columns:
        return f"{first_rows(problem)} rows of the first projection (allowed: a multiple of {tactic.gate_up_columns})"
    return None


@cache
def every(problem: MoEProblem) -> tuple[Tactic, ...]:
    """All tactics of a problem, each of them valid."""
    found = (Tactic(*parts) for parts in product(TILE_TOKENS, (128, 256), (128, 256), (1, 2), (False, True)))
    return tuple(tactic for tactic in found if validity(problem, tactic) is None)


@lru_cache(4096)
def choose(problem: MoEProblem, tokens: int) -> Tactic:
    """The tactic of a call of ``tokens`` tokens (1 or more), from shapes alone: two-CTA tiles and wide ones where experts fill them."""
    if mean_tokens(problem, tokens) < LARGE:
        return Tactic()
    wide = 256 if first_rows(problem) % 256 == 0 else 128
    return Tactic(256, wide, 256)


def chosen(problem: MoEProblem, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tactic:
    """The tactic of a call of ``tokens`` tokens (1 or more): as tuned, else as :func:`choose` says. Reads no file."""
    return tactics.tuned(problem, tokens, dtype) or choose(problem, tokens)


def tactics_met(problem: MoEProblem, max_tokens: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[Tactic]:
    """Every tactic that calls of 1 .. ``max_tokens`` tokens can meet."""
    # Between two of these counts the same bucket answers, or none; and the heuristic changes its mind but once, as experts fill.
    ends = {1, max_tokens}
    for bucket in tactics.tuned_buckets(problem, dtype):
        ends |= {bucket.first - 1, bucket.first, bucket.last, bucket.last + 1}
    yield from dict.fromkeys(chosen(problem, tokens, dtype) for tokens in sorted(ends) if 1 <= tokens <= max_tokens)


def width(problem: MoEProblem) -> int:
    """The expert width, padded."""
    return layout.padded_width(problem.intermediate, problem.activation.gated)


def first_rows(problem: MoEProblem) -> int:
    """Rows of the first projection, padded."""
    return width(problem) * (2 if problem.activation.gated else 1)


def unsupported_reason(problem: MoEProblem, tokens: torch.dtype) -> str | None:
    """Why the kernels cannot serve such a layer on a Blackwell GPU, or None if they can."""
    if problem.activation_precision != "nvfp4":
        return f"activations in {problem.activation_precision}; the kernels multiply NVFP4 activations (moe.activations: nvfp4)"
    if tokens not in TOKEN_TYPES:
        return f"activation dtype {tokens}; the kernels serve {', '.join(map(str, TOKEN_TYPES))}"
    if problem.hidden % HIDDEN:
        return f"hidden size {problem.hidden}; the kernels serve multiples of {HIDDEN}"
    if problem.num_experts > MAX_EXPERTS:
        return f"{problem.num_experts} experts; the kernels serve up to {MAX_EXPERTS}"
    if problem.top_k > min(MAX_TOP_K, problem.num_experts):
        return f"{problem.top_k} experts a token; the kernels serve up to {min(MAX_TOP_K, problem.num_experts)}"
    if problem.apply_router_weight_on_input and problem.top_k > 1:
        return f"router weights on the input of {problem.top_k} experts a token; the kernels round one input a token"
    return None


# --- weights ----------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """The experts of one layer on this rank: see :mod:`..nvfp4.blackwell`.

    w13: uint8 [E, R', H/2]; w13_scale: float8_e4m3fn [E, R', H/16], tiled; w2: uint8 [E, H, I'/2]; w2_scale: float8_e4m3fn [E, H, I'/16],
    tiled. w13_alpha, w2_alpha: float32 [E]. x_scale: float32 [1], or None for a scale a token; h_scale: float32 [1].
    """

    w13: Tensor
    w13_scale: Tensor
    w13_alpha: Tensor
    w2: Tensor
    w2_scale: Tensor
    w2_alpha: Tensor
    h_scale: Tensor
    x_scale: Tensor | None = None

    @property
    def activation_scales(self) -> ActivationScales:
        return "token" if self.x_scale is None else "static"


def pack(
    problem: MoEProblem,
    w13: Tensor,
    w13_scale: Tensor,
    w13_scale_2: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w2_scale_2: Tensor,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
) -> Weights:
    """A checkpoint's experts, with shapes as in :func:`.reference.fused_moe`, for many calls; without input scales a scale a token.

    Raises PluginError (a ValueError) where the scales cannot be had with one number an expert: see :func:`..nvfp4.blackwell.resolve`.
    """
    gated = problem.activation.gated
    linear_in_up = problem.activation.kind == "silu" and problem.activation.limit is None
    scales = layout.resolve(w13_scale_2, w2_scale_2, w13_input_scale, w2_input_scale, linear_in_up=linear_in_up)
    first = layout.pack_first(w13, w13_scale, gated=gated)
    second = layout.pack_second(w2, w2_scale, gated=gated)
    return Weights(*first, scales.w13_alpha, *second, scales.w2_alpha, scales.h, scales.x)


# --- memory -----------------------------------------------------------------------------------------------------------


def max_tiles(pairs: int, experts: int, tile_tokens: int) -> int:
    """The most tiles that ``pairs`` (token, slot) pairs of ``experts`` local experts can fill: one begun by each, the rest full."""
    begun = min(pairs, experts)
    return begun + (pairs - begun) // tile_tokens


@lru_cache(1024)
def plan(problem: MoEProblem, tokens: int, tactic: Tactic, scales: ActivationScales, dtype: torch.dtype = torch.bfloat16) -> workspace.Plan:
    """The memory of a call of ``tokens`` tokens (1 or more): its regions are FlashInfer's buffers, of exactly the sizes it wants.

    With P = tokens x top_k, T = :func:`max_tiles`, S = T x tile_tokens sorted rows, W = the padded expert width:

    ============  =======  ==================================================================
    tile_expert   int32    ``[T]``, local expert of a tile
    tile_limit    int32    ``[T]``, first sorted row that is no longer the tile's
    position      int32    ``[tokens, top_k]``, sorted row of a pair, -1 where no expert here answers
    order         int32    ``[S]``, pair of a sorted row
    rows, tiles   int32    ``[1]``, how many there are
    h             uint8    ``[S, W/2]``; ``dtype [S, W]`` with a scale a token, where FlashInfer rounds it after
    h_scale       uint8    ``[32, 4, S/128, 4, W/64, 1]``; only with static scales
    y             dtype    ``[P, H]``; only with an ordered tactic
    ============  =======  ==================================================================

    Raises PluginError (a ValueError) on fewer than 1 token or a tactic that is not valid.
    """
    if tokens < 1:
        raise PluginError("plan: tokens", str(tokens), "1 or more")
    if reason := validity(problem, tactic):
        raise PluginError(f"tactic {tactic.name}", reason, "a tactic that the kernels can have")
    pairs = tokens * problem.top_k
    tiles = max_tiles(pairs, problem.num_local_experts, tactic.tile_tokens)
    sorted_rows, columns = tiles * tactic.tile_tokens, width(problem)
    shapes: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        ("tile_expert", torch.int32, (tiles,)),
        ("tile_limit", torch.int32, (tiles,)),
        ("position", torch.int32, (tokens, problem.top_k)),
        ("order", torch.int32, (sorted_rows,)),
        ("rows", torch.int32, (1,)),
        ("tiles", torch.int32, (1,)),
    ]
    if scales == "static":
        shapes.append(("h", torch.uint8, (sorted_rows, columns // 2)))
        shapes.append(("h_scale", torch.uint8, (32, 4, sorted_rows // 128, 4, columns // 64, 1)))
    else:
        shapes.append(("h", dtype, (sorted_rows, columns)))
    if tactic.ordered:
        shapes.append(("y", dtype, (pairs, problem.hidden)))
    regions, end = [], 0
    for name, kind, shape in shapes:
        regions.append(workspace.Region(name, end, prod(shape) * kind.itemsize, kind, shape))
        end = -(-(end + regions[-1].bytes) // workspace.ALIGNMENT) * workspace.ALIGNMENT
    return workspace.Plan(problem, tokens, workspace.Call(tactic.tile_tokens, y=dtype), tuple(regions), end)


def largest(problem: MoEProblem, max_tokens: int, scales: ActivationScales, dtype: torch.dtype = torch.bfloat16) -> workspace.Plan:
    """The plan that takes the most bytes of all tactics at 1 .. ``max_tokens`` tokens: memory never shrinks with tokens."""
    return max((plan(problem, max_tokens, tactic, scales, dtype) for tactic in every(problem)), key=lambda found: found.bytes)


# --- FlashInfer -------------------------------------------------------------------------------------------------------


class Library(NamedTuple):
    """FlashInfer's functions that a call goes through."""

    quantize: Callable[..., tuple[Tensor, Tensor]]
    quantize_by_token: Callable[..., tuple[Tensor, Tensor, Tensor]]
    sort: Callable[..., Any]
    first: Callable[..., tuple[Tensor, Tensor | None]]
    second: Callable[..., Tensor]
    zero: Callable[[Tensor], None]
    combine: Callable[..., None]
    linear_layout: int
    tiled_layout: int
    swiglu: int
    relu2: int


def missing() -> str | None:
    """Why FlashInfer's kernels cannot be called from this environment, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return "no package flashinfer (pip install flashinfer-python)"
    try:
        library()
    except Exception as error:  # noqa: BLE001  importing it builds and loads libraries; whatever that raises, its kernels are not there
        return f"flashinfer without what is needed of it ({type(error).__name__}: {error})"
    return None


@cache
def library() -> Library:
    """What is used of FlashInfer 0.7. Raises ImportError where it is absent, or lacks a part of it."""
    from flashinfer import fp4_quantize
    from flashinfer.fused_moe.cute_dsl.blockscaled_contiguous_gather_grouped_gemm_act_fusion import (
        blockscaled_contiguous_gather_grouped_gemm_act_fusion,
    )
    from flashinfer.fused_moe.cute_dsl.blockscaled_contiguous_grouped_gemm_finalize_fusion import (
        blockscaled_contiguous_grouped_gemm_finalize_fusion,
    )
    from flashinfer.fused_moe.cute_dsl.moe_utils import moe_output_memset_inplace, moe_sort, moe_unpermute
    from flashinfer.quantization.kernels.nvfp4_quantize import (
        SF_LAYOUT_LINEAR,
        SF_LAYOUT_128x4,
        nvfp4_quantize_per_token_cute_dsl,
    )
    from flashinfer.tllm_enums import ActivationType

    return Library(
        fp4_quantize,
        nvfp4_quantize_per_token_cute_dsl,
        moe_sort,
        blockscaled_contiguous_gather_grouped_gemm_act_fusion,
        blockscaled_contiguous_grouped_gemm_finalize_fusion,
        moe_output_memset_inplace,
        moe_unpermute,
        SF_LAYOUT_LINEAR,
        SF_LAYOUT_128x4,
        ActivationType.Swiglu.value,
        ActivationType.Relu2.value,
    )


# --- the call ---------------------------------------------------------------------------------------------------------


def prepare(problem: MoEProblem, tokens: torch.dtype, device: torch.device, max_tokens: int, scales: ActivationScales) -> int:
    """Make the arena large enough for every tactic at up to ``max_tokens`` tokens, and the memset's stream; returns the arena's bytes.

    FlashInfer compiles a kernel at its first launch: :func:`.kernel_check.require` launches each before the first request.
    """
    memset.of(device)
    return workspace.Arena.get(device, largest(problem, max_tokens, scales, tokens).bytes, workspace.EVERY_STREAM).bytes


def fused_moe(
    x: Tensor,
    weights: Weights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    problem: MoEProblem,
    out: Tensor,
    expert_map: Tensor | None = None,
    tactic: Tactic | None = None,
    first: int = 0,
    flashinfer: Library | None = None,
) -> None:
    """``out`` [M, H] = the layer's output for ``x`` [M, H], bf16, both contiguous and 32-byte aligned.

    topk_weights: float32 [M, k]; topk_ids: int32 or int64 [M, k]; both contiguous. Ids that no local expert answers add nothing. This
    rank's experts follow one another from global id ``first``; or ``expert_map`` (integer [num_experts]: local expert or -1) says where
    they are, which takes some small launches more. Without an ordered tactic the sum over a token's experts is made in bf16 in the
    order in which they finish: its last bits differ from call to call. ``tactic``: instead of what was tuned or the heuristic says;
    ``flashinfer``: instead of the installed library.
    Raises RuntimeError if the arena would have to grow while a graph is captured: see :func:`prepare`.
    """
    tokens = x.shape[0]
    if tokens == 0:
        return
    fi = flashinfer or library()
    tactic = tactic or chosen(problem, tokens, x.dtype)
    scales = weights.activation_scales
    found = plan(problem, tokens, tactic, scales, x.dtype)
    memory = workspace.Arena.get(x.device, found.bytes, workspace.EVERY_STREAM).views(found)
    zeros = memset.of(x.device)
    experts, ids = problem.num_experts, topk_ids
    if expert_map is not None:
        # In terms of this rank alone: FlashInfer knows ranks by a range of ids only.
        local = local_ids(topk_ids, problem.num_local_experts, expert_map)
        ids, experts, first = torch.where(local < problem.num_local_experts, local, -1), problem.num_local_experts, 0
    # The routing kernel tells by the range which ids are its own, after a cast to 16 bits.
    ids = ids.clamp(-1, experts).int()
    router = topk_weights
    if problem.apply_router_weight_on_input:
        x, router = (x.float() * topk_weights).to(x.dtype), torch.ones_like(topk_weights)

    # A single row may have any stride, and one of 1 would be taken for a matrix that lies in columns.
    x = x.view(-1).view(x.shape)
    if scales == "static":
        x_codes, x_scale = fi.quantize(x, weights.x_scale, sf_vec_size=16, sf_use_ue8m0=False, is_sf_swizzled_layout=False)
        x_token_scale = None
    else:
        x_codes, x_scale, x_token_scale = fi.quantize_by_token(x, weights.h_scale, sf_layout=fi.linear_layout)
    fi.sort(
        token_selected_experts=ids,
        token_final_scales=router,
        num_experts=experts,
        top_k=problem.top_k,
        local_expert_offset=first,
        num_local_experts=problem.num_local_experts,
        tile_tokens_dim=tactic.tile_tokens,
        out_tile_idx_to_expert_idx=memory["tile_expert"],
        out_tile_idx_to_mn_limit=memory["tile_limit"],
        out_expanded_idx_to_permuted_idx=memory["position"],
        out_permuted_idx_to_expanded_idx=memory["order"],
        out_total_num_padded_tokens=memory["rows"],
        out_num_non_exiting_tiles=memory["tiles"],
    )
    if not tactic.ordered:
        zeros.begin(out, fi.zero)
    h, h_scale, h_token_scale = _first(fi, x_codes, x_scale, x_token_scale, weights, problem, memory, tactic, x.dtype)
    if not tactic.ordered:
        zeros.end()
    fi.second(
        a=h,
        b=weights.w2,
        a_scale=h_scale,
        b_scale=layout.scale_view(weights.w2_scale),
        alpha=weights.w2_alpha,
        tile_idx_to_expert_idx=memory["tile_expert"],
        num_non_exiting_tiles=memory["tiles"],
        tile_idx_to_mn_limit=memory["tile_limit"],
        permuted_idx_to_expanded_idx=memory["order"],
        token_final_scales=router,
        out=memory["y"] if tactic.ordered else out,
        a_per_token_scale=h_token_scale,
        a_dtype="float4_e2m1fn",
        b_dtype="float4_e2m1fn",
        out_dtype="bfloat16",
        mma_tiler_mn=(tactic.tile_tokens, tactic.down_columns),
        cluster_shape_mn=(tactic.tile_tokens // 128, tactic.down_cluster),
        use_fused_finalize=not tactic.ordered,
    )
    if tactic.ordered:
        fi.combine(
            permuted_input=memory["y"],
            output=out,
            expanded_idx_to_permuted_idx=memory["position"],
            topk_scales=router,
            num_tokens=tokens,
            top_k=problem.top_k,
            input_is_expanded=True,
        )


def _first(
    fi: Library,
    x_codes: Tensor,
    x_scale: Tensor,
    x_token_scale: Tensor | None,
    weights: Weights,
    problem: MoEProblem,
    memory: dict[str, Tensor],
    tactic: Tactic,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The second projection's input: codes [S, W/2], block scales in tiled order, and with a scale a token that of each sorted row."""
    static, activation = x_token_scale is None, problem.activation
    h, h_scale = fi.first(
        a=x_codes,
        b=weights.w13,
        a_scale=x_scale,
        b_scale=layout.scale_view(weights.w13_scale),
        alpha=weights.w13_alpha,
        tile_idx_to_expert_idx=memory["tile_expert"],
        tile_idx_to_mn_limit=memory["tile_limit"],
        token_id_mapping=memory["order"],
        num_non_exiting_tiles=memory["tiles"],
        out=memory["h"],
        out_scale=memory["h_scale"] if static else None,
        global_scale=weights.h_scale if static else None,
        a_per_token_scale=x_token_scale,
        topk=problem.top_k,
        a_dtype="float4_e2m1fn",
        b_dtype="float4_e2m1fn",
        c_dtype="float4_e2m1fn" if static else name_of(dtype),
        quantize_output=static,
        mma_tiler_mn=(tactic.tile_tokens, tactic.gate_up_columns),
        cluster_shape_mn=(tactic.tile_tokens // 128, 1),
        activation_type=fi.swiglu if activation.gated else fi.relu2,
        swiglu_alpha=activation.alpha,
        swiglu_beta=activation.beta,
        swiglu_limit=NO_LIMIT if activation.limit is None else activation.limit,
        gated=activation.gated,
    )
    if static:
        return h, h_scale, None
    codes, scale, token_scale = fi.quantize_by_token(h, weights.h_scale, sf_layout=fi.tiled_layout)
    return codes, layout.scale_view(scale.view(1, *scale.shape)), token_scale
