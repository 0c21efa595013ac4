"""Split-pool indices: which state each row of a decode call reads, and where each new state goes.

Every engine keeps the recurrent states of all requests in one pool and tells a layer which slots the rows of a
batch own, each in its own metadata. A kernel sees :class:`Slots` only. The functions ``from_*`` build it from the
engines' tensors; they launch a few small device operations, never synchronise with the host, and are safe in
CUDA-graph capture. Run them once a step, not once a layer.

Rules that hold for every engine:

* Indices are int64 from here on: a slot number times a slot stride leaves 32 bits at pool sizes in daily use.
* An index is *live* if ``live_begin <= index < live_end``, else it is null. A null read slot skips the whole row
  (zero output, no memory touched); a null write slot skips that one write. So no index can leave the pool.
* A row that cannot be right (accepted count outside 1..columns, length outside 0..columns) becomes null on the
  hot path, where raising would need a synchronisation. :meth:`Slots.validate` and ``check=True`` raise instead.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from ..errors import PluginError

NULL = -1
"""Null under every rule: what the ``from_*`` functions write for rows and columns that must be skipped."""


class SlotsError(PluginError):
    """Slot indices that no kernel may be given: outside the pool, written twice, or read while being written."""


class NullRule(enum.Enum):
    """Which slot indices mean "no state here" (padded rows, mostly)."""

    BLOCK_ZERO = "index <= 0"
    """vLLM: block 0 is never owned by a request. SGLang: nor is slot 0, which padded rows of eager batches have; of graphs, -1."""
    NEGATIVE = "index < 0"
    """FlashInfer's fp32 path: slot 0 is an ordinary slot."""
    NEGATIVE_OR_LAST = "index < 0 or index == pool size - 1"
    """SGLang where padding is remapped to a sentinel slot at the end of the pool."""


