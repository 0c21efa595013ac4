"""The expert kernel's loads: one warp copies packed weights, four warps gather tokens, both into the stages of one ring."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from .moe_gemm_groups import UNIT, WARPGROUP, Ring, RouterWeights, Work


class Loads:
    """What the warps of ``moe_gemm.MoeGemm`` that load do."""

    @cute.jit
    def produce_weights(self, ring: Ring, packed: cute.Tensor, work: Work, lane: Int32):
        """One warp: a lane for each block of rows copies its part of a stage."""
        v = self.variant
        parts = v.row_groups * v.row_blocks
        stage, phase = Int32(0), Int32(1)
        item = cute.arch.block_idx()[0]
        upcoming = self.ask(work, item, lane)
        while item < work.total:
            expert = self.told(upcoming).expert
            row = item % work.row_tiles * parts + lane
            if row >= work.row_blocks:  # past the expert's last row: something to copy, for no one to use
                row = work.row_blocks - 1
            source = packed.iterator.toint() + (Int64(expert) * work.row_blocks + row) * work.column_blocks * UNIT
            item += cute.arch.grid_dim()[0]
            upcoming = self.ask(work, item, lane)
            for step in cutlass.range(work.steps, unroll=1):
                cute.arch.mbarrier_wait(ring.empty + stage, phase)
                size = Int32(v.stage_blocks * UNIT)
                if const_expr(v.ragged):
                    left = (work.column_blocks - step * v.stage_blocks) * UNIT
                    if left < size:
                        size = left
                if lane == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, size * parts)
                cute.arch.sync_warp()
                if lane < parts:
                    target = (ring.weights + (stage * parts + lane) * (v.stage_blocks * UNIT)).toint()
                    cute.arch.inline_ptx(
                        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
                        read_only_args=[target, source + Int64(step) * (v.stage_blocks * UNIT), size, (ring.full + stage).toint()],
                    )
                stage += 1
                if stage == v.stages:
                    stage, phase = Int32(0), phase ^ 1

    @cute.jit
    def produce_tokens(
        self,
        ring: Ring,
        router_weights: RouterWeights,
        tokens: cute.Tensor,
        router: cute.Tensor | None,
        order: cute.Tensor,
        top_k: Int32,
        work: Work,
        thread: Int32,
    ):
        """Four warps: eight threads copy the 128 bytes that a token has in a block of columns, 16 tokens at a time."""
        v = self.variant
        held = max(1, v.tile_tokens // 16)
        piece = thread % 8
        first_row = thread // 8 % v.tile_tokens
        first_block = thread // 8 // v.tile_tokens  # with 8 tokens, half of the threads serve the next block of columns
        block_step = 2 if const_expr(v.tile_tokens == 8) else 1
        base = ring.tokens.iterator.toint() + (first_row * 128 + ((piece ^ (first_row % 8)) * 16) + first_block * (v.tile_tokens * 128))
        columns = tokens.shape[1]
        stage, phase = Int32(0), Int32(1)
        turn, router_phase = Int32(0), Int32(1)
        item = cute.arch.block_idx()[0]
        upcoming = self.ask(work, item, thread % 32)
        sources = cute.make_rmem_tensor(held, Int64)
        while item < work.total:
            tile = self.told(upcoming)
            item += cute.arch.grid_dim()[0]
            upcoming = self.ask(work, item, thread % 32)
            for i in cutlass.range_constexpr(held):
                row = Int64(tile.first + first_row + i * 16)
                if first_row + i * 16 < tile.count:
                    if const_expr(v.use == "gate_up"):
                        row = Int64(order[row] // top_k)
                    sources[i] = (tokens.iterator + row * tokens.stride[0]).toint() + piece * 16
            if const_expr(v.weighted):
                cute.arch.mbarrier_wait(router_weights.empty + turn, router_phase)
                for i in cutlass.range_constexpr((v.tile_tokens + WARPGROUP - 1) // WARPGROUP):
                    n = thread + i * WARPGROUP
                    if n < tile.count:
                        target = cute.make_tensor(router_weights.smem + turn * v.tile_tokens, cute.make_layout(v.tile_tokens))
                        target[n] = router[order[tile.first + n]]
                cute.arch.mbarrier_arrive(router_weights.full + turn)
                turn += 1
                if turn == 2:
                    turn, router_phase = Int32(0), router_phase ^ 1
            for step in cutlass.range(work.steps, unroll=1):
                cute.arch.mbarrier_wait(ring.empty + stage, phase)
                for block in cutlass.range_constexpr(0, v.stage_blocks, block_step):
                    column = (step * v.stage_blocks + block + first_block) * 64
                    size = Int32(16)
                    if column + piece * 8 >= columns:
                        size = Int32(0)  # zeros: a weight of zero must not meet a NaN
                    for i in cutlass.range_constexpr(held):
                        if first_row + i * 16 < tile.count:
                            offset = (stage * v.stage_blocks + block) * (v.tile_tokens * 128) + i * 2048
                            source = sources[i]
                            if size > 0:
                                source += Int64(column) * 2
                            cute.arch.inline_ptx(
                                "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[base + offset, source, size]
                            )
                cute.arch.cp_async_mbarrier_arrive_noinc(ring.full + stage)
                stage += 1
                if stage == v.stages:
                    stage, phase = Int32(0), phase ^ 1
