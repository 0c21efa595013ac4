"""The Blackwell provider on a CPU: tactics, buffers, and the numbers through an emulation of FlashInfer's kernels on their own layouts.

No Blackwell GPU has run this code; these tests say what holds without one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flashinfer_emulation import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import make_layer, make_tokens

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe import blackwell, memset, reference
from moe_backend_plugin.moe.blackwell import Tactic
from moe_backend_plugin.moe.problem import Activation, MoEProblem

PROBLEM = MoEProblem(256, 32, 7168, 2048, 8, Activation(), "nvfp4")
CPU, DEFAULT = torch.device("cpu"), Tactic()
OAI = Activation("swigluoai", 1.702, 1.0, 7.0)


# --- tactics ----------------------------------------------------------------------------------------------------------


def test_names_are_read_back():
    assert all(blackwell.parse(tactic.name) == tactic for tactic in blackwell.every(PROBLEM))
    assert len({tactic.name for tactic in blackwell.every(PROBLEM)}) == 32
    with pytest.raises(PluginError, match="a name such as s128.128.128x1"):
        blackwell.parse("t8.r1x1k2x2b2w")


def test_two_cta_tiles_are_among_the_tactics_and_wide_tiles_need_whole_columns():
    assert {tactic.tile_tokens for tactic in blackwell.every(PROBLEM)} == {128, 256}
    odd = replace(PROBLEM, intermediate=192)  # 384 rows of gate and up
    assert {tactic.gate_up_columns for tactic in blackwell.every(odd)} == {128}
    assert blackwell.validity(odd, Tactic(gate_up_columns=256)) == "384 rows of the first projection (allowed: a multiple of 256)"
    assert blackwell.validity(PROBLEM, Tactic(64)) == "tile_tokens 64 (allowed: 128, 256)"


@given(st.integers(1, 131072), st.sampled_from([64, 192, 768, 2048]))
@settings(max_examples=60, deadline=None)
def test_the_choice_is_always_valid_and_announced(tokens, intermediate):
    problem = replace(PROBLEM, intermediate=intermediate)
    tactic = blackwell.choose(problem, tokens)
    assert blackwell.validity(problem, tactic) is None
    assert tactic in set(blackwell.tactics_met(problem, 131072))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_precision": "bf16"}, "moe.activations: nvfp4"),
        ({"hidden": 7168 + 128}, "hidden size 7296; the kernels serve multiples of 256"),
        ({"num_experts": 640}, "640 experts"),
        ({"top_k": 23}, "23 experts a token"),
        ({"apply_router_weight_on_input": True}, "router weights on the input of 8 experts"),
    ],
)
def test_layers_that_the_kernels_cannot_serve(change, words):
    assert blackwell.unsupported_reason(PROBLEM, torch.bfloat16) is None
    assert words in blackwell.unsupported_reason(replace(PROBLEM, **change), torch.bfloat16)
    assert "float16" in blackwell.unsupported_reason(PROBLEM, torch.float16)


# --- memory -----------------------------------------------------------------------------------------------------------

problems = st.builds(
    MoEProblem,
    num_experts=st.just(512),
    num_local_experts=st.integers(1, 512),
    hidden=st.sampled_from([256, 2048, 7168]),
    intermediate=st.sampled_from([64, 192, 768, 2048]),
    top_k=st.integers(1, 22),
    activation=st.sampled_from([Activation(), Activation("relu2")]),
    activation_precision=st.just("nvfp4"),
)


@given(problems, st.integers(1, 20000), st.sampled_from(["static", "token"]))
@settings(max_examples=80, deadline=None)
def test_one_arena_serves_every_tactic_at_every_number_of_tokens(problem, tokens, scales):
    most = blackwell.largest(problem, 20000, scales).bytes
    for tactic in blackwell.every(problem):
        plan = blackwell.plan(problem, tokens, tactic, scales)
        assert plan.bytes <= most and plan.bytes <= blackwell.plan(problem, tokens + 1, tactic, scales).bytes
        ends = 0
        for region in plan.regions:
            assert region.offset >= ends and region.offset % 256 == 0
            ends = region.offset + region.bytes
        assert ends <= plan.bytes
        assert plan["order"].shape[0] == plan["tile_expert"].shape[0] * tactic.tile_tokens == plan["h"].shape[0]


@given(st.lists(st.integers(0, 700), min_size=1, max_size=40), st.sampled_from([128, 256]))
@settings(max_examples=200, deadline=None)
def test_no_routing_fills_more_tiles_and_one_fills_as_many(loads, tile):
    pairs, experts = sum(loads), len(loads)
    assert sum(-(-load // tile) for load in loads) <= blackwell.max_tiles(pairs, experts, tile)
    begun = min(pairs, experts)
    worst = [1] * (begun - 1) + [pairs - begun + 1] if pairs else []
    assert sum(-(-load // tile) for load in worst) == blackwell.max_tiles(pairs, experts, tile)


def test_bad_plans_are_refused():
    with pytest.raises(PluginError, match="1 or more"):
        blackwell.plan(PROBLEM, 0, Tactic(), "static")
    with pytest.raises(PluginError, match="a tactic that the kernels can have"):
        blackwell.plan(replace(PROBLEM, intermediate=192), 1, Tactic(gate_up_columns=256), "static")


# --- numbers ----------------------------------------------------------------------------------------------------------


def shared_scales(layer):
    """Input scales as the kernels have them: one for all."""
    w13, w2 = layer.input_scales
    return torch.full_like(w13, float(w13.max())), torch.full_like(w2, float(w2.max()))


def run(layer, tokens, tactic=DEFAULT, scales="static", emulation=None, expert_map=None, first=0, dtype=torch.float32):
    problem, (x, chosen, ids) = layer.problem, make_tokens(layer, tokens, dtype)
    weights = blackwell.pack(problem, *layer.weights, *(layer.input_scales if scales == "static" else ()))
    blackwell.prepare(problem, dtype, CPU, tokens, scales)
    out = torch.full_like(x, torch.nan)
    emulation = emulation or Emulation()
    blackwell.fused_moe(x, weights, chosen, ids, problem, out, expert_map, tactic, first, emulation.library())
    return out


def even_scales(layer):
    """Gate and up with one global scale, as kernels of one alpha need under a clamp."""
    w13, w13_scale, first, *rest = layer.weights
    layer.weights = (w13, w13_scale, first[:, :1].expand_as(first).contiguous(), *rest)
    return layer


@pytest.mark.parametrize("activation", [Activation(), Activation(limit=0.5), OAI, Activation("relu2")], ids=lambda a: f"{a.kind} {a.limit}")
@pytest.mark.parametrize("scales", ["static", "token"])
@pytest.mark.parametrize("tactic", [Tactic(), Tactic(256, 128, 256, 2, ordered=True)], ids=lambda t: t.name)
def test_the_prepared_layer_is_the_reference(activation, scales, tactic):
    layer = even_scales(make_layer(8, 256, 96, 2, activation, w4a4=True))
    x, chosen, ids = make_tokens(layer, 9, torch.float32)
    out = run(layer, 9, tactic, scales)
    w13, w2 = shared_scales(layer) if scales == "static" else (None, None)
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, w13, w2, by_token=scales == "token")
    # The same numbers, but where float32 rounds a sum over the edge between two of E2M1's.
    error = (out - right).norm(dim=1) / right.norm(dim=1)
    assert float(error.median()) < 2e-6 and float(error.max()) < 0.1


def test_gate_and_up_with_scales_of_their_own():
    """Exact but for what is rounded: up carries the gate's scale, so block scales of the second input round elsewhere."""
    layer = make_layer(8, 256, 64, 2, w4a4=True)
    ratio = layer.weights[2][:, 1] / layer.weights[2][:, 0]
    assert float(ratio.max() / ratio.min()) > 1.3
    x, chosen, ids = make_tokens(layer, 9, torch.float32)
    plain = reference.fused_moe(x, *layer.weights, chosen, ids, replace(layer.problem, activation_precision="bf16"))
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, *shared_scales(layer))
    rounding = float((right - plain).norm() / plain.norm())
    error = float((run(layer, 9) - plain).norm() / plain.norm())
    assert error < 1.25 * rounding
    # With powers of two between them nothing rounds elsewhere.
    w13, w13_scale, first, *rest = layer.weights
    powers = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 1.0, 2.0, 0.5])
    layer.weights = (w13, w13_scale, torch.stack((first[:, 0], first[:, 0] * powers), 1), *rest)
    h = layer.input_scales[1]
    layer.input_scales = layer.input_scales[0], h.max() * powers  # every expert's own scale is then the shared one
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, *layer.input_scales)
    error = (run(layer, 9) - right).norm(dim=1) / right.norm(dim=1)
    assert float(error.median()) < 2e-6


