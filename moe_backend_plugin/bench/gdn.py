"""``moe-backend bench gdn``: which cases are timed, by which providers, and the run itself.

A provider is a function that takes the inputs of a case and returns ``launch(i)``, which runs call number i and returns its
output [tokens, HV, V]. Each (provider, case) is first run once and compared with ``gdn/reference.py`` in float64; what is
wrong or cannot run is not timed, and the reason is stored.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby, product
from typing import Any

import torch

from ..gdn import reference
from ..gdn.slots import NullRule, PoolLayout, Slots
from ..gdn.support import HEAD
from .shared import first_line, release

HQ = 16
NORM_EPS = 1e-6
STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = torch.bfloat16
RESERVE = 12 << 30  # bytes left to inputs, outputs, intermediate states (up to 9 GiB) and the providers' own buffers

# The defaults: what a server meets, in a few minutes of GPU time.
BATCHES = tuple(2**i for i in range(10))
FEW_BATCHES = (1, 4, 16, 64, 256)
TOKEN_COUNTS = tuple(range(1, 9))
HEADS = (16, 32, 64)
FEW_HEADS = (32,)
QUICK_BATCHES, QUICK_TOKENS = (1, 64), (1, 4)
SPEC_TARGET = 16
"""Rows from which the target for several tokens a row counts."""
SECONDS = 420.0
"""Default of the time a run may take once Python is up."""
FEW_LAUNCHES_ABOVE = 1 << 30
"""Bytes that a call moves; longer calls of several tokens a row are timed with two launches, as eight of the largest need more memory
than there is."""
COLUMNS = 8
"""Of slot tables whose rows are further apart than T."""


@dataclass(frozen=True)
class Case:
    """One decode call: B rows of T tokens, HQ key heads and HV value heads, states of type ``state``.

    pool: "single" (T = 1 in place; T > 1 to T slots a row of the same pool) or "split" (to another pool).
    intermediates: the state after each token also goes to a buffer [B, T, HV, V, K].
    """

    B: int
    T: int
    HV: int
    state: str
    pool: str = "single"
    intermediates: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's state."""
        return self.HV * HEAD * HEAD * STATES[self.state].itemsize

    @property
    def moved_bytes(self) -> int:
        """Bytes of state that a call must read and write: each row once in, and out after each token (twice with intermediates)."""
        return self.B * self.row_bytes * (1 + self.T * (2 if self.intermediates else 1))

    @property
    def operations(self) -> int:
        """Floating-point operations on the states, 7 for each element and token: the decay 1, S k 2, S + delta k^T 2, S q 2.

        As the reference counts; normalisation, gates and delta itself are some hundredths more and left out.
        """
        return 7 * self.B * self.T * self.HV * HEAD * HEAD

    @property
    def launches(self) -> int:
        """Calls in the graph that is timed; the inputs have one more."""
        from .timing import LAUNCHES

        return min(2, LAUNCHES) if self.T > 1 and self.moved_bytes > FEW_LAUNCHES_ABOVE else LAUNCHES

    def __str__(self) -> str:
        return f"T={self.T} B={self.B} HV={self.HV} {self.state} {self.pool}{' intermediates' if self.intermediates else ''}"


@dataclass(frozen=True)
class Options:
    """What the user asked for; None is the default grid."""

    batch: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    state: tuple[str, ...] | None = None
    providers: tuple[str, ...] | None = None
    quick: bool = False
    seconds: float = SECONDS


Cell = tuple[Case, tuple[str, ...]]
"""A case and the providers that are timed on it."""


def plan(options: Options) -> list[Cell]:
    """All cells that were asked for, the most important first: what is left when the time is up has not been timed.

    First what the targets are about, each case beside the one kernel that vLLM runs there; then split pool, intermediates, and the other
    providers. A split pool and intermediates are this package's alone: vLLM's kernels write to the pool that they read, or to memory
    that they allocate themselves. Cells of one pool, (HV, state), come one after the other within each of these parts.
    """
    asked = options.providers or tuple(PROVIDERS)
    heads = options.heads or (FEW_HEADS if options.quick else HEADS)
    ours = tuple(name for name in asked if name == "plugin")
    parts: list[list[Cell]] = [[] for _ in range(6)]
    for state, HV, T in product(options.state or STATES, heads, options.tokens or (QUICK_TOKENS if options.quick else TOKEN_COUNTS)):
        for B in options.batch or (QUICK_BATCHES if options.quick else BATCHES):
            case = Case(B, T, HV, state)
            serving = tuple(name for name in asked if _in_grid(PROVIDERS[name], case, options))
            first = tuple(name for name in serving if name in ("plugin", "triton" if T == 1 else "triton-spec"))
            parts[0 if T == 1 else 1 if B >= SPEC_TARGET else 2].append((case, first))
            if T == 1 or B in FEW_BATCHES or options.batch:
                parts[3].append((Case(B, T, HV, state, pool="split"), ours))
            if B in FEW_BATCHES or options.batch:
                parts[4].append((Case(B, T, HV, state, intermediates=True), ours))
            parts[5].append((case, tuple(name for name in serving if name not in first)))
    return [cell for part in parts for cell in part if cell[1]]


