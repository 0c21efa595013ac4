"""From the router's choice to the experts of this rank, with the rules for ids that no expert here answers."""

from __future__ import annotations

import torch
from torch import Tensor


def local_ids(topk_ids: Tensor, num_local_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """Local expert of each (token, slot), ``num_local_experts`` where there is none.

    ``topk_ids`` int32 or int64 ``[M, k]``, global ids. ``expert_map`` integer ``[num_experts]``: local expert or -1; None
    when this rank holds all experts. An id below 0 or past the last expert (padded rows and NaN logits make both), and a
    map entry that is no local expert, give ``num_local_experts``; nothing is read out of bounds. Returns int64 ``[M, k]``.
    """
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(known, expert_map.long()[ids.clamp(0, expert_map.numel() - 1)], -1)
    return torch.where((ids >= 0) & (ids < num_local_experts), ids, num_local_experts)


def local_list(topk_ids: Tensor, num_local_experts: int, expert_map: Tensor | None = None) -> list[int]:
    """:func:`local_ids` as a list of M * k in row order, with -1 where there is none; waits for the tensors."""
    ids = topk_ids.reshape(-1).tolist()
    if expert_map is None:
        return [i if 0 <= i < num_local_experts else -1 for i in ids]
    known = [i if 0 <= i < num_local_experts else -1 for i in expert_map.tolist()]
    return [known[i] if 0 <= i < len(known) else -1 for i in ids]
