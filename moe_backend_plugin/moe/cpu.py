"""The NVFP4 MoE layer on a CPU: :mod:`.reference`'s formula with few torch calls and little memory.

What costs at serving sizes is dequantising, then the number of calls. So each active expert is dequantised once, several
small experts at a time into one 4 MiB buffer; their tokens form one padded batch, so a chunk of experts is two batched
products; and the router-weighted sum over a token's experts is one ``embedding_bag``. Of small experts, a few tokens (a
decoding step) go through every active one instead, and what was not asked for is not read: that costs the matrix library
nothing, and sorting the tokens by expert is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear.op import project_by_rows
from ..linear.scratch import SCRATCH_VALUES, scratch, scratch_bits
from ..nvfp4.format import quantize_activations
from ..nvfp4.unscaled import unscaled_planes
from .problem import Activation
from .routing import local_list

# The experts' outputs are kept one row a (token, slot) pair before they are summed; longer batches are cut to bound them.
_PAIR_BYTES = 256 << 20
# Rows that padding may add to a chunk's batch beyond a quarter: below that, a call saved is worth more than the rows.
_FREE_PADDING = 64
# Rows of a chunk: with more, what lies between its steps leaves the cache, and a call saved is nothing beside the products.
_CHUNK_ROWS = 512
# Up to this many rows a product with a small expert takes MKL the same time.
_FEW_TOKENS = 8


def fused_moe_cpu(
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
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    w13_input_scale: Tensor | None = None,
    w2_input_scale: Tensor | None = None,
) -> Tensor:
    """As :func:`.reference.fused_moe`, shapes, rules for bad input and precision included; float32 sums in another order.

    The weights and block scales are those that :func:`.op.prepare` returned. Input scales mean "nvfp4" activations. Shapes
    are not checked here: the op does. Returns a new ``[M, H]`` in ``x``'s dtype.
    """
    # Weights of an expert's larger projection.
    values = 2 * max(w13.shape[1] * w13.shape[2], w2.shape[1] * w2.shape[2])
    pair_bytes = topk_ids.shape[1] * x.shape[1] * 4
    block = max(1, _PAIR_BYTES // pair_bytes)
    if x.shape[0] > block:
        blocks = [
            fused_moe_cpu(
                *(xs, w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, weights, ids, activation),
                *(apply_router_weight_on_input, expert_map, w13_input_scale, w2_input_scale),
            )
            for xs, weights, ids in zip(x.split(block), topk_weights.split(block), topk_ids.split(block), strict=True)
        ]
        return torch.cat(blocks)

    (tokens, hidden), top_k, width = x.shape, topk_ids.shape[1], w2.shape[2] // 2
    # An expert that hardly shares the buffer is large: there every row counts, and the sorting does not.
    few = tokens <= _FEW_TOKENS and 4 * values <= SCRATCH_VALUES and not apply_router_weight_on_input
    local = local_list(topk_ids, w13.shape[0], expert_map)
    plan = _plan_few(local, tokens, values) if few else _plan(local, values)
    if not plan.chunks:
        return x.new_zeros(x.shape)

    weights = topk_weights.float()
    if few:
        every_input = x.float()
    else:
        pair_of_row = torch.tensor(plan.pair_of_row)
        token_of_row = pair_of_row if top_k == 1 else pair_of_row.div(top_k, rounding_mode="floor")
    # Row 0 of the outputs is zero and stands for the pairs of no expert here.
    outputs = torch.empty(1 + sum(len(chunk) * most for chunk, most in plan.chunks), hidden)
    if plan.strangers:
        outputs[0].zero_()
    w4a4 = w13_input_scale is not None

    end = 0
    for chunk, most in plan.chunks:
        start, end = end, end + len(chunk) * most
        which, shape = _selection(chunk), (len(chunk), most, hidden)
        if few:
            inputs = every_input.expand(shape)
        else:
            inputs = x.index_select(0, token_of_row[start:end]).float()
            if apply_router_weight_on_input:
                inputs = inputs.mul_(weights.reshape(-1)[pair_of_row[start:end]].unsqueeze(1)).to(x.dtype).float()
            inputs = inputs.view(shape)
        if w4a4:
            inputs = quantize_activations(inputs, w13_input_scale.view(w13.shape[0], -1).amax(1)[which].view(-1, 1, 1))

        h = torch.empty(*shape[:2], w13.shape[1] * 4)
        _project(inputs, w13, w13_scale, which, h)
        h.view(*shape[:2], -1, width).mul_(w13_scale_2[which].view(len(chunk), 1, -1, 1))
        h = activation.apply(h)
        if x.dtype != torch.float32:
            h = h.to(x.dtype).float()
        if w4a4:
            h = quantize_activations(h, w2_input_scale[which].view(-1, 1, 1))
        out = outputs[1 + start : 1 + end].view(*shape[:2], hidden)
        _project(h, w2, w2_scale, which, out)
        out.mul_(w2_scale_2[which].view(-1, 1, 1))

    row_of_pair = torch.tensor(plan.row_of_pair)
    if apply_router_weight_on_input:
        weights = torch.ones_like(weights)
    elif plan.strangers:
        # The zero row times a NaN weight would be NaN.
        weights = weights.masked_fill(row_of_pair.view(weights.shape) == 0, 0.0)
    bags = torch.arange(0, row_of_pair.numel(), top_k)
    # Positional: no gradient scaling, mode 0 is the sum, not sparse.
    return torch.embedding_bag(outputs, row_of_pair, bags, False, 0, False, weights.reshape(-1))[0].to(x.dtype)


@dataclass(frozen=True)
class _Plan:
    """Which rows to compute: chunk after chunk, expert after expert, each expert's (token, slot) pairs and then padding.

    ``chunks``: local experts of a chunk, and the rows each of them is padded to. ``pair_of_row``: pair ``token * k + slot``
    of each row (padding repeats a pair, its result is not read). ``row_of_pair``: 1 + the row of each pair, 0 for a pair of
    no expert here, of which there are ``strangers``. From :func:`_plan_few` an expert's rows are all tokens in order, and
    ``pair_of_row`` is empty.
    """

    chunks: list[tuple[list[int], int]]
    pair_of_row: list[int]
    row_of_pair: list[int]
    strangers: int


def _plan(local: list[int], values: int) -> _Plan:
    """``local``: local expert of each pair, -1 for none. ``values``: weights of one expert's larger projection.

    Lists and not tensors: a decoding step has tens of pairs, where each of a dozen torch calls would cost more than all of
    this; and at 16,384 pairs it is some milliseconds beside seconds of products.
    """
    pairs: dict[int, list[int]] = {}
    for pair, expert in enumerate(local):
        if expert >= 0:
            pairs.setdefault(expert, []).append(pair)
    counts = {expert: len(pairs[expert]) for expert in sorted(pairs)}
    chunks = _chunks(counts, values)
    pair_of_row: list[int] = []
    row_of_pair = [0] * len(local)
    for chunk, most in chunks:
        for expert in chunk:
            own = pairs[expert]
            for row, pair in enumerate(own, len(pair_of_row) + 1):
                row_of_pair[pair] = row
            pair_of_row += own
            pair_of_row += own[:1] * (most - len(own))
    return _Plan(chunks, pair_of_row, row_of_pair, len(local) - sum(counts.values()))


def _plan_few(local: list[int], tokens: int, values: int) -> _Plan:
    """As :func:`_plan`, with every token a row of every active expert."""
    active = sorted({*local})
    strangers = local.count(-1)
    if strangers:
        del active[0]
    most, top_k = max(1, SCRATCH_VALUES // values), len(local) // max(1, tokens)
    first = {expert: 1 + i * tokens for i, expert in enumerate(active)}
    row_of_pair = [first[e] + i // top_k if e >= 0 else 0 for i, e in enumerate(local)]
    return _Plan([(active[i : i + most], tokens) for i in range(0, len(active), most)], [], row_of_pair, strangers)


def _chunks(counts: dict[int, int], values: int) -> list[tuple[list[int], int]]:
    """Groups of experts, in the order given, and the rows each expert of a group is padded to.

    ``counts``: pairs of each active expert. A group's weights fit the scratch buffer (a group of one may not: it is cut by
    rows), it has few rows unless it is one expert, and padding adds at most a quarter to them, or little.
    """
    most_experts = max(1, SCRATCH_VALUES // values)
    chunks: list[tuple[list[int], int]] = []
    real = 0
    for expert, count in counts.items():
        if chunks:
            group, most = chunks[-1]
            wide = max(most, count)
            rows = (len(group) + 1) * wide
            if len(group) < most_experts and rows <= min(_CHUNK_ROWS, (real + count) * 5 // 4 + _FREE_PADDING):
                group.append(expert)
                chunks[-1] = (group, wide)
                real += count
                continue
        chunks.append(([expert], count))
        real = count
    return chunks


def _selection(chunk: list[int]) -> slice | Tensor:
    """An index for the experts of a chunk: neighbours as a slice, which copies nothing."""
    if chunk[-1] - chunk[0] + 1 == len(chunk):
        return slice(chunk[0], chunk[-1] + 1)
    return torch.tensor(chunk)


def _select(words: Tensor, scale: Tensor, which: slice | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(which, slice):
        return words[which], scale[which]
    return words.index_select(0, which), scale.index_select(0, which)


def _dequantise(words: Tensor, scale: Tensor, which: slice | Tensor) -> Tensor:
    """Block-scaled weights ``[n, N, K]`` of n experts, in the scratch buffer."""
    words, scale = _select(words, scale, which)
    count = words.numel() * 2
    return unscaled_planes(words, scale, scratch_bits(count), scratch(count).view(*scale.shape[:2], -1))


def _project(x: Tensor, words: Tensor, scale: Tensor, which: slice | Tensor, out: Tensor) -> None:
    """``out [n, m, N] = x [n, m, K] @ w.T`` for n experts' block-scaled weights, without the global scale."""
    if out.shape[0] * words.shape[1] * words.shape[2] * 2 <= SCRATCH_VALUES:
        torch.bmm(x, _dequantise(words, scale, which).transpose(1, 2), out=out)
    else:
        # One expert, larger than the buffer.
        words, scale = _select(words, scale, which)
        out[0] = project_by_rows(x[0], words[0], scale[0])
