"""Inputs to tune on: routings that are the same in every run, spread over experts as even routing spreads them, for any rank.

The same arguments give the same routing on every machine. A rank gets the most pairs that an even share can round to, so a rank's
call is never empty. Experts are named by their global ids.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..errors import PluginError
from .problem import MoEProblem

Loads = Literal["even", "equal", "random"]


def local_pairs(problem: MoEProblem, tokens: int) -> int:
    """(token, slot) pairs of this rank: an even share of all, rounded up."""
    return min(
        -(-tokens * problem.top_k * problem.num_local_experts // problem.num_experts),
        tokens * min(problem.top_k, problem.num_local_experts),
    )


def shares(count: int, parts: int) -> list[int]:
    """``count`` in ``parts`` whole shares that differ by one at most, the larger ones evenly apart."""
    return [(i + 1) * count // parts - i * count // parts for i in range(parts)]


def even_loads(problem: MoEProblem, tokens: int) -> list[int]:
    """Tokens of each local expert, ascending, as even routing makes them: expert i of E gets the (i + 1/2) / E quantile of a binomial.

    Where every expert is as likely as any other some get more tokens than others, and of a few tokens some experts get none; a tuner
    that gives all the same would pick tiles that only just hold the mean. The sum is :func:`local_pairs`.
    """
    experts, wanted, p = problem.num_local_experts, local_pairs(problem, tokens), problem.top_k / problem.num_experts
    if problem.num_experts == problem.top_k:
        return [tokens] * experts
    loads, count, below = [], 0, _binomial(tokens, p, 0)
    for i in range(experts):
        while below < (i + 0.5) / experts and count < tokens:
            count += 1
            below += _binomial(tokens, p, count)
        loads.append(count)
    # Rounding leaves a few pairs too many or too few: from or to the experts in the middle outwards, which changes the least.
    middle = sorted(range(experts), key=lambda i: abs(2 * i + 1 - experts))
    while (rest := wanted - sum(loads)) != 0:
        step = 1 if rest > 0 else -1
        able = [i for i in middle if 0 <= loads[i] + step <= tokens]
        for i in able[: abs(rest)]:
            loads[i] += step
    return sorted(loads)


def _binomial(n: int, p: float, k: int) -> float:
    log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    return math.exp(log)


def quotas(problem: MoEProblem, tokens: int, first: int = 0, loads: Loads = "even", seed: int = 0) -> list[int]:
    """Tokens of every expert of the model, by global id; their sum is tokens x top_k, and no expert has more than ``tokens``.

    ``first``: global id of this rank's first expert. "even": :func:`even_loads`, shuffled by ``seed``. "equal": every local expert
    gets its mean, rounded up or down. The other ranks' experts share the rest equally.
    Raises PluginError (a ValueError) if the rank's experts lie outside the model's, or top_k is above num_experts.
    """
    experts, local = problem.num_experts, problem.num_local_experts
    if not 0 <= first <= experts - local:
        raise PluginError("first expert", str(first), f"0 to {experts - local}")
    if problem.top_k > experts:
        raise PluginError("top_k", str(problem.top_k), f"up to num_experts = {experts}")
    chance = torch.Generator().manual_seed(seed)
    pairs = local_pairs(problem, tokens) if local < experts else tokens * problem.top_k
    if loads == "even":
        here = even_loads(problem, tokens)
        here = [here[i] for i in torch.randperm(local, generator=chance).tolist()]
    else:
        here = shares(pairs, local)
        turn = seed % local
        here = here[turn:] + here[:turn]
    others = shares(tokens * problem.top_k - pairs, experts - local) if local < experts else []
    return others[:first] + here + others[first:]


def routing(problem: MoEProblem, tokens: int, first: int = 0, loads: Loads = "even", seed: int = 0) -> tuple[Tensor, Tensor]:
    """(router weights float32 [M, k], rows sum to 1; global expert ids int32 [M, k], different within a row), on the CPU.

    An expert has exactly its quota of tokens (one with a quota of 0 none), in no order. "random" is a known mistake of other tuners:
    every id drawn by itself from a few popular experts, neither balanced nor different.
    """
    chance = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, problem.top_k, generator=chance) + 0.1
    weights /= weights.sum(1, keepdim=True)
    if loads == "random":
        drawn = torch.rand(tokens, problem.top_k, generator=chance).pow(3) * problem.num_experts
        return weights, drawn.long().clamp_(max=problem.num_experts - 1).int()
    count = torch.tensor(quotas(problem, tokens, first, loads, seed))
    # Pair number j goes to token j modulo M: a run of one expert's pairs, M at most, meets a token once.
    ids = torch.repeat_interleave(torch.arange(problem.num_experts), count).view(problem.top_k, tokens).t()
    return weights, ids[torch.randperm(tokens, generator=chance)].int().contiguous()
