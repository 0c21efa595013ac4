"""Random decode problems, and the two implementations under one signature (packed tokens)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moe_backend_plugin.gdn import op, reference
from moe_backend_plugin.gdn.slots import Slots


@dataclass
class Case:
    """Packed inputs of ``sum(lengths)`` tokens, HQ and HV heads, head sizes K and V."""

    HQ: int
    HV: int
    K: int
    V: int
    mixed_qkv: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor

    def heads(self, mixed_qkv=None):
        x = self.mixed_qkv if mixed_qkv is None else mixed_qkv
        q, k, v = x.split([self.HQ * self.K, self.HQ * self.K, self.HV * self.V], dim=-1)
        shape = x.shape[:-1]
        return q.view(*shape, self.HQ, self.K), k.view(*shape, self.HQ, self.K), v.view(*shape, self.HV, self.V)


def make_case(tokens, HQ=2, HV=4, K=16, V=16, dtype=torch.float32, seed=0) -> Case:
    r = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=r)

    a_log = torch.rand(HV, generator=r).mul(4).add(0.1).log()
    return Case(
        HQ,
        HV,
        K,
        V,
        rand(tokens, 2 * HQ * K + HV * V).to(dtype),
        rand(tokens, HV).to(dtype),
        rand(tokens, HV).to(dtype),
        a_log,
        rand(HV).to(dtype),
    )


def make_pool(slots, HV=4, K=16, V=16, dtype=torch.float32, gap=64, seed=1) -> torch.Tensor:
    """A pool whose slots lie ``gap`` elements apart, as where the convolution state shares the block."""
    r = torch.Generator().manual_seed(seed)
    return torch.randn(slots, HV * V * K + gap, generator=r).to(dtype)[:, : HV * V * K].view(slots, HV, V, K)


def clone_pool(pool: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides and the same bytes between the slots."""
    size = (pool.shape[0] - 1) * pool.stride(0) + pool[0].numel()
    return pool.as_strided((size,), (1,)).clone().as_strided(pool.shape, pool.stride())


def whole(pool: torch.Tensor) -> torch.Tensor:
    """Every element between the first slot and the last, as integers (so that NaN compares equal)."""
    size = (pool.shape[0] - 1) * pool.stride(0) + pool[0].numel()
    return pool.as_strided((size,), (1,)).view({2: torch.int16, 4: torch.int32}[pool.element_size()])


def pad_rows(x: torch.Tensor, cu: list[int], T: int) -> torch.Tensor:
    out = x.new_zeros(len(cu) - 1, T, *x.shape[1:])
    for row in range(len(cu) - 1):
        out[row, : cu[row + 1] - cu[row]] = x[cu[row] : cu[row + 1]]
    return out


def run_reference(case: Case, pool, slots: Slots, intermediate=None, update_state=True, T=None, as_vllm=False):
    tokens = case.mixed_qkv.shape[0]
    cu = list(range(tokens + 1)) if slots.cu_seqlens is None else slots.cu_seqlens.tolist()
    T = T or max([1, *(e - s for s, e in zip(cu, cu[1:], strict=False))])
    x, a, b = (pad_rows(t, cu, T) for t in (case.mixed_qkv, case.a, case.b))
    padded = reference.gdn_decode(
        *case.heads(x), a, b, case.A_log, case.dt_bias, pool, slots, intermediate=intermediate, update_state=update_state, as_vllm=as_vllm
    )
    out = case.mixed_qkv.new_zeros(tokens, case.HV, case.V)
    for row in range(len(cu) - 1):
        out[cu[row] : cu[row + 1]] = padded[row, : cu[row + 1] - cu[row]]
    return out


def run_op(case: Case, pool, slots: Slots, intermediate=None, update_state=True, T=None, as_vllm=False):
    args = (case.mixed_qkv, case.a, case.b, case.A_log, case.dt_bias, pool, slots)
    return op.gdn_decode(*args, intermediate=intermediate, update_state=update_state, as_vllm=as_vllm)


RUNNERS = {"reference": run_reference, "op": run_op, "op-as-vllm": partial(run_op, as_vllm=True)}


def conv_reference(x, pool, weight, bias, slots, num_accepted=None, activation="silu"):
    tokens = x.shape[0]
    cu = list(range(tokens + 1)) if slots.cu_seqlens is None else slots.cu_seqlens.tolist()
    T = max([1, *(e - s for s, e in zip(cu, cu[1:], strict=False))])
    padded = reference.conv_update(pad_rows(x, cu, T), pool, weight, bias, slots, None, num_accepted, activation)
    out = torch.zeros_like(x)
    for row in range(len(cu) - 1):
        out[cu[row] : cu[row + 1]] = padded[row, : cu[row + 1] - cu[row]]
    return out


def conv_op(x, pool, weight, bias, slots, num_accepted=None, activation="silu"):
    return op.gdn_conv_update(x, pool, weight, bias, slots, num_accepted=num_accepted, activation=activation)


CONV_RUNNERS = {"reference": conv_reference, "op": conv_op}
