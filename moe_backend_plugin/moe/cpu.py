"""The NVFP4 MoE layer on a CPU: :mod:`.reference`'s formula with few torch calls and little memory.

What costs at serving sizes is dequantising, then the number of calls. So each active expert is dequantised once, several
small experts at a time into one 4 MiB buffer; their tokens form one padded batch, so a chunk of experts is two batched
products; and the router-weighted sum over a token's experts is one ``embedding_bag``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear.scratch import SCRATCH_VALUES, scratch
from ..nvfp4.format import quantize_activations
from ..nvfp4.unscaled import unscaled
from .problem import Activation
from .routing import local_ids

# The experts' outputs are kept one row a (token, slot) pair before they are summed; longer batches are cut to bound them.
_PAIR_BYTES = 256 << 20
# Rows that padding may add to a chunk's batch beyond doubling it: below that, a call saved is worth more than the rows.
_FREE_PADDING = 64


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

    Input scales mean "nvfp4" activations. Shapes are not checked here: the op does. Returns a new ``[M, H]`` in ``x``'s
    dtype.
    """
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

    experts, top_k = w13.shape[0], topk_ids.shape[1]
    local = local_ids(topk_ids, experts, expert_map)
    flat, order = local.view(-1).sort(stable=True)
    counts = torch.bincount(flat, minlength=experts + 1).tolist()
    pairs = flat.numel() - counts.pop()
    if pairs == 0:
        return x.new_zeros(x.shape)
    chunks = _chunks(counts, max(w13[0].numel(), w2[0].numel()) * 2)

    # Every pair's row among the outputs; row 0 is zero and stands for the pairs of no expert here.
    first_row, row, start = [0] * (experts + 1), 1, 0
    for chunk, most in chunks:
        for e in chunk:
            first_row[e] = row - start
            row += most
            start += counts[e]
    positions = torch.arange(flat.numel())
    rows = torch.tensor(first_row)[flat].add_(positions)
    if pairs < flat.numel():
        rows[pairs:] = 0
    row_of_pair = torch.empty_like(rows).scatter_(0, order, rows).view(local.shape)
    outputs = torch.empty(row, x.shape[1])
    outputs[0].zero_()

    # w2's global scale joins the router weight: both multiply an expert's finished output.
    scales = F.pad(w2_scale_2.float(), (0, 1))[local]
    weights = topk_weights.float()
    if not apply_router_weight_on_input:
        scales.mul_(weights).masked_fill_(local == experts, 0.0)

    w4a4 = w13_input_scale is not None
    token = order // top_k
    row, start = 1, 0
    for chunk, most in chunks:
        starts = []
        for e in chunk:
            starts.append(start)
            start += counts[e]
        which = _selection(chunk)
        shape = (len(chunk), most)
        # Rows past an expert's own tokens are other pairs' tokens: computed, and never read.
        at = torch.tensor(starts).unsqueeze(1).add(positions[:most]).clamp_(max=pairs - 1).view(-1)
        inputs = x.index_select(0, token[at]).float()
        if apply_router_weight_on_input:
            inputs = inputs.mul_(weights.reshape(-1)[order[at]].unsqueeze(1)).to(x.dtype).float()
        inputs = inputs.view(*shape, -1)
        if w4a4:
            inputs = quantize_activations(inputs, w13_input_scale.view(experts, -1).amax(1)[which].view(-1, 1, 1))

        h = torch.empty(*shape, w13.shape[1])
        _project(inputs, w13, w13_scale, which, h)
        h.view(*shape, -1, w2.shape[2] * 2).mul_(w13_scale_2.float()[which].view(len(chunk), 1, -1, 1))
        h = activation.apply(h)
        if x.dtype != torch.float32:
            h = h.to(x.dtype).float()
        if w4a4:
            h = quantize_activations(h, w2_input_scale[which].view(-1, 1, 1))
        end = row + len(chunk) * most
        _project(h, w2, w2_scale, which, outputs[row:end].view(*shape, -1))
        row = end
    return F.embedding_bag(row_of_pair, outputs, mode="sum", per_sample_weights=scales).to(x.dtype)


def _chunks(counts: list[int], values: int) -> list[tuple[list[int], int]]:
    """Groups of active experts, in order of their number, and the rows each expert of a group is padded to.

    ``counts``: pairs of each expert. ``values``: weights of one expert's larger projection. A group's weights fit the
    scratch buffer (a group of one may not: it is cut by rows), and padding at most doubles its rows, or adds few.
    """
    most_experts = max(1, SCRATCH_VALUES // values)
    chunks: list[tuple[list[int], int]] = []
    real = 0
    for e, count in enumerate(counts):
        if not count:
            continue
        if chunks:
            group, most = chunks[-1]
            wide = max(most, count)
            if len(group) < most_experts and (len(group) + 1) * wide <= 2 * (real + count) + _FREE_PADDING:
                group.append(e)
                chunks[-1] = (group, wide)
                real += count
                continue
        chunks.append(([e], count))
        real = count
    return chunks


def _selection(chunk: list[int]) -> slice | Tensor:
    """An index for the experts of a chunk: neighbours as a slice, which copies nothing."""
    if chunk[-1] - chunk[0] + 1 == len(chunk):
        return slice(chunk[0], chunk[-1] + 1)
    return torch.tensor(chunk)


def _project(x: Tensor, packed: Tensor, scale: Tensor, which: slice | Tensor, out: Tensor) -> None:
    """``out [n, m, N] = x [n, m, K] @ w.T`` for n experts' block-scaled weights, without the global scale."""
    if isinstance(which, slice):
        packed, scale = packed[which], scale[which]
    else:
        packed, scale = packed.index_select(0, which), scale.view(torch.uint8).index_select(0, which).view(scale.dtype)
    n, rows, columns = packed.shape[0], packed.shape[1], packed.shape[2] * 2
    if n * rows * columns <= SCRATCH_VALUES:
        w = unscaled(packed, scale, out=scratch(n * rows * columns).view(n, rows, columns))
        torch.bmm(x, w.transpose(1, 2), out=out)
        return
    # One expert, larger than the buffer.
    step = max(1, SCRATCH_VALUES // columns)
    for first in range(0, rows, step):
        part = packed[0, first : first + step]
        w = unscaled(part, scale[0, first : first + step], out=scratch(part.numel() * 2).view(-1, columns))
        torch.mm(x[0], w.t(), out=out[0, :, first : first + step])
