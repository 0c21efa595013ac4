"""This machine's kernels, each against its reference: what ``moe-backend verify --kernels`` prints. No model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch

from .gdn import reference as gdn_reference
from .gdn.slots import PoolLayout, Slots, from_vllm_decode, from_vllm_spec
from .kernels.compile import name_of
from .linear import op as linear
from .linear import reference as linear_reference
from .moe import kernel_check
from .moe.kernel_check import Found, Row, attempt, compare, until_lost
from .nvfp4.format import quantize

if TYPE_CHECKING:
    from .linear import cuda as cuda_linear

BOUNDS = (1e-2, 5e-2)
"""Of bfloat16 outputs, as in :mod:`.moe.kernel_check`."""
HEADS, HEAD = (2, 4), 128
"""Key and value heads, and their size."""
COUNTS = (1, 6, 40, 128)
"""Rows of a decode step: with these heads, every size of block that :func:`.gdn.cuda.tile_for` has."""
DRAFTS = 2
"""Of a speculative row: it has a slot for the state after each of its tokens."""


@until_lost
def rows(device: torch.device) -> Iterator[Row]:
    """Expert kernels with every tactic, gated-delta-net decode, and dense layers where this package has a way to run them."""
    yield from kernel_check.rows(device)
    if device.type == "cpu":
        yield from gdn_rows(device, COUNTS[:2])  # whose op has no blocks
        yield from linear_rows()
        return
    yield from gdn_rows(device)
    if torch.cuda.get_device_capability(device)[0] == 9:
        yield from hopper_linear_rows(device)


@until_lost
def gdn_rows(device: torch.device, counts: Sequence[int] = COUNTS) -> Iterator[Row]:
    """One decode step of so many rows: with one token each, and with drafts, where rows have 1 to 3 tokens and resume after 1 to 3."""
    generator = torch.Generator(device).manual_seed(0)
    for drafts, state, count in product((0, DRAFTS), (torch.float32, torch.bfloat16), counts):
        step = _Step(state, count, drafts, generator)
        case, way = f"{HEADS[1]} heads of {HEAD}", f"{name_of(state)} states" + (f", up to {drafts} drafts" if drafts else "")
        yield attempt(device, "gdn_decode", case, way, len(step.mixed), _gdn, step)


class _Step:
    """A random decode step; row 1 has no slot. mixed, a, b, a_log, bias, pool: arguments of :func:`.gdn.op.gdn_decode`.

    tables: None, or int32 state slots [n, drafts + 1], accepted tokens [n] and offsets of the rows' tokens [n + 1], as vLLM has them.
    """

    def __init__(self, state: torch.dtype, count: int, drafts: int, generator: torch.Generator) -> None:
        def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(*shape, device=generator.device, generator=generator).to(dtype)

        def up_to(most: int) -> torch.Tensor:
            return torch.randint(1, most + 1, (count,), device=generator.device, generator=generator)

        key_heads, heads = HEADS
        columns = drafts + 1
        lengths = up_to(columns)
        tokens = int(lengths.sum())
        self.mixed, self.a, self.b = rand(tokens, (2 * key_heads + heads) * HEAD), rand(tokens, heads), rand(tokens, heads)
        self.a_log, self.bias = rand(heads, dtype=torch.float32), rand(heads)
        self.pool = rand(count * columns + 3, heads, HEAD, HEAD, dtype=state)
        owned = torch.randperm(count * columns + 2, device=generator.device, generator=generator)[: count * columns] + 1
        owned = owned.view(count, columns).int()
        if count > 1:
            owned[1] = 0
        layout = PoolLayout.of(self.pool)
        self.tables, self.slots = None, from_vllm_decode(owned[:, 0], count, layout)
        if drafts:
            starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            self.tables = owned, up_to(columns).int(), starts
            self.slots = from_vllm_spec(*self.tables, layout)
        self.has_token = torch.arange(columns, device=generator.device) < lengths[:, None]

    def right(self, pool: torch.Tensor) -> torch.Tensor:
        """The reference's output [tokens, HV, V]; ``pool`` is updated."""

        def by_row(packed: torch.Tensor) -> torch.Tensor:
            rows = packed.new_zeros(*self.has_token.shape, packed.shape[-1])
            rows[self.has_token] = packed
            return rows

        sizes = [HEADS[0] * HEAD, HEADS[0] * HEAD, HEADS[1] * HEAD]
        q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in by_row(self.mixed).split(sizes, dim=-1))
        return gdn_reference.gdn_decode(q, k, v, by_row(self.a), by_row(self.b), self.a_log, self.bias, pool, self.slots)[self.has_token]