@dataclass(frozen=True)
class PoolLayout:
    """How a pool tensor lies in memory.

    ``num_slots`` slots, ``slot_stride`` elements apart (more than one state's elements where the convolution state
    shares the block), and ``order``: "VK" if a head's matrix is stored [V, K], "KV" if the engine stores [K, V] in a
    buffer that it declares as [slots, HV, V, K] (vLLM's CPU backend).
    """

    num_slots: int
    slot_stride: int
    order: str = "VK"

    def __post_init__(self) -> None:
        if self.order not in ("VK", "KV"):
            raise SlotsError("PoolLayout.order", repr(self.order), "'VK' or 'KV'")

    @classmethod
    def of(cls, pool: torch.Tensor, order: str = "VK") -> PoolLayout:
        """The layout of ``pool`` [slots, ...], any stride between slots."""
        return cls(pool.shape[0], pool.stride(0), order)

    def view(self, pool: torch.Tensor) -> torch.Tensor:
        """``pool`` as the engine declares it, [slots, HV, V, K], to the logical [slots, HV, V, K]; never copies."""
        if self.order == "VK":
            return pool
        slots, heads, v, k = pool.shape
        return pool.view(slots, heads, k, v).transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the rows of one decode call find their states and leave them.

    read: int64 [n]. write: int64 [n] (one write a row, after its last token) or [n, T] (the state after token t goes to
    column t; columns past the row's length are null). cu_seqlens: int64 [n + 1], the first token of each row in packed
    tensors, or None if row i is token i. ``same_slots`` says, without looking at the indices, that every row is updated in
    place (the design's ``same_pool``): kernels compile read and write as one pointer. It is never true for
    [n, T] writes. Two rows must not write one slot; with split slots no row may write what another row reads.
    """

    read: torch.Tensor
    write: torch.Tensor
    pool: PoolLayout
    null_rule: NullRule
    same_slots: bool
    cu_seqlens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("read", self.read), ("write", self.write), ("cu_seqlens", self.cu_seqlens)):
            if tensor is not None and tensor.dtype != torch.int64:
                raise SlotsError(f"Slots.{name}", str(tensor.dtype), "torch.int64")
        if self.read.dim() != 1 or self.write.dim() not in (1, 2) or self.write.shape[0] != self.read.shape[0]:
            raise SlotsError("Slots", f"read {tuple(self.read.shape)}, write {tuple(self.write.shape)}", "read [n], write [n] or [n, T]")
        if self.same_slots and self.write.dim() == 2:
            raise SlotsError("Slots.same_slots", "True with one write slot a token", "True only with write [n]")

    @property
    def live_begin(self) -> int:
        return 1 if self.null_rule is NullRule.BLOCK_ZERO else 0

    @property
    def live_end(self) -> int:
        return self.pool.num_slots - (1 if self.null_rule is NullRule.NEGATIVE_OR_LAST else 0)

    @property
    def lengths(self) -> torch.Tensor | None:
        """int64 [n] tokens of each row, or None if each row has one token."""
        return None if self.cu_seqlens is None else self.cu_seqlens.diff()

    def is_live(self, index: torch.Tensor) -> torch.Tensor:
        """bool, same shape: which of ``index`` are slots a kernel may touch."""
        return (index >= self.live_begin) & (index < self.live_end)

    def validate(self) -> Slots:
        """Check what the hot path cannot, for tests and debugging; synchronises. Returns self, raises SlotsError."""
        read, write = self.read.cpu(), self.write.cpu()
        for name, index in (("read", read), ("write", write)):
            if index.numel() and int(index.max()) >= self.pool.num_slots:
                raise SlotsError(f"Slots.{name}", f"slot {int(index.max())}", f"slots below the pool size {self.pool.num_slots}")
        lengths = torch.ones_like(read) if self.cu_seqlens is None else self.cu_seqlens.cpu().diff()
        if lengths.numel() and int(lengths.min()) < 0:
            raise SlotsError("Slots.cu_seqlens", "a decreasing offset", "offsets that never decrease")
        if self.write.dim() == 2 and lengths.numel() and int(lengths.max()) > self.write.shape[1]:
            raise SlotsError("Slots.cu_seqlens", f"a row of {int(lengths.max())} tokens", f"at most {self.write.shape[1]} tokens a row")
        active = self.is_live(read) & (lengths > 0)
        columns = write if write.dim() == 2 else write[:, None]
        row_of = torch.arange(read.shape[0])[:, None].expand_as(columns)
        used = self.is_live(columns) & active[:, None]
        slots, rows = columns[used].tolist(), row_of[used].tolist()
        if len(set(slots)) != len(slots):
            raise SlotsError("Slots.write", f"slot {max(slots, key=slots.count)} written more than once", "distinct live write slots")
        writer = dict(zip(slots, rows, strict=True))
        for row in active.nonzero().flatten().tolist():
            owner = writer.get(int(read[row]), row)
            if owner != row:
                raise SlotsError("Slots", f"row {owner} writes slot {int(read[row])}, which row {row} reads", "slots owned by one row")
        return self


def from_vllm_decode(state_indices: torch.Tensor, num_decodes: int, pool: PoolLayout) -> Slots:
    """vLLM, one token a row: the first ``num_decodes`` of ``non_spec_state_indices_tensor`` ([>= num_decodes], any int).

    Rows are updated in place. ``num_decodes`` is the padded row count under a full CUDA graph; block 0 is null.
    """
    slots = state_indices[:num_decodes].to(torch.int64)
    return Slots(slots, slots, pool, NullRule.BLOCK_ZERO, same_slots=True)


def from_vllm_spec(
    spec_state_indices: torch.Tensor,
    num_accepted: torch.Tensor,
    query_start_loc: torch.Tensor,
    pool: PoolLayout,
    *,
    check: bool = False,
) -> Slots:
    """vLLM, speculative rows: ``spec_state_indices_tensor`` [n, C], ``num_accepted_tokens`` [>= n], ``query_start_loc`` [n + 1].

    A row owns C slots, C - 1 drafts and one. The last step left the state after its token t in column t, so a row of
    which ``num_accepted`` tokens stood resumes from column ``num_accepted - 1`` and refills the columns from 0 on. Rows
    may be ragged, empty, or null. A row with an accepted count outside 1..C or a length outside 0..C is an error:
    ``check=True`` raises SlotsError (and synchronises); without it the row is skipped as null, because resuming from a
    wrong state would corrupt the request silently.
    """
    rows, columns = spec_state_indices.shape
    index = spec_state_indices.to(torch.int64)
    accepted = num_accepted[:rows].to(torch.int64)
    cu_seqlens = query_start_loc[: rows + 1].to(torch.int64)
    lengths = cu_seqlens.diff()
    accepted_ok = (accepted >= 1) & (accepted <= columns)
    length_ok = (lengths >= 0) & (lengths <= columns)
    if check:
        owned = (index > 0).any(1)
        for name, ok, values, allowed in (
            ("num_accepted", accepted_ok | ~owned, accepted, f"1..{columns}"),
            ("query_start_loc", length_ok, lengths, f"rows of 0..{columns} tokens"),
        ):
            if not bool(ok.all()):
                raise SlotsError(name, f"{int(values[~ok][0])}", allowed)
    column = (accepted - 1).clamp(0, columns - 1)
    read = index.gather(1, column[:, None]).squeeze(1)
    read = read.where(accepted_ok & length_ok & (lengths > 0), NULL)
    token = torch.arange(columns, device=index.device)
    write = index.where(token < lengths[:, None], NULL)
    return Slots(read, write, pool, NullRule.BLOCK_ZERO, same_slots=False, cu_seqlens=cu_seqlens)


def from_vllm_spec_conv(spec_state_indices: torch.Tensor, query_start_loc: torch.Tensor, pool: PoolLayout) -> Slots:
    """vLLM, the convolution state of speculative rows: one rolling buffer a row, in column 0, updated in place."""
    rows = spec_state_indices.shape[0]
    slots = spec_state_indices[:, 0].to(torch.int64)
    return Slots(slots, slots, pool, NullRule.BLOCK_ZERO, same_slots=True, cu_seqlens=query_start_loc[: rows + 1].to(torch.int64))


def from_sglang(
    cache_indices: torch.Tensor,
    pool: PoolLayout,
    *,
    write_indices: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    sentinel: bool = False,
) -> Slots:
    """SGLang: ``cache_indices`` [n], padded with -1 or 0 (``sentinel``: with -1 or the pool's last slot, which is never a request's).

    In place unless ``write_indices`` ([n] or [n, T]) are given. ``query_start_loc`` [n + 1] for more than one token a row
    (``target_verify``; per-step states then go to the batch-scoped intermediate buffer, with ``update_state=False``).
    """
    read = cache_indices.to(torch.int64)
    write = read if write_indices is None else write_indices.to(torch.int64)
    cu_seqlens = None if query_start_loc is None else query_start_loc[: read.shape[0] + 1].to(torch.int64)
    rule = NullRule.NEGATIVE_OR_LAST if sentinel else NullRule.BLOCK_ZERO
    return Slots(read, write, pool, rule, same_slots=write_indices is None, cu_seqlens=cu_seqlens)
