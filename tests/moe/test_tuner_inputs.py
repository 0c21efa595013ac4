"""Which token counts are tuned, and on which routings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.bench.moe import MODELS
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe import balanced, tiles
from moe_backend_plugin.moe.buckets import MOST_TOKENS, edges
from moe_backend_plugin.moe.problem import MoEProblem

QWEN = MODELS["qwen3-30b-a3b"].problem

# --- buckets ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 1500), st.lists(st.integers(1, 1500), max_size=5), st.sampled_from(list(MODELS)))
def test_buckets_follow_the_actual_sizes(max_tokens, sizes, model):
    problem = MODELS[model].problem
    sizes = [size for size in sizes if size <= max_tokens]
    found = edges(problem, max_tokens, 132, sizes)
    assert found == sorted(set(found)) and found[0] == 1 and found[-1] == max_tokens
    assert {1 << i for i in range(20) if 1 << i <= max_tokens} | set(sizes) <= set(found)
    # A longer list has the shorter one's counts, but for its end.
    assert set(found[:-1]) - set(sizes) <= set(edges(problem, max_tokens + 100, 132))
    for first, last in zip([0, *found], found, strict=False):
        chosen = {tiles.choose(problem, tokens, 132) for tokens in {first + 1, (first + last) // 2 + 1, last}}
        assert len(chosen) == 1  # within a bucket the heuristic does not change its mind


def test_buckets_have_no_cap():
    found = edges(QWEN, MOST_TOKENS, 132)
    assert {1 << i for i in range(18)} <= set(found) and found[-1] == 131072
    assert edges(QWEN, MOST_TOKENS, 132, cap=8192)[-1] == 8192


@pytest.mark.parametrize(("tokens", "sizes"), [(0, ()), (MOST_TOKENS + 1, ()), (8, (9,)), (8, (0,))])
def test_bad_sizes(tokens, sizes):
    with pytest.raises(PluginError):
        edges(QWEN, tokens, 132, sizes)


# --- loads ------------------------------------------------------------------------------------------------------------


@st.composite
def ranks(draw):
    """A problem, a rank's first expert, tokens."""
    experts = draw(st.integers(1, 300))
    local = draw(st.sampled_from([d for d in range(1, experts + 1) if experts % d == 0]))
    top_k = draw(st.integers(1, min(experts, 32)))
    first = draw(st.integers(0, experts // local - 1)) * local
    return MoEProblem(experts, local, 64, 64, top_k), first, draw(st.integers(1, 400))


@settings(max_examples=150, deadline=None)
@given(ranks(), st.sampled_from(["even", "equal"]), st.integers(0, 5))
def test_routings_meet_their_quotas(rank, loads, seed):
    problem, first, tokens = rank
    quotas = balanced.quotas(problem, tokens, first, loads, seed)
    weights, ids = balanced.routing(problem, tokens, first, loads, seed)
    assert ids.shape == weights.shape == (tokens, problem.top_k) and ids.dtype == torch.int32 and ids.is_contiguous()
    assert torch.bincount(ids.flatten(), minlength=problem.num_experts).tolist() == quotas  # a quota of 0 gets none
    assert all(len(set(row)) == problem.top_k for row in ids.tolist())
    assert torch.allclose(weights.sum(1), torch.ones(tokens)) and (weights > 0).all()
    again = balanced.routing(problem, tokens, first, loads, seed)
    assert torch.equal(again[0], weights) and torch.equal(again[1], ids)

    here = quotas[first : first + problem.num_local_experts]
    share = tokens * problem.top_k * problem.num_local_experts / problem.num_experts
    assert share <= sum(here) < share + 1 and sum(here) >= 1
    if loads == "equal":
        assert max(here) - min(here) <= 1
    others = quotas[:first] + quotas[first + problem.num_local_experts :]
    assert not others or max(others) - min(others) <= 1


def test_every_rank_gets_the_same_load_under_its_own_ids():
    model = MODELS["deepseek-v3-ep16"].problem
    found = [balanced.quotas(model, 40, 16 * rank)[16 * rank : 16 * rank + 16] for rank in range(16)]
    assert all(loads == found[0] for loads in found) and sum(found[0]) == 20


@pytest.mark.parametrize("tokens", [1, 16, 64, 300, 4096])
def test_even_loads_are_those_of_even_routing(tokens):
    """Against draws: experts that get a token, and the fullest ones."""
    loads = balanced.even_loads(QWEN, tokens)
    assert sum(loads) == tokens * 8 and loads == sorted(loads)
    chance = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(40):
        ids = torch.rand(tokens, 128, generator=chance).topk(8).indices.flatten()
        drawn.append(torch.bincount(ids, minlength=128).sort().values.float())
    mean = torch.stack(drawn).mean(0)
    assert (torch.tensor(loads) - mean).abs().max() <= max(2.5, 0.06 * tokens / 16)
    active = sum(load > 0 for load in loads)
    assert abs(active - tiles.active_experts(QWEN, tokens)) <= 6


def test_bad_ranks():
    with pytest.raises(PluginError, match="first expert: found 250; allowed: 0 to 240"):
        balanced.quotas(MODELS["deepseek-v3-ep16"].problem, 4, 250)
    with pytest.raises(PluginError, match="top_k: found 5"):
        balanced.quotas(MoEProblem(4, 4, 64, 64, 5), 4)


def test_random_routing_is_neither_even_nor_different():
    _, ids = balanced.routing(QWEN, 512, loads="random")
    counts = torch.bincount(ids.flatten(), minlength=128)
    assert counts.max() > 10 * counts.float().mean() and any(len(set(row)) < 8 for row in ids.tolist())
