"""Tactics as data: names, what is valid, the workspace that serves them all, and which one a call gets."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.bench.moe import MODELS
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe import cuda, route, tactics, tiles, workspace
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.tactics import Bucket, Table
from moe_backend_plugin.moe.tiles import Choice, Shape

BF16 = torch.bfloat16
QWEN = MODELS["qwen3-30b-a3b"].problem
MULTIPROCESSORS = 132
shapes = st.builds(
    Shape,
    tile_tokens=st.sampled_from([0, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 256, 272]),
    row_groups=st.integers(0, 8),
    k_groups=st.integers(1, 4),
    row_blocks=st.integers(1, 4),
    k_blocks=st.sampled_from([1, 2, 3, 4, 8]),
    blocks=st.integers(1, 3),
    warp_mma=st.booleans(),
)
problems = st.builds(
    lambda experts, local, hidden, intermediate, top_k, gated: MoEProblem(
        experts, min(local, experts), 16 * hidden, 16 * intermediate, min(top_k, experts), Activation("silu" if gated else "relu2")
    ),
    st.integers(1, 1024),
    st.integers(1, 1024),
    st.integers(16, 512),
    st.integers(1, 128),
    st.integers(1, 32),
    st.booleans(),
)


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(tactics, "_tables", {})


def test_names_are_read_back_and_tell_tactics_apart():
    found = tactics.every(QWEN)
    assert len({tactics.name(tactic) for tactic in found}) == len(found) > 300
    assert all(tactics.parse(tactics.name(tactic)) == tactic for tactic in found)
    assert tactics.name(Choice(tiles.FEW, tiles.SOME)) == "t8.r1x1k2x2b2w.r2x1k1x4b2w"


@pytest.mark.parametrize("text", ["", "t8", "t8.r1x1k2x2b2w", "t8.r1x1k2x2b2w.r2x1k1x4b2w ", "t8.r1x1k2x2b2v.r2x1k1x4b2w", "8.1.2"])
def test_what_is_no_name(text):
    with pytest.raises(PluginError, match="tactic: found .*; allowed: a name such as t8"):
        tactics.parse(text)


@settings(max_examples=300, deadline=None)
@given(shapes)
def test_valid_shapes_are_variants_of_the_kernel(shape):
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    from moe_backend_plugin.kernels.moe_gemm import PRODUCER_REGISTERS, SHARED_BYTES, WARPGROUP, Variant

    if tactics.shape_reason(shape) is not None:
        return
    for use in ("gate_up", "down"):
        variant = Variant(**cuda.variant_fields(QWEN, use, shape, BF16))
        threads = shape.row_groups * shape.k_groups * WARPGROUP + variant.producers
        assert threads <= 1024 and shape.blocks * variant.shared_bytes <= SHARED_BYTES
        assert variant.stages >= 2 and shape.rows == variant.rows
        if variant.regroup:  # what the warpgroups ask for must be there when the block starts, or they wait for ever
            held = (threads - variant.producers) * variant.consumer_registers + variant.producers * PRODUCER_REGISTERS
            assert PRODUCER_REGISTERS <= variant.consumer_registers <= 255, tactics.name(Choice(shape, shape))
            assert shape.blocks == 1 and held <= 65536 // threads // 8 * 8 * threads


def test_what_the_heuristic_takes_is_valid_and_among_the_candidates():
    for model in MODELS.values():
        for choice, tokens in tiles.choices(model.problem, 20000, MULTIPROCESSORS).items():
            assert tactics.validity(model.problem, choice) is None
            assert tactics.candidates(model.problem, tokens, MULTIPROCESSORS)[0] == choice


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(12, 1), "12 tokens a tile"),
        (Shape(272, 1), "272 tokens a tile"),
        (Shape(8, 8, warp_mma=True), "threads"),
        (Shape(16, 1, k_blocks=1), "1 x 1 units"),
        (Shape(8, 1, row_blocks=2, k_blocks=1, warp_mma=True), "1 blocks a stage"),
        (Shape(16, 1, warp_mma=True), "16 tokens a tile"),
        (Shape(16, 1, blocks=3), "3 thread blocks"),
        (Shape(128, 4, row_blocks=2), "need 192 registers a thread (allowed: 96 with 768 threads)"),
        (Shape(128, 4), "need 128 registers a thread"),
        (Shape(128, 2, row_blocks=2, blocks=2), "take registers from the rest, 2 blocks"),
        (Shape(256, 1, row_blocks=2), "need 320 registers"),
        (Shape(128, 2, row_blocks=2, k_blocks=8), "stages fit"),
        (Shape(16, 0), "a count below 1"),
    ],
    ids=str,
)
def test_invalid_shapes_say_why(shape, words):
    assert words in tactics.shape_reason(shape)
    reason = tactics.validity(QWEN, Choice(shape, shape))
    assert reason.startswith("gate_up: ") and words in reason


def test_both_projections_share_their_tiles():
    assert "tiles of 8 and 16" in tactics.validity(QWEN, Choice(tiles.FEW, tiles.TILES[16]))
    tiny = MoEProblem(8, 8, 64, 16, 2)
    assert "256 rows a tile, and 64 rows of weights" in tactics.validity(tiny, Choice(Shape(16, 1, k_blocks=4), Shape(16, 4)))


@settings(max_examples=60, deadline=None)
@given(problems, st.integers(1, 131072), st.integers(1, 528), st.integers(0, 1 << 30))
def test_candidates_are_valid_near_the_load_and_not_too_many(problem, tokens, multiprocessors, seed):
    found = tactics.candidates(problem, tokens, multiprocessors)
    assert len(found) == len(set(found)) <= 150
    assert all(tactics.validity(problem, tactic) is None for tactic in found)
    chance = random.Random(seed)
    times = {tactic: chance.uniform(1, 2) for tactic in found}
    more = tactics.crossed(times)
    assert not set(more) & set(found) and len(more) <= 9 * len(tactics.TILE_TOKENS)
    assert all(tactics.validity(problem, tactic) is None for tactic in more)
    # What they are made of was compiled for the candidates.
    assert {t.gate_up for t in more} <= {t.gate_up for t in found} and {t.down for t in more} <= {t.down for t in found}


@settings(max_examples=60, deadline=None)
@given(problems, st.integers(1, 131072), st.integers(0, 1 << 30), st.sampled_from([torch.bfloat16, torch.float16]))
def test_one_workspace_serves_every_tactic_at_every_token_count(problem, max_tokens, seed, dtype):
    every = tactics.every(problem)
    held = tactics.largest_plan(problem, max_tokens, every, dtype, route.scratch_ints).bytes
    chance = random.Random(seed)
    for tokens in {1, max_tokens, *(chance.randint(1, max_tokens) for _ in range(20))}:
        for tile in {tactic.tile_tokens for tactic in every}:
            plan = workspace.plan.__wrapped__(problem, tokens, workspace.Call(tile, y=dtype), dtype, route.scratch_ints)
            assert plan.bytes <= held
            # The tile list has room for the worst routing with this tile.
            assert plan["tiles"].shape[0] >= route.max_tiles(tokens * problem.top_k, problem.num_local_experts, tile)


# --- the choice -------------------------------------------------------------------------------------------------------

A, B, C = (tactics.candidates(QWEN, 64, MULTIPROCESSORS)[i] for i in (1, 2, 3))


def test_a_table_never_answers_from_less_load_and_leaves_gaps_to_the_heuristic():
    table = Table([Bucket(1, 1, A), Bucket(5, 8, B), Bucket(7, 7, C)])
    assert [table.of(tokens) for tokens in range(1, 11)] == [A, None, None, None, B, B, C, B, None, None]
    buckets = [Bucket(1, 4, A), Bucket(5, 8, B), Bucket(9, 131072, C)]
    for tokens in (1, 4, 5, 8, 9, 16384, 131072):
        bucket = next(b for b in buckets if b.tactic == Table(buckets).of(tokens))
        assert bucket.first <= tokens <= bucket.last


def test_without_a_table_the_heuristic_answers():
    for tokens in (1, 64, 5000):
        assert tactics.chosen(QWEN, tokens, MULTIPROCESSORS) is tiles.choose(QWEN, tokens, MULTIPROCESSORS)
    assert tactics.choices(QWEN, 3000, MULTIPROCESSORS) == tiles.choices(QWEN, 3000, MULTIPROCESSORS)
    if _dsl():  # each shape once, and up to 32 and 128 pairs once more
        shapes = [(use, shape, most) for choice, last in _sizes(3000) for use, shape, most in cuda._uses(QWEN, choice, last)]
        assert len(list(cuda.variants(QWEN, BF16, 3000, MULTIPROCESSORS))) == len(set(shapes))


def _sizes(largest):
    return ((tactics.chosen(QWEN, tokens, MULTIPROCESSORS), tokens) for tokens in range(1, largest + 1))


def _dsl() -> bool:
    import importlib.util

    return importlib.util.find_spec("cutlass") is not None


def test_with_a_table_kernels_and_arena_are_those_of_the_calls():
    wide = Choice(tactics.shapes(256)[0], tactics.shapes(256)[0])
    table = Table([Bucket(1, 8, A), Bucket(9, 64, wide)])
    assert tactics.set_table(QWEN, BF16, table) and not tactics.set_table(QWEN, BF16, Table(table.buckets))
    cuda.forget_choices()
    assert tactics.chosen(QWEN, 8, MULTIPROCESSORS) == A and tactics.chosen(QWEN, 9, MULTIPROCESSORS) == wide
    assert tactics.chosen(QWEN, 65, MULTIPROCESSORS) == tiles.choose(QWEN, 65, MULTIPROCESSORS)
    assert tactics.chosen(QWEN, 8, MULTIPROCESSORS, torch.float16) == tiles.choose(QWEN, 8, MULTIPROCESSORS)
    met = tactics.choices(QWEN, 500, MULTIPROCESSORS)
    assert met[A] == 8 and met[wide] == 64
    held = cuda.arena_bytes(QWEN, 500, BF16, MULTIPROCESSORS)
    for tokens in range(1, 501):
        choice = tactics.chosen(QWEN, tokens, MULTIPROCESSORS)
        assert choice in met and met[choice] >= tokens
        assert workspace.plan(QWEN, tokens, workspace.Call(choice.tile_tokens), BF16, route.scratch_ints).bytes <= held
    assert tactics.set_table(QWEN, BF16, None) and not tactics.set_table(QWEN, BF16, None)
    cuda.forget_choices()


def test_a_choice_reads_no_file(monkeypatch):
    tactics.set_table(QWEN, BF16, Table([Bucket(1, 8, A)]))

    def no_file(*_, **__):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", no_file)
    assert tactics.chosen(QWEN, 5, MULTIPROCESSORS) == A
    assert tactics.chosen(QWEN, 9, MULTIPROCESSORS) == tiles.choose(QWEN, 9, MULTIPROCESSORS)
