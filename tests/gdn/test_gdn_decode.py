"""The reference against independent mathematics, the operator against the reference, and what a call may touch."""

import math

import pytest
import torch
from gdn_cases import RUNNERS, clone_pool, make_case, make_pool, run_op, run_reference, whole

from moe_backend_plugin.gdn import reference
from moe_backend_plugin.gdn.slots import NullRule, PoolLayout, Slots, from_sglang, from_vllm_decode

both = pytest.mark.parametrize("run", RUNNERS.values(), ids=RUNNERS.keys())


def in_place(rows, pool, rule=NullRule.BLOCK_ZERO, T=None):
    index = torch.tensor(rows, dtype=torch.int64)
    cu = None if T is None else torch.arange(len(rows) + 1) * T
    return Slots(index, index, PoolLayout.of(pool), rule, True, cu)


def scalar_decode(case, S):
    """One row in Python floats: case's tokens in turn on S, nested lists [HV][V][K]; returns outputs [T][HV][V]."""
    q_all, k_all, v_all = (x.double().tolist() for x in case.heads())
    out = []
    for t in range(len(q_all)):
        token = []
        for h in range(case.HV):
            hq = h // (case.HV // case.HQ)
            x = float(case.a[t, h]) + float(case.dt_bias[h])
            softplus = math.log1p(math.exp(x)) if x <= 20 else x
            g = math.exp(-math.exp(float(case.A_log[h])) * softplus)
            beta = 1 / (1 + math.exp(-float(case.b[t, h])))
            q, k, v = q_all[t][hq], k_all[t][hq], v_all[t][h]
            qn, kn = (math.sqrt(sum(e * e for e in vec) + 1e-6) for vec in (q, k))
            q, k = [e / qn / math.sqrt(case.K) for e in q], [e / kn for e in k]
            o = []
            for i in range(case.V):
                row = [g * e for e in S[h][i]]
                delta = beta * (v[i] - sum(s * e for s, e in zip(row, k, strict=True)))
                S[h][i] = [s + delta * e for s, e in zip(row, k, strict=True)]
                o.append(sum(s * e for s, e in zip(S[h][i], q, strict=True)))
            token.append(o)
        out.append(token)
    return out


