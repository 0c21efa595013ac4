"""The expert kernel's results: sums become outputs of a layer, and are stored."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

from .moe_gemm_groups import Gate, Place, Tile

LOG2_E = 1.4426950408889634


class Scaling(NamedTuple):
    """What a tile's sums are multiplied by, and what the activation of a "gate_up" kernel takes."""

    factor: Float32  # of all rows, or of the gate's
    factor_up: Float32
    weights: cute.Pointer  # fp32 [tile_tokens]: router weights, in shared memory
    gate: Gate


class Results:
    """What the warpgroups of ``moe_gemm.MoeGemm`` do with a tile when it has been multiplied."""

    @cute.jit
    def finish(self, acc: cute.Tensor, out: cute.Tensor, tile: Tile, block: Int32, place: Place, scaling: Scaling):
        """64 rows x the tile's tokens: scales, activation, router weight, and the stores."""
        v = self.variant
        router = cute.make_tensor(scaling.weights, cute.make_layout(v.tile_tokens))
        # Of 8 tokens lane 4 g + q has rows g, g, g + 8, g + 8 of the slice, for tokens 2 q, 2 q + 1, 2 q, 2 q + 1. With a gate, rows g and
        # g + 8 are gate and up of one output, and the next output is in another lane; without one they are outputs side by side.
        if const_expr(v.gated):
            token, column = place.lane // 4, block * 32 + place.slice * 8 + place.lane % 4 * 2
        else:
            token, column = place.lane % 4 * 2, block * 64 + place.slice * 16 + place.lane // 4 * 2
        rows = tile.count
        if column >= out.shape[1]:
            rows = Int32(0)
        row_bytes = Int64(out.stride[0]) * (self.act.width // 8)
        address = (out.iterator + column).toint() + Int64(tile.first + token) * row_bytes
        for n in cutlass.range_constexpr(v.tile_tokens // 8):
            if n * 8 < tile.count:
                low, high = (acc[4 * n], acc[4 * n + 1]), (acc[4 * n + 2], acc[4 * n + 3])
                factors = [(scaling.factor, scaling.factor_up)] * 2
                if const_expr(v.weighted):
                    weights = router[n * 8 + place.lane % 4 * 2], router[n * 8 + place.lane % 4 * 2 + 1]
                    factors = [(scaling.factor * w, scaling.factor_up * w) for w in weights]
                if const_expr(v.gated):
                    a, b = [self.gate(low[i] * factors[i][0], high[i] * factors[i][1], scaling.gate) for i in range(2)]
                    word = self.transposed(self.pair(a, b))
                    if n * 8 + token < rows:
                        self.store(address, word)
                else:
                    for i in cutlass.range_constexpr(2):
                        a, b = low[i] * factors[i][0], high[i] * factors[i][0]
                        if const_expr(v.use == "gate_up"):
                            a, b = self.relu2(a), self.relu2(b)
                        if n * 8 + token + i < rows:
                            self.store(address + i * row_bytes, self.pair(a, b))
            address += 8 * row_bytes

    @cute.jit
    def store(self, address: Int64, word: Uint32):
        """Two outputs, to global memory."""
        cute.arch.inline_ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[address, word])

    @cute.jit
    def pair(self, a: Float32, b: Float32) -> Uint32:
        """Both in the type of the output, ``a`` in the low half."""
        both = cute.make_rmem_tensor(2, self.act)
        both[0], both[1] = a.to(self.act), b.to(self.act)
        return cute.recast_tensor(both, Uint32)[0]

    @cute.jit
    def transposed(self, word: Uint32) -> Uint32:
        """8 x 8 values transposed: from tokens 2 (l % 4), + 1 of weight row l // 4 in lane l, to rows 2 (l % 4), + 1 of token l // 4."""
        return cute.arch.inline_ptx("movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[word])

    @cute.jit
    def gate(self, gate: Float32, up: Float32, constants: Gate) -> Float32:
        """act(gate) * up."""
        if const_expr(self.variant.limited):  # not min and max: these lose a NaN
            if gate > constants.limit:
                gate = constants.limit
            if up > constants.limit:
                up = constants.limit
            if up < -constants.limit:
                up = -constants.limit
        if const_expr(self.variant.activation == "silu"):
            return self.sigmoid(gate) * gate * up
        return self.sigmoid(gate * constants.alpha) * gate * (up + constants.beta)

    @cute.jit
    def relu2(self, value: Float32) -> Float32:
        """The square of what is above zero."""
        if value < 0.0:  # not max: it loses a NaN
            value = Float32(0.0)
        return value * value

    @cute.jit
    def sigmoid(self, x: Float32) -> Float32:
        """1 / (1 + exp(-x)), by approximate instructions."""
        return cute.arch.rcp_approx(1.0 + cute.math.exp2(-x * LOG2_E, fastmath=True))
