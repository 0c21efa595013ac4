"""Gated-delta-net decode for K = V = 128: every row's state is read once, updated in registers, and written.

One thread block serves ``tile_v`` rows of one head's state [V, K] for one row of the batch. Eight lanes hold one row of the
state (K contiguous, 16 elements a lane as 16-byte pieces), so a warp's load covers four full 128-byte lines and a sum over K
takes three shuffles. With R rows a lane, all R loads are in flight before anything is computed. What is common to the block
(normalised q and k, v, gates) is prepared for all tokens of the row while the state is on its way, and kept in shared memory.

The decay is applied after the products, S k = g (S_old k), so one pass over the old state gives what both the update and
the output need:  delta = beta (v - g S_old k),  o = g S_old q + delta (k . q),  S = g S_old + delta k^T.

Each block also asks the L2 cache for the state of a block that starts a little later, which keeps the memory busy while this
one waits for its slot number. The launch is programmatic: blocks of the next kernel may be set up while these still run.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

HEAD = 128
"""K and V: the head sizes that this kernel serves."""
L2_EPS = 1e-6
SOFTPLUS_THRESHOLD = 20.0
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
LANES = 8
"""Lanes that share one row of the state."""
GROUPS = 32 // LANES
MAX_TOKENS = 8
"""The longest row of a ragged batch; what is prepared for a row lies in shared memory."""
TYPES = {
    "float32": cutlass.Float32,
    "bfloat16": cutlass.BFloat16,
    "float16": cutlass.Float16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
}


@dataclass(frozen=True)
class Variant:
    """What is fixed when the kernel is compiled.

    state, tokens, bias: element types of the pools, of the activations, and of dt_bias ("float32", "bfloat16", "float16").
    index: element type of the slot tables, ``cu_seqlens`` and ``num_accepted`` ("int32", "int64").
    heads_per_group: HV / HQ.
    ragged: rows of any number of tokens up to ``max_tokens``, as ``cu_seqlens`` says; otherwise row i is token i.
    write: "same" (the read slot), "last" (``write[row]``, after the row's last token), "each" (``write[row, t]``), "none".
    accepted: the read slot is ``read[row, num_accepted[row] - 1]`` instead of ``read[row]``.
    split: the write pool is another tensor than the read pool.
    intermediate: the state after each token also goes to ``intermediate[row, t]``.
    norm: "silu" or "sigmoid" writes RMSNorm(o) * weight * activation(gate) instead of o; "" does not.
        The blocks of a head then form a cluster, which sums the squares.
    norm_weight: element type of the norm's weight.
    tile_v, warps: rows of the state a block serves, and its warps.
    """

    state: str = "float32"
    tokens: str = "bfloat16"
    bias: str = "bfloat16"
    index: str = "int32"
    heads_per_group: int = 2
    ragged: bool = False
    write: str = "same"
    accepted: bool = False
    split: bool = False
    intermediate: bool = False
    norm: str = ""
    norm_weight: str = "bfloat16"
    tile_v: int = 32
    warps: int = 4

    def __post_init__(self) -> None:
        rows = self.tile_v // (self.warps * GROUPS)
        if rows < 1 or rows * self.warps * GROUPS != self.tile_v or HEAD % self.tile_v:
            raise ValueError(
                f"tile_v: found {self.tile_v} with {self.warps} warps, allowed: divisors of {HEAD}, {GROUPS} rows a warp or more"
            )


class GdnDecode:
    """The kernel of one ``Variant``; calling it (inside ``cute.compile``) launches it on ``rows`` rows."""

    def __init__(self, variant: Variant, architecture: str) -> None:
        self.variant = variant
        # Blackwell has fp32 instructions on register pairs; where registers are short they cost a spill.
        self.packed = architecture.startswith("sm_10") and not (variant.ragged and variant.norm)
        self.state = TYPES[variant.state]
        self.act = TYPES[variant.tokens]
        self.vec = 128 // self.state.width
        self.pieces = HEAD // (LANES * self.vec)
        self.held = self.vec * self.pieces
        self.rows = variant.tile_v // (variant.warps * GROUPS)
        self.cluster = HEAD // variant.tile_v if variant.norm else 1

    @cute.jit
    def __call__(
        self,
        qkv: cute.Tensor,  # [tokens, 2 HQ K + HV V]
        a: cute.Tensor,  # [tokens, HV]
        b: cute.Tensor,  # [tokens, HV]
        A_log: cute.Tensor,  # [HV]
        dt_bias: cute.Tensor,  # [HV]
        pool: cute.Tensor,  # [slots, HV, V, K]
        write_pool: cute.Tensor | None,  # [slots, HV, V, K]
        read: cute.Tensor,  # [rows] or [rows, columns]
        write: cute.Tensor | None,  # [rows] or [rows, columns]
        cu_seqlens: cute.Tensor | None,  # [rows + 1]
        accepted: cute.Tensor | None,  # [rows]
        intermediate: cute.Tensor | None,  # [rows, T, HV, V, K]
        gate: cute.Tensor | None,  # [tokens, HV, V]
        norm_weight: cute.Tensor | None,  # [V]
        out: cute.Tensor,  # [tokens, HV, V]
        rows: Int32,
        max_tokens: Int32,
        ahead: Int32,
        live_begin: Int32,
        live_end: Int32,
        norm_eps: Float32,
        stream: cuda.CUstream,
    ):
        self.kernel(
            qkv, a, b, A_log, dt_bias, pool, write_pool, read, write, cu_seqlens, accepted, intermediate, gate, norm_weight, out,
            max_tokens, ahead, live_begin, live_end, norm_eps,
        ).launch(
            grid=[HEAD // self.variant.tile_v, A_log.shape[0], rows],
            block=[self.variant.warps * 32, 1, 1],
            cluster=[self.cluster, 1, 1] if const_expr(self.cluster > 1) else None,
            stream=stream,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        qkv: cute.Tensor,
        a: cute.Tensor,
        b: cute.Tensor,
        A_log: cute.Tensor,
        dt_bias: cute.Tensor,
        pool: cute.Tensor,
        write_pool: cute.Tensor | None,
        read: cute.Tensor,
        write: cute.Tensor | None,
        cu_seqlens: cute.Tensor | None,
        accepted: cute.Tensor | None,
        intermediate: cute.Tensor | None,
        gate: cute.Tensor | None,
        norm_weight: cute.Tensor | None,
        out: cute.Tensor,
        max_tokens: Int32,
        ahead: Int32,
        live_begin: Int32,
        live_end: Int32,
        norm_eps: Float32,
    ):
        variant = self.variant
        R = self.rows
        thread = cute.arch.thread_idx()[0]
        tile, head, row = cute.arch.block_idx()
        warp, lane = thread // 32, thread % 32
        sub, group = lane % LANES, lane // LANES
        first = tile * variant.tile_v + (warp * GROUPS + group) * R  # this thread's first row of the state
        tile_start = Int64(head) * (HEAD * HEAD) + tile * (variant.tile_v * HEAD)
        inside = tile_start + (((warp * GROUPS + group) * R) * HEAD + sub * self.vec)

        smem = cutlass.memory.SmemAllocator()
        longest = MAX_TOKENS if const_expr(variant.ragged) else 1
        qk = smem.allocate_tensor(Float32, cute.make_layout((HEAD, 2, longest)), byte_alignment=16)
        v = smem.allocate_tensor(Float32, cute.make_layout((variant.tile_v, longest)), byte_alignment=16)
        gates = smem.allocate_tensor(Float32, cute.make_layout((4, longest)), byte_alignment=16)  # decay, beta, q . k
        squares = None
        if const_expr(variant.norm != ""):
            squares = smem.allocate_tensor(Float32, cute.make_layout((self.cluster * variant.warps, 2)), byte_alignment=16)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()  # a block's shared memory may be written once it has started

        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        slot = self.read_slot(read, accepted, row, live_begin)
        begin, length = Int32(row), Int32(1)
        if const_expr(variant.ragged):
            begin = Int32(cu_seqlens[row])
            length = Int32(cu_seqlens[row + 1]) - begin
        live = slot >= live_begin and slot < live_end
        if const_expr(variant.ragged):
            live = live and length <= max_tokens
        raw = cute.make_rmem_tensor((self.vec, self.pieces, R), self.state)
        if live:
            self.copy_rows(self.state_rows(pool, slot * pool.stride[0] + inside), raw)
        if thread == variant.warps * 32 - 1 and row + ahead < cute.arch.grid_dim()[2]:
            later = self.read_slot(read, accepted, row + ahead, live_begin)
            if later >= live_begin and later < live_end:
                self.prefetch(pool, later * pool.stride[0] + tile_start, variant.tile_v * HEAD * self.state.width // 8)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_wait()

        if not live:
            zeros = cute.make_rmem_tensor(R, Float32)
            zeros.fill(0.0)
            for t in cutlass.range(length):
                self.store_out(out, begin + t, head, first, sub, zeros)
        else:
            for t in cutlass.range(warp, length, variant.warps):
                self.prepare(qkv, a, b, A_log, dt_bias, begin + t, t, head, tile, lane, qk, v, gates)
            cute.arch.barrier()
            S = cute.make_rmem_tensor((self.held, R), Float32)
            for i in cutlass.range_constexpr(R):
                for n in cutlass.range_constexpr(self.held):
                    S[n, i] = raw[n % self.vec, n // self.vec, i].to(Float32)
            weight = None
            if const_expr(variant.norm != ""):
                weight = cute.make_rmem_tensor(R, Float32)
                for i in cutlass.range_constexpr(R):
                    weight[i] = norm_weight[first + i].to(Float32)
            for t in cutlass.range(length if const_expr(variant.ragged) else 1, unroll=1):
                z = None
                if const_expr(variant.norm != ""):
                    z = self.load_gate(gate, begin + t, head, first)
                o = self.step(qk[None, None, t], v[None, t], gates[None, t], S, warp, group, sub)
                if const_expr(variant.norm != ""):
                    self.send_square(o, squares, t, tile, warp, lane)
                self.store_state(S, pool, write_pool, write, intermediate, live_begin, live_end, slot, t, length, row, inside)
                if const_expr(variant.norm != ""):
                    self.normalise(o, squares, z, weight, norm_eps, t)
                self.store_out(out, begin + t, head, first, sub, o)

    # --- the recurrence -----------------------------------------------------------------------------------------------

    @cute.jit
    def prepare(
        self,
        qkv: cute.Tensor,
        a: cute.Tensor,
        b: cute.Tensor,
        A_log: cute.Tensor,
        dt_bias: cute.Tensor,
        token: Int32,
        t: Int32,
        head: Int32,
        tile: Int32,
        lane: Int32,
        qk: cute.Tensor,
        v: cute.Tensor,
        gates: cute.Tensor,
    ):
        """One warp, one token: normalised q and k, this tile's v, and the gates, as fp32 in shared memory."""
        each = HEAD // 32
        groups = A_log.shape[0] // self.variant.heads_per_group
        start = Int64(token) * qkv.stride[0]
        q_start = start + (head // self.variant.heads_per_group * HEAD + lane * each)
        q = self.load_tokens(qkv, q_start, each)
        k = self.load_tokens(qkv, q_start + groups * HEAD, each)
        wide = min(HEAD // 32, self.variant.tile_v // 32) if const_expr(self.variant.tile_v >= 32) else 1
        if lane * wide < self.variant.tile_v:
            values = self.load_tokens(qkv, start + (groups * (2 * HEAD) + head * HEAD + tile * self.variant.tile_v + lane * wide), wide)
            for n in cutlass.range_constexpr(wide):
                v[lane * wide + n, t] = values[n]
        x = a[token, head].to(Float32) + dt_bias[head].to(Float32)
        step = b[token, head].to(Float32)
        rate = A_log[head].to(Float32)

        qq, kk, dot = Float32(0.0), Float32(0.0), Float32(0.0)
        for n in cutlass.range_constexpr(each):
            qq += q[n] * q[n]
            kk += k[n] * k[n]
            dot += q[n] * k[n]
        q_scale = cute.math.rsqrt(cute.arch.warp_reduction_sum(qq) + L2_EPS, fastmath=True) * (HEAD**-0.5)
        k_scale = cute.math.rsqrt(cute.arch.warp_reduction_sum(kk) + L2_EPS, fastmath=True)
        dot = cute.arch.warp_reduction_sum(dot)
        for n in cutlass.range_constexpr(each):
            q[n], k[n] = q[n] * q_scale, k[n] * k_scale
        for part, values in ((0, q), (1, k)):
            target = cute.make_tensor(qk.iterator + ((t * 2 + part) * HEAD + lane * each), cute.make_layout(each))
            cute.autovec_copy(values, cute.make_tensor(target.iterator.align(16), cute.make_layout(each)))

        soft = x
        if x <= SOFTPLUS_THRESHOLD:
            soft = cute.math.log2(1.0 + cute.math.exp2(x * LOG2_E, fastmath=True), fastmath=True) * LN_2
        decay = cute.math.exp2(-cute.math.exp2(rate * LOG2_E, fastmath=True) * soft * LOG2_E, fastmath=True)
        if lane == 0:
            gates[0, t] = decay
            gates[1, t] = self.sigmoid(step)
            gates[2, t] = dot * q_scale * k_scale

    @cute.jit
    def step(
        self, qk: cute.Tensor, v: cute.Tensor, gates: cute.Tensor, S: cute.Tensor, warp: Int32, group: Int32, sub: Int32
    ) -> cute.Tensor:
        """One token: S [held, R] becomes the new state; returns o [R], the same in all eight lanes of a row."""
        held, R, vec = self.held, self.rows, self.vec
        q, k = cute.make_rmem_tensor(held, Float32), cute.make_rmem_tensor(held, Float32)
        for part, values in ((0, q), (1, k)):
            for j in cutlass.range_constexpr(held // 4):
                n = j * 4
                source = qk.iterator + (part * HEAD + n // vec * (LANES * vec) + sub * vec + n % vec)
                piece = cute.make_layout(4)
                cute.autovec_copy(cute.make_tensor(source.align(16), piece), cute.make_tensor(values.iterator + n, piece))
        decay, beta, dot = gates[0], gates[1], gates[2]

        o = cute.make_rmem_tensor(R, Float32)
        for i in cutlass.range_constexpr(R):
            sk, sq = (Float32(0.0), Float32(0.0)), (Float32(0.0), Float32(0.0))
            for n in cutlass.range_constexpr(0, held, 2):
                pair = (S[n, i], S[n + 1, i])
                sk = self.fma2(pair, (k[n], k[n + 1]), sk)
                sq = self.fma2(pair, (q[n], q[n + 1]), sq)
            sum_k, sum_q = self.lanes_sum(sk[0] + sk[1]), self.lanes_sum(sq[0] + sq[1])
            delta = beta * (v[(warp * GROUPS + group) * R + i] - decay * sum_k)
            o[i] = decay * sum_q + delta * dot
            for n in cutlass.range_constexpr(0, held, 2):
                kept = S[n, i] * decay, S[n + 1, i] * decay  # not as a pair, for the same reason
                S[n, i], S[n + 1, i] = self.fma2((k[n], k[n + 1]), (delta, delta), kept)
        return o

    @cute.jit
    def lanes_sum(self, x: Float32) -> Float32:
        return cute.arch.warp_reduction_sum(x, threads_in_group=LANES)

    @cute.jit
    def sigmoid(self, x: Float32) -> Float32:
        return cute.arch.rcp_approx(1.0 + cute.math.exp2(-x * LOG2_E, fastmath=True))

    @cute.jit
    def fma2(self, x, y, z):
        if const_expr(self.packed):
            return cute.arch.fma_packed_f32x2(x, y, z)
        return x[0] * y[0] + z[0], x[1] * y[1] + z[1]

    # --- loads and stores ---------------------------------------------------------------------------------------------

    @cute.jit
    def read_slot(self, read: cute.Tensor, accepted: cute.Tensor | None, row: Int32, live_begin: Int32) -> Int64:
        """The slot to read, or one before the first live slot where the accepted count is out of range."""
        slot = Int64(live_begin) - 1
        if const_expr(self.variant.accepted):
            column = Int64(self.load_index(accepted.iterator + row)) - 1
            if column >= 0 and column < read.shape[1]:
                slot = Int64(self.load_index(read.iterator + (Int64(row) * read.stride[0] + column)))
        else:
            slot = Int64(self.load_index(read.iterator + Int64(row) * read.stride[0]))
        return slot

    @cute.jit
    def load_index(self, pointer: cute.Pointer):
        return cute.arch.load(pointer, TYPES[self.variant.index])

    @cute.jit
    def prefetch(self, tensor: cute.Tensor, offset: Int64, count: cutlass.Constexpr[int]):
        """Ask the L2 cache for ``count`` bytes that start ``offset`` elements into ``tensor``."""
        cute.arch.inline_ptx(
            "cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};", read_only_args=[(tensor.iterator + offset).toint(), Int32(count)]
        )

    @cute.jit
    def pointer(self, tensor: cute.Tensor, offset: Int64, align: cutlass.Constexpr[int]) -> cute.Pointer:
        """``offset`` elements into ``tensor``, with an alignment (bytes) that the offset is known to keep."""
        return cute.make_ptr(tensor.element_type, (tensor.iterator + offset).toint(), cute.AddressSpace.gmem, assumed_align=align)

    @cute.jit
    def state_rows(self, tensor: cute.Tensor, offset: Int64) -> cute.Tensor:
        """This thread's part of a [V, K] block, (vector, piece, row); ``offset`` is that of its first element in ``tensor``."""
        layout = cute.make_layout((self.vec, self.pieces, self.rows), stride=(1, LANES * self.vec, HEAD))
        return cute.make_tensor(self.pointer(tensor, offset, 16), layout)

    @cute.jit
    def copy_rows(self, source: cute.Tensor, target: cute.Tensor):
        for i in cutlass.range_constexpr(self.rows):
            for j in cutlass.range_constexpr(self.pieces):
                cute.autovec_copy(source[None, j, i], target[None, j, i])

    @cute.jit
    def load_tokens(self, qkv: cute.Tensor, offset: Int64, count: cutlass.Constexpr[int]) -> cute.Tensor:
        """fp32 [count]: activations that lie side by side, ``offset`` elements into the tokens."""
        raw = cute.make_rmem_tensor(count, self.act)
        cute.autovec_copy(cute.make_tensor(self.pointer(qkv, offset, count * self.act.width // 8), cute.make_layout(count)), raw)
        values = cute.make_rmem_tensor(count, Float32)
        values.store(raw.load().to(Float32))
        return values

    @cute.jit
    def send_square(self, o: cute.Tensor, squares: cute.Tensor, t: Int32, tile: Int32, warp: Int32, lane: Int32):
        """This warp's sum of o^2, to every block of the head; ``normalise`` waits for it."""
        square = Float32(0.0)
        for i in cutlass.range_constexpr(self.rows):
            square += o[i] * o[i]
        for doubling in cutlass.range_constexpr(2):  # over the four groups of the warp
            square += cute.arch.shuffle_sync_bfly(square, offset=LANES << doubling)
        if const_expr(self.cluster == 1):
            if lane == 0:
                squares[warp, t % 2] = square
        else:
            if lane < self.cluster:
                place = squares.iterator + (t % 2 * (self.cluster * self.variant.warps) + tile * self.variant.warps + warp)
                remote = cute.arch.map_dsmem_ptr(place, lane).toint()
                cute.arch.inline_ptx("st.shared::cluster.f32 [{$r0}], {$r1};", read_only_args=[remote, square])
            cute.arch.cluster_arrive()

    @cute.jit
    def load_gate(self, gate: cute.Tensor, token: Int32, head: Int32, first: Int32) -> cute.Tensor:
        """The gate of this thread's R rows, unconverted."""
        R = self.rows
        z = cute.make_rmem_tensor(R, self.act)
        start = Int64(token) * gate.stride[0] + (head * gate.stride[1] + first)
        cute.autovec_copy(cute.make_tensor(self.pointer(gate, start, min(16, R * self.act.width // 8)), cute.make_layout(R)), z)
        return z

    @cute.jit
    def normalise(self, o: cute.Tensor, squares: cute.Tensor, z: cute.Tensor, weight: cute.Tensor, norm_eps: Float32, t: Int32):
        """o [R] becomes RMSNorm(o) * weight * activation(z)."""
        if const_expr(self.cluster == 1):
            cute.arch.barrier()
        else:
            cute.arch.cluster_wait()
        total = Float32(0.0)
        for w in cutlass.range_constexpr(self.cluster * self.variant.warps):
            total += squares[w, t % 2]
        scale = cute.math.rsqrt(total / HEAD + norm_eps, fastmath=True)
        for i in cutlass.range_constexpr(self.rows):
            factor = self.sigmoid(z[i].to(Float32))
            if const_expr(self.variant.norm == "silu"):
                factor = z[i].to(Float32) * factor
            o[i] = o[i] * scale * weight[i] * factor

    @cute.jit
    def store_out(self, out: cute.Tensor, token: Int32, head: Int32, first: Int32, sub: Int32, values: cute.Tensor):
        """R outputs of this thread's rows; one lane of the eight stores them side by side."""
        R = self.rows
        if sub == 0:
            start = Int64(token) * out.stride[0] + (head * out.stride[1] + first)
            target = cute.make_tensor(self.pointer(out, start, min(16, R * self.act.width // 8)), cute.make_layout(R))
            converted = cute.make_rmem_tensor(R, self.act)
            converted.store(values.load().to(self.act))
            cute.autovec_copy(converted, target)

    @cute.jit
    def store_state(
        self,
        S: cute.Tensor,
        pool: cute.Tensor,
        write_pool: cute.Tensor | None,
        write: cute.Tensor | None,
        intermediate: cute.Tensor | None,
        live_begin: Int32,
        live_end: Int32,
        slot: Int64,
        t: Int32,
        length: Int32,
        row: Int32,
        inside: Int64,
    ):
        """The state after token ``t``, to wherever the variant keeps it."""
        variant = self.variant
        converted = cute.make_rmem_tensor((self.vec, self.pieces, self.rows), self.state)
        for i in cutlass.range_constexpr(self.rows):
            for j in cutlass.range_constexpr(self.pieces):
                part = cute.make_tensor(S.iterator + (i * self.held + j * self.vec), cute.make_layout(self.vec))
                converted[None, j, i].store(part.load().to(self.state))
        if const_expr(variant.intermediate):
            offset = Int64(row) * intermediate.stride[0] + Int64(t) * intermediate.stride[1] + inside
            self.copy_rows(converted, self.state_rows(intermediate, offset))
        target_pool = write_pool if const_expr(variant.split) else pool
        if const_expr(variant.write in ("same", "last")):
            if t == length - 1:
                target = slot
                if const_expr(variant.write == "last"):
                    target = Int64(write[row])
                if target >= live_begin and target < live_end:
                    self.copy_rows(converted, self.state_rows(target_pool, target * target_pool.stride[0] + inside))
        elif const_expr(variant.write == "each"):
            target = Int64(write[row, t])
            if target >= live_begin and target < live_end:
                self.copy_rows(converted, self.state_rows(target_pool, target * target_pool.stride[0] + inside))


KERNEL = GdnDecode


def fake_arguments(variant: Variant) -> list:
    """Tensors without memory that say which types, strides and alignments the compiled kernel accepts; sizes are free."""

    def fake(dtype: str, rank: int, align: int = 0):
        kind = TYPES[dtype]
        divide = align * 8 // kind.width if align else 1
        strides = tuple(cute.sym_int64(divisibility=divide) for _ in range(rank - 1))
        shape = tuple(cute.sym_int() for _ in range(rank))
        return cute.runtime.make_fake_tensor(kind, shape, (*strides, 1), assumed_align=align or kind.width // 8)

    def states(rank: int):
        kind = TYPES[variant.state]
        shape = (*(cute.sym_int() for _ in range(rank - 2)), HEAD, HEAD)
        strides = tuple(cute.sym_int64(divisibility=128 // kind.width) for _ in range(rank - 3))
        return cute.runtime.make_fake_tensor(kind, shape, (*strides, HEAD * HEAD, HEAD, 1), assumed_align=16)

    v = variant
    return [
        fake(v.tokens, 2, align=16),
        fake(v.tokens, 2),
        fake(v.tokens, 2),
        fake("float32", 1),
        fake(v.bias, 1),
        states(4),
        states(4) if v.split else None,
        fake(v.index, 2 if v.accepted else 1),
        {"same": None, "none": None, "last": fake(v.index, 1), "each": fake(v.index, 2)}[v.write],
        fake(v.index, 1) if v.ragged else None,
        fake(v.index, 1) if v.accepted else None,
        states(5) if v.intermediate else None,
        fake(v.tokens, 3, align=16) if v.norm else None,
        fake(v.norm_weight, 1) if v.norm else None,
        fake(v.tokens, 3, align=16),
        Int32(1),
        Int32(1),
        Int32(1),
        Int32(0),
        Int32(1),
        Float32(1e-6),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    ]
