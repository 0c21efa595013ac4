"""The reference against a float64 loop, and the CPU op against the reference, over ordinary and hostile inputs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_cases import Layer, assert_close, make_layer, make_tokens, naive

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe import cpu, routing
from moe_backend_plugin.moe.problem import Activation

ACTIVATIONS = {
    "silu": Activation(),
    "silu with limit": Activation("silu", limit=0.7),
    "swigluoai": Activation("swigluoai", 1.702, 1.0, 7.0),
    "swigluoai other": Activation("swigluoai", 1.1, 0.25, 0.6),
    "relu2": Activation("relu2"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EVERY_ACTIVATION
@EVERY_DTYPE
def test_reference_is_the_formula(activation, dtype):
    layer = make_layer(activation=activation, top_k=3)
    x, weights, ids = make_tokens(layer, 5, dtype)
    got = layer.reference(x, weights, ids)
    assert got.dtype == dtype
    assert_close(got, naive(layer, x, weights, ids))


@EVERY_ACTIVATION
@EVERY_DTYPE
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_op_is_the_reference(activation, dtype, tokens):
    layer = make_layer(activation=activation, top_k=3)
    batch = make_tokens(layer, tokens, dtype)
    assert_close(layer.op(*batch), layer.reference(*batch))


@pytest.mark.parametrize("top_k", range(1, 9))
def test_top_k(top_k):
    layer = make_layer(experts=8, top_k=top_k)
    batch = make_tokens(layer, 5, torch.float32)
    assert_close(layer.op(*batch), layer.reference(*batch))
    assert_close(layer.reference(*batch), naive(layer, *batch), torch.bfloat16)


def test_gate_and_up_keep_their_own_global_scale():
    layer = make_layer()
    batch = make_tokens(layer, 6, torch.float32)
    scale_2 = layer.weights[2]
    assert (scale_2[:, 0] != scale_2[:, 1]).all()
    scale_2[:, 0] *= 3
    scale_2[:, 1] /= 7
    want = naive(layer, *batch)
    assert_close(layer.reference(*batch), want, torch.float16)
    assert_close(layer.op(*batch), want, torch.float16)


@EVERY_DTYPE
def test_router_weight_on_input(dtype):
    layer = make_layer(top_k=1, on_input=True)
    x, weights, ids = make_tokens(layer, 9, dtype)
    weights = weights * 1.7
    assert_close(layer.reference(x, weights, ids), naive(layer, x, weights, ids))
    assert_close(layer.op(x, weights, ids), layer.reference(x, weights, ids))
    ids[4] = 99
    assert not layer.op(x, weights, ids)[4].any()


def test_empty_batch():
    layer = make_layer()
    batch = make_tokens(layer, 0)
    for call in (layer.reference, layer.op):
        out = call(*batch)
        assert out.shape == (0, layer.problem.hidden) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 3, 64, 131])
def test_all_tokens_on_one_expert(tokens):
    layer = make_layer(top_k=1)
    x, weights, ids = make_tokens(layer, tokens, torch.float32)
    ids.fill_(4)
    assert_close(layer.op(x, weights, ids), layer.reference(x, weights, ids))


def test_skewed_batch_splits_into_chunks():
    layer = make_layer(experts=12, top_k=2)
    x, weights, ids = make_tokens(layer, 200, torch.float32)
    ids[:180, 0] = 7
    assert_close(layer.op(x, weights, ids), layer.reference(x, weights, ids))
    counts = {e: n for e, n in enumerate(torch.bincount(ids.flatten(), minlength=12).tolist()) if n}
    chunks = cpu._chunks(counts, 64 * 96)
    assert len(chunks) > 1
    assert [e for group, _ in chunks for e in group] == list(counts)
    for group, most in chunks:
        assert most == max(counts[e] for e in group)
        assert len(group) * most <= 1.25 * sum(counts[e] for e in group) + cpu._FREE_PADDING


@pytest.mark.parametrize("per_chunk", [4, 5, 100])
@pytest.mark.parametrize("w4a4", [False, True])
def test_few_tokens_give_what_many_do(monkeypatch, w4a4, per_chunk):
    """A decoding step sends its tokens through every active expert; cut into chunks or not, with ids of no expert here."""
    layer = make_layer(experts=9, top_k=3, w4a4=w4a4)
    x, weights, ids = make_tokens(layer, cpu._FEW_TOKENS, torch.float32)
    ids[2, 1], ids[5], weights[5, 0] = -1, 42, math.nan
    monkeypatch.setattr(cpu, "_FEW_TOKENS", 0)
    want = layer.op(x, weights, ids)
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "SCRATCH_VALUES", per_chunk * 96 * 64)
    assert_close(layer.op(x, weights, ids), want)


def test_an_infinite_result_of_an_expert_that_a_token_did_not_ask_for():
    layer = make_layer(experts=2, top_k=1)
    x, weights, ids = make_tokens(layer, 4, torch.float16)
    ids[:, 0] = torch.tensor([0, 1, 0, 1])
    layer.weights[2][1] = 1e30
    assert_close(layer.op(x, weights, ids)[0::2], layer.reference(x, weights, ids)[0::2])


def test_duplicate_ids_each_count():
    layer = make_layer(top_k=4)
    x, weights, ids = make_tokens(layer, 6, torch.float32)
    ids[2] = 3
    ids[3, 1:] = ids[3, :1]
    want = naive(layer, x, weights, ids)
    assert_close(layer.reference(x, weights, ids), want, torch.float16)
    assert_close(layer.op(x, weights, ids), layer.reference(x, weights, ids))


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_ids_out_of_range_add_nothing(id_dtype):
    layer = make_layer(top_k=3)
    x, weights, ids = make_tokens(layer, 6, torch.float32)
    ids = ids.to(id_dtype)
    ids[0, 1], ids[1, 0], ids[2, 2], ids[3] = -1, 6, torch.iinfo(id_dtype).max, torch.iinfo(id_dtype).min
    weights[0, 1] = math.nan
    want = naive(layer, x, weights, ids)
    assert not want.isnan().any()
    assert_close(layer.reference(x, weights, ids), want, torch.float16)
    got = layer.op(x, weights, ids)
    assert_close(got, layer.reference(x, weights, ids))
    assert not got[3].any()


@pytest.mark.parametrize("expert_map", [None, torch.tensor([-1, 0, 2, 7, 1, -5])])
def test_both_forms_of_routing_agree(expert_map):
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [-1, 6, 2**31 - 1], [-(2**31), 1, 1]], dtype=torch.int32)
    tensor = routing.local_ids(ids, 3, expert_map)
    assert [-1 if i == 3 else i for i in tensor.flatten().tolist()] == routing.local_list(ids, 3, expert_map)


def test_no_valid_id_at_all():
    layer = make_layer()
    x, weights, ids = make_tokens(layer, 4)
    x[1] = math.nan
    assert not layer.op(x, weights.fill_(math.nan), ids.fill_(-1)).any()
    assert not layer.reference(x, weights, ids).any()


@pytest.mark.parametrize("call", ["reference", "op"])
def test_nan_stays_in_its_row(call):
    layer = make_layer(experts=3, top_k=2)
    call = getattr(layer, call)
    x, weights, ids = make_tokens(layer, 9, torch.float32)
    clean = call(x, weights, ids)
    x[2] = math.nan
    x[5, 17] = math.nan
    weights[7, 1] = math.nan
    out = call(x, weights, ids)
    bad = torch.zeros(9, dtype=torch.bool)
    bad[[2, 5, 7]] = True
    assert out[bad].isnan().all()
    assert_close(out[~bad], clean[~bad])


@pytest.mark.parametrize("ranks", [2, 3])
def test_expert_parallel_ranks_add_up(ranks):
    whole = make_layer(experts=12, top_k=4)
    x, weights, ids = make_tokens(whole, 11, torch.float32)
    total = torch.zeros(11, 64)
    for rank in range(ranks):
        first, last = 12 * rank // ranks, 12 * (rank + 1) // ranks
        layer = make_layer(experts=12, top_k=4, expert_range=(first, last))
        layer.weights = tuple(t[first:last] for t in whole.weights)
        part = layer.op(x, weights, ids)
        assert_close(part, layer.reference(x, weights, ids))
        total += part
    assert_close(total, whole.reference(x, weights, ids), torch.float16)


def test_expert_map_with_a_bad_entry_reads_nothing():
    layer = make_layer(experts=8, expert_range=(2, 5))
    x, weights, ids = make_tokens(layer, 8, torch.float32)
    layer.expert_map[0] = 1000
    assert_close(layer.op(x, weights, ids), layer.reference(x, weights, ids))
    layer.expert_map[0] = -1
    again = make_tokens(layer, 8, torch.float32)
    layer_64 = Layer(layer.problem, layer.weights, layer.expert_map.long())
    assert torch.equal(layer.op(*again), layer_64.op(*again))


@pytest.mark.parametrize("call", ["reference", "op"])
def test_a_row_does_not_depend_on_the_others(call):
    layer = make_layer(experts=5, hidden=128, top_k=2)
    call = getattr(layer, call)
    x, weights, ids = make_tokens(layer, 40, torch.float32)
    whole = call(x, weights, ids)
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40), slice(0, 40, 7)):
        alone = call(x[rows], weights[rows], ids[rows])
        assert_close(alone, whole[rows])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert_close(call(x[shuffled], weights[shuffled], ids[shuffled]), whole[shuffled])


@pytest.mark.parametrize("activation", [Activation(), Activation("relu2")], ids=["silu", "relu2"])
def test_w4a4(activation):
    layer = make_layer(activation=activation, w4a4=True, top_k=3)
    if not activation.gated:
        layer.input_scales[1].mul_(4)  # squares reach further
    x, weights, ids = make_tokens(layer, 17)
    got, want = layer.op(x, weights, ids).double(), layer.reference(x, weights, ids).double()
    # A value of the intermediate near a midpoint of FP4 may fall on either side.
    assert (got - want).norm() < 2e-2 * want.norm()
    exact = naive(layer, x, weights, ids)
    error = (want - exact).norm() / exact.norm()
    assert 0.01 < error < 0.3, "rounding activations to four bits must show, and no more"
    x[3] = math.nan
    assert layer.op(x, weights, ids).isnan().any(-1).nonzero().flatten().tolist() == [3]


def test_w4a4_gate_and_up_share_the_larger_input_scale():
    layer = make_layer(w4a4=True)
    batch = make_tokens(layer, 5)
    a13, a2 = layer.input_scales
    want = layer.reference(*batch)
    for other in (torch.stack((a13[:, 0], a13[:, 0] / 2), 1), torch.stack((a13[:, 0] / 3, a13[:, 0]), 1), a13[:, 0].contiguous()):
        layer.input_scales = (other, a2)
        assert torch.equal(layer.reference(*batch), want)
        layer.op(*batch)


def test_a_long_batch_is_cut_into_blocks(monkeypatch):
    layer = make_layer()
    batch = make_tokens(layer, 50, torch.float32)
    whole = layer.op(*batch)
    monkeypatch.setattr(cpu, "_PAIR_BYTES", 64 * 2 * 4 * 7)
    assert_close(layer.op(*batch), whole)


def test_experts_larger_than_the_scratch_buffer(monkeypatch):
    layer = make_layer()
    batch = make_tokens(layer, 9, torch.float32)
    monkeypatch.setattr(cpu, "SCRATCH_VALUES", 64 * 20)
    assert_close(layer.op(*batch), layer.reference(*batch))


def test_inputs_are_not_changed_and_strides_are_free():
    layer = make_layer(on_input=True, top_k=1)
    x, weights, ids = make_tokens(layer, 8, torch.float32)
    wide = torch.randn(8, 3 * 64)
    wide[:, 64:128] = x
    before = [t.clone() for t in (x, weights, ids, *(w.view(torch.uint8) for w in layer.weights))]
    assert torch.equal(layer.op(wide[:, 64:128], weights.t().contiguous().t(), ids.t().contiguous().t()), layer.op(x, weights, ids))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weights, ids, *(w.view(torch.uint8) for w in layer.weights)), strict=True))


@pytest.mark.parametrize("what", ["hidden", "ids", "weights", "scale_2", "one input scale", "dtype"])
@pytest.mark.parametrize("call", ["reference", "op"])
def test_wrong_shapes_are_refused(what, call):
    layer = make_layer()
    x, weights, ids = make_tokens(layer, 4)
    if what == "hidden":
        x = x[:, :32]
    elif what == "ids":
        ids = ids[:3]
    elif what == "weights":
        weights = weights[:, :1]
    elif what == "scale_2":
        layer.weights = (*layer.weights[:2], layer.weights[2][:, :1], *layer.weights[3:])
    elif what == "one input scale":
        layer.input_scales = (torch.ones(6), None)
    else:
        x = x.double()
    with pytest.raises(PluginError):
        getattr(layer, call)(x, weights, ids)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_any_routing(data):
    experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, 8))
    tokens = data.draw(st.integers(0, 20))
    first = data.draw(st.integers(0, experts - 1))
    last = data.draw(st.integers(first + 1, experts))
    layer = make_layer(
        experts=experts,
        hidden=32,
        intermediate=data.draw(st.sampled_from([16, 48])),
        top_k=top_k,
        activation=data.draw(st.sampled_from(list(ACTIVATIONS.values()))),
        expert_range=data.draw(st.sampled_from([None, (first, last)])),
        seed=data.draw(st.integers(0, 5)),
    )
    ids = data.draw(st.lists(st.integers(-2, experts + 2), min_size=tokens * top_k, max_size=tokens * top_k))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, -0.25, math.nan]), min_size=tokens * top_k, max_size=tokens * top_k))
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(3))
    if tokens and data.draw(st.booleans()):
        x[data.draw(st.integers(0, tokens - 1))] = math.nan
    shape = (tokens, top_k)
    batch = x, torch.tensor(weights).view(shape), torch.tensor(ids, dtype=torch.int32).view(shape)
    assert_close(layer.op(*batch), layer.reference(*batch), torch.float16)
