"""NVFP4 experts on Hopper: one grouped product, dequantised in registers, for a single token as for thousands.

The weights are the tensor cores' left operand and come from registers; tokens are the right operand, from shared memory. So a
tile is 64 or more rows of an expert's weights by 8 to 256 tokens, and the smallest tile wastes no weight bandwidth.

A persistent grid walks the tiles that the routing kernel listed. In each block one warp copies packed weights into a ring of
shared-memory stages (bulk copies; weights never wait for anything but a free stage), four warps gather the tokens of the tile
into the same stages, and warpgroups turn 64 x 64 units of weights into bf16 fragments and multiply. Warpgroups share a stage's
tokens (``row_groups``) or share out its columns (``k_groups``; their sums are added in a fixed order through shared memory).
While a unit is multiplied the next one is dequantised.

Two uses: "gate_up" gathers the layer's input by the sorted list and writes act(gate) * up; "down" reads that, and writes each
pair's output times its router weight, in sorted order. The weights of a "down" call are asked for while the call before it
still runs. Layout and bit placement of the weights: ``moe_backend_plugin.nvfp4.hopper``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

UNIT = 2304
"""Bytes of a 64 x 64 unit of packed weights: 2048 of codes, 256 of block scales."""
SLICE_CODES = 512
SLICE_SCALES = 64
WARPGROUP = 128
LOG2_E = 1.4426950408889634
EXPONENT = 1024.0
"""What the product of a dequantised weight lacks: 2^10, see nvfp4.hopper."""
SHARED_BYTES = 227 * 1024
TYPES = {"bfloat16": BFloat16, "float16": Float16}


@dataclass(frozen=True)
class Variant:
    """What is fixed when the kernel is compiled.

    use: "gate_up" or "down".
    activation: "silu", "swigluoai" or "relu2" (without gate), of a "gate_up" kernel.
    tile_tokens: tokens of a tile, 8 to 256.
    row_groups, k_groups: warpgroups side by side in rows, and in columns.
    row_blocks: blocks of 64 rows a warpgroup serves.
    k_blocks: blocks of 64 columns that a warpgroup takes from a stage.
    stages: length of the ring.
    ragged: the columns do not fill the last stage.
    weighted: outputs are multiplied by the pair's router weight (a "gate_up" kernel: before the activation).
    tokens: element type of the tokens and of the output.
    warp_mma: each warp multiplies its 16 rows by itself (mma.sync, 8 tokens at a time) instead of four warps together (wgmma).
    """

    use: str = "gate_up"
    activation: str = "silu"
    tile_tokens: int = 8
    row_groups: int = 1
    k_groups: int = 4
    row_blocks: int = 1
    k_blocks: int = 2
    stages: int = 6
    ragged: bool = False
    weighted: bool = False
    tokens: str = "bfloat16"
    warp_mma: bool = False

    @property
    def rows(self) -> int:
        """Rows of weights in a tile."""
        return 64 * self.row_groups * self.row_blocks

    @property
    def stage_blocks(self) -> int:
        """Blocks of 64 columns in a stage."""
        return self.k_groups * self.k_blocks

    @property
    def gated(self) -> bool:
        return self.use == "gate_up" and self.activation != "relu2"

    @property
    def stage_bytes(self) -> int:
        return self.stage_blocks * (self.row_groups * self.row_blocks * UNIT + self.tile_tokens * 128)

    @property
    def reduce_bytes(self) -> int:
        """Two buffers of partial sums of all but the first column group."""
        return 2 * (self.k_groups - 1) * self.row_groups * self.row_blocks * 64 * self.tile_tokens * 4

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.stage_bytes + 16) + self.reduce_bytes + 2 * self.tile_tokens * 4 + 2048

    @property
    def producers(self) -> int:
        """Threads that load: four warps for tokens and one for weights, or whole warpgroups where registers are handed over."""
        return WARPGROUP + (WARPGROUP if self.regroup else 32)

    @property
    def halves(self) -> bool:
        """Whether tiles that are at most half full have a path of their own."""
        return self.regroup  # with fewer registers ptxas makes wgmmas wait for each other

    @property
    def regroup(self) -> bool:
        """Whether consumers need more registers than an even share."""
        return self.tile_tokens * self.row_blocks > 128

    def __post_init__(self) -> None:
        if self.tile_tokens % 8 or not 8 <= self.tile_tokens <= 256 or (self.tile_tokens > 8 and self.tile_tokens % 16):
            raise ValueError(f"tile_tokens: found {self.tile_tokens}, allowed 8 or a multiple of 16 up to 256")
        if self.k_blocks * self.row_blocks % 2 or (self.tile_tokens == 8 and self.stage_blocks % 2):
            found = f"{self.k_blocks} x {self.row_blocks}, {self.k_groups} k_groups"
            raise ValueError(f"k_blocks x row_blocks: found {found}, allowed: an even number of units; with 8 tokens, of blocks a stage")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"stages: found {self.stages} ({self.shared_bytes} bytes of shared memory), allowed up to {SHARED_BYTES} bytes"
            )


class MoeGemm:
    """The kernel of one ``Variant``; calling it (inside ``cute.compile``) launches it."""

    def __init__(self, variant: Variant, architecture: str) -> None:
        if not architecture.startswith("sm_90"):
            raise ValueError(f"architecture: found {architecture!r}, allowed sm_90a (wgmma)")
        self.variant = variant
        self.groups = variant.row_groups * variant.k_groups
        self.act = TYPES[variant.tokens]
        self.half = variant.tokens == "float16"

    @cute.jit
    def __call__(
        self,
        tokens: cute.Tensor,  # [rows, K]
        packed: cute.Tensor,  # uint8 [E, row blocks, column blocks, UNIT]
        scale_2: cute.Tensor,  # fp32 [E, 2 or 1]
        router: cute.Tensor | None,  # fp32 [pairs]
        order: cute.Tensor,  # int32 [pairs]
        tiles: cute.Tensor,  # int32 [tiles, 4]
        counts: cute.Tensor,  # int32 [4]
        out: cute.Tensor,  # [pairs, columns]
        top_k: Int32,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        v = self.variant
        mma = cute.make_tiled_mma(
            warpgroup.MmaF16BF16Op(
                self.act, Float32, (64, v.tile_tokens, 16), warpgroup.OperandSource.RMEM, OperandMajorMode.K, OperandMajorMode.K
            )
        )
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.act)
        half = None
        if const_expr(v.halves):
            shape = (64, v.tile_tokens // 2, 16)
            half = cute.make_tiled_mma(
                warpgroup.MmaF16BF16Op(self.act, Float32, shape, warpgroup.OperandSource.RMEM, OperandMajorMode.K, OperandMajorMode.K)
            )
        layout = cute.tile_to_shape(atom, (v.tile_tokens, 64, v.stage_blocks * v.stages), order=(0, 1, 2))
        self.kernel(mma, half, layout, tokens, packed, scale_2, router, order, tiles, counts, out, top_k, alpha, beta, limit).launch(
            grid=[blocks, 1, 1], block=[self.groups * WARPGROUP + v.producers, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        half: cute.TiledMma | None,
        token_layout: cute.ComposedLayout,
        tokens: cute.Tensor,
        packed: cute.Tensor,
        scale_2: cute.Tensor,
        router: cute.Tensor | None,
        order: cute.Tensor,
        tiles: cute.Tensor,
        counts: cute.Tensor,
        out: cute.Tensor,
        top_k: Int32,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
    ):
        v = self.variant
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)

        smem = cutlass.memory.SmemAllocator()
        ring_tokens = smem.allocate_tensor(self.act, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner)
        ring_weights = smem.allocate_array(Uint8, v.stages * v.stage_blocks * v.row_groups * v.row_blocks * UNIT, byte_alignment=128)
        sums = smem.allocate_array(Float32, max(v.reduce_bytes // 4, 4), byte_alignment=16)
        router_smem = smem.allocate_array(Float32, 2 * v.tile_tokens, byte_alignment=16)
        full = smem.allocate_array(Int64, v.stages, byte_alignment=8)
        empty = smem.allocate_array(Int64, v.stages, byte_alignment=8)
        router_full = smem.allocate_array(Int64, 2, byte_alignment=8)
        router_empty = smem.allocate_array(Int64, 2, byte_alignment=8)
        if thread == 0:
            for s in cutlass.range_constexpr(v.stages):
                cute.arch.mbarrier_init(full + s, WARPGROUP + 1)
                cute.arch.mbarrier_init(empty + s, self.groups * 4)
            for s in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(router_full + s, WARPGROUP)
                cute.arch.mbarrier_init(router_empty + s, v.row_groups * 4)
            cute.arch.mbarrier_init_fence()
        cute.arch.barrier()

        row_blocks, column_blocks = packed.shape[1], packed.shape[2]
        row_tiles = (row_blocks + (v.row_groups * v.row_blocks - 1)) // (v.row_groups * v.row_blocks)
        steps = (column_blocks + (v.stage_blocks - 1)) // v.stage_blocks

        if warp < self.groups * 4:
            if const_expr(v.regroup):
                cute.arch.setmaxregister_increase(208)
            if const_expr(v.use == "gate_up"):
                cute.arch.griddepcontrol_wait()
            work = self.work_of(counts, row_tiles)
            self.consume(
                *(mma, half, ring_tokens, ring_weights, sums, router_smem, full, empty, router_full, router_empty),
                *(scale_2, tiles, out, alpha, beta, limit, work, row_blocks, column_blocks, row_tiles, steps, thread),
            )
        elif warp < self.groups * 4 + 4:
            if const_expr(v.regroup):
                cute.arch.setmaxregister_decrease(40)
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
            work = self.work_of(counts, row_tiles)
            self.produce_tokens(
                *(ring_tokens, router_smem, full, empty, router_full, router_empty),
                *(tokens, router, order, tiles, top_k, work, column_blocks, row_tiles, steps, thread - self.groups * WARPGROUP),
            )
        else:
            if const_expr(v.regroup):
                cute.arch.setmaxregister_decrease(40)
            if warp == self.groups * 4 + 4:
                if const_expr(v.use == "gate_up"):
                    # A "down" call starts while "gate_up" runs, and that one started when routing was done: its lists are there.
                    cute.arch.griddepcontrol_wait()
                work = self.work_of(counts, row_tiles)
                self.produce_weights(
                    ring_weights, full, empty, packed, tiles, work, row_blocks, column_blocks, row_tiles, steps, thread % 32
                )

    @cute.jit
    def work_of(self, counts: cute.Tensor, row_tiles: Int32) -> Int32:
        """Tiles of the whole call: token tiles x row tiles."""
        return counts[0] * row_tiles

    @cute.jit
    def tile(self, tiles: cute.Tensor, work: Int32, total: Int32, row_tiles: Int32):
        """(expert, first position, tokens) of a piece of work; of the last one past the end, where nobody looks."""
        index = cutlass.max(cutlass.min(work, total - 1), 0) // row_tiles
        return tiles[index, 0], tiles[index, 1], tiles[index, 2]

    # --- loads --------------------------------------------------------------------------------------------------------

    @cute.jit
    def produce_weights(
        self,
        ring: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        packed: cute.Tensor,
        tiles: cute.Tensor,
        total: Int32,
        row_blocks: Int32,
        column_blocks: Int32,
        row_tiles: Int32,
        steps: Int32,
        lane: Int32,
    ):
        """One warp: a lane for each block of rows copies its part of a stage."""
        v = self.variant
        parts = v.row_groups * v.row_blocks
        stage, phase = Int32(0), Int32(1)
        work = cute.arch.block_idx()[0]
        next_expert, next_first, next_count = self.tile(tiles, work, total, row_tiles)
        while work < total:
            expert = next_expert
            row = work % row_tiles * parts + lane
            if row >= row_blocks:
                row = row_blocks - 1
            source = packed.iterator.toint() + (Int64(expert) * row_blocks + row) * column_blocks * UNIT
            work += cute.arch.grid_dim()[0]
            next_expert, next_first, next_count = self.tile(tiles, work, total, row_tiles)
            for step in cutlass.range(steps, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                size = Int32(v.stage_blocks * UNIT)
                if const_expr(v.ragged):
                    left = (column_blocks - step * v.stage_blocks) * UNIT
                    if left < size:
                        size = left
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, size * parts)
                cute.arch.sync_warp()
                if lane < parts:
                    target = (ring + (stage * parts + lane) * (v.stage_blocks * UNIT)).toint()
                    cute.arch.inline_ptx(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
                        read_only_args=[target, source + Int64(step) * (v.stage_blocks * UNIT), size, (full + stage).toint()],
                    )
                stage += 1
                if stage == v.stages:
                    stage, phase = Int32(0), phase ^ 1

    @cute.jit
    def produce_tokens(
        self,
        ring: cute.Tensor,
        router_smem: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        router_full: cute.Pointer,
        router_empty: cute.Pointer,
        tokens: cute.Tensor,
        router: cute.Tensor | None,
        order: cute.Tensor,
        tiles: cute.Tensor,
        top_k: Int32,
        total: Int32,
        column_blocks: Int32,
        row_tiles: Int32,
        steps: Int32,
        thread: Int32,
    ):
        """Four warps: eight threads copy the 128 bytes that a token has in a block of columns, 16 tokens at a time."""
        v = self.variant
        held = max(1, v.tile_tokens // 16)
        piece = thread % 8
        first_row = thread // 8 % v.tile_tokens
        first_block = thread // 8 // v.tile_tokens  # with 8 tokens, half of the threads serve the next block of columns
        block_step = 2 if const_expr(v.tile_tokens == 8) else 1
        base = ring.iterator.toint() + (first_row * 128 + ((piece ^ (first_row % 8)) * 16) + first_block * (v.tile_tokens * 128))
        columns = tokens.shape[1]
        stage, phase = Int32(0), Int32(1)
        turn, router_phase = Int32(0), Int32(1)
        work = cute.arch.block_idx()[0]
        next_expert, next_first, next_count = self.tile(tiles, work, total, row_tiles)
        sources = cute.make_rmem_tensor(held, Int64)
        while work < total:
            first, count = next_first, next_count
            work += cute.arch.grid_dim()[0]
            next_expert, next_first, next_count = self.tile(tiles, work, total, row_tiles)
            for i in cutlass.range_constexpr(held):
                row = Int64(first + first_row + i * 16)
                if first_row + i * 16 < count:
                    if const_expr(v.use == "gate_up"):
                        row = Int64(order[row] // top_k)
                    sources[i] = (tokens.iterator + row * tokens.stride[0]).toint() + piece * 16
            if const_expr(v.weighted):
                cute.arch.mbarrier_wait(router_empty + turn, router_phase)
                for i in cutlass.range_constexpr((v.tile_tokens + WARPGROUP - 1) // WARPGROUP):
                    n = thread + i * WARPGROUP
                    if n < count:
                        target = cute.make_tensor(router_smem + turn * v.tile_tokens, cute.make_layout(v.tile_tokens))
                        target[n] = router[order[first + n]]
                cute.arch.mbarrier_arrive(router_full + turn)
                turn += 1
                if turn == 2:
                    turn, router_phase = Int32(0), router_phase ^ 1
            for step in cutlass.range(steps, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                for block in cutlass.range_constexpr(0, v.stage_blocks, block_step):
                    column = (step * v.stage_blocks + block + first_block) * 64
                    size = Int32(16)
                    if column + piece * 8 >= columns:
                        size = Int32(0)  # zeros: a weight of zero must not meet a NaN
                    for i in cutlass.range_constexpr(held):
                        if first_row + i * 16 < count:
                            offset = (stage * v.stage_blocks + block) * (v.tile_tokens * 128) + i * 2048
                            source = sources[i]
                            if size > 0:
                                source += Int64(column) * 2
                            cute.arch.inline_ptx(
                                "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[base + offset, source, size]
                            )
                cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
                stage += 1
                if stage == v.stages:
                    stage, phase = Int32(0), phase ^ 1

    # --- products -----------------------------------------------------------------------------------------------------

    @cute.jit
    def consume(
        self,
        mma: cute.TiledMma,
        half: cute.TiledMma | None,
        ring_tokens: cute.Tensor,
        ring_weights: cute.Pointer,
        sums: cute.Pointer,
        router_smem: cute.Pointer,
        full: cute.Pointer,
        empty: cute.Pointer,
        router_full: cute.Pointer,
        router_empty: cute.Pointer,
        scale_2: cute.Tensor,
        tiles: cute.Tensor,
        out: cute.Tensor,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
        total: Int32,
        row_blocks: Int32,
        column_blocks: Int32,
        row_tiles: Int32,
        steps: Int32,
        thread: Int32,
    ):
        v = self.variant
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        row_group, k_group = group % v.row_groups, group // v.row_groups
        t = thread % WARPGROUP
        lane, slice_ = t % 32, t // 32
        right = self.right_operand(mma, ring_tokens, v.tile_tokens, t)
        left = cute.make_rmem_tensor(mma.partition_shape_A((64, 128)), self.act)  # two units
        acc = [cute.make_rmem_tensor(mma.partition_shape_C((64, v.tile_tokens)), Float32) for _ in range(v.row_blocks)]
        if const_expr(v.halves):
            # A tile that is at most half full is multiplied by half as many tokens, in the first half of the same registers.
            right_half = self.right_operand(half, ring_tokens, v.tile_tokens // 2, t)
            like = cute.make_rmem_tensor(half.partition_shape_C((64, v.tile_tokens // 2)), Float32)
            acc_half = [cute.make_tensor(whole.iterator, like.layout) for whole in acc]
        # ldmatrix: lane l reads 16 bytes of token l % 8, in piece l // 8 of the first 32 columns; the other 32 are 64 bytes away.
        matrix_at = ring_tokens.iterator.toint() + (lane % 8 * 128 + ((lane // 8) ^ (lane % 8)) * 16)
        mine = ring_weights.toint() + (row_group * v.row_blocks * v.stage_blocks + k_group * v.k_blocks) * UNIT
        codes_at = mine + (slice_ * SLICE_CODES + lane * 16)
        scales_at = mine + (4 * SLICE_CODES + slice_ * SLICE_SCALES + lane // 4 * 8)

        stage, phase = Int32(0), Int32(0)
        turn, router_phase = Int32(0), Int32(0)
        work = cute.arch.block_idx()[0]
        next_expert, next_first, next_count = self.tile(tiles, work, total, row_tiles)
        while work < total:
            expert, first, count = next_expert, next_first, next_count
            row_tile = work % row_tiles
            work += cute.arch.grid_dim()[0]
            next_expert, next_first, next_count = self.tile(tiles, work, total, row_tiles)
            factor = scale_2[expert, 0] * EXPONENT
            factor_up = factor
            if const_expr(v.gated):
                factor_up = scale_2[expert, 1] * EXPONENT
            for m in cutlass.range_constexpr(v.row_blocks):
                acc[m].fill(0.0)
            at = (codes_at, scales_at, matrix_at, full, empty, k_group, column_blocks, steps, lane)
            if const_expr(v.halves):
                if count > v.tile_tokens // 2:
                    stage, phase = self.sum_up(mma, right, left, acc, *at, stage, phase)
                else:
                    stage, phase = self.sum_up(half, right_half, left, acc_half, *at, stage, phase)
            else:
                stage, phase = self.sum_up(mma, right, left, acc, *at, stage, phase)

            if const_expr(v.k_groups > 1):
                self.add_groups(acc, sums, turn, row_group, k_group, t)
            if k_group == 0:
                weights = router_smem + turn * v.tile_tokens
                if const_expr(v.weighted):
                    cute.arch.mbarrier_wait(router_full + turn, router_phase)
                for m in cutlass.range_constexpr(v.row_blocks):
                    block = (row_tile * v.row_groups + row_group) * v.row_blocks + m
                    if block < row_blocks:
                        self.finish(acc[m], weights, out, first, count, block, slice_, lane, factor, factor_up, alpha, beta, limit)
                if const_expr(v.weighted):
                    if lane == 0:
                        cute.arch.mbarrier_arrive(router_empty + turn)
            turn += 1
            if turn == 2:
                turn, router_phase = Int32(0), router_phase ^ 1

    @cute.jit
    def right_operand(self, mma: cute.TiledMma, ring: cute.Tensor, tokens: cutlass.Constexpr[int], t: Int32) -> cute.Tensor:
        mma.set(warpgroup.Field.ACCUMULATE, True)
        thread_mma = mma.get_slice(t)
        return thread_mma.make_fragment_B(thread_mma.partition_B(cute.local_tile(ring, (tokens, 64), (0, 0, None))))

    @cute.jit
    def sum_up(
        self,
        mma: cute.TiledMma,
        right: cute.Tensor,
        left: cute.Tensor,
        acc: list,
        codes_at: Int32,
        scales_at: Int32,
        matrix_at: Int32,
        full: cute.Pointer,
        empty: cute.Pointer,
        k_group: Int32,
        column_blocks: Int32,
        steps: Int32,
        lane: Int32,
        stage: Int32,
        phase: Int32,
    ):
        """This warpgroup's rows of a tile, over all columns; returns the ring's next (stage, phase)."""
        v = self.variant
        parts = v.row_groups * v.row_blocks
        bits = cute.recast_tensor(left, Uint32)
        previous = Int32(-1)
        for step in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            if const_expr(not v.warp_mma):
                cute.arch.fence_proxy("async.shared", space="cta")
            for unit in cutlass.range_constexpr(v.k_blocks * v.row_blocks):
                block, m = unit // v.row_blocks, unit % v.row_blocks
                offset = (stage * parts + m) * (v.stage_blocks * UNIT) + block * UNIT
                token_block = stage * v.stage_blocks + k_group * v.k_blocks + block
                live = Int32(1)
                if const_expr(v.ragged):
                    live = Int32(step * v.stage_blocks + k_group * v.k_blocks + block < column_blocks)
                start = unit % 2 * 16
                self.dequantise(codes_at + offset, scales_at + offset, bits, start, live)
                if const_expr(v.warp_mma):
                    self.multiply(acc[m], bits, start, matrix_at + token_block * (v.tile_tokens * 128))
                else:
                    warpgroup.fence()
                    for k in cutlass.range_constexpr(4):
                        cute.gemm(mma, acc[m], left[None, None, unit % 2 * 4 + k], right[None, None, k, token_block], acc[m])
                    warpgroup.commit_group()
                    warpgroup.wait_group(1)
                    if const_expr(unit == 0):
                        if previous >= 0 and lane == 0:
                            cute.arch.mbarrier_arrive(empty + previous)
            if const_expr(v.warp_mma):
                if lane == 0:
                    cute.arch.mbarrier_arrive(empty + stage)
            previous = stage
            stage += 1
            if stage == v.stages:
                stage, phase = Int32(0), phase ^ 1
        if const_expr(not v.warp_mma):
            warpgroup.wait_group(0)
            if lane == 0:
                cute.arch.mbarrier_arrive(empty + previous)
        return stage, phase

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
    def dequantise(self, codes: Int32, scales: Int32, bits: cute.Tensor, start: cutlass.Constexpr[int], live: Int32):
        """This lane's 32 weights of a 64 x 64 unit, as 16 registers of ``bits``; zeros unless ``live``."""
        word = cute.arch.inline_ptx(
            "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Uint32] * 4, read_only_args=[codes]
        )
        scale = cute.arch.inline_ptx("ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[scales])
        PAIR = Uint32(0x81C081C0)  # sign and magnitude bits of two values, where bf16 has them
        word, scale = list(word), list(scale)
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
        return cute.arch.inline_ptx(f"shf.r.wrap.b32 {{$w0}}, {{$r0}}, {{$r0}}, {right};", write_only_types=[Uint32], read_only_args=[x])

    @cute.jit
    def times_half(self, x: Uint32, scales: Uint32, half: cutlass.Constexpr[int]) -> Uint32:
        """Two values times one of two scales; the instruction picks the half."""
        kind = "f16x2" if self.half else "bf16x2"
        half_of = "h, h" if half else "l, l"
        text = f".reg .b16 l, h; .reg .b32 s; mov.b32 {{l, h}}, {{$r1}}; mov.b32 s, {{{half_of}}}; mul.rn.{kind} {{$w0}}, {{$r0}}, s;"
        return cute.arch.inline_ptx("{ " + text + " }", write_only_types=[Uint32], read_only_args=[x, scales])

    @cute.jit
    def add_groups(self, acc: list, sums: cute.Pointer, turn: Int32, row_group: Int32, k_group: Int32, t: Int32):
        """The sums of all column groups, in their order, to the first."""
        v = self.variant
        size = v.tile_tokens // 2  # registers of one accumulator
        layout = cute.make_layout((WARPGROUP, size, v.row_blocks, v.row_groups, v.k_groups - 1, 2))
        shared = cute.make_tensor(sums, layout)
        threads = self.groups * WARPGROUP
        if k_group > 0:
            for m in cutlass.range_constexpr(v.row_blocks):
                for n in cutlass.range_constexpr(size):
                    shared[t, n, m, row_group, k_group - 1, turn] = acc[m][n]
            cute.arch.barrier_arrive(barrier_id=1 + turn, number_of_threads=threads)
        else:
            cute.arch.barrier(barrier_id=1 + turn, number_of_threads=threads)
            for other in cutlass.range_constexpr(v.k_groups - 1):
                for m in cutlass.range_constexpr(v.row_blocks):
                    for n in cutlass.range_constexpr(size):
                        acc[m][n] = acc[m][n] + shared[t, n, m, row_group, other, turn]

    # --- results ------------------------------------------------------------------------------------------------------

    @cute.jit
    def finish(
        self,
        acc: cute.Tensor,
        router_smem: cute.Pointer,
        out: cute.Tensor,
        first: Int32,
        count: Int32,
        block: Int32,
        slice_: Int32,
        lane: Int32,
        factor: Float32,
        factor_up: Float32,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
    ):
        """64 rows x the tile's tokens: scales, activation, router weight, and the stores."""
        v = self.variant
        router = cute.make_tensor(router_smem, cute.make_layout(v.tile_tokens))
        # Registers of an 8-token column block: (row g, token 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
        for n in cutlass.range_constexpr(v.tile_tokens // 8):
            if n * 8 < count:
                low, high = (acc[4 * n], acc[4 * n + 1]), (acc[4 * n + 2], acc[4 * n + 3])
                weight = (Float32(1.0), Float32(1.0))
                if const_expr(v.weighted):
                    weight = (router[n * 8 + lane % 4 * 2], router[n * 8 + lane % 4 * 2 + 1])
                token = first + n * 8 + lane // 4
                wanted = n * 8 + lane // 4 < count
                words = cute.make_rmem_tensor(1 if const_expr(v.gated) else 2, Uint32)
                if const_expr(v.gated):
                    a = self.gate(low[0] * factor * weight[0], high[0] * factor_up * weight[0], alpha, beta, limit)
                    b = self.gate(low[1] * factor * weight[1], high[1] * factor_up * weight[1], alpha, beta, limit)
                    words[0] = self.transposed(a, b)
                    column = block * 32 + slice_ * 8 + lane % 4 * 2
                else:
                    for part, pair in enumerate((low, high)):
                        a, b = pair[0] * factor * weight[0], pair[1] * factor * weight[1]
                        if const_expr(v.use == "gate_up"):
                            a, b = self.relu2(a), self.relu2(b)
                        words[part] = self.transposed(a, b)
                    column = block * 64 + slice_ * 16 + lane % 4 * 4
                if wanted and column < out.shape[1]:
                    address = (out.iterator + (Int64(token) * out.stride[0] + column)).toint()
                    target = cute.make_ptr(Uint32, address, cute.AddressSpace.gmem, assumed_align=cute.size(words) * 4)
                    cute.autovec_copy(words, cute.make_tensor(target, words.layout))

    @cute.jit
    def transposed(self, a: Float32, b: Float32) -> Uint32:
        """8 x 8 values transposed: from tokens 2 (l % 4), + 1 of weight row l // 4 in lane l, to rows 2 (l % 4), + 1 of token l // 4."""
        pair = cute.make_rmem_tensor(2, self.act)
        pair[0], pair[1] = a.to(self.act), b.to(self.act)
        word = cute.recast_tensor(pair, Uint32)
        return cute.arch.inline_ptx(
            "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[word[0]]
        )

    @cute.jit
    def gate(self, gate: Float32, up: Float32, alpha: Float32, beta: Float32, limit: Float32) -> Float32:
        # Not min and max: these lose a NaN.
        if gate > limit:
            gate = limit
        if up > limit:
            up = limit
        if up < -limit:
            up = -limit
        if const_expr(self.variant.activation == "silu"):
            return self.sigmoid(gate) * gate * up
        return self.sigmoid(gate * alpha) * gate * (up + beta)

    @cute.jit
    def relu2(self, value: Float32) -> Float32:
        if value < 0.0:
            value = Float32(0.0)
        return value * value

    @cute.jit
    def sigmoid(self, x: Float32) -> Float32:
        return cute.arch.rcp_approx(1.0 + cute.math.exp2(-x * LOG2_E, fastmath=True))


KERNEL = MoeGemm


def fake_arguments(variant: Variant) -> list:
    """Tensors without memory that say which types, strides and alignments the compiled kernel accepts; sizes are free."""

    def fake(kind, rank: int, align: int):
        divide = max(1, align * 8 // kind.width)
        strides = tuple(cute.sym_int64(divisibility=divide) for _ in range(rank - 1))
        shape = tuple(cute.sym_int() for _ in range(rank))
        return cute.runtime.make_fake_tensor(kind, shape, (*strides, 1), assumed_align=align)

    v = variant
    return [
        fake(TYPES[v.tokens], 2, 16),
        fake(Uint8, 4, 256),
        fake(Float32, 2, 4),
        fake(Float32, 1, 4) if v.weighted else None,
        fake(Int32, 1, 4),
        fake(Int32, 2, 16),
        fake(Int32, 1, 16),
        fake(TYPES[v.tokens], 2, 16),
        Int32(1),
        Float32(1.0),
        Float32(0.0),
        Float32(float("inf")),
        Int32(1),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    ]
