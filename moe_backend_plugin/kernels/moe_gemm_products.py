"""The expert kernel's products: packed weights become fragments in registers, and are multiplied by a tile's tokens."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import warpgroup

from .moe_gemm_groups import UNIT, WARPGROUP, Gate, Place, Ring, RouterWeights, Work
from .moe_gemm_results import Scaling

SLICE_CODES = 512
"""Bytes of 16 rows of a unit, which are a warp's: their codes, and below their block scales."""
SLICE_SCALES = 64
EXPONENT = 1024.0
"""What the product of a dequantised weight lacks: 2^10, see nvfp4.hopper."""


class Path(NamedTuple):
    """Operands of products with a certain number of tokens."""

    mma: cute.TiledMma
    right: cute.Tensor  # tokens, of all stages
    left: cute.Tensor  # weights, of the unit that is multiplied and the next
    sums: list  # an accumulator for each block of rows


class Addresses(NamedTuple):
    """Where a thread reads in the first stage of the ring."""

    codes: Int32
    scales: Int32
    matrices: Int32  # of tokens, where warps multiply by themselves


class Products:
    """What the warpgroups of ``moe_gemm.MoeGemm`` that multiply do."""

    @cute.jit
    def consume(
        self,
        mmas: list,
        ring: Ring,
        sums: cute.Pointer,
        router_weights: RouterWeights,
        scale_2: cute.Tensor,
        out: cute.Tensor,
        gate: Gate,
        work: Work,
        thread: Int32,
    ):
        """A warpgroup's part of every tile of this block: sums over all columns, then results."""
        v = self.variant
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        t = thread % WARPGROUP
        place = Place(group % v.row_groups, group // v.row_groups, t, t % 32, t // 32)
        left = cute.make_rmem_tensor(mmas[0].partition_shape_A((64, 128)), self.act)  # two units
        acc = [cute.make_rmem_tensor(mmas[0].partition_shape_C((64, v.tile_tokens)), Float32) for _ in range(v.row_blocks)]
        # A tile with few tokens is multiplied by fewer, in the first part of the same registers.
        paths = []
        for mma, tokens in zip(mmas, v.paths, strict=True):
            like = cute.make_rmem_tensor(mma.partition_shape_C((64, tokens)), Float32)
            part = [cute.make_tensor(whole.iterator, like.layout) for whole in acc]
            paths.append(Path(mma, self.right_operand(mma, ring.tokens, tokens, t), left, part))
        # ldmatrix: lane l reads 16 bytes of token l % 8, in piece l // 8 of the first 32 columns; the other 32 are 64 bytes away.
        matrices_at = ring.tokens.iterator.toint() + (place.lane % 8 * 128 + ((place.lane // 8) ^ (place.lane % 8)) * 16)
        mine = ring.weights.toint() + (place.row_group * v.row_blocks * v.stage_blocks + place.k_group * v.k_blocks) * UNIT
        codes_at = mine + (place.slice * SLICE_CODES + place.lane * 16)
        scales_at = mine + (4 * SLICE_CODES + place.slice * SLICE_SCALES + place.lane // 4 * 8)
        at = Addresses(codes_at, scales_at, matrices_at)

        stage, phase = Int32(0), Int32(0)
        turn, router_phase = Int32(0), Int32(0)
        item = cute.arch.block_idx()[0]
        upcoming = self.ask(work, item, place.lane)
        while item < work.total:
            tile = self.told(upcoming)
            row_tile = item % work.row_tiles
            item += cute.arch.grid_dim()[0]
            upcoming = self.ask(work, item, place.lane)
            factor = scale_2[tile.expert, 0] * EXPONENT
            factor_up = factor
            if const_expr(v.gated):
                factor_up = scale_2[tile.expert, 1] * EXPONENT
            for m in cutlass.range_constexpr(v.row_blocks):
                acc[m].fill(0.0)
            if const_expr(len(paths) == 1):
                stage, phase = self.sum_up(paths[0], at, ring, work, place, stage, phase)
            elif tile.count > v.short:
                stage, phase = self.sum_up(paths[0], at, ring, work, place, stage, phase)
            else:
                stage, phase = self.sum_up(paths[1], at, ring, work, place, stage, phase)

            if const_expr(v.k_groups > 1):
                self.add_groups(acc, sums, turn, place)
            if place.k_group == 0:
                scaling = Scaling(factor, factor_up, router_weights.smem + turn * v.tile_tokens, gate)
                if const_expr(v.weighted):
                    cute.arch.mbarrier_wait(router_weights.full + turn, router_phase)
                for m in cutlass.range_constexpr(v.row_blocks):
                    block = (row_tile * v.row_groups + place.row_group) * v.row_blocks + m
                    if block < work.row_blocks:
                        self.finish(acc[m], out, tile, block, place, scaling)
                if const_expr(v.weighted):
                    if place.lane == 0:
                        cute.arch.mbarrier_arrive(router_weights.empty + turn)
            turn += 1
            if turn == 2:
                turn, router_phase = Int32(0), router_phase ^ 1

    @cute.jit
    def right_operand(self, mma: cute.TiledMma, ring: cute.Tensor, tokens: cutlass.Constexpr[int], t: Int32) -> cute.Tensor:
        """What ``cute.gemm`` takes for the ring's tokens, the first ``tokens`` of each tile; its sums go on from where they are."""
        mma.set(warpgroup.Field.ACCUMULATE, True)
        thread_mma = mma.get_slice(t)
        return thread_mma.make_fragment_B(thread_mma.partition_B(cute.local_tile(ring, (tokens, 64), (0, 0, None))))

    @cute.jit
    def sum_up(self, path: Path, at: Addresses, ring: Ring, work: Work, place: Place, stage: Int32, phase: Int32):
        """This warpgroup's rows of a tile, over all columns; returns the ring's next (stage, phase)."""
        v = self.variant
        units = v.k_blocks * v.row_blocks
        mma, right, left, acc = path
        bits = cute.recast_tensor(left, Uint32)
        first_column = place.k_group * v.k_blocks
        previous = Int32(-1)
        for step in cutlass.range(work.steps, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            if const_expr(not v.warp_mma):
                cute.arch.fence_proxy("async.shared", space="cta")
            offset = self.unit_at(stage, 0)
            raw = self.fetch(at.codes + offset, at.scales + offset)
            for unit in cutlass.range_constexpr(units):
                block, m, start = unit // v.row_blocks, unit % v.row_blocks, unit % 2 * 16
                word, scale = raw
                if const_expr(unit + 1 < units):  # before the wait for this unit's products
                    offset = self.unit_at(stage, unit + 1)
                    raw = self.fetch(at.codes + offset, at.scales + offset)
                token_block = stage * v.stage_blocks + first_column + block
                live = Int32(1)
                if const_expr(v.ragged):
                    live = Int32(step * v.stage_blocks + first_column + block < work.column_blocks)
                self.dequantise(word, scale, bits, start, live)
                if const_expr(v.warp_mma):
                    self.multiply(acc[m], bits, start, at.matrices + token_block * (v.tile_tokens * 128))
                else:
                    warpgroup.fence()
                    for k in cutlass.range_constexpr(4):
                        cute.gemm(mma, acc[m], left[None, None, unit % 2 * 4 + k], right[None, None, k, token_block], acc[m])
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if const_expr(unit == 0):
                        if previous >= 0 and place.lane == 0:
                            cute.arch.mbarrier_arrive(ring.empty + previous)
            if const_expr(v.warp_mma):
                if place.lane == 0:
                    cute.arch.mbarrier_arrive(ring.empty + stage)
            previous = stage
            stage += 1
            if stage == v.stages:
                stage, phase = Int32(0), phase ^ 1
        if const_expr(not v.warp_mma):
            warpgroup.wait_group(0)
            if place.lane == 0:
                cute.arch.mbarrier_arrive(ring.empty + previous)
        return stage, phase

    @cute.jit
    def unit_at(self, stage: Int32, unit: cutlass.Constexpr[int]) -> Int32:
        """Bytes from a warpgroup's first unit of the ring to its unit number ``unit`` of a stage."""
        v = self.variant
        block, m = unit // v.row_blocks, unit % v.row_blocks
        return (stage * (v.row_groups * v.row_blocks) + m) * (v.stage_blocks * UNIT) + block * UNIT

    @cute.jit
    def multiply(self, acc: cute.Tensor, bits: cute.Tensor, start: cutlass.Constexpr[int], tokens: Int32):
        """This warp's 16 rows by 64 columns of weights, times the tile's tokens."""
        kind = "f16" if const_expr(self.half) else "bf16"
        for n in cutlass.range_constexpr(self.variant.tile_tokens // 8):
            for half in cutlass.range_constexpr(2):
                matrices = cute.arch.inline_ptx(
                    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                    write_only_types=[Uint32] * 4,
                    read_only_args=[(tokens + n * 1024) ^ (half * 64)],
                )
                for k in cutlass.range_constexpr(2):
                    at = start + half * 8 + k * 4
                    sums = cute.arch.inline_ptx(
                        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, "
                        "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
                        write_only_types=[Float32] * 4,
                        read_only_args=[
                            *(bits[at + i] for i in range(4)),
                            *(matrices[2 * k + i] for i in range(2)),
                            *(acc[4 * n + i] for i in range(4)),
                        ],
                    )
                    for i in cutlass.range_constexpr(4):
                        acc[4 * n + i] = sums[i]

    @cute.jit
    def fetch(self, codes: Int32, scales: Int32):
        """This lane's 32 weights of a 64 x 64 unit as they are stored, and their scales."""
        word = cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Uint32] * 4, read_only_args=[codes]
        )
        scale = cute.arch.inline_ptx("ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[scales])
        return word, scale

    @cute.jit
    def dequantise(self, word: tuple, scale: tuple, bits: cute.Tensor, start: cutlass.Constexpr[int], live: Int32):
        """These weights as 16 registers of ``bits``; zeros unless ``live``."""
        PAIR = Uint32(0x81C081C0)  # sign and magnitude bits of two values, where bf16 has them
        if const_expr(self.variant.ragged):
            keep = Uint32(0) - Uint32(live)
            word, scale = [w & keep for w in word], [s & keep for s in scale]
        for k in cutlass.range_constexpr(4):
            x = word[k]
            pairs = [self.scale_pair(s, k // 2) for s in scale]
            fourth = ((x << 2) & Uint32(0x00400040)) | (self.rotate(x, 6) & Uint32(0x81808180))
            for n, value in enumerate((x & PAIR, (x << 6) & PAIR, self.rotate(x, 4) & PAIR, fourth)):
                if const_expr(self.half):
                    value = ((value & Uint32(0x01C001C0)) << 3) | (value & Uint32(0x80008000))
                bits[start + 4 * k + n] = self.times_half(value, pairs[n % 2], k % 2)

    @cute.jit
    def scale_pair(self, x: Uint32, half: cutlass.Constexpr[int]) -> Uint32:
        """Two block scales as bf16, times 2^116; as fp16, times 2^4, where weights are times 2^-14."""
        if const_expr(half):
            x = self.rotate(x, 8)
        if const_expr(self.half):
            return (x & Uint32(0x0FF00FF0)) << 3
        return (x & Uint32(0x0FF00FF0)) | Uint32(0x70007000)

    @cute.jit
    def rotate(self, x: Uint32, right: cutlass.Constexpr[int]) -> Uint32:
        """Rotated to the right by so many bits."""
        return cute.arch.inline_ptx(f"shf.r.wrap.b32 {{$w0}}, {{$r0}}, {{$r0}}, {right};", write_only_types=[Uint32], read_only_args=[x])

    @cute.jit
    def times_half(self, x: Uint32, scales: Uint32, half: cutlass.Constexpr[int]) -> Uint32:
        """Two values times one of two scales; the instruction picks the half."""
        kind = "f16x2" if self.half else "bf16x2"
        half_of = "h, h" if half else "l, l"
        text = f".reg .b16 l, h; .reg .b32 s; mov.b32 {{l, h}}, {{$r1}}; mov.b32 s, {{{half_of}}}; mul.rn.{kind} {{$w0}}, {{$r0}}, s;"
        return cute.arch.inline_ptx("{ " + text + " }", write_only_types=[Uint32], read_only_args=[x, scales])

    @cute.jit
    def add_groups(self, acc: list, sums: cute.Pointer, turn: Int32, place: Place):
        """The sums of all column groups, in their order, to the first."""
        v = self.variant
        size = v.tile_tokens // 2  # registers of one accumulator
        layout = cute.make_layout((WARPGROUP, size, v.row_blocks, v.row_groups, v.k_groups - 1, 2))
        shared = cute.make_tensor(sums, layout)
        threads = self.groups * WARPGROUP
        if place.k_group > 0:
            for m in cutlass.range_constexpr(v.row_blocks):
                for n in cutlass.range_constexpr(size):
                    shared[place.thread, n, m, place.row_group, place.k_group - 1, turn] = acc[m][n]
            cute.arch.barrier_arrive(barrier_id=1 + turn, number_of_threads=threads)
        else:
            cute.arch.barrier(barrier_id=1 + turn, number_of_threads=threads)
            for other in cutlass.range_constexpr(v.k_groups - 1):
                for m in cutlass.range_constexpr(v.row_blocks):
                    for n in cutlass.range_constexpr(size):
                        acc[m][n] = acc[m][n] + shared[place.thread, n, m, place.row_group, other, turn]