def _in_grid(provider: Provider, case: Case, options: Options) -> bool:
    if case.T > provider.max_tokens or case.state not in provider.states:
        return False
    if provider.few(case.T) and not (options.batch or options.heads):
        return case.B in FEW_BATCHES and case.HV in FEW_HEADS
    return True


# --- inputs --------------------------------------------------------------------------------------------------------------------------


class Inputs:
    """Random inputs of ``count`` calls of one case; every list has one entry a call, each aligned as torch aligns a tensor.

    pool, write_pool: [slots, HV, V, K], shared with other cases; each call has slots of its own, drawn from the whole pool.
    table: int32 [B, T]. accepted: int32 [B], 1 .. T. cu: int32 [B + 1]. write: int32 [B, T], slots of ``write_pool``.
    qkv: [B T, 2 HQ K + HV V]. a, b: [B T, HV]. A_log: fp32 [HV]. dt_bias: [HV]. out: [B T, HV, V].
    """

    def __init__(self, case: Case, count: int, pool: torch.Tensor, write_pool: torch.Tensor | None, cache_bytes: int) -> None:
        self.case, self.count, self.pool, self.write_pool = case, count, pool, write_pool
        self._arenas: dict[str, torch.Tensor] = {}
        device, B, T, HV, tokens = pool.device, case.B, case.T, case.HV, case.B * case.T
        self.device = device
        (self.qkv,) = self._random("qkv", (tokens, (2 * HQ + HV) * HEAD))
        self.a, self.b = self._random("gates", (tokens, HV), (tokens, HV))
        self.A_log = (torch.rand(HV, device=device) * 8 + 0.1).log()
        self.dt_bias = torch.randn(HV, device=device).to(TOKENS)
        self.norm_weight = torch.randn(HEAD, device=device).to(TOKENS)
        self.out = [torch.empty(tokens, HV, HEAD, dtype=TOKENS, device=device) for _ in range(count)]
        self.table, self.accepted, self.write = self._carve("tables", torch.int32, (B, T), (B,), (B, T))
        slots = torch.randperm(pool.shape[0] - 1, device=device)[: count * B * T].view(count, B, T) + 1
        targets = None
        if write_pool is not None:
            targets = torch.randperm(write_pool.shape[0] - 1, device=device)[: count * B * T].view(count, B, T) + 1
        for i in range(count):
            self.table[i].copy_(slots[i])
            self.accepted[i].copy_(torch.randint(1, T + 1, (B,), device=device))
            if targets is not None:
                self.write[i].copy_(targets[i])
        self.cu = torch.arange(0, tokens + 1, T, dtype=torch.int32, device=device)
        self.intermediate: list[torch.Tensor | None] = [None] * count
        if case.intermediates:  # one buffer is enough where it is far larger than the cache
            shape = (B, T, HV, HEAD, HEAD)
            kept = min(count, 1 + cache_bytes // (B * T * case.row_bytes))
            buffers = [torch.empty(shape, dtype=pool.dtype, device=device) for _ in range(kept)]
            self.intermediate = [buffers[i % kept] for i in range(count)]

    @cached_property
    def qkv_apart(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """q, k [1, B T, HQ, K] and v [1, B T, HV, V], contiguous copies of ``qkv``, for kernels that do not take it packed."""
        tokens, HV = self.case.B * self.case.T, self.case.HV
        q, k, v = self._carve("qkv_apart", TOKENS, (1, tokens, HQ, HEAD), (1, tokens, HQ, HEAD), (1, tokens, HV, HEAD))
        for i, packed in enumerate(self.qkv):
            for part, source in zip((q, k, v), packed.split([HQ * HEAD, HQ * HEAD, HV * HEAD], dim=1), strict=True):
                part[i].view(tokens, -1).copy_(source)
        return list(zip(q, k, v, strict=True))

    @cached_property
    def wide_table(self) -> list[torch.Tensor]:
        """``table`` with its rows as far apart whatever T is, for kernels that are compiled for that distance."""
        (wide,) = self._carve("wide_table", torch.int32, (self.case.B, COLUMNS if self.case.T > 1 else 1))
        found = [tensor[:, : self.case.T] for tensor in wide]
        for tensor, source in zip(found, self.table, strict=True):
            tensor.copy_(source)
        return found

    @cached_property
    def gate(self) -> list[torch.Tensor]:
        """[B T, HV, V]."""
        return self._random("gate", (self.case.B * self.case.T, self.case.HV, HEAD))[0]

    def warm(self, provider: Provider) -> list[torch.Tensor]:
        """All that the kernels before this one would have left in the cache: what ``provider`` reads besides the states."""
        names = ["qkv_apart" if provider.apart else "qkv", "gates", "tables"]
        names += ["gate"] * provider.norm + ["wide_table"] * provider.wide
        return [self._arenas[name] for name in names]

    def _random(self, name: str, *shapes: tuple[int, ...]) -> list[list[torch.Tensor]]:
        found = self._carve(name, TOKENS, *shapes)
        for tensors in found:
            for tensor in tensors:
                tensor.normal_()
        return found

    def _carve(self, name: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[list[torch.Tensor]]:
        """``count`` tensors of each shape out of one piece of memory, so that one pass brings all into the cache."""
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        steps = [-(-size // 512) * 512 for size in sizes]
        arena = torch.zeros(self.count * sum(steps), dtype=torch.uint8, device=self.device)
        self._arenas[name] = arena.view(torch.int64)
        found, start = [], 0
        for shape, size, step in zip(shapes, sizes, steps, strict=True):
            starts = range(start, start + self.count * step, step)
            found.append([arena[at : at + size].view(dtype).view(shape) for at in starts])
            start += self.count * step
        return found


# --- providers -----------------------------------------------------------------------------------------------------------------------

Launch = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Provider:
    """Someone's kernel.

    prepare: inputs -> launch; imports what it needs and raises where it cannot serve.
    max_tokens: most tokens a row; 1 for kernels without speculative rows. states: the pools' types it takes.
    norm: the output is RMSNorm(o) * weight * silu(gate). apart: takes q, k and v apart (made before the timing).
    wide: takes ``wide_table``. compiles_each_shape: compiles for each batch size, so that the default grid leaves most of them out.
    full: on the default grid with every batch size and HV also with several tokens a row.
    """

    prepare: Callable[[Inputs], Launch]
    max_tokens: int = 1
    states: tuple[str, ...] = tuple(STATES)
    norm: bool = False
    apart: bool = False
    wide: bool = False
    compiles_each_shape: bool = False
    full: bool = False

    def few(self, T: int) -> bool:
        """Whether the default grid has only some of its batch sizes and HV, with T tokens a row."""
        return self.compiles_each_shape or (T > 1 and not self.full)


def _plugin(x: Inputs, norm: bool = False) -> Launch:
    from ..gdn.cuda import decode

    spec, split = x.case.T > 1, x.case.pool == "split"
    gates = x.gate if norm else [None] * x.count
    written = x.write if split else x.table

    def launch(i: int) -> torch.Tensor:
        decode(
            x.qkv[i], x.a[i], x.b[i], x.A_log, x.dt_bias, x.pool, x.table[i] if spec else x.table[i][:, 0], x.out[i],
            write=written[i] if spec else written[i][:, 0] if split else None,
            write_pool=x.write_pool if split else None,
            cu_seqlens=x.cu if spec else None, num_accepted=x.accepted[i] if spec else None, max_tokens=x.case.T,
            intermediate=x.intermediate[i], gate=gates[i], norm_weight=x.norm_weight if norm else None, norm_eps=NORM_EPS,
        )  # fmt: skip
        return x.out[i]

    return launch


def _plugin_norm(x: Inputs) -> Launch:
    return _plugin(x, norm=True)


def _triton(x: Inputs) -> Launch:
    from vllm.third_party.flash_linear_attention.ops import fused_recurrent_gated_delta_rule_packed_decode as packed_decode

    def launch(i: int) -> torch.Tensor:
        packed_decode(
            mixed_qkv=x.qkv[i], a=x.a[i], b=x.b[i], A_log=x.A_log, dt_bias=x.dt_bias, scale=HEAD**-0.5, initial_state=x.pool,
            out=x.out[i].unsqueeze(1), ssm_state_indices=x.table[i][:, 0], use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return x.out[i]

    return launch


def _triton_norm(x: Inputs) -> Launch:
    from vllm.third_party.flash_linear_attention.ops.layernorm_guard import layer_norm_fwd

    decode = _triton(x)
    normed = [torch.empty_like(out) for out in x.out]
    gate = x.gate

    def launch(i: int) -> torch.Tensor:
        layer_norm_fwd(
            decode(i).view(-1, HEAD), x.norm_weight, None, NORM_EPS, z=gate[i].view(-1, HEAD), out=normed[i].view(-1, HEAD),
            group_size=HEAD, norm_before_gate=True, is_rms_norm=True, activation="silu",
        )  # fmt: skip
        return normed[i]

    return launch


def _triton_spec(x: Inputs) -> Launch:
    from vllm.third_party.flash_linear_attention.ops import fused_sigmoid_gating_delta_rule_update as update

    qkv, table = x.qkv_apart, x.wide_table

    def launch(i: int) -> torch.Tensor:
        q, k, v = qkv[i]
        out, _ = update(
            A_log=x.A_log, a=x.a[i], b=x.b[i], dt_bias=x.dt_bias, q=q, k=k, v=v, initial_state=x.pool, inplace_final_state=True,
            cu_seqlens=x.cu, ssm_state_indices=table[i], num_accepted_tokens=x.accepted[i], use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out.view_as(x.out[i])

    return launch


def _vllm_cuda(x: Inputs) -> Launch:
    import vllm._custom_ops as ops

    if not hasattr(torch.ops._C, "fused_gdn_decode_post_conv_mtp"):
        raise RuntimeError("torch.ops._C.fused_gdn_decode_post_conv_mtp is not built")
    gate = x.gate

    def launch(i: int) -> torch.Tensor:
        ops.fused_gdn_decode_post_conv_mtp(
            mixed_qkv=x.qkv[i], a=x.a[i], b=x.b[i], A_log=x.A_log, dt_bias=x.dt_bias, state_indices=x.table[i], cu_seqlens=x.cu,
            num_accepted_tokens=x.accepted[i], state=x.pool, output_gate=gate[i], norm_weight=x.norm_weight, out=x.out[i],
            scale=HEAD**-0.5, norm_eps=NORM_EPS, output_gate_activation="silu",
        )  # fmt: skip
        return x.out[i]

    return launch


def _flashinfer(x: Inputs) -> Launch:
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose as decode

    B, HV, qkv = x.case.B, x.case.HV, x.qkv_apart

    def launch(i: int) -> torch.Tensor:
        q, k, v = (part.view(B, 1, -1, HEAD) for part in qkv[i])
        decode(
            q=q, k=k, v=v, state=None, A_log=x.A_log, a=x.a[i].view(B, 1, HV), dt_bias=x.dt_bias, b=x.b[i].view(B, 1, HV),
            scale=HEAD**-0.5, output=x.out[i].view(B, 1, HV, HEAD), use_qk_l2norm=True,
            initial_state=x.pool, initial_state_indices=x.table[i][:, 0],
        )  # fmt: skip
        return x.out[i]

    return launch


def _sglang(x: Inputs) -> Launch:
    from sglang.kernels.ops.attention.cutedsl_gdn import cutedsl_fused_sigmoid_gating_delta_rule_update as cutedsl_update

    qkv = x.qkv_apart

    def launch(i: int) -> torch.Tensor:
        q, k, v = qkv[i]
        out = cutedsl_update(
            A_log=x.A_log, dt_bias=x.dt_bias, q=q, k=k, v=v, a=x.a[i], b=x.b[i], initial_state_source=x.pool,
            initial_state_indices=x.table[i][:, 0], cu_seqlens=x.cu, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out.view_as(x.out[i])

    return launch


PROVIDERS = {
    "plugin": Provider(_plugin, max_tokens=8, full=True),
    "plugin-norm": Provider(_plugin_norm, max_tokens=8, norm=True),
    "triton": Provider(_triton),
    "triton-spec": Provider(_triton_spec, max_tokens=8, apart=True, wide=True, full=True),
    "vllm-cuda": Provider(_vllm_cuda, max_tokens=8, norm=True),
    "triton+norm": Provider(_triton_norm, norm=True),
    "flashinfer": Provider(_flashinfer, apart=True, compiles_each_shape=True),
    "sglang-cutedsl": Provider(_sglang, states=("float32",), apart=True, compiles_each_shape=True),
}


# --- comparison with the reference ---------------------------------------------------------------------------------------------------

OUT_BOUND = 1e-2
STATE_BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2}
"""Relative errors (norms) that rounding to the outputs' and the pools' types stays well below."""
ROWS_COMPARED = 4


def wrong(x: Inputs, launch: Launch, provider: Provider) -> str | None:
    """Run call 0 and compare the output and the states of some rows with the reference; what is wrong, or None."""
    rows = torch.linspace(0, x.case.B - 1, min(x.case.B, ROWS_COMPARED), device=x.device).long()
    table, start = x.table[0].long(), x.accepted[0].long() - 1
    before = x.pool[table[rows, start[rows]]].double()
    x.out[0].fill_(float("nan"))
    out = launch(0).view(x.case.B, x.case.T, x.case.HV, HEAD)[rows].double()
    written = x.pool[table[rows]] if x.case.pool == "single" else x.write_pool[x.write[0].long()[rows]]
    expected_out, expected = _expected(x, rows, before, provider.norm)
    errors = {"output": (out, expected_out, OUT_BOUND), "states": (written.double(), expected, STATE_BOUNDS[x.case.state])}
    if x.case.intermediates:
        errors["intermediates"] = (x.intermediate[0][rows].double(), expected, STATE_BOUNDS[x.case.state])
    errors = {what: (float((got - want).norm() / want.norm()), bound) for what, (got, want, bound) in errors.items()}
    bad = [f"{what} {error:.1e} (bound {bound:.0e})" for what, (error, bound) in errors.items() if not error <= bound]
    return f"relative error of {', '.join(bad)}" if bad else None


def _expected(x: Inputs, rows: torch.Tensor, before: torch.Tensor, norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [n, T, HV, V] and the states after each token [n, T, HV, V, K] of ``rows``, in float64; before: [n, HV, V, K]."""
    n, B, T, HV = len(rows), x.case.B, x.case.T, x.case.HV
    store = torch.cat([before, before.new_zeros(n * T, HV, HEAD, HEAD)])
    index = torch.arange(n * (1 + T), device=x.device)
    slots = Slots(index[:n], index[n:].view(n, T), PoolLayout.of(store), NullRule.NEGATIVE, same_slots=False)
    q, k, v = x.qkv[0].view(B, T, -1)[rows].double().split([HQ * HEAD, HQ * HEAD, HV * HEAD], dim=-1)
    a, b = (gate[0].view(B, T, HV)[rows] for gate in (x.a, x.b))
    out = reference.gdn_decode(
        q.reshape(n, T, HQ, HEAD), k.reshape(n, T, HQ, HEAD), v.reshape(n, T, HV, HEAD), a, b, x.A_log, x.dt_bias, store, slots,
        compute_dtype=torch.float64,
    )  # fmt: skip
    if norm:
        out = reference.gated_rms_norm(out, x.gate[0].view(B, T, HV, HEAD)[rows], x.norm_weight, NORM_EPS)
    return out, store[n:].view(n, T, HV, HEAD, HEAD)


# --- the run -------------------------------------------------------------------------------------------------------------------------


WRITE_EVERY = 10.0
"""Seconds between two results that are handed out to be written."""


def run(options: Options, device: torch.device, say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """Time the plan; yields the growing result {"ceilings", "rows", "missing", "skipped", "dropped", "seconds"} every few seconds, the
    whole at the end. "dropped": the cells that did not fit in ``options.seconds``, each with its "providers".
    """
    from .timing import Clock, copy_tb_s

    began = written = time.monotonic()
    cells = plan(options)
    result: dict[str, Any] = {"ceilings": {}, "rows": [], "missing": {}, "skipped": [], "dropped": [], "seconds": 0.0}
    result["ceilings"] |= {"copy_TB_s": round(copy_tb_s(device), 4)}
    release()
    clock = Clock(device)
    result["ceilings"] |= {"empty_us": round(clock.empty_us(), 3), "l2_bytes": clock.l2_bytes}
    say(f"copy {result['ceilings']['copy_TB_s']:.3f} TB/s, empty kernel {result['ceilings']['empty_us']:.2f} us")
    if device.type == "cuda":
        _compile(cells, device, say)
    session = _Session(result, clock, say, began + options.seconds)
    for _, group in groupby(cells, key=lambda cell: (cell[0].HV, cell[0].state)):
        for _ in session.group(list(group), device):
            result["seconds"] = round(time.monotonic() - began, 1)
            if time.monotonic() - written > WRITE_EVERY:
                yield result
                written = time.monotonic()
    if result["dropped"]:
        say(f"{len(result['dropped'])} cells dropped after {result['seconds']} s")
    timed = {row["provider"] for row in result["rows"]}
    untried = {name for entry in result["dropped"] for name in entry["providers"]}
    for name in options.providers or PROVIDERS:
        reasons = [entry["reason"] for entry in result["skipped"] if entry["provider"] == name]
        if name not in timed:
            reason = "no time" if name in untried else "no case of the grid that it serves"
            result["missing"].setdefault(name, reasons[0] if reasons else reason)
        elif PROVIDERS[name].compiles_each_shape and not (options.batch or options.heads):
            result["skipped"].append({"provider": name, "reason": f"by default only B in {FEW_BATCHES}: compiles for each shape"})
    result["seconds"] = round(time.monotonic() - began, 1)
    yield result


def _compile(cells: list[Cell], device: torch.device, say: Callable[[str], None]) -> None:
    """All of this package's kernels at once, a core each: one after the other they would take longer than the timing."""
    began = time.monotonic()
    try:
        from ..gdn import cuda
        from ..kernels import compile as kernels

        wanted = [variant(case, PROVIDERS[name].norm) for case, names in cells for name in names if name.startswith("plugin")]
        jobs = min(len(os.sched_getaffinity(0)), 16)
        count = kernels.prepare(cuda.FAMILY, wanted, kernels.device_architecture(device.index or 0), jobs=jobs)
    except Exception as error:  # noqa: BLE001  the cells that need the kernel meet the error again and store it
        say(f"compiling ahead: {first_line(error)}")
    else:
        say(f"{count} kernels compiled in {time.monotonic() - began:.1f} s")


def variant(case: Case, norm: bool):
    """The ``kernels.gdn_decode.Variant`` that this package's kernel is launched in: what ``gdn.cuda.decode`` would choose."""
    from ..gdn import cuda

    state, spec, split = STATES[case.state], case.T > 1, case.pool == "split"
    layer = cuda.Layer(state, TOKENS, TOKENS, case.HV // HQ, norm="silu" if norm else "")
    tile = cuda.tile_for(state.itemsize, case.B * case.HV, spec)
    write = "each" if spec else "last" if split else "same"
    return layer.variant(tile, ragged=spec, write=write, accepted=spec, split=split, intermediate=case.intermediates)


class _Session:
    def __init__(self, result: dict[str, Any], clock, say: Callable[[str], None], deadline: float) -> None:
        self.result, self.clock, self.say, self.deadline = result, clock, say, deadline
        self.failed: dict[tuple, str] = {}

    def group(self, cells: list[Cell], device: torch.device) -> Iterator[None]:
        """Cases of one (HV, state): one pool, made here and released; yields after each."""
        pool = write_pool = None
        for case, names in cells:
            if time.monotonic() > self.deadline:
                self.result["dropped"].append({**_case_fields(case), "providers": list(names)})
                continue
            if pool is None:
                pool, write_pool = _pools([case for case, _ in cells], self.clock, device)
            reason = _does_not_fit(case, pool, write_pool)
            if reason is None:
                self._cell(case, names, pool, write_pool)
            for name in names if reason else ():
                self._skip(name, case, reason)
            yield
        del pool, write_pool
        release()

    def _cell(self, case: Case, names: tuple[str, ...], pool: torch.Tensor, write_pool: torch.Tensor | None) -> None:
        names = tuple(name for name in names if name not in self.result["missing"])
        if not names:
            return
        copy_us = self.clock.copy_us(pool, case.B * case.row_bytes) if case.T == 1 else None
        inputs = Inputs(case, case.launches + 1, pool, write_pool if case.pool == "split" else None, 4 * self.clock.l2_bytes)
        said = []
        for name in names:
            key = (name, case.T, case.HV, case.state, case.pool, case.intermediates)
            if key in self.failed:  # one failure costs seconds of a compiler's time: do not repeat it for each batch size
                self.result["skipped"].append({"provider": name, **_case_fields(case), "reason": f"not tried: {self.failed[key]}"})
                continue
            try:
                us = self._time(PROVIDERS[name], inputs)
            except ImportError as error:
                self.result["missing"][name] = first_line(error)
                self.say(f"  {name}: {first_line(error)}")
            except Exception as error:  # noqa: BLE001  another project's kernel may raise anything; the reason is stored
                torch.cuda.synchronize()  # raises once more if the device is lost: then nothing after this would be true
                self.failed[key] = f"at B={case.B}: {first_line(error)}"
                self._skip(name, case, first_line(error), failed=True)
            else:
                self.result["rows"].append(row(case, name, us, copy_us, self.result["ceilings"]["copy_TB_s"]))
                said.append(f"{name} {us:.2f}")
        self.say(f"{case}: {', '.join(said)}{f'; copy {copy_us:.2f}' if copy_us else ''} us")

    def _time(self, provider: Provider, inputs: Inputs) -> float:
        launch = provider.prepare(inputs)
        reason = wrong(inputs, launch, provider)
        if reason:
            raise RuntimeError(f"differs from the reference: {reason}")
        return self.clock.time(launch, inputs.warm(provider), inputs.count - 1)

    def _skip(self, name: str, case: Case, reason: str, **more: bool) -> None:
        self.result["skipped"].append({"provider": name, **_case_fields(case), "reason": reason, **more})
        self.say(f"  {case}: {name} skipped: {reason}")


def row(case: Case, provider: str, us: float, copy_us: float | None, copy_tb: float) -> dict[str, Any]:
    """One measured time as it is stored: ``us`` a call, TB/s of state moved, TFLOP/s, and the TB/s as a part of torch's copy."""
    speed = case.moved_bytes / us / 1e6
    return {
        **_case_fields(case),
        "provider": provider,
        "us": round(us, 3),
        "TB_s": round(speed, 4),
        "TFLOP_s": round(case.operations / us / 1e6, 4),
        "copy_fraction": round(speed / copy_tb, 4),
        "copy_us": None if copy_us is None else round(copy_us, 3),
    }


def _case_fields(case: Case) -> dict[str, Any]:
    fields = asdict(case)
    return {"B": fields.pop("B"), "T": fields.pop("T"), "HV": fields.pop("HV"), "HQ": HQ, "state_dtype": fields.pop("state"), **fields}


def slots_needed(case: Case) -> tuple[int, int]:
    """(slots of the pool, slots of the write pool) for the calls that are timed and one before them; slot 0 stays unused.

    With one token a row the pool is twice that, so that the copy beside it reads one half and writes the other.
    """
    calls = (case.launches + 1) * case.B
    return 1 + calls * max(case.T, 2), 1 + calls * case.T if case.pool == "split" else 0


def _pools(cases: list[Case], clock, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The pool that all ``cases`` share, as large as they need if it fits, at least four times the cache; and a write pool."""
    row_bytes, dtype = cases[0].row_bytes, STATES[cases[0].state]
    wanted, write_wanted = (max(needed) for needed in zip(*map(slots_needed, cases), strict=True))
    free = (torch.cuda.mem_get_info(device)[0] - RESERVE) // row_bytes
    slots = max(min(max(wanted, 2 + 4 * clock.l2_bytes // row_bytes), free), 2)
    write_slots = min(write_wanted, free - slots)
    shape = (cases[0].HV, HEAD, HEAD)
    pool = torch.empty(slots, *shape, dtype=dtype, device=device).normal_()
    return pool, torch.empty(write_slots, *shape, dtype=dtype, device=device).normal_() if write_slots > 1 else None


def _does_not_fit(case: Case, pool: torch.Tensor, write_pool: torch.Tensor | None) -> str | None:
    slots = 1 + (case.launches + 1) * case.B * case.T
    for name, needed, found in (
        ("pool", slots, pool.shape[0]),
        ("write pool", slots if case.pool == "split" else 0, 0 if write_pool is None else write_pool.shape[0]),
    ):
        if needed > found:
            return f"the {name} needs {needed} slots of {case.row_bytes / 2**20:.2f} MiB, {found} fit"
    return None
