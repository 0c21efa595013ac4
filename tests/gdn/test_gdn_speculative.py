"""Speculative decoding must not be visible: a chain of steps with any accepted counts equals decoding the accepted tokens one by one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gdn_cases import CONV_RUNNERS, RUNNERS, clone_pool, make_case, make_pool, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.gdn.slots import PoolLayout, from_vllm_decode, from_vllm_spec, from_vllm_spec_conv

HQ, HV, K, V, WIDTH = 1, 2, 8, 4, 4
C = 2 * HQ * K + HV * V


def conv_pool(slots, columns, dtype=torch.float32, seed=3, dim_first=True):
    r = torch.Generator().manual_seed(seed)
    if dim_first:
        return torch.randn(slots, C * columns + 10, generator=r).to(dtype)[:, : C * columns].view(slots, C, columns)
    return torch.randn(slots, columns * C + 10, generator=r).to(dtype)[:, : C * columns].view(slots, columns, C).transpose(1, 2)


@pytest.mark.parametrize("name", RUNNERS)
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_chain_of_steps_equals_accepted_tokens_one_by_one(name, data):
    run, conv = RUNNERS[name], CONV_RUNNERS["reference" if name == "reference" else "op"]
    # With vLLM's rounding goes its own epsilon in the norms, which shows where a vector is short.
    reference = partial(RUNNERS["reference"], as_vllm=name == "op-as-vllm")
    rows, columns = data.draw(st.integers(1, 3), "rows"), data.draw(st.integers(1, 4), "columns")
    seed = data.draw(st.integers(0, 1000), "seed")
    r = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, WIDTH, generator=r), torch.randn(C, generator=r)
    index = (torch.randperm(rows * columns, generator=r) + 1).view(rows, columns).int()
    index = torch.cat([index, torch.zeros(1, columns, dtype=torch.int32)])  # a padded row at the end
    states, windows = make_pool(rows * columns + 1, HV, K, V), conv_pool(rows * columns + 1, WIDTH - 1 + columns - 1)
    accepted = [1] * rows
    # The plain engine: one slot a row, width - 1 columns.
    plain_states, plain_windows = make_pool(rows + 1, HV, K, V, seed=9), conv_pool(rows + 1, WIDTH - 1, seed=9)
    plain_states[1:] = states[index[:rows, 0].long()]
    plain_windows[1:] = windows[index[:rows, 0].long()][:, :, : WIDTH - 1]

    for step in range(data.draw(st.integers(1, 4), "steps")):
        lengths = [data.draw(st.integers(0, columns), "length") for _ in range(rows)]
        cu = torch.tensor([0, *lengths, 0]).cumsum(0).int()
        case = make_case(sum(lengths), HQ, HV, K, V, seed=seed + step)
        counts = torch.tensor([*accepted, 1], dtype=torch.int32)
        slots = from_vllm_spec(index, counts, cu, PoolLayout.of(states), check=True).validate()
        window_slots = from_vllm_spec_conv(index, cu, PoolLayout.of(windows))
        x = case.mixed_qkv
        case.mixed_qkv = conv(x, windows, weight, bias, window_slots, counts)
        out = run(case, states, slots)
        for row in range(rows):
            if lengths[row] == 0:
                continue
            accepted[row] = data.draw(st.integers(1, lengths[row]), "accepted")
            own = torch.tensor([row + 1])
            for token in range(int(cu[row]), int(cu[row]) + accepted[row]):
                one = make_case(1, HQ, HV, K, V)
                one.A_log, one.dt_bias, one.a, one.b = case.A_log, case.dt_bias, case.a[token][None], case.b[token][None]
                one.mixed_qkv = CONV_RUNNERS["reference"](
                    x[token][None], plain_windows, weight, bias, from_vllm_decode(own, 1, PoolLayout.of(plain_windows))
                )
                torch.testing.assert_close(case.mixed_qkv[token][None], one.mixed_qkv, atol=1e-5, rtol=1e-5)
                expected = reference(one, plain_states, from_vllm_decode(own, 1, PoolLayout.of(plain_states)))
                torch.testing.assert_close(out[token][None], expected, atol=1e-5, rtol=1e-5)
            owned = int(index[row, accepted[row] - 1])
            torch.testing.assert_close(states[owned], plain_states[row + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize("activation,with_bias", [("silu", True), (None, False)])
def test_conv_op_matches_reference(dim_first, dtype, speculative, activation, with_bias):
    columns, lengths = 6, [2, 0, 3, 1, 4]
    pool = conv_pool(9, columns, dtype, dim_first=dim_first)
    index = torch.tensor([[5], [2], [3], [0], [8]], dtype=torch.int32)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    slots = from_vllm_spec_conv(index, cu, PoolLayout.of(pool))
    counts = torch.tensor([1, 2, 3, 1, 4]) if speculative else None
    x, weight = torch.randn(sum(lengths) + 1, C).to(dtype), torch.randn(C, WIDTH).to(dtype)
    bias = torch.randn(C).to(dtype) if with_bias else None
    a, b = clone_pool(pool), clone_pool(pool)
    oa = CONV_RUNNERS["reference"](x, a, weight, bias, slots, counts, activation)
    ob = CONV_RUNNERS["op"](x, b, weight, bias, slots, counts, activation)
    torch.testing.assert_close(ob, oa)
    assert torch.equal(whole(a), whole(b))
    assert [not torch.equal(a[i], pool[i]) for i in range(9)] == [i in (5, 3, 8) for i in range(9)]
    assert not oa[5].any() and not oa[-1].any()  # the null row's token, and the token of no row


@pytest.mark.parametrize("name", CONV_RUNNERS)
def test_conv_is_the_causal_convolution(name):
    """Any way of cutting a sequence into calls gives the convolution of the whole."""
    x, weight, bias = torch.randn(7, C), torch.randn(C, WIDTH), torch.randn(C)
    pool = conv_pool(2, WIDTH - 1)
    pool[1] = 0
    expected = F.silu(F.conv1d(F.pad(x.T, (WIDTH - 1, 0))[None], weight[:, None], bias, groups=C))[0].T
    got = []
    for begin, end in ((0, 1), (1, 3), (3, 7)):
        slots = from_vllm_spec_conv(torch.tensor([[1]]), torch.tensor([0, end - begin]), PoolLayout.of(pool))
        got.append(CONV_RUNNERS[name](x[begin:end], pool, weight, bias, slots))
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONV_RUNNERS)
@pytest.mark.parametrize("count", [0, 5])
def test_conv_skips_impossible_accepted_counts(name, count):
    pool = conv_pool(3, WIDTH - 1 + 3)
    before = clone_pool(pool)
    slots = from_vllm_spec_conv(torch.tensor([[1]]), torch.tensor([0, 2]), PoolLayout.of(pool))
    out = CONV_RUNNERS[name](torch.randn(2, C), pool, torch.randn(C, WIDTH), None, slots, torch.tensor([count]))
    assert not out.any() and torch.equal(whole(pool), whole(before))