def test_many_tiles_of_few_experts():
    layer = make_layer(4, 256, 64, 2, w4a4=True)
    layer = even_scales(layer)
    x, chosen, ids = make_tokens(layer, 300, torch.float32)
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, *shared_scales(layer))
    for tactic in (Tactic(), Tactic(256, ordered=True)):
        error = (run(layer, 300, tactic) - right).norm(dim=1) / right.norm(dim=1)
        assert float(error.median()) < 2e-6 and float(error.max()) < 0.1


@pytest.mark.parametrize("by_map", [False, True])
def test_a_rank_computes_its_own_experts(by_map):
    layer = even_scales(make_layer(8, 256, 64, 3, expert_range=(2, 6), w4a4=True))
    x, chosen, ids = make_tokens(layer, 12, torch.float32)
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, layer.expert_map, *shared_scales(layer))
    out = run(layer, 12, expert_map=layer.expert_map) if by_map else run(layer, 12, first=2)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("ordered", [False, True])
def test_ids_that_no_expert_answers_add_nothing(ordered):
    layer = even_scales(make_layer(8, 256, 64, 2, w4a4=True))
    x, chosen, ids = make_tokens(layer, 6, torch.float32)
    ids[0], ids[1, 0], ids[2, 1], ids[3, 0] = -1, 8, 2**31 - 1, -(2**31)
    ids[4] = 65536 + 3  # the low 16 bits of which are an expert
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, *shared_scales(layer))
    weights = blackwell.pack(layer.problem, *layer.weights, *layer.input_scales)
    out = torch.full_like(x, torch.nan)
    for index in (ids, ids.long()):
        blackwell.fused_moe(x, weights, chosen, index, layer.problem, out, tactic=Tactic(ordered=ordered), flashinfer=Emulation().library())
        torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    assert not out[0].any() and not out[4].any()