def _gdn(step: _Step) -> Found:
    """Outputs, the states that the rows leave, and that no other slot changes by a bit."""
    right_pool, own_pool = step.pool.clone(), step.pool.clone()
    right = step.right(right_pool).float()
    out = _decode(step.mixed, step.a, step.b, step.a_log, step.bias, own_pool, step.slots, step.tables)
    reason, max_abs, relative = compare(out.flatten(1), right.flatten(1), BOUNDS)
    written = step.slots.write[step.slots.is_live(step.slots.write)]
    others = torch.ones(len(step.pool), dtype=torch.bool, device=step.pool.device)
    others[written] = False
    if reason is None:
        found = compare(own_pool[written].float().flatten(1), right_pool[written].float().flatten(1), BOUNDS)[0]
        reason = f"states {found}" if found else None
    if reason is None and not torch.equal(own_pool[others], step.pool[others]):
        reason = "a slot that no row writes has changed"
    return reason, max_abs, relative


def _decode(
    mixed: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    bias: torch.Tensor,
    pool: torch.Tensor,
    slots: Slots,
    tables: tuple[torch.Tensor, ...] | None,
) -> torch.Tensor:
    """By the kernel of the tensors' device."""
    if mixed.device.type == "cpu":
        from .gdn.op import gdn_decode

        return gdn_decode(mixed, a, b, a_log, bias, pool, slots)
    from .gdn import cuda

    out = torch.full((mixed.shape[0], pool.shape[1], HEAD), torch.nan, dtype=mixed.dtype, device=mixed.device)
    if tables is None:
        cuda.decode(mixed, a, b, a_log, bias, pool, slots.read.int(), out)
        return out
    owned, accepted, starts = tables
    cuda.decode(
        *(mixed, a, b, a_log, bias, pool, owned, out),
        write=owned,
        cu_seqlens=starts,
        num_accepted=accepted,
        max_tokens=owned.shape[1],
    )
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


@until_lost
def hopper_linear_rows(device: torch.device, counts: Sequence[int] = (1, 12, 70, 300)) -> Iterator[Row]:
    """The experts' kernel as a dense layer, with and without a last block of columns that is not full."""
    from .linear import cuda

    generator = torch.Generator(device).manual_seed(0)
    for rows, columns in ((1024, 512), (208, 272)):
        weights = quantize(torch.randn(rows, columns, device=device, generator=generator) / columns**0.5)
        packed = cuda.pack(weights.packed, weights.scale, weights.scale_2)
        cuda.prepare(rows, columns, torch.bfloat16, device, max(counts))
        for count in counts:
            x = torch.randn(count, columns, device=device, generator=generator).bfloat16()
            right = linear_reference.nvfp4_linear(x.float(), weights.packed, weights.scale, weights.scale_2)
            yield attempt(device, "moe_gemm", f"{rows}x{columns} dense", "W4A16", count, _dense, x, packed, right)


def _dense(x: torch.Tensor, packed: cuda_linear.Weights, right: torch.Tensor) -> Found:
    from .linear import cuda

    out = torch.full(right.shape, torch.nan, dtype=x.dtype, device=x.device)
    cuda.nvfp4_linear(x, packed, out)
    return compare(out, right, BOUNDS)
