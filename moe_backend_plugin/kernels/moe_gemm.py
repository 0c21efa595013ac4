"""NVFP4 experts on Hopper: one grouped product, dequantised in registers, for a single token as for thousands.

The weights are the tensor cores' left operand and come from registers; tokens are the right operand, from shared memory. So a
tile is 64 or more rows of an expert's weights by 8 to 256 tokens, and the smallest tile wastes no weight bandwidth. Layers take
tiles of up to 144 tokens: with 128 rows to a warpgroup their sums are 144 registers a thread, so warps that load hand over what
they do not need. A tile that is far from full may be multiplied by fewer tokens (``short``).

A persistent grid walks the listed tiles. The lists come from the routing kernel, which costs a launch; of few pairs every block
makes them for itself in its shared memory (``pairs``). In each block one warp copies packed weights into a ring of
shared-memory stages (bulk copies; weights never wait for anything but a free stage), four warps gather the tokens of the tile
into the same stages (both: ``moe_gemm_loads``), and warpgroups turn 64 x 64 units of weights into bf16 or fp16 fragments and
multiply (``moe_gemm_products``). Warpgroups share a stage's tokens (``row_groups``) or share out its columns (``k_groups``;
their sums are added in a fixed order through shared memory). While a unit is multiplied the next one is dequantised. The sums
are scaled and stored as the use asks for (``moe_gemm_results``).

Two uses: "gate_up" gathers the layer's input by the sorted list and writes act(gate) * up; "down" reads that, and writes each
pair's output times its router weight, in sorted order. The weights of a "down" call are asked for while the call before it
still runs. Layout and bit placement of the weights: ``moe_backend_plugin.nvfp4.hopper``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from .moe_gemm_groups import UNIT, WARPGROUP, Gate, Lists, Ring, RouterWeights, Routing, Tile, Work
from .moe_gemm_loads import Loads
from .moe_gemm_products import Products
from .moe_gemm_results import Results
from .moe_route import TYPES as INDEX_TYPES
from .moe_route import MoERoute
from .moe_route import Variant as RouteVariant

SHARED_BYTES = 227 * 1024
"""The most that a thread block may have."""
REGISTERS, PRODUCER_REGISTERS, MOST_REGISTERS = 65536, 48, 248
"""Of a multiprocessor, what a loading thread keeps where it hands over the others, and the most that a thread can have."""
FRAGMENTS = 64
"""Registers of a consumer thread beside its sums: two units of dequantised weights, and addresses."""
SORTED_PAIRS = (32, 128)
"""``pairs`` of kernels that sort: threads of a "ballot", see moe_route."""
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
    short: tiles with at most so many tokens are multiplied by so many; 0: all tiles by ``tile_tokens``.
    limited: gate and up are clamped before the activation.
    pairs: 0: the lists come from the routing kernel. Else this one takes the router's choice, up to so many pairs, and every block
        sorts them for itself; "gate_up" also writes their positions.
    index, mapped: element type of the ids, and whether they go through an expert map, as in ``moe_route.Variant``; with ``pairs``.
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
    short: int = 0
    limited: bool = False
    pairs: int = 0
    index: str = "int32"
    mapped: bool = False

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
        """Whether rows of weights are gate and up in turn, and two make one output."""
        return self.use == "gate_up" and self.activation != "relu2"

    @property
    def stage_bytes(self) -> int:
        """Weights and tokens of a stage."""
        return self.stage_blocks * (self.row_groups * self.row_blocks * UNIT + self.tile_tokens * 128)

    @property
    def reduce_bytes(self) -> int:
        """Two buffers of partial sums of all but the first column group."""
        return 2 * (self.k_groups - 1) * self.row_groups * self.row_blocks * 64 * self.tile_tokens * 4

    @property
    def shared_bytes(self) -> int:
        """All shared memory of a block, with room for alignment."""
        lists = 5 * 4 * self.pairs + 16 + self.pairs // 4
        return self.stages * (self.stage_bytes + 16) + self.reduce_bytes + 2 * self.tile_tokens * 4 + lists + 240

    @property
    def producers(self) -> int:
        """Threads that load: four warps for tokens and one for weights, or whole warpgroups where registers are handed over."""
        return WARPGROUP + (WARPGROUP if self.regroup else 32)

    @property
    def paths(self) -> tuple[int, ...]:
        """Tokens that wgmmas multiply by: all of a tile, or ``short`` where no more are there."""
        return (self.tile_tokens, self.short) if self.short else (self.tile_tokens,)

    @property
    def regroup(self) -> bool:
        """Whether consumers need more registers than an even share, which ptxas counts for whole warpgroups."""
        threads = (self.row_groups * self.k_groups + 2) * WARPGROUP
        return self.tile_tokens * self.row_blocks // 2 + FRAGMENTS > REGISTERS // threads // 8 * 8

    @property
    def consumer_registers(self) -> int:
        """Of a consumer thread, where producers hand theirs over. There are no more than the block was launched with, the same number for
        every thread, a multiple of 8: who asks for more waits for ever."""
        consumers = self.row_groups * self.k_groups * WARPGROUP
        launched = REGISTERS // (consumers + self.producers) // 8 * 8 * (consumers + self.producers)
        return min(MOST_REGISTERS, (launched - self.producers * PRODUCER_REGISTERS) // consumers // 8 * 8)

    def __post_init__(self) -> None:
        if self.tile_tokens % 8 or not 8 <= self.tile_tokens <= 256 or (self.tile_tokens > 8 and self.tile_tokens % 16):
            raise ValueError(f"tile_tokens: found {self.tile_tokens}, allowed 8 or a multiple of 16 up to 256")
        if self.k_blocks * self.row_blocks % 2 or (self.tile_tokens == 8 and self.stage_blocks % 2):
            found = f"{self.k_blocks} x {self.row_blocks}, {self.k_groups} k_groups"
            raise ValueError(f"k_blocks x row_blocks: found {found}, allowed: an even number of units; with 8 tokens, of blocks a stage")
        if self.short and (self.warp_mma or self.short not in range(8, self.tile_tokens, 8)):
            found = f"{self.short} of {self.tile_tokens} tokens{' with warp_mma' if self.warp_mma else ''}"
            raise ValueError(f"short: found {found}, allowed 0 or, without warp_mma, a multiple of 8 below tile_tokens")
        if self.pairs not in (0, *SORTED_PAIRS):
            raise ValueError(f"pairs: found {self.pairs}, allowed 0, {', '.join(map(str, SORTED_PAIRS))}")
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(
                f"stages: found {self.stages} ({self.shared_bytes} bytes of shared memory), allowed up to {SHARED_BYTES} bytes"
            )


class MoeGemm(Loads, Products, Results):
    """The kernel of one ``Variant``; calling it (inside ``cute.compile``) launches it."""

    def __init__(self, variant: Variant, architecture: str) -> None:
        if not architecture.startswith("sm_90"):
            raise ValueError(f"architecture: found {architecture!r}, allowed sm_90a (wgmma)")
        self.variant = variant
        self.groups = variant.row_groups * variant.k_groups
        self.act = TYPES[variant.tokens]
        self.half = variant.tokens == "float16"
        if variant.pairs:
            self.route = MoERoute(RouteVariant("ballot", variant.index, variant.mapped, variant.pairs), architecture, cache="cg")

    @cute.jit
    def __call__(
        self,
        tokens: cute.Tensor,  # [rows, K]
        packed: cute.Tensor,  # uint8 [E, row blocks, column blocks, UNIT]
        scale_2: cute.Tensor,  # fp32 [E, 2 or 1]
        router: cute.Tensor | None,  # fp32 [pairs]
        order: cute.Tensor | None,  # int32 [pairs]
        tiles: cute.Tensor | None,  # int32 [tiles, 4]
        counts: cute.Tensor | None,  # int32 [4]
        ids: cute.Tensor | None,  # [tokens, top_k]
        expert_map: cute.Tensor | None,  # int32 [G]
        position: cute.Tensor | None,  # int32 [pairs]
        out: cute.Tensor,  # [pairs, columns]
        top_k: Int32,
        alpha: Float32,
        beta: Float32,
        limit: Float32,
        blocks: Int32,
        stream: cuda.CUstream,
    ):
        """Launch it on ``blocks`` blocks. Either order, tiles and counts are given, or (``pairs``) ids, expert_map and position."""
        v = self.variant
        mmas = [
            cute.make_tiled_mma(
                warpgroup.MmaF16BF16Op(
                    self.act, Float32, (64, tokens, 16), warpgroup.OperandSource.RMEM, OperandMajorMode.K, OperandMajorMode.K
                )
            )
            for tokens in v.paths
        ]
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.act)
        layout = cute.tile_to_shape(atom, (v.tile_tokens, 64, v.stage_blocks * v.stages), order=(0, 1, 2))
        lists, routing = Lists(order, tiles, counts), Routing(ids, expert_map, position)
        self.kernel(mmas, layout, tokens, packed, scale_2, router, lists, routing, out, top_k, Gate(alpha, beta, limit)).launch(
            grid=[blocks, 1, 1], block=[self.groups * WARPGROUP + v.producers, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        mmas: list,
        token_layout: cute.ComposedLayout,
        tokens: cute.Tensor,
        packed: cute.Tensor,
        scale_2: cute.Tensor,
        router: cute.Tensor | None,
        lists: Lists,
        routing: Routing,
        out: cute.Tensor,
        top_k: Int32,
        gate: Gate,
    ):
        """Lays out shared memory, lists few pairs, and gives every warp its role."""
        v = self.variant
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)

        smem = cutlass.memory.SmemAllocator()
        ring_tokens = smem.allocate_tensor(self.act, token_layout.outer, byte_alignment=1024, swizzle=token_layout.inner)
        ring_weights = smem.allocate_array(Uint8, v.stages * v.stage_blocks * v.row_groups * v.row_blocks * UNIT, byte_alignment=128)
        sums = smem.allocate_array(Float32, max(v.reduce_bytes // 4, 4), byte_alignment=16)
        router_smem = smem.allocate_array(Float32, 2 * v.tile_tokens, byte_alignment=16)
        barriers = [smem.allocate_array(Int64, number, byte_alignment=8) for number in (v.stages, v.stages, 2, 2)]
        ring = Ring(ring_tokens, ring_weights, *barriers[:2])
        router_weights = RouterWeights(router_smem, *barriers[2:])
        if thread == 0:
            for s in cutlass.range_constexpr(v.stages):
                cute.arch.mbarrier_init(ring.full + s, WARPGROUP + 1)
                cute.arch.mbarrier_init(ring.empty + s, self.groups * 4)
            for s in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(router_weights.full + s, WARPGROUP)
                cute.arch.mbarrier_init(router_weights.empty + s, v.row_groups * 4)
            cute.arch.mbarrier_init_fence()
        if const_expr(v.pairs):
            lists = Lists(
                smem.allocate_tensor(Int32, cute.make_layout(v.pairs), byte_alignment=16),
                smem.allocate_tensor(Int32, cute.make_layout((v.pairs, 4), stride=(4, 1)), byte_alignment=16),
                smem.allocate_tensor(Int32, cute.make_layout(4), byte_alignment=16),
            )
            shared = smem.allocate_tensor(Int32, cute.make_layout((v.pairs // 32, 2)), byte_alignment=16)
            if thread < v.pairs:
                if const_expr(v.use == "gate_up"):  # "down" starts when the ids have been read once
                    cute.arch.griddepcontrol_wait()
                record = v.use == "gate_up" and cute.arch.block_idx()[0] == 0
                ids, expert_map, position = routing
                targets = (lists.order, position, lists.tiles, lists.counts)
                numbers = (ids.shape[0] * ids.shape[1], packed.shape[0], Int32(v.tile_tokens), Int32(-(-(1 << 32) // v.tile_tokens)))
                self.route.sort(ids, expert_map, *targets, *numbers, thread, shared, record)
        cute.arch.barrier()

        row_blocks, column_blocks = packed.shape[1], packed.shape[2]
        row_tiles = (row_blocks + (v.row_groups * v.row_blocks - 1)) // (v.row_groups * v.row_blocks)
        steps = (column_blocks + (v.stage_blocks - 1)) // v.stage_blocks
        sizes = (row_blocks, column_blocks, row_tiles, steps)

        if warp < self.groups * 4:
            if const_expr(v.regroup):
                cute.arch.setmaxregister_increase(v.consumer_registers)
            if const_expr(v.use == "gate_up"):
                cute.arch.griddepcontrol_wait()
            work = self.work_of(lists, *sizes)
            self.consume(mmas, ring, sums, router_weights, scale_2, out, gate, work, thread)
        elif warp < self.groups * 4 + 4:
            if const_expr(v.regroup):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()
            work = self.work_of(lists, *sizes)
            self.produce_tokens(ring, router_weights, tokens, router, lists.order, top_k, work, thread - self.groups * WARPGROUP)
        else:
            if const_expr(v.regroup):
                cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp == self.groups * 4 + 4:
                if const_expr(v.use == "gate_up"):
                    # A "down" call starts while "gate_up" runs, and that one started when routing was done: its lists are there.
                    cute.arch.griddepcontrol_wait()
                work = self.work_of(lists, *sizes)
                self.produce_weights(ring, packed, work, thread % 32)

    @cute.jit
    def work_of(self, lists: Lists, row_blocks: Int32, column_blocks: Int32, row_tiles: Int32, steps: Int32) -> Work:
        """The work of the whole call, once the lists are there."""
        listed = lists.counts[0] if const_expr(self.variant.pairs) else self.listed(lists.counts, Int32(0))
        return Work(lists.tiles, listed * row_tiles, row_blocks, column_blocks, row_tiles, steps)

    @cute.jit
    def ask(self, work: Work, item: Int32, lane: Int32) -> Int32:
        """Have the tile of a piece of work read (of the last one past the end, where nobody looks): a word a lane, for :meth:`told`.

        Were all lanes to read all words, the compiler would move them to uniform registers at once, and wait for them.
        """
        index = cutlass.max(cutlass.min(item, work.total - 1), 0) // work.row_tiles
        if const_expr(self.variant.pairs):
            return work.tiles[index, lane % 4]
        return self.listed(work.tiles, index * 4 + lane % 4)

    @cute.jit
    def told(self, asked: Int32) -> Tile:
        """The tile that was asked for, by all lanes of a warp."""
        return Tile(*(cute.arch.shuffle_sync(asked, offset=word) for word in range(3)))

    @cute.jit
    def listed(self, words: cute.Tensor, at: Int32) -> Int32:
        """A word of a list, from the L2 cache: a "down" kernel asks before it has waited for the one in front."""
        address = (words.iterator + at).toint()
        return cute.arch.inline_ptx("ld.global.cg.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


KERNEL = MoeGemm


def fake_arguments(variant: Variant) -> list:
    """Tensors without memory that say which types, strides and alignments the compiled kernel accepts; sizes are free."""

    def fake(kind, rank: int, align: int):
        divide = max(1, align * 8 // kind.width)
        strides = tuple(cute.sym_int64(divisibility=divide) for _ in range(rank - 1))
        shape = tuple(cute.sym_int() for _ in range(rank))
        return cute.runtime.make_fake_tensor(kind, shape, (*strides, 1), assumed_align=align)

    v = variant
    lists = [fake(Int32, 1, 4), fake(Int32, 2, 16), fake(Int32, 1, 16), None, None, None]
    if v.pairs:
        kind = INDEX_TYPES[v.index]
        ids = cute.runtime.make_fake_tensor(kind, (cute.sym_int(), cute.sym_int()), (cute.sym_int64(), 1), assumed_align=kind.width // 8)
        lists = [None, None, None, ids, fake(Int32, 1, 4) if v.mapped else None, fake(Int32, 1, 4)]
    return [
        fake(TYPES[v.tokens], 2, 16),
        fake(Uint8, 4, 256),
        fake(Float32, 2, 4),
        fake(Float32, 1, 4) if v.weighted else None,
        *lists,
        fake(TYPES[v.tokens], 2, 16),
        Int32(1),
        Float32(1.0),
        Float32(0.0),
        Float32(float("inf")),
        Int32(1),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    ]