def test_router_weights_on_the_input():
    layer = even_scales(make_layer(8, 256, 64, 1, w4a4=True, on_input=True))
    x, chosen, ids = make_tokens(layer, 7, torch.float32)
    right = reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, *shared_scales(layer))
    torch.testing.assert_close(run(layer, 7), right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


def test_a_row_of_any_stride():
    layer = even_scales(make_layer(8, 256, 64, 2, w4a4=True))
    x, chosen, ids = make_tokens(layer, 1, torch.float32)
    weights, out = blackwell.pack(layer.problem, *layer.weights, *layer.input_scales), torch.empty(1, 256)
    column = x.as_strided((1, 256), (1, 1))
    assert column.is_contiguous() and column.stride() == (1, 1)
    blackwell.fused_moe(column, weights, chosen, ids, layer.problem, out, flashinfer=Emulation().library())
    assert torch.equal(out, run(layer, 1))


def test_no_tokens_no_call():
    layer = make_layer(8, 256, 64, 2, w4a4=True)
    weights, emulation = blackwell.pack(layer.problem, *layer.weights, *layer.input_scales), Emulation()
    empty = torch.empty(0, 256)
    blackwell.fused_moe(
        empty, weights, torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32), layer.problem, empty, flashinfer=emulation.library()
    )
    assert emulation.calls == []


def test_every_call_goes_through_the_same_memory():
    """Tactics and calls share one arena; a second call of a size finds the same buffers, so a graph of it stays valid."""
    layer = even_scales(make_layer(8, 256, 64, 2, w4a4=True))
    blackwell.prepare(layer.problem, torch.float32, CPU, 40, "static")
    places = []
    for _ in range(2):
        emulation = Emulation()
        for tactic in (Tactic(), Tactic(256)):
            run(layer, 9, tactic, emulation=emulation)
        places.append([call[2]["out"].data_ptr() for call in emulation.calls if call[0] == "first"])
    assert places[0] == places[1]


