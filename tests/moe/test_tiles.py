"""The choice of kernels on random layers, and what the host makes of it: kernels, grids, arena. No GPU is needed."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.moe import cuda, route, tactics, tiles, workspace
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.tactic_cache import problem_of
from moe_backend_plugin.moe.tiles import Choice

BF16, FP16 = torch.bfloat16, torch.float16
MULTIPROCESSOR_SHARED = 228 << 10
SYSTEM_SHARED = 1 << 10
"""Bytes of a block's shared memory that are not its own."""
RECORDED = sorted((Path(__file__).parents[2] / "integration/bench/results").glob("tuner_biases_*.json"))
SHAPES = tactics.SHIPPED
LAYERS = (
    MoEProblem(128, 128, 2048, 768, 8),
    MoEProblem(512, 512, 2048, 512, 10),
    MoEProblem(256, 32, 7168, 2048, 8),
    MoEProblem(128, 128, 3072, 1536, 4, Activation("swigluoai", 1.702, 1.0, 7.0)),
    MoEProblem(24, 6, 272, 144, 3, Activation("relu2")),
    MoEProblem(16, 16, 4096, 1040, 2, apply_router_weight_on_input=True),
    MoEProblem(1, 1, 256, 16, 1),
)


@st.composite
def problems(draw):
    experts = draw(st.integers(1, 1024))
    return MoEProblem(
        experts,
        draw(st.integers(1, experts)),
        16 * draw(st.integers(256 // 16, 16384 // 16)),
        16 * draw(st.integers(1, 8192 // 16)),
        draw(st.integers(1, min(32, experts))),
        Activation(draw(st.sampled_from(["silu", "swigluoai", "relu2"]))),
        apply_router_weight_on_input=draw(st.booleans()),
    )


counts = st.one_of(st.integers(1, 64), st.integers(1, 16384))
multiprocessors = st.sampled_from([78, 114, 132])


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.tile_tokens} tokens, {s.rows} rows")
def test_a_ring_has_room_for_eight_blocks_of_columns(shape):
    assert 2 <= shape.stages <= 12 and shape.stages * shape.stage_blocks >= 8


@settings(max_examples=500, deadline=None)
@given(problems(), counts, multiprocessors, st.sampled_from([BF16, FP16]))
def test_every_choice_is_a_kernel_that_fits(problem, tokens, processors, dtype):
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    from moe_backend_plugin.kernels.moe_gemm import Variant

    choice = tiles.choose(problem, tokens, processors)
    assert choice.gate_up.tile_tokens == choice.down.tile_tokens == choice.tile_tokens
    assert choice.tile_tokens in route.TILE_TOKENS and choice.tile_tokens <= workspace.ROW_SLACK
    for use, shape in (("gate_up", choice.gate_up), ("down", choice.down)):
        variant = Variant(**cuda.variant_fields(problem, use, shape, dtype))
        assert shape.blocks * (variant.shared_bytes + SYSTEM_SHARED) <= MULTIPROCESSOR_SHARED
        assert (variant.rows, variant.stage_blocks, variant.tile_tokens) == (shape.rows, shape.stage_blocks, choice.tile_tokens)
        assert variant.gated == (use == "gate_up" and problem.activation.gated)
        assert variant.weighted == ((use == "gate_up") == problem.apply_router_weight_on_input)
        columns = -(-(problem.hidden if use == "gate_up" else problem.intermediate) // 64)
        assert variant.ragged == (columns % variant.stage_blocks != 0)


# Layers whose thread blocks all have many pieces to do, so that the last round hardly counts.
large_layers = st.builds(
    lambda experts, hidden, width, top_k: MoEProblem(experts, experts, 16 * hidden, 16 * width, top_k),
    st.integers(128, 1024),
    st.integers(4096 // 16, 16384 // 16),
    st.integers(2048 // 16, 8192 // 16),
    st.integers(1, 32),
)


@settings(max_examples=100, deadline=None)
@given(large_layers, multiprocessors, st.lists(counts, min_size=2, max_size=20))
def test_tiles_grow_with_the_tokens(problem, processors, tokens):
    """As long as an expert's tokens fit one tile."""
    fitting = [count for count in sorted(tokens) if (mean := tiles.mean_tokens(problem, count)) + 2 * mean**0.5 <= 144]
    sizes = [tiles.choose(problem, count, processors).tile_tokens for count in fitting]
    assert sizes == sorted(sizes)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 2000), multiprocessors)
def test_choices_are_those_of_every_count(problem, max_tokens, processors):
    last = {}
    for tokens in range(1, max_tokens + 1):
        last[tiles.choose(problem, tokens, processors)] = tokens
    assert tiles.choices(problem, max_tokens, processors) == last


@settings(max_examples=200, deadline=None)
@given(large_layers, counts)
def test_a_tile_holds_what_an_expert_gets(problem, tokens):
    """All but the fullest experts are done with one tile, as long as there is one of that size."""
    mean = tiles.mean_tokens(problem, tokens)
    assert tiles.choose(problem, tokens, 132).tile_tokens >= mean - 1e-9 or mean > 128


@settings(max_examples=200, deadline=None)
@given(problems(), counts)
def test_active_experts(problem, tokens):
    active = tiles.active_experts(problem, tokens)
    assert 0 < active <= problem.num_local_experts and tiles.mean_tokens(problem, tokens) >= 1 - 1e-9


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_no_tactic_was_much_faster_than_what_is_chosen(file):
    """Of all that were timed on a GPU. The projections are launches of their own, each timed in every shape beside one of the other, so
    a pair that was not timed is the sum of its parts."""
    content = json.loads(file.read_text(encoding="utf-8"))
    problem = problem_of(content["problem"])
    found: dict[int, dict[Choice, float]] = {}
    for row in content["rows"]:
        if row["condition"] == "unbiased":
            found.setdefault(row["tokens"], {})[tactics.parse(row["tactic"])] = statistics.mean(row["us"])

    def of_parts(us: dict[Choice, float], wanted: Choice) -> float:
        gate_ups, downs = ([one for one in us if getattr(one, use) == getattr(wanted, use)] for use in ("gate_up", "down"))
        pairs = ((one, other, Choice(other.gate_up, one.down)) for one in gate_ups for other in downs)
        return min(us[one] + us[other] - us[both] for one, other, both in pairs if both in us)

    for tokens, us in found.items():
        wanted = tiles.choose(problem, tokens, content["multiprocessors"])
        chosen = us[wanted] if wanted in us else of_parts(us, wanted)
        assert chosen <= min(us.values()) * 1.05, (tokens, wanted, chosen, min(us.values()))


def test_more_slots_than_experts_reach_them_all():
    problem = MoEProblem(4, 4, 256, 64, 8)
    assert [tiles.active_experts(problem, tokens) for tokens in (1, 2, 3)] == [4, 4, 4]
    assert tiles.choose(problem, 2, 132).tile_tokens == 8


# --- the host's use of them -------------------------------------------------------------------------------------------


def reason(tokens=BF16, experts=128, local=128, hidden=2048, width=768, top_k=8, **fields):
    return cuda.unsupported_reason(MoEProblem(experts, local, hidden, width, top_k, **fields), tokens)


def test_supported():
    extremes = itertools.product((1, 1024), (256, 16384), (16, 8192), (1, 32), (BF16, FP16))
    for local, hidden, width, top_k, tokens in extremes:
        assert reason(tokens, 2048, local, hidden, width, top_k) is None
    assert reason(activation=Activation("relu2"), apply_router_weight_on_input=True) is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"activation_precision": "nvfp4"}, "activations in nvfp4; the kernels multiply 16-bit activations"),
        ({"tokens": torch.float32}, "activation dtype torch.float32; the kernels serve torch.bfloat16, torch.float16"),
        ({"hidden": 240}, "hidden size 240; the kernels serve multiples of 16 from 256 to 16384"),
        ({"hidden": 16400}, "hidden size 16400; the kernels serve multiples of 16 from 256 to 16384"),
        ({"width": 8208}, "expert width 8208; the kernels serve multiples of 16 from 16 to 8192"),
        ({"experts": 1025, "local": 1025}, "1025 experts on a rank; the kernels serve up to 1024"),
        ({"top_k": 33}, "33 experts a token; the kernels serve up to 32"),
    ],
)
def test_unsupported_says_what_and_what_is(fields, text):
    assert reason(**fields) == text


