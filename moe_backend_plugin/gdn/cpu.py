"""Gated-delta-net decode on a CPU: torch calls, one row's state at a time.

A row's state (HV V K, 256 KB and up) fits a core's second-level cache, a batch of them does not: gathering all states,
updating them and scattering them back moves nine times the bytes. So everything small is batched over all tokens
(normalisation, gates, output), and only the four operations that touch the state loop over rows, straight on the pool
where it is fp32.

The decay is folded in afterwards, S k = (g S_old) k = g (S_old k), so that one matrix product reads the old state for
key and query together, and the output is o = g (S_old q) + delta (k . q). The product is taken as [q; k] S^T rather than
S [q, k]: the BLAS batch product is five times faster with the short side on the left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .reference import L2_EPS, SOFTPLUS_THRESHOLD


def gdn_decode_out(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    read: torch.Tensor,
    write: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    intermediate: torch.Tensor | None,
    live_begin: int,
    live_end: int,
    update_state: bool,
    out: torch.Tensor,
) -> None:
    """The op's CPU kernel; see ``op.gdn_decode`` for the arguments. pool is logical: [slots, HV, V, K] in either order."""
    tokens = mixed_qkv.shape[0]
    if tokens == 0:
        return
    HV, V, K = pool.shape[1:]
    qk, v = _heads(mixed_qkv, HV, V, K)
    g = torch.exp(A_log.float().exp().neg() * F.softplus(a.float() + dt_bias.float(), threshold=SOFTPLUS_THRESHOLD))
    beta = torch.sigmoid(b.float())

    # delta = beta v - (beta g) (S_old k): everything but the product is known for all tokens up front.
    target = v * beta[..., None]
    weight = (beta * g)[..., None]
    product = torch.empty(tokens, HV, 2, V)
    delta = torch.empty(tokens, HV, V)
    walk = _Walk(
        pool,
        intermediate,
        update_state,
        list(
            zip(
                qk.unbind(0),
                product.unbind(0),
                target.unbind(0),
                weight.unbind(0),
                delta.unbind(0),
                g[..., None, None].unbind(0),
                strict=True,
            )
        ),
    )

    rows = read.tolist()
    writes = write.tolist()
    bounds = range(len(rows) + 1) if cu_seqlens is None else cu_seqlens.tolist()
    done: list[tuple[int, int]] = []
    for row, slot in enumerate(rows):
        begin, end = bounds[row], min(bounds[row + 1], tokens)
        if not live_begin <= slot < live_end or end <= begin:
            continue
        columns = writes[row] if write.dim() == 2 else [-1] * (end - begin - 1) + [writes[row]]
        if end - begin > len(columns):
            continue
        walk.row(row, slot, begin, [c if live_begin <= c < live_end else -1 for c in columns[: end - begin]])
        done.append((begin, end))

    qk_dot = (qk[:, :, 0] * qk[:, :, 1]).sum(-1, keepdim=True)
    result = (product[:, :, 0] * g[..., None]).addcmul_(delta, qk_dot)
    if sum(end - begin for begin, end in done) == tokens:
        out.copy_(result)
        return
    out.zero_()
    for begin, end in done:
        out[begin:end].copy_(result[begin:end])


def _heads(mixed_qkv: torch.Tensor, HV: int, V: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [q; k] for each value head, normalised and q scaled, [tokens, HV, 2, K], and v [tokens, HV, V]."""
    tokens, channels = mixed_qkv.shape
    HQ = (channels - HV * V) // (2 * K)
    x = mixed_qkv.float()
    qk = x[:, : 2 * HQ * K].view(tokens, 2, HQ, K)
    scale = torch.rsqrt((qk * qk).sum(-1, keepdim=True).add_(L2_EPS))
    scale[:, 0] *= K**-0.5
    qk = (qk * scale).transpose(1, 2)
    if HQ != HV:
        qk = qk[:, :, None].expand(tokens, HQ, HV // HQ, 2, K)
    return qk.reshape(tokens, HV, 2, K), x[:, 2 * HQ * K :].view(tokens, HV, V)


class _Walk:
    """Runs the tokens of one row over its state; holds what all rows share."""

    def __init__(self, pool: torch.Tensor, intermediate: torch.Tensor | None, update_state: bool, steps: list) -> None:
        self.pool, self.intermediate, self.update_state, self.steps = pool, intermediate, update_state, steps
        self.fp32 = pool.dtype == torch.float32
        self._scratch: torch.Tensor | None = None

    def row(self, row: int, slot: int, begin: int, writes: list[int]) -> None:
        """Read ``slot``, apply one token for each entry of ``writes``, and store the state after it there (-1: nowhere)."""
        state = self.pool[slot]
        if not self.fp32:
            state = self.scratch().copy_(state)
        for t, target in enumerate(writes):
            qk, product, base, weight, delta, g = self.steps[begin + t]
            torch.bmm(qk, state.transpose(1, 2), out=product)
            torch.addcmul(base, weight, product[:, 1], value=-1, out=delta)
            store = self.update_state and target >= 0
            # An fp32 pool needs no working copy: the new state is built in the slot it goes to, the old one is only read.
            new = self.pool[target] if store and self.fp32 else self.scratch()
            torch.mul(state, g, out=new)
            new.addcmul_(delta[:, :, None], qk[:, None, 1])
            if store and not self.fp32:
                self.pool[target].copy_(new)
            if self.intermediate is not None:
                self.intermediate[row, t].copy_(new)
            state = new

    def scratch(self) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = torch.empty_like(self.pool[0], dtype=torch.float32)
        return self._scratch


def conv_update_out(
    x: torch.Tensor,
    conv_pool: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    read: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    num_accepted: torch.Tensor | None,
    live_begin: int,
    live_end: int,
    silu: bool,
    out: torch.Tensor,
) -> None:
    """The CPU kernel of ``op.gdn_conv_update``: all windows of the batch side by side, one fused sum over the width."""
    tokens, C = x.shape
    width = weight.shape[1]
    rows = read.tolist()
    bounds = list(range(len(rows) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    starts = [0] * len(rows) if num_accepted is None else [count - 1 for count in num_accepted.tolist()]
    work = []
    for slot, start, begin, end in zip(rows, starts, bounds, bounds[1:], strict=False):
        end = min(end, tokens)
        if live_begin <= slot < live_end and end > begin and 0 <= start <= conv_pool.shape[2] - width + 1:
            work.append((conv_pool[slot], start, begin, end))
    # Each row gets its history in front of its tokens; token t of a row then sees columns t .. t + width - 1 of its part.
    total = sum(width - 1 + end - begin for _, _, begin, end in work)
    line = torch.empty(max(total, width), C, dtype=conv_pool.dtype)
    at = 0
    for buffer, start, begin, end in work:
        line[at : at + width - 1].copy_(buffer[:, start : start + width - 1].T)
        at += width - 1 + end - begin
        line[at - (end - begin) : at].copy_(x[begin:end])
    full, taps = line.float(), weight.float().unbind(1)
    y = full[: full.shape[0] - width + 1] * taps[0]
    for j in range(1, width):
        y.addcmul_(full[j : full.shape[0] - width + 1 + j], taps[j])
    if bias is not None:
        y += bias.float()
    if silu:
        F.silu(y, inplace=True)
    if sum(end - begin for _, _, begin, end in work) != tokens:
        out.zero_()
    at = 0
    for buffer, _, begin, end in work:
        count = end - begin
        out[begin:end].copy_(y[at : at + count])
        first = at + (count if num_accepted is None else 1)
        at += width - 1 + count
        buffer[:, : at - first].copy_(line[first:at].T)
