"""What gated-delta-net decode means, in plain torch: the truth the kernels are tested against.

One head's state is a matrix S [V, K] that maps keys to values. A token decays it, corrects what it returns for the
token's key, and reads it with the token's query:

    S <- g S;   delta = beta (v - S k);   S <- S + delta k^T;   o = S q

Arithmetic is fp32 (or ``compute_dtype``). Between the tokens of one call the state stays in that precision; it is rounded
to the pool's dtype once for each write, as the engines' kernels do, which keep it in registers. So a call with T tokens
equals T calls with one token bit for bit only for an fp32 pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .slots import Slots

L2_EPS = 1e-6
VLLM_L2_EPS = 1e-5
"""vLLM 0.32's CPU kernel for decode has this; its kernel for prefill has 1e-6, as everything else."""
SOFTPLUS_THRESHOLD = 20.0


def gates(a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, dtype: torch.dtype = torch.float32):
    """Decay g in (0, 1] and step size beta in (0, 1), both ``dtype`` [..., HV]; a, b [..., HV], A_log, dt_bias [HV]."""
    rate = F.softplus(a.to(dtype) + dt_bias.to(dtype), threshold=SOFTPLUS_THRESHOLD)
    return torch.exp(-torch.exp(A_log.to(dtype)) * rate), torch.sigmoid(b.to(dtype))


def vllm_step_size(b: torch.Tensor) -> torch.Tensor:
    """sigmoid(b) as vLLM's CPU kernel for decode has it: computed in b's dtype, and rounded to it after each of three steps."""
    return (1 + b.neg().exp()).reciprocal()


def l2_normalize(x: torch.Tensor, eps: float = L2_EPS) -> torch.Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension: the engines add eps under the root."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def delta_rule_step(S, q, k, v, g, beta):
    """One token of every row: S [m, HV, V, K], q, k [m, HV, K], v [m, HV, V], g, beta [m, HV] -> (new S, o [m, HV, V])."""
    S = g[..., None, None] * S
    delta = beta[..., None] * (v - torch.einsum("mhvk,mhk->mhv", S, k))
    S = S + delta[..., :, None] * k[..., None, :]
    return S, torch.einsum("mhvk,mhk->mhv", S, q)


def gdn_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    slots: Slots,
    lengths: torch.Tensor | None = None,
    intermediate: torch.Tensor | None = None,
    update_state: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    as_vllm: bool = False,
) -> torch.Tensor:
    """Decode T tokens of each of n rows and update the pool; returns out [n, T, HV, V] in v's dtype.

    q, k: [n, T, HQ, K], v: [n, T, HV, V], HV a multiple of HQ (value head h uses key head h // (HV // HQ)). a, b: [n, T, HV].
    A_log, dt_bias: [HV]. pool: [slots, HV, V, K] as the engine declares it (``slots.pool`` says how it is stored), fp32,
    bf16 or fp16, any stride between slots. lengths: int [n], tokens of ragged rows (default: ``slots.lengths``, else T);
    output past a row's length is zero. intermediate: [B >= n, T, HV, V, K]: the state after token t of row i goes to
    [i, t], by batch row and never by slot. update_state=False leaves the pool as it is. as_vllm: with the step size and the
    eps of vLLM's own CPU kernel; all else in ``compute_dtype``.

    Null read slots: zero output, nothing touched. Read slots that are not written keep every bit, and so do all slots of
    other requests.
    """
    n, T, HQ, K = q.shape
    HV, V = v.shape[2:]
    out = v.new_zeros(n, T, HV, V)
    store = slots.pool.view(pool)
    if lengths is None:
        lengths = slots.lengths
    if lengths is None:
        lengths = torch.full((n,), T, device=q.device)
    rows = (slots.is_live(slots.read) & (lengths > 0)).nonzero().flatten()
    lengths = lengths[rows]

    eps = VLLM_L2_EPS if as_vllm else L2_EPS
    q, k = (l2_normalize(x[rows].to(compute_dtype), eps).repeat_interleave(HV // HQ, dim=2) for x in (q, k))
    q = q * K**-0.5
    v = v[rows].to(compute_dtype)
    g, beta = gates(a[rows], b[rows], A_log, dt_bias, compute_dtype)
    if as_vllm:
        beta = vllm_step_size(b[rows]).to(compute_dtype)
    S = store[slots.read[rows]].to(compute_dtype)

    for t in range(T):
        active = lengths > t
        stepped, o = delta_rule_step(S, q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t])
        S = torch.where(active[:, None, None, None], stepped, S)
        out[rows[active], t] = o[active].to(out.dtype)
        if intermediate is not None:
            intermediate[rows[active], t] = S[active].to(intermediate.dtype)
        if update_state and slots.write.dim() == 2:
            _write(store, slots, slots.write[rows, t], active, S)
    if update_state and slots.write.dim() == 1:
        _write(store, slots, slots.write[rows], torch.ones_like(lengths, dtype=torch.bool), S)
    return out


def _write(store: torch.Tensor, slots: Slots, index: torch.Tensor, active: torch.Tensor, S: torch.Tensor) -> None:
    keep = active & slots.is_live(index)
    store[index[keep]] = S[keep].to(store.dtype)


def conv_update(
    x: torch.Tensor,
    conv_pool: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slots: Slots,
    lengths: torch.Tensor | None = None,
    num_accepted: torch.Tensor | None = None,
    activation: str | None = "silu",
) -> torch.Tensor:
    """The short causal convolution before the delta rule, and its rolling buffer; returns out [n, T, C] in x's dtype.

    x: [n, T, C]. conv_pool: [slots, C, columns >= width - 1], any strides (transpose an engine's [slots, columns, C]).
    weight: [C, width]. bias: [C] or None. slots: one slot a row, in place. lengths: as in :func:`gdn_decode`.

    Without ``num_accepted`` the history of a row is columns 0 .. width - 2, and afterwards they hold its last width - 1
    inputs. With it (speculative rows, int [n]) the history starts at column num_accepted - 1, and afterwards the columns
    from 0 hold (history, x) without its first column, so that whichever number of tokens is accepted next, their history
    starts at that number minus one. Further columns are left alone. Rows whose slot is null, or whose accepted count does
    not fit the buffer, are skipped: zero output, nothing touched.
    """
    n, T, C = x.shape
    width = weight.shape[1]
    out = x.new_zeros(n, T, C)
    if lengths is None:
        lengths = slots.lengths
    for row in slots.is_live(slots.read).nonzero().flatten().tolist():
        tokens = T if lengths is None else int(lengths[row])
        start = 0 if num_accepted is None else int(num_accepted[row]) - 1
        buffer = conv_pool[slots.read[row]]
        if tokens == 0 or start < 0 or start + width - 1 > buffer.shape[1]:
            continue
        history = buffer[:, start : start + width - 1]
        conv_in = torch.cat([history, x[row, :tokens].T.to(buffer.dtype)], dim=1)
        y = F.conv1d(conv_in[None].float(), weight[:, None].float(), None if bias is None else bias.float(), groups=C)[0]
        out[row, :tokens] = (F.silu(y) if activation in ("silu", "swish") else y).T.to(out.dtype)
        kept = conv_in[:, 1:] if num_accepted is not None else conv_in[:, tokens:]
        buffer[:, : kept.shape[1]] = kept
    return out


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """RMS norm over the last dimension, then times silu(gate): x, gate [..., V], weight [V]; fp32 inside, x's dtype out."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * y * F.silu(gate.float())).to(x.dtype)