def call_bytes(problem, tokens, dtype):
    """Of the one call: what the kernels of that many tokens need."""
    tile = tiles.choose(problem, tokens, 132).tile_tokens
    return workspace.plan(problem, tokens, workspace.Call(tile, y=dtype), dtype, route.scratch_ints).bytes


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("problem", LAYERS, ids=lambda p: f"{p.num_local_experts} of {p.hidden} x {p.intermediate}")
def test_the_arena_is_as_large_as_the_largest_call(problem, dtype):
    for max_tokens in (1, 64, 700):
        most = max(call_bytes(problem, tokens, dtype) for tokens in range(1, max_tokens + 1))
        assert cuda.arena_bytes(problem, max_tokens, dtype) == most


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(1, 16384), st.lists(st.integers(1, 16384), max_size=30))
def test_the_arena_holds_every_call(problem, max_tokens, tokens):
    sizes = [call_bytes(problem, min(count, max_tokens), BF16) for count in [*tokens, max_tokens]]
    ends = tiles.choices(problem, max_tokens, 132).values()
    assert max(sizes) <= cuda.arena_bytes(problem, max_tokens) == max(call_bytes(problem, last, BF16) for last in ends)


@pytest.mark.parametrize("problem", LAYERS, ids=lambda p: f"{p.num_local_experts} of {p.hidden} x {p.intermediate}")
def test_what_is_compiled_ahead_is_what_calls_launch(problem, monkeypatch):
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    from moe_backend_plugin.kernels.moe_gemm import Variant

    ids = cuda.Ids(torch.int64, True)

    def gemm(device, problem, use, shape, tokens, pairs, ids):
        return Variant(**cuda.variant_fields(problem, use, shape, tokens, pairs, ids))

    monkeypatch.setattr(cuda, "multiprocessors_of", lambda device: 132)
    monkeypatch.setattr(cuda, "gemm", gemm)
    launched = set()
    for tokens in range(1, 4097):
        call = cuda._call.__wrapped__(0, problem, tokens, BF16, ids)
        assert call.sorts == (call.gate_up.pairs > 0) and call.gate_up.pairs == call.down.pairs
        assert call.sorts == (call.tile_tokens == 8 and tokens * problem.top_k <= 128) and (not call.sorts or call.gate_up.mapped)
        launched |= {call.gate_up, call.down}
        assert (call.gate_up.use, call.down.use, call.gate_up.tile_tokens) == ("gate_up", "down", call.tile_tokens)
        most = workspace.max_tiles(tokens * problem.top_k, problem.num_local_experts, call.tile_tokens)
        for variant, blocks, rows in (
            (call.gate_up, call.gate_up_blocks, problem.w13_rows),
            (call.down, call.down_blocks, problem.hidden),
        ):
            assert 1 <= blocks <= min(2 * 132, most * -(-rows // variant.rows))
            assert blocks * (variant.shared_bytes + SYSTEM_SHARED) <= 132 * MULTIPROCESSOR_SHARED
        assert call.plan.bytes <= cuda.arena_bytes(problem, 4096)
    for max_tokens in (1, 100, 4096):
        ahead = set(cuda.variants(problem, BF16, max_tokens, 132, ids))
        assert ahead <= launched and (ahead == launched or max_tokens < 4096)
