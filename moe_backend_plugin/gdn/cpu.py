"""Gated-delta-net decode on a CPU: torch calls, one row's state at a time.

A row's state (HV V K, 256 KB and up) fits a core's second-level cache, a batch of them does not: gathering all states,
updating them and scattering them back moves nine times the bytes. So everything small is batched over all tokens
(normalisation, gates, output), and only the four operations that touch the state loop over rows, straight on the pool
where it is fp32.

The decay is folded in afterwards, S k = (g S_old) k = g (S_old k), so that one matrix product reads the old state for
key and query together, and the output is o = g (S_old q) + delta (k . q). The product is taken as [q; k] S^T rather than
S [q, k]: the BLAS batch product is five times faster with the short side on the left.

In fp32 that is as exact as any other order, and yet other last bits become other texts in time: one logit in some thousands
is a tie. ``as_vllm`` therefore does the same mathematics in the order, and with the roundings, of vLLM's own CPU kernel.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F

from .reference import L2_EPS, SOFTPLUS_THRESHOLD, VLLM_L2_EPS, vllm_step_size


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
    as_vllm: bool = False,
) -> None:
    """The op's CPU kernel; see ``op.gdn_decode`` for the arguments. pool is logical: [slots, HV, V, K] in either order."""
    tokens = mixed_qkv.shape[0]
    if tokens == 0:
        return
    rule = (_InOrder if as_vllm else _Folded)(mixed_qkv, a, b, A_log, dt_bias, pool)
    walk = _Walk(pool, intermediate, update_state, rule)

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

    result = rule.outputs()
    if sum(end - begin for begin, end in done) == tokens:
        out.copy_(result)
        return
    out.zero_()
    for begin, end in done:
        out[begin:end].copy_(result[begin:end])


