"""Against the kernels that vLLM's CPU backend runs (bf16 inputs, the [K, V] state order)."""

import pytest
import torch
from gdn_cases import clone_pool, make_case, make_pool, run_op, run_reference

from moe_backend_plugin.gdn.slots import PoolLayout, from_vllm_decode, from_vllm_spec

ops = pytest.importorskip("vllm._custom_ops", reason="vllm is not installed: its CPU kernels cannot be compared", exc_type=ImportError)
NAMES = ("fused_sigmoid_gating_delta_rule_update_cpu", "fused_sigmoid_gating_delta_rule_update_spec_cpu")
pytestmark = pytest.mark.skipif(
    not all(hasattr(ops, name) and hasattr(torch.ops._C, name) for name in NAMES), reason="this build of vllm has no CPU GDN kernels"
)

# Elements of its states of size 1 were seen to differ from float64 by up to 5e-3, even where the pool is fp32; ours by 1e-6.
STATE = dict(atol=3.2e-2, rtol=1.6e-2)
OUT = dict(atol=4e-3, rtol=1.6e-2)


def heads(case):
    q, k, v = (x.contiguous() for x in case.heads())
    return q, k, v


def through_vllm(case, pool, index) -> torch.Tensor:
    n, HV = len(index), case.HV
    q, k, v = (x[None] for x in heads(case))
    return ops.fused_sigmoid_gating_delta_rule_update_cpu(
        A_log=case.A_log,
        dt_bias=case.dt_bias,
        q=q,
        k=k,
        v=v,
        a=case.a,
        b=case.b,
        initial_state_source=pool.view(len(pool), HV, 128, 128),
        initial_state_indices=index,
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32),
        use_qk_l2norm_in_kernel=True,
    ).reshape(n, HV, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("HQ,HV,n", [(2, 4, 8), (4, 4, 1), (1, 8, 3)])
def test_decode(dtype, HQ, HV, n):
    case = make_case(n, HQ, HV, 128, 128, torch.bfloat16)
    pool = make_pool(n + 3, HV, 128, 128, dtype, gap=4096)
    index = torch.randperm(n + 2)[:n].int() + 1
    slots = from_vllm_decode(index, n, PoolLayout.of(pool, "KV"))
    theirs, ours, truth = clone_pool(pool), clone_pool(pool), clone_pool(pool)
    expected = through_vllm(case, theirs, index)
    torch.testing.assert_close(run_op(case, ours, slots), expected, **OUT)
    torch.testing.assert_close(run_reference(case, truth, slots), expected, **OUT)
    torch.testing.assert_close(ours, theirs, **STATE)
    torch.testing.assert_close(truth, theirs, **STATE)


@pytest.mark.parametrize("HQ,HV,n", [(2, 4, 8), (4, 4, 1), (1, 8, 3), (16, 32, 4)])
def test_decode_rounded_as_vllms(HQ, HV, n):
    """Many steps on small keys, where a thousandth in a norm or a bit of the step size would show; the state starts afresh."""
    index = torch.randperm(n + 2)[:n].int() + 1
    theirs = make_pool(n + 3, HV, 128, 128, gap=4096).zero_()
    slots = from_vllm_decode(index, n, PoolLayout.of(theirs, "KV"))
    ours, truth, plain = (clone_pool(theirs) for _ in range(3))
    different = tokens = 0
    for step in range(20):
        case = make_case(n, HQ, HV, 128, 128, torch.bfloat16, seed=step)
        case.mixed_qkv *= 0.03
        expected, found = through_vllm(case, theirs, index), run_op(case, ours, slots, as_vllm=True)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=2**-7)  # one step of bfloat16
        different, tokens = different + int((found != expected).sum()), tokens + found.numel()
        torch.testing.assert_close(run_reference(case, truth, slots, as_vllm=True), expected, atol=1e-6, rtol=2**-7)
        run_reference(case, plain, slots)
    # Of the outputs, rounded to bfloat16, all but one in a thousand are the same bits (with MKL, in ten thousand).
    assert different <= tokens * 1e-3, f"{different} of {tokens}"
    assert distance(ours, theirs) < 1e-6 and distance(truth, theirs) < 1e-6
    assert 1e-4 < distance(plain, theirs) < 3 * 2**-9, "the step size is rounded to bfloat16 three times"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 3, 3], [3, 1, 2]])
def test_speculative(dtype, lengths):
    n, columns, HQ, HV = 3, 3, 2, 4
    case = make_case(sum(lengths), HQ, HV, 128, 128, torch.bfloat16)
    pool = make_pool(n * columns + 1, HV, 128, 128, dtype, gap=4096)
    index = (torch.randperm(n * columns) + 1).view(n, columns).int()
    accepted = torch.tensor([1, 3, 2], dtype=torch.int32)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = from_vllm_spec(index, accepted, cu, PoolLayout.of(pool, "KV"), check=True)
    theirs, ours = clone_pool(pool), clone_pool(pool)
    q, k, v = heads(case)
    expected = ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
        A_log=case.A_log,
        dt_bias=case.dt_bias,
        q=q,
        k=k,
        v=v,
        a=case.a,
        b=case.b,
        initial_state_source=theirs.view(pool.shape[0], HV, 128, 128),
        spec_state_indices=index,
        num_accepted_tokens=accepted,
        cu_seqlens=cu,
        use_qk_l2norm_in_kernel=True,
    )
    torch.testing.assert_close(run_op(case, ours, slots), expected.reshape(-1, HV, 128), **OUT)
    torch.testing.assert_close(ours, theirs, **STATE)
