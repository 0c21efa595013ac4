"""This machine's kernels, each against its reference: what ``moe-backend verify --kernels`` prints. No model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .gdn import reference as gdn_reference
from .gdn.slots import NullRule, PoolLayout, Slots
from .kernels.compile import name_of
from .linear import op as linear
from .linear import reference as linear_reference
from .moe import kernel_check
from .moe.kernel_check import Row, compare
from .nvfp4.format import quantize

BOUNDS = (1e-2, 5e-2)
"""Of bfloat16 outputs, as in :mod:`.moe.kernel_check`."""
HEADS, HEAD = (2, 4), 128
"""Key and value heads, and their size."""


def rows(device: torch.device) -> Iterator[Row]:
    """Expert kernels with every tactic, gated-delta-net decode, and on a CPU dense layers (on GPUs these are the engine's)."""
    yield from kernel_check.rows(device)
    yield from gdn_rows(device)
    if device.type == "cpu":
        yield from linear_rows()


def gdn_rows(device: torch.device, counts: Sequence[int] = (1, 6, 70)) -> Iterator[Row]:
    """One decode step: outputs, the states of the rows' slots, and that no other slot changes by a bit. Row 1 has no slot."""
    generator = torch.Generator(device).manual_seed(0)
    key_heads, heads = HEADS

    def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    for state in (torch.float32, torch.bfloat16):
        for count in counts:
            mixed, a, b = rand(count, (2 * key_heads + heads) * HEAD), rand(count, heads), rand(count, heads)
            a_log, bias = rand(heads, dtype=torch.float32), rand(heads)
            pool = rand(count + 3, heads, HEAD, HEAD, dtype=state)
            index = torch.randperm(count + 2, device=device, generator=generator)[:count] + 1
            if count > 1:
                index[1] = 0
            slots = Slots(index, index, PoolLayout.of(pool), NullRule.BLOCK_ZERO, same_slots=True)
            right_pool, own_pool = pool.clone(), pool.clone()
            parts = mixed.split([key_heads * HEAD, key_heads * HEAD, heads * HEAD], dim=-1)
            q, k, v = (part.reshape(count, 1, -1, HEAD) for part in parts)
            right = gdn_reference.gdn_decode(q, k, v, a[:, None], b[:, None], a_log, bias, right_pool, slots).float()
            out = _decode(mixed, a, b, a_log, bias, own_pool, slots)
            reason, max_abs, relative = compare(out.view(count, -1), right.view(count, -1), BOUNDS)
            live = index[index > 0]
            others = torch.ones(len(pool), dtype=torch.bool, device=device)
            others[live] = False
            if reason is None:
                found = compare(own_pool[live].float().flatten(1), right_pool[live].float().flatten(1), BOUNDS)[0]
                reason = f"states {found}" if found else None
            if reason is None and not torch.equal(own_pool[others], pool[others]):
                reason = "a slot of no row has changed"
            yield Row("gdn_decode", f"{heads} heads of {HEAD}", f"{name_of(state)} states", count, reason, max_abs, relative)


def _decode(
    mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor, pool: torch.Tensor, slots: Slots
) -> torch.Tensor:
    """By the kernel of the tensors' device."""
    if mixed.device.type == "cpu":
        from .gdn.op import gdn_decode

        return gdn_decode(mixed, a, b, a_log, bias, pool, slots)
    from .gdn import cuda

    out = torch.full((mixed.shape[0], pool.shape[1], HEAD), torch.nan, dtype=mixed.dtype, device=mixed.device)
    cuda.decode(mixed, a, b, a_log, bias, pool, slots.read.int(), out)
    return out


def linear_rows(counts: Sequence[int] = (1, 70)) -> Iterator[Row]:
    """The CPU's dense layer, with and without rounded activations."""
    generator = torch.Generator().manual_seed(0)
    weights = quantize(torch.randn(96, 256, generator=generator))
    scale = weights.scale_2.expand(96)
    words = linear.prepare(weights.packed, weights.scale, scale)
    for input_scale in (None, torch.tensor(5 / 2688)):
        for count in counts:
            x = torch.randn(count, 256, generator=generator).bfloat16()
            right = linear_reference.nvfp4_linear(x, weights.packed, weights.scale, scale, None, input_scale).float()
            found = compare(linear.nvfp4_linear(x, *words, None, input_scale), right, BOUNDS)
            yield Row("nvfp4_linear", "96x256", "W4A16" if input_scale is None else "W4A4", count, *found)