def _heads(mixed_qkv: torch.Tensor, HV: int, V: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [q, k], [tokens, 2, HQ, K], and v, [tokens, HV, V]."""
    tokens, channels = mixed_qkv.shape
    HQ = (channels - HV * V) // (2 * K)
    x = mixed_qkv.float()
    return x[:, : 2 * HQ * K].view(tokens, 2, HQ, K), x[:, 2 * HQ * K :].view(tokens, HV, V)


def _for_value_heads(qk: torch.Tensor, HV: int) -> torch.Tensor:
    """[tokens, 2, HQ, K] -> [q; k] for each value head, [tokens, HV, 2, K]."""
    tokens, _, HQ, K = qk.shape
    qk = qk.transpose(1, 2)
    if HQ != HV:
        qk = qk[:, :, None].expand(tokens, HQ, HV // HQ, 2, K)
    return qk.reshape(tokens, HV, 2, K)


class _Folded:
    """The delta rule with the decay folded in afterwards; everything but the products is known for all tokens up front."""

    def __init__(self, mixed_qkv, a, b, A_log, dt_bias, pool) -> None:
        HV, V, K = pool.shape[1:]
        qk, v = _heads(mixed_qkv, HV, V, K)
        scale = torch.rsqrt((qk * qk).sum(-1, keepdim=True).add_(L2_EPS))
        scale[:, 0] *= K**-0.5
        qk = _for_value_heads(qk * scale, HV)
        g = torch.exp(A_log.float().exp().neg() * F.softplus(a.float() + dt_bias.float(), threshold=SOFTPLUS_THRESHOLD))
        beta = torch.sigmoid(b.float())
        # delta = beta v - (beta g) (S_old k)
        self.product, self.delta = torch.empty(len(qk), HV, 2, V), torch.empty(len(qk), HV, V)
        self.qk, self.g = qk, g[..., None]
        parts = qk, self.product, v * beta[..., None], (beta * g)[..., None], self.delta, self.g[..., None]
        self.steps = list(zip(*(part.unbind(0) for part in parts), strict=True))

    def token(self, index: int, state: torch.Tensor, new: torch.Tensor) -> None:
        """Token ``index``'s update of ``state`` [HV, V, K] into ``new``, which may be the same memory."""
        qk, product, base, weight, delta, g = self.steps[index]
        torch.bmm(qk, state.transpose(1, 2), out=product)
        torch.addcmul(base, weight, product[:, 1], value=-1, out=delta)
        torch.mul(state, g, out=new)
        new.addcmul_(delta[:, :, None], qk[:, None, 1])

    def outputs(self) -> torch.Tensor:
        """[tokens, HV, V], once the tokens have run."""
        qk_dot = (self.qk[:, :, 0] * self.qk[:, :, 1]).sum(-1, keepdim=True)
        return (self.product[:, :, 0] * self.g).addcmul_(self.delta, qk_dot)


class _InOrder:
    """The delta rule as vLLM's CPU kernel rounds it, bit for bit where the BLAS adds in order.

    Its sums over K are one chain of fused multiply-adds. MKL's batch product is that too from four rows on (up to K = 128;
    with fewer it adds in parallel), so the one row that is meant is given four times.
    """

    ROWS = 4

    def __init__(self, mixed_qkv, a, b, A_log, dt_bias, pool) -> None:
        HV, V, K = pool.shape[1:]
        qk, v = _heads(mixed_qkv, HV, V, K)
        tokens = len(qk)
        norm = _sum_by_lanes(qk * qk).add_(VLLM_L2_EPS).sqrt_().reciprocal_()
        q, k = _for_value_heads(qk * norm, HV).unbind(2)
        beta = vllm_step_size(b).float()
        keys = k[:, :, None].expand(tokens, HV, self.ROWS, K).contiguous()
        self.result, self.scale = torch.empty(tokens, HV, self.ROWS, V), torch.full((HV, self.ROWS, K), K**-0.5)
        self.recalled, self.delta = torch.empty(HV, self.ROWS, V), torch.empty(HV, V)
        self.product = torch.empty_like(pool[0], dtype=torch.float32)
        # Views are made once: at these sizes each costs a tenth of the arithmetic.
        self.recall, self.delta_column, self.product_t = self.recalled[:, 0], self.delta[:, :, None], self.product.transpose(1, 2)
        parts = q[:, :, None], keys, k[:, :, None], v, beta[..., None], _decay(a, A_log, dt_bias)[..., None, None], self.result
        self.steps = list(zip(*(part.unbind(0) for part in parts), strict=True))

    def token(self, index: int, state: torch.Tensor, new: torch.Tensor) -> None:
        q, keys, k, v, beta, g, result = self.steps[index]
        torch.mul(state, g, out=new)
        torch.bmm(keys, new.transpose(1, 2), out=self.recalled)
        torch.sub(v, self.recall, out=self.delta).mul_(beta)
        new.addcmul_(self.delta_column, k)
        # Each term of the output is rounded before it is scaled.
        torch.mul(new, q, out=self.product)
        torch.bmm(self.scale, self.product_t, out=result)

    def outputs(self) -> torch.Tensor:
        return self.result[:, :, 0]


def _decay(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """The decay from steps that are each rounded correctly to fp32, as those of the C library nearly are."""

    def exact(function, x: torch.Tensor) -> torch.Tensor:
        return function(x.double()).float()

    x = a.float() + dt_bias.float()
    rate = torch.where(x > SOFTPLUS_THRESHOLD, x, exact(torch.log1p, exact(torch.exp, x)))
    return exact(torch.exp, -exact(torch.exp, A_log.float()) * rate)


def _sum_by_lanes(x: torch.Tensor, lanes: int = 16) -> torch.Tensor:
    """The sum over the last dimension in the order of a loop with 16 lanes, [..., 1]."""
    if x.shape[-1] % lanes:
        return x.sum(-1, keepdim=True)
    x = reduce(torch.add, x.unflatten(-1, (-1, lanes)).unbind(-2))
    while lanes > 1:
        lanes //= 2
        x = x[..., :lanes] + x[..., lanes:]
    return x


class _Walk:
    """Runs the tokens of one row over its state; holds what all rows share."""

    def __init__(self, pool: torch.Tensor, intermediate: torch.Tensor | None, update_state: bool, rule: _Folded | _InOrder) -> None:
        self.pool, self.intermediate, self.update_state, self.rule = pool, intermediate, update_state, rule
        self.fp32 = pool.dtype == torch.float32
        self._scratch: torch.Tensor | None = None

    def row(self, row: int, slot: int, begin: int, writes: list[int]) -> None:
        """Read ``slot``, apply one token for each entry of ``writes``, and store the state after it there (-1: nowhere)."""
        state = self.pool[slot]
        if not self.fp32:
            state = self.scratch().copy_(state)
        for t, target in enumerate(writes):
            store = self.update_state and target >= 0
            # An fp32 pool needs no working copy: the new state is built in the slot it goes to, the old one is only read.
            new = self.pool[target] if store and self.fp32 else self.scratch()
            self.rule.token(begin + t, state, new)
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