def test_the_output_is_zeroed_only_where_it_is_added_to():
    layer = even_scales(make_layer(8, 256, 64, 2, w4a4=True))
    for tactic, stages in (
        (Tactic(), ["quantize", "sort", "zero", "first", "second"]),
        (Tactic(ordered=True), ["quantize", "sort", "first", "second", "combine"]),
    ):
        emulation = Emulation()
        run(layer, 5, tactic, emulation=emulation)
        assert [call[0] for call in emulation.calls] == stages


# --- the memset -------------------------------------------------------------------------------------------------------


def test_the_memset_runs_beside_and_joins(monkeypatch):
    """On a GPU: the side stream waits for the main one, zeroes, and the main one waits for that, by events made before."""
    log: list[str] = []
    names = iter(("before", "after"))

    class Event:
        def __init__(self):
            self.name = next(names)
            log.append(f"make {self.name}")

        def record(self):
            log.append(f"{current[0]}: record {self.name}")

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name}: wait {event.name}")

    class Inside:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            current.insert(0, self.stream.name)

        def __exit__(self, *_):
            current.pop(0)

    current = ["main"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    monkeypatch.setattr(torch.cuda, "device", lambda device: Inside(Stream("main")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    found = memset.Memset(torch.device("cuda", 0))
    assert log == ["make before", "make after"]
    out = torch.ones(3)
    found.begin(out, lambda tensor: (log.append(f"{current[0]}: zero"), tensor.zero_()))
    found.end()
    assert log[2:] == ["main: record before", "side: wait before", "side: zero", "side: record after", "main: wait after"]
    assert not out.any()


def test_a_memset_is_not_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(memset, "_memsets", {})
    with pytest.raises(RuntimeError, match="under capture"):
        memset.of(torch.device("cuda", 0))
    assert memset.of(CPU) is memset.of(CPU)


def test_the_operator_takes_what_its_function_takes():
    import inspect

    from moe_backend_plugin.moe import op

    schema = torch.ops.moe_backend_plugin.nvfp4_moe_flashinfer.default._schema
    assert [argument.name for argument in schema.arguments] == list(inspect.signature(op._flashinfer).parameters)
    layer = even_scales(make_layer(8, 256, 64, 2, OAI, w4a4=True))
    x, chosen, ids = make_tokens(layer, 5)
    weights = blackwell.pack(layer.problem, *layer.weights, *layer.input_scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blackwell, "library", lambda: Emulation().library())
        out = op.nvfp4_moe_flashinfer(x, weights, chosen, ids, layer.problem)
        fake = torch.ops.moe_backend_plugin.nvfp4_moe_flashinfer
        meta = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in (x, *weights, chosen, ids)]
        assert fake(*meta, 8, 64, "swigluoai", 1.702, 1.0, 7.0).shape == x.shape
    right = reference.fused_moe(x.float(), *layer.weights, chosen, ids, layer.problem, None, *shared_scales(layer))
    assert float((out.float() - right).norm() / right.norm()) < 0.02


def test_a_scale_a_token_in_the_reference():
    """Each row rounds as if it were alone, with its own largest magnitude as the static scale."""
    layer = make_layer(4, 64, 32, 1, w4a4=True)
    x, chosen, ids = make_tokens(layer, 5, torch.float32)
    x[3] = 0
    every = reference.fused_moe(
        x * torch.tensor([1.0, 8, 0.01, 1, 3]).view(-1, 1), *layer.weights, chosen, ids, layer.problem, by_token=True
    )
    alone = [
        reference.fused_moe(row, *layer.weights, weight, index, layer.problem, by_token=True)
        for row, weight, index in zip(
            (x * torch.tensor([1.0, 8, 0.01, 1, 3]).view(-1, 1)).split(1), chosen.split(1), ids.split(1), strict=True
        )
    ]
    assert torch.equal(every, torch.cat(alone)) and not every[3].any()
    with pytest.raises(PluginError, match="allowed: none"):
        reference.fused_moe(x, *layer.weights, chosen, ids, layer.problem, None, *layer.input_scales, by_token=True)