@both
@pytest.mark.parametrize("HQ,HV", [(4, 4), (2, 4), (2, 6), (1, 4), (1, 8)])
def test_scalar_float64(run, HQ, HV):
    case = make_case(3, HQ, HV, K=8, V=5)
    case.a[0, 0] = 30.0  # past softplus' threshold
    pool = make_pool(4, HV, K=8, V=5)
    state = pool[2].double().tolist()
    expected = scalar_decode(case, state)
    out = run(case, pool, in_place([2], pool, T=3))
    torch.testing.assert_close(out.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(pool[2].double(), torch.tensor(state, dtype=torch.float64), atol=2e-6, rtol=1e-5)


@both
@pytest.mark.parametrize("T", [1, 5])
def test_transformers_recurrent_rule(run, T):
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    n, case = 3, make_case(3 * T, HQ=2, HV=4, K=32, V=16)
    pool = make_pool(5, K=32, V=16)
    q, k, v = (x.view(n, T, *x.shape[1:]) for x in case.heads())
    g, beta = reference.gates(case.a, case.b, case.A_log, case.dt_bias)
    expected, state = modeling.torch_recurrent_gated_delta_rule(
        q.repeat_interleave(2, 2),
        k.repeat_interleave(2, 2),
        v,
        g.log().view(n, T, -1),
        beta.view(n, T, -1),
        pool[1:4].transpose(-1, -2).clone(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    out = run(case, pool, in_place([1, 2, 3], pool, T=T))
    torch.testing.assert_close(out.view_as(expected), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool[1:4], state.transpose(-1, -2), atol=1e-5, rtol=1e-5)


@both
def test_many_tokens_equal_single_tokens(run):
    n, T = 3, 4
    case, pool = make_case(n * T), make_pool(6)
    single = clone_pool(pool)
    out = run(case, pool, in_place([1, 4, 5], pool, T=T))
    for t in range(T):
        step = make_case(n)
        step.mixed_qkv, step.a, step.b = (x.view(n, T, -1)[:, t].contiguous() for x in (case.mixed_qkv, case.a, case.b))
        step.A_log, step.dt_bias = case.A_log, case.dt_bias
        torch.testing.assert_close(run(step, single, in_place([1, 4, 5], pool)), out.view(n, T, 4, 16)[:, t], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(single, pool, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["VK", "KV"])
@pytest.mark.parametrize("HQ,HV,K,V", [(4, 4, 16, 16), (2, 4, 16, 32), (1, 8, 32, 16), (2, 6, 8, 8)])
@pytest.mark.parametrize("split", [False, True])
def test_op_matches_reference(dtype, order, HQ, HV, K, V, split):
    """Ragged rows, null rows, intermediates, both state orders, in place and with a write slot for each token."""
    lengths = [2, 0, 3, 1, 3, 2]
    case = make_case(sum(lengths) + 2, HQ, HV, K, V, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    pool = make_pool(32, HV, K, V, dtype)
    read = torch.tensor([1, 2, 3, 0, 5, 31])
    write = torch.tensor([[6, 7, 8], [9, 10, 11], [12, 13, 0], [15, 16, 17], [18, 19, 20], [21, 22, 23]]) if split else read
    cu = torch.tensor([0, *lengths]).cumsum(0)
    slots = Slots(read, write, PoolLayout.of(pool, order), NullRule.BLOCK_ZERO, not split, cu)
    a, b = clone_pool(pool), clone_pool(pool)
    ia, ib = (torch.zeros(7, 3, HV, V, K) for _ in "ab")
    oa, ob = run_reference(case, a, slots, ia), run_op(case, b, slots, ib)
    assert ob.dtype == case.mixed_qkv.dtype
    tight = dict(atol=2e-6, rtol=1e-5)
    noise = {torch.bfloat16: dict(atol=1e-3, rtol=1e-2), torch.float16: dict(atol=2e-3, rtol=2e-3)}.get(dtype, tight)
    torch.testing.assert_close(ob, oa, **noise)
    torch.testing.assert_close(b, a, **noise)
    torch.testing.assert_close(ib, ia, **tight)
    assert ib.ne(0).flatten(2).any(-1).tolist() == [
        [True, True, False],
        [False] * 3,
        [True] * 3,
        [False] * 3,
        [True] * 3,
        [True, True, False],
        [False] * 3,
    ]
    assert not ob[-2:].any() and not oa[-2:].any()  # tokens of no row
    changed = (whole(b) != whole(pool)).nonzero().flatten()
    assert set((changed // pool.stride(0)).tolist()) == ({6, 7, 12, 13, 18, 19, 20, 21, 22} if split else {1, 3, 5, 31})
    assert int((changed % pool.stride(0)).max()) < HV * V * K  # nothing between the slots


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_rows_touch_nothing(run, dtype):
    pool = make_pool(5, dtype=dtype)
    before = clone_pool(pool)
    case = make_case(4)
    case.mixed_qkv[1] = math.nan  # padding is not initialised
    for null, rule in (
        (0, NullRule.BLOCK_ZERO),
        (-1, NullRule.BLOCK_ZERO),
        (-1, NullRule.NEGATIVE),
        (4, NullRule.NEGATIVE_OR_LAST),
        (5, NullRule.NEGATIVE),
    ):
        out = run(case, pool, in_place([null] * 4, pool, rule))
        assert torch.equal(whole(pool), whole(before)) and torch.equal(out, torch.zeros_like(out))
    out = run(case, pool, in_place([0, -1, 2, -1], pool, NullRule.NEGATIVE))
    assert out[0].any() and not out[1].any() and out[2].any() and not out[3].any()
    assert [not torch.equal(pool[i], before[i]) for i in range(5)] == [True, False, True, False, False]


@both
def test_null_write_skips_the_write_only(run):
    pool = make_pool(4)
    before, case = clone_pool(pool), make_case(2)
    slots = Slots(torch.tensor([1, 2]), torch.tensor([-1, 3]), PoolLayout.of(pool), NullRule.NEGATIVE, False)
    out = run(case, pool, slots)
    assert out.flatten(1).any(1).all()
    assert torch.equal(pool[:3], before[:3]) and not torch.equal(pool[3], before[3])


@both
def test_split_pool_equals_in_place_and_keeps_the_read_slots(run):
    pool = make_pool(8, dtype=torch.bfloat16)
    case, split = make_case(3, dtype=torch.bfloat16), clone_pool(pool)
    layout = PoolLayout.of(pool)
    expected = run(case, pool, from_sglang(torch.tensor([1, 2, 3]), layout))
    before = clone_pool(split)
    out = run(case, split, from_sglang(torch.tensor([1, 2, 3]), layout, write_indices=torch.tensor([5, 6, 7])))
    assert torch.equal(out, expected) and torch.equal(split[5:], pool[1:4])
    assert torch.equal(split[:5].view(torch.int16), before[:5].view(torch.int16))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_keeps_the_pool_and_fills_the_intermediates(run, dtype):
    """SGLang's target_verify: the buffer is indexed by batch row, whatever the slots; accepting row by row is a copy from it."""
    pool = make_pool(20, dtype=dtype)
    before, case = clone_pool(pool), make_case(6)
    slots = from_sglang(torch.tensor([17, 3]), PoolLayout.of(pool), query_start_loc=torch.tensor([0, 3, 6]))
    buffer = torch.full((4, 3, 4, 16, 16), 7.0)
    out = run(case, pool, slots, buffer, update_state=False)
    assert torch.equal(whole(pool), whole(before)) and (buffer[2:] == 7).all()
    torch.testing.assert_close(run(case, pool, slots), out)
    torch.testing.assert_close(pool[[17, 3]].float(), buffer[:2, 2].to(dtype).float())


@both
def test_empty_batch(run):
    pool = make_pool(3)
    out = run(make_case(0), pool, from_vllm_decode(torch.zeros(0, dtype=torch.int32), 0, PoolLayout.of(pool)))
    assert out.shape == (0, 4, 16)


@both
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_rows_stay_in_their_rows_and_slots(run, poison):
    pool = make_pool(8)
    clean, case, good = clone_pool(pool), make_case(4), make_case(4)
    case.mixed_qkv[1] = poison
    pool[3] = poison
    slots = in_place([1, 2, 3, 4], pool)
    out, expected = run(case, pool, slots), run(good, clean, slots)
    assert torch.equal(out[[0, 3]], expected[[0, 3]]) and not out[1:3].isfinite().all()
    assert torch.equal(pool[[1, 4, 5]], clean[[1, 4, 5]]) and pool[[0, 5, 6, 7]].isfinite().all()


@both
def test_offsets_past_32_bits(run):
    """vLLM's real block stride at 4,100 slots: 4.4 GB of address space, of which only the touched pages exist."""
    slots, stride, HV, V, K = 4100, 540672, 4, 16, 16
    pool = torch.empty(slots * stride, dtype=torch.bfloat16).as_strided((slots, HV, V, K), (stride, V * K, K, 1))
    small = make_pool(4, dtype=torch.bfloat16)
    wrapped = (4099 * stride - 2**31) // stride  # where an offset cut to 31 bits would land
    for slot in (3990, 4099, 4098, wrapped, wrapped + 1):
        pool[slot].copy_(small[1] * (slot % 7 + 1))
    small[1:4] = pool[[3990, 4099, 4098]]
    guard = pool[[wrapped, wrapped + 1]].clone()
    case = make_case(3)
    out = run(case, pool, from_vllm_decode(torch.tensor([3990, 4099, 4098], dtype=torch.int32), 3, PoolLayout.of(pool)))
    expected = run(case, small, in_place([1, 2, 3], small))
    assert torch.equal(out, expected) and torch.equal(pool[[3990, 4099, 4098]], small[1:4])
    assert torch.equal(pool[[wrapped, wrapped + 1]], guard)


def test_op_out_variant_and_schema():
    pool, case = make_pool(4), make_case(2)
    from moe_backend_plugin.gdn import op

    slots = in_place([1, 2], pool)
    args = case.mixed_qkv, case.a, case.b, case.A_log, case.dt_bias
    expected = op.gdn_decode(*args, clone_pool(pool), slots)
    out = torch.full((5, 4, 16), 3.0)
    assert op.gdn_decode(*args, clone_pool(pool), slots, out=out[:2]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:2], expected) and (out[2:] == 3).all()
    raw = (*args, pool, slots.read, slots.write, None, None, slots.live_begin, slots.live_end, True)
    torch.library.opcheck(torch.ops.moe_backend_plugin.gdn_decode.default, raw)
    torch.library.opcheck(torch.ops.moe_backend_plugin.gdn_decode_out.default, (*raw, out[:2].clone()))


def test_gated_rms_norm():
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    norm = modeling.Qwen3NextRMSNormGated(16)
    norm.weight.data.normal_()
    x, gate = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    torch.testing.assert_close(reference.gated_rms_norm(x, gate, norm.weight.data), norm(x, gate).detach())
