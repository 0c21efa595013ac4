"""From the router's choice to sorted pairs and a tile list, on the device: the first kernel of a mixture-of-experts layer.

A pair is one slot of one token, number ``token * k + slot``. Pairs that a local expert answers are sorted by expert; the pairs of
an expert are cut into tiles of at most ``tile_tokens``. Four kernels do it, by the number P of pairs:

* "ballot" (a few dozen pairs): every warp holds all the expert numbers and sorts them bit by bit with warp votes, which gives
  every pair two masks: the pairs of smaller experts, and those of its own. All that is written is the number of set bits in
  parts of these masks. One warp needs no shared memory and no barrier; several warps exchange two words each.
* "block" (thousands of pairs): one block. Shared-memory atomics count the pairs of an expert and number each of them; one scan
  over the experts gives first positions and first tiles together (two halves of a word); the sorted list is put together in
  shared memory, because scattered stores to global memory take a cycle each.
* "count" and "scatter" (any number): many blocks, each with its share of the pairs. The first writes how many pairs of each
  expert its share has; in the second every block adds these up for the experts, and for the shares before its own.

A tile is written by the pair that comes first in it, so a list of many tiles for one expert costs no loop.
Launches are programmatic: nothing is read or written before the kernel in front has ended. Only the expert map, which no kernel
in front is likely to have left in the cache, is asked for (into the L2 cache, where it cannot go stale) while that one still runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

MAX_EXPERTS = 1024
"""Local experts; expert numbers have ``EXPERT_BITS`` bits."""
EXPERT_BITS = 10
METHODS = ("ballot", "block", "count", "scatter")
TYPES = {"int32": cutlass.Int32, "int64": cutlass.Int64}
SORT_BARRIER = 5
"""Of the threads that sort, which in another kernel are not all of a block."""
LOW = 0xFFFF
"""The half of a packed word that counts pairs; tiles are in the other half."""


@dataclass(frozen=True)
class Variant:
    """What is fixed when the kernel is compiled.

    method: "ballot", "block", "count" or "scatter".
    index: element type of the ids ("int32", "int64").
    mapped: ids go through an expert map.
    threads: threads of a block; pairs: the most pairs that a thread of a "block" holds.
    "ballot" serves up to ``threads`` pairs, "block" up to ``threads * pairs``.
    """

    method: str = "ballot"
    index: str = "int32"
    mapped: bool = False
    threads: int = 32
    pairs: int = 1

    def __post_init__(self) -> None:
        allowed = {"ballot": (32, 64, 128, 256), "block": (128, 256, 512, 1024)}.get(self.method, (MAX_EXPERTS,))
        if self.method not in METHODS:
            raise ValueError(f"method: found {self.method!r}, allowed {', '.join(METHODS)}")
        if self.threads not in allowed:
            raise ValueError(f"threads: found {self.threads}, allowed for {self.method!r}: {', '.join(map(str, allowed))}")
        if self.pairs < 1 or (self.pairs > 1 and self.method != "block") or self.threads * self.pairs > 8192:
            raise ValueError(f"pairs: found {self.pairs}, allowed 1, and for 'block' up to 8192 pairs a block")


class MoERoute:
    """The kernel of one ``Variant``; calling it (inside ``cute.compile``) launches it on ``blocks`` blocks."""

    def __init__(self, variant: Variant, architecture: str, cache: str = "ca") -> None:
        """``cache``: "cg" reads ids and map from L2, for a kernel that sorts before it has waited for the one in front."""
        self.variant = variant
        self.cache = cache
        self.index = TYPES[variant.index]
        self.warps = variant.threads // 32
        self.each = max(1, MAX_EXPERTS // variant.threads)  # experts that a thread scans

    @cute.jit
    def __call__(
        self,
        ids: cute.Tensor,  # [M, k]
        expert_map: cute.Tensor | None,  # [G]
        order: cute.Tensor,  # [>= P]
        position: cute.Tensor,  # [>= P]
        tiles: cute.Tensor,  # [>= T, 4]
        counts: cute.Tensor,  # [4]
        scratch: cute.Tensor | None,  # [>= blocks * experts]
        pairs: Int32,
        experts: Int32,
        tile_tokens: Int32,
        reciprocal: Int32,
        blocks: Int32,
        share: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(
            ids, expert_map, order, position, tiles, counts, scratch, pairs, experts, tile_tokens, reciprocal, share
        ).launch(
            grid=[blocks, 1, 1],
            block=[self.variant.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        order: cute.Tensor,
        position: cute.Tensor,
        tiles: cute.Tensor,
        counts: cute.Tensor,
        scratch: cute.Tensor | None,
        pairs: Int32,
        experts: Int32,
        tile_tokens: Int32,
        reciprocal: Int32,
        share: Int32,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        thread = cute.arch.thread_idx()[0]
        if const_expr(self.variant.mapped):
            self.prefetch(expert_map, thread)
        if const_expr(self.variant.method == "ballot"):
            self.ballot(ids, expert_map, order, position, tiles, counts, pairs, experts, tile_tokens, reciprocal, thread)
        elif const_expr(self.variant.method == "block"):
            self.block(ids, expert_map, order, position, tiles, counts, pairs, experts, tile_tokens, reciprocal, thread)
        elif const_expr(self.variant.method == "count"):
            self.count(ids, expert_map, scratch, pairs, experts, share, thread)
        else:
            self.scatter(
                ids, expert_map, order, position, tiles, counts, scratch, pairs, experts, tile_tokens, reciprocal, share, thread
            )  # fmt: skip

    # --- the four kernels ---------------------------------------------------------------------------------------------

    @cute.jit
    def ballot(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        order: cute.Tensor,
        position: cute.Tensor,
        tiles: cute.Tensor,
        counts: cute.Tensor,
        pairs: Int32,
        experts: Int32,
        tile_tokens: Int32,
        reciprocal: Int32,
        thread: Int32,
    ):
        shared = None
        if const_expr(self.warps > 1):
            shared = cutlass.memory.SmemAllocator().allocate_tensor(Int32, cute.make_layout((self.warps, 2)), byte_alignment=16)
        cute.arch.griddepcontrol_wait()
        self.sort(ids, expert_map, order, position, tiles, counts, pairs, experts, tile_tokens, reciprocal, thread, shared, Boolean(True))

    @cute.jit
    def sort(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        order: cute.Tensor,
        position: cute.Tensor,
        tiles: cute.Tensor,
        counts: cute.Tensor,
        pairs: Int32,
        experts: Int32,
        tile_tokens: Int32,
        reciprocal: Int32,
        thread: Int32,
        shared: cute.Tensor | None,
        record: Boolean,
    ):
        """The lists, in global or in shared memory, by the first ``threads`` threads of a block; ``position`` only if ``record``.

        shared: shared memory, int32 [warps, 2], where there are several warps.
        """
        W = self.warps
        lane, warp = thread % 32, thread // 32
        keys = self.load_experts(ids, expert_map, lane, 32, W, pairs, experts)
        own = keys[0]
        for w in cutlass.range_constexpr(1, W):
            own = self.select(warp == w, keys[w], own)

        # For each word w of 32 pairs: pairs of smaller experts, pairs of this pair's expert, pairs that stand before it.
        less, same, before, valid = (cute.make_rmem_tensor(W, Int32) for _ in range(4))
        below = (Int32(1) << lane) - 1
        for w in cutlass.range_constexpr(W):
            valid[w] = cute.arch.vote_ballot_sync(keys[w] >= 0)
            same[w] = valid[w]
            less[w] = Int32(0)
            before[w] = below
            if const_expr(W > 1):
                before[w] = self.select(warp == w, below, self.select(warp > w, Int32(-1), Int32(0)))
        for bit in cutlass.range_constexpr(EXPERT_BITS - 1, -1, -1):
            mine = -((own >> bit) & 1)  # all bits set or none
            for w in cutlass.range_constexpr(W):
                ones = cute.arch.vote_ballot_sync(((keys[w] >> bit) & 1) != 0)
                less[w] = less[w] | (same[w] & ~ones & mine)
                same[w] = same[w] & ~(ones ^ mine)

        first, rank, count = Int32(0), Int32(0), Int32(0)
        for w in cutlass.range_constexpr(W):
            first += cute.arch.popc(less[w])
            rank += cute.arch.popc(same[w] & before[w])
            count += cute.arch.popc(same[w])
        tile = cute.arch.mul_hi(rank, reciprocal)
        answered = own >= 0
        starts = answered and tile * tile_tokens == rank
        tile_starts, active = cute.make_rmem_tensor(W, Int32), cute.make_rmem_tensor(W, Int32)
        tile_starts[0] = cute.arch.vote_ballot_sync(starts)
        active[0] = cute.arch.vote_ballot_sync(answered and rank == 0)
        if const_expr(W > 1):
            if lane == 0:
                shared[warp, 0] = tile_starts[0]
                shared[warp, 1] = active[0]
            cute.arch.barrier(barrier_id=SORT_BARRIER, number_of_threads=self.variant.threads)
            cute.autovec_copy(shared[None, 0], tile_starts)
            cute.autovec_copy(shared[None, 1], active)

        if thread < pairs:
            place = Int32(-1)
            if answered:
                place = first + rank
                order[place] = thread
            if record:
                position[thread] = place
        if starts:
            row = Int32(0)
            for w in cutlass.range_constexpr(W):
                row += cute.arch.popc(tile_starts[w] & (less[w] | (same[w] & before[w])))
            self.store_tile(tiles, row, own, first, rank, count, tile_tokens)
        if thread == 0:
            sums = cute.make_rmem_tensor(4, Int32)
            sums.fill(0)
            for w in cutlass.range_constexpr(W):
                sums[0] += cute.arch.popc(tile_starts[w])
                sums[1] += cute.arch.popc(valid[w])
                sums[2] += cute.arch.popc(active[w])
            self.store_four(counts, Int32(0), sums)

    @cute.jit
    def block(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        order: cute.Tensor,
        position: cute.Tensor,
        tiles: cute.Tensor,
        counts: cute.Tensor,
        pairs: Int32,
        experts: Int32,
        tile_tokens: Int32,
        reciprocal: Int32,
        thread: Int32,
    ):
        R, threads, each = self.variant.pairs, self.variant.threads, self.each
        smem = cutlass.memory.SmemAllocator()
        found = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16)  # pairs of an expert
        starts = smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16)  # first pair, first tile
        sums = smem.allocate_tensor(Int32, cute.make_layout((32, 2)), byte_alignment=16)
        line = smem.allocate_tensor(Int32, cute.make_layout(threads * R), byte_alignment=16)
        self.clear(found, thread)
        cute.arch.barrier()

        cute.arch.griddepcontrol_wait()
        keys = self.load_experts(ids, expert_map, thread, threads, R, pairs, experts)
        ranks = cute.make_rmem_tensor(R, Int32)
        for j in cutlass.range_constexpr(R):
            ranks[j] = Int32(0)
            if keys[j] >= 0:
                ranks[j] = cute.arch.atomic_add(found.iterator + keys[j], Int32(1), sem="relaxed", scope="cta")
        cute.arch.barrier()

        here = cute.make_rmem_tensor(each, Int32)
        cute.autovec_copy(self.part(found, thread), here)
        active, total = Int32(0), Int32(0)
        for i in cutlass.range_constexpr(each):
            active += cute.arch.popc(cute.arch.vote_ballot_sync(here[i] > 0))
            here[i] = here[i] | cute.arch.mul_hi(here[i] + (tile_tokens - 1), reciprocal) << 16
            total += here[i]
        start, everything, active = self.block_scan(total, active, sums, thread)
        for i in cutlass.range_constexpr(each):
            following = start + here[i]
            here[i] = start
            start = following
        cute.autovec_copy(here, self.part(starts, thread))
        if thread == 0:
            self.store_counts(counts, everything >> 16, everything & LOW, active)
        cute.arch.barrier()

        # Step by step for all pairs of the thread, so that none waits for the answers to another.
        firsts, sizes = cute.make_rmem_tensor(R, Int32), cute.make_rmem_tensor(R, Int32)
        for j in cutlass.range_constexpr(R):
            firsts[j] = starts[cutlass.max(keys[j], 0)]
            sizes[j] = Int32(0)
        for j in cutlass.range_constexpr(R):
            if keys[j] >= 0 and cute.arch.mul_hi(ranks[j], reciprocal) * tile_tokens == ranks[j]:
                sizes[j] = found[keys[j]]
        for j in cutlass.range_constexpr(R):
            pair = thread + j * threads
            place = self.select(keys[j] >= 0, (firsts[j] & LOW) + ranks[j], Int32(-1))
            if keys[j] >= 0:
                line[place] = pair
            if pair < pairs:
                position[pair] = place
        for j in cutlass.range_constexpr(R):
            if sizes[j] > 0:
                row = (firsts[j] >> 16) + cute.arch.mul_hi(ranks[j], reciprocal)
                self.store_tile(tiles, row, keys[j], firsts[j] & LOW, ranks[j], sizes[j], tile_tokens)
        cute.arch.barrier()
        for j in cutlass.range_constexpr(R):
            place = thread + j * threads
            if place < (everything & LOW):
                order[place] = line[place]

    @cute.jit
    def count(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        scratch: cute.Tensor,
        pairs: Int32,
        experts: Int32,
        share: Int32,
        thread: Int32,
    ):
        """scratch[block, expert]: the pairs of the expert among the block's share."""
        block = cute.arch.block_idx()[0]
        found = cutlass.memory.SmemAllocator().allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16)
        self.clear(found, thread)
        cute.arch.barrier()
        cute.arch.griddepcontrol_wait()
        for done in cutlass.range(0, share, self.variant.threads, unroll=1):
            key = self.load_experts(ids, expert_map, block * share + done + thread, 0, 1, pairs, experts)[0]
            if key >= 0:
                cute.arch.atomic_add(found.iterator + key, Int32(1), sem="relaxed", scope="cta")
        cute.arch.barrier()
        if thread < experts:
            scratch[block * experts + thread] = found[thread]

    @cute.jit
    def scatter(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        order: cute.Tensor,
        position: cute.Tensor,
        tiles: cute.Tensor,
        counts: cute.Tensor,
        scratch: cute.Tensor,
        pairs: Int32,
        experts: Int32,
        tile_tokens: Int32,
        reciprocal: Int32,
        share: Int32,
        thread: Int32,
    ):
        block, blocks = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        smem = cutlass.memory.SmemAllocator()
        found, earlier, starts, first_tile = (
            smem.allocate_tensor(Int32, cute.make_layout(MAX_EXPERTS), byte_alignment=16) for _ in range(4)
        )
        sums = smem.allocate_tensor(Int32, cute.make_layout((32, 4)), byte_alignment=16)
        self.clear(found, thread)
        self.clear(earlier, thread)
        cute.arch.barrier()

        # Threads stand in rows of as many as there are experts (whole warps); a row adds up every so many shares.
        cute.arch.griddepcontrol_wait()
        width = (experts + 31) // 32 * 32
        rows = self.variant.threads // width
        row, expert = thread // width, thread % width
        if row < rows and expert < experts:
            all_shares, shares_before = Int32(0), Int32(0)
            for other in cutlass.range(row, blocks, rows, unroll=4):
                value = scratch[other * experts + expert]
                all_shares += value
                shares_before += self.select(other < block, value, Int32(0))
            cute.arch.atomic_add(found.iterator + expert, all_shares, sem="relaxed", scope="cta")
            cute.arch.atomic_add(earlier.iterator + expert, shares_before, sem="relaxed", scope="cta")
        cute.arch.barrier()

        here = found[thread]
        active = cute.arch.popc(cute.arch.vote_ballot_sync(here > 0))
        tile_count = cute.arch.mul_hi(here + (tile_tokens - 1), reciprocal)
        start, valid, active = self.block_scan(here, active, sums, thread)
        tile_start, all_tiles, _ = self.block_scan(tile_count, Int32(0), cute.make_tensor(sums.iterator + 64, sums.layout), thread)
        starts[thread] = start
        first_tile[thread] = tile_start
        earlier[thread] = start + earlier[thread]  # from now on: the next position of this block's pairs
        if thread == 0 and block == 0:
            self.store_counts(counts, all_tiles, valid, active)
        cute.arch.barrier()

        for done in cutlass.range(0, share, self.variant.threads, unroll=1):
            pair = block * share + done + thread
            key = self.load_experts(ids, expert_map, pair, 0, 1, pairs, experts)[0]
            if pair < pairs:
                place = Int32(-1)
                if key >= 0:
                    place = cute.arch.atomic_add(earlier.iterator + key, Int32(1), sem="relaxed", scope="cta")
                    order[place] = pair
                    rank = place - starts[key]
                    tile = cute.arch.mul_hi(rank, reciprocal)
                    if tile * tile_tokens == rank:
                        self.store_tile(tiles, first_tile[key] + tile, key, starts[key], rank, found[key], tile_tokens)
                position[pair] = place

    # --- parts --------------------------------------------------------------------------------------------------------

    @cute.jit
    def prefetch(self, expert_map: cute.Tensor, thread: Int32):
        """Ask the L2 cache for the map, a line of 128 bytes a thread."""
        if thread * 32 < expert_map.shape[0]:
            cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[(expert_map.iterator + thread * 32).toint()])

    @cute.jit
    def select(self, condition: Boolean, yes: Int32, no: Int32) -> Int32:
        return cutlass.select_(condition, yes, no)

    @cute.jit
    def load_experts(
        self,
        ids: cute.Tensor,
        expert_map: cute.Tensor | None,
        first: Int32,
        step: cutlass.Constexpr[int],
        number: cutlass.Constexpr[int],
        pairs: Int32,
        experts: Int32,
    ) -> cute.Tensor:
        """int32 [number]: local experts of the pairs first, first + step, ...; -1 where there is none, or no such pair.

        Addresses are clamped instead of branched on, so that all loads are on their way together. Ids are compared in
        their own type: one of 64 bits may equal an expert in its lower half.
        """
        raw = cute.make_rmem_tensor(number, self.index)
        keys = cute.make_rmem_tensor(number, Int32)
        for j in cutlass.range_constexpr(number):
            raw[j] = cute.arch.load(ids.iterator + cutlass.min(first + j * step, pairs - 1), self.index, cop=self.cache)
        for j in cutlass.range_constexpr(number):
            known = raw[j] >= 0 and first + j * step < pairs
            if const_expr(self.variant.mapped):
                known = known and raw[j] < expert_map.shape[0]
                keys[j] = cute.arch.load(expert_map.iterator + self.select(known, Int32(raw[j]), Int32(0)), Int32, cop=self.cache)
                known = known and keys[j] >= 0 and keys[j] < experts
            else:
                known = known and raw[j] < experts
                keys[j] = Int32(raw[j])
            keys[j] = self.select(known, keys[j], Int32(-1))
        return keys

    @cute.jit
    def part(self, values: cute.Tensor, thread: Int32) -> cute.Tensor:
        """The experts that ``thread`` scans, in an array of all."""
        each = self.each
        return cute.make_tensor((values.iterator + thread * each).align(min(16, each * 4)), cute.make_layout(each))

    @cute.jit
    def clear(self, values: cute.Tensor, thread: Int32):
        zeros = cute.make_rmem_tensor(self.each, Int32)
        zeros.fill(0)
        cute.autovec_copy(zeros, self.part(values, thread))

    @cute.jit
    def block_scan(self, value: Int32, warp_value: Int32, sums: cute.Tensor, thread: Int32) -> tuple[Int32, Int32, Int32]:
        """(sum of ``value`` over the threads before this one, over all threads, sum of ``warp_value`` over the warps)."""
        lane, warp = thread % 32, thread // 32
        upto = value
        for doubling in cutlass.range_constexpr(5):
            lower = cute.arch.shuffle_sync_up(upto, offset=1 << doubling)
            upto += self.select(lane >= 1 << doubling, lower, Int32(0))
        if lane == 31:
            sums[warp, 0] = upto
            sums[warp, 1] = warp_value
        cute.arch.barrier()
        of_warp, other = Int32(0), Int32(0)
        if lane < self.warps:
            of_warp, other = sums[lane, 0], sums[lane, 1]
        before = cute.arch.warp_redux_sync(self.select(lane < warp, of_warp, Int32(0)), "add")
        return before + upto - value, cute.arch.warp_redux_sync(of_warp, "add"), cute.arch.warp_redux_sync(other, "add")

    @cute.jit
    def store_tile(self, tiles: cute.Tensor, row: Int32, expert: Int32, first: Int32, rank: Int32, count: Int32, tile_tokens: Int32):
        values = cute.make_rmem_tensor(4, Int32)
        values[0], values[1], values[2], values[3] = expert, first + rank, cutlass.min(tile_tokens, count - rank), Int32(0)
        self.store_four(tiles, row, values)

    @cute.jit
    def store_counts(self, counts: cute.Tensor, tiles: Int32, valid: Int32, active: Int32):
        values = cute.make_rmem_tensor(4, Int32)
        values[0], values[1], values[2], values[3] = tiles, valid, active, Int32(0)
        self.store_four(counts, Int32(0), values)

    @cute.jit
    def store_four(self, target: cute.Tensor, row: Int32, values: cute.Tensor):
        """Four words, as row ``row`` of ``target``."""
        cute.autovec_copy(values, cute.make_tensor((target.iterator + row * 4).align(16), cute.make_layout(4)))


KERNEL = MoERoute


def fake_arguments(variant: Variant) -> list:
    """Tensors without memory that say which types, strides and alignments the compiled kernel accepts; sizes are free."""

    def flat(dtype: str, align: int = 0):
        kind = TYPES[dtype]
        return cute.runtime.make_fake_tensor(kind, (cute.sym_int(),), (1,), assumed_align=align or kind.width // 8)

    ids = cute.runtime.make_fake_tensor(
        TYPES[variant.index], (cute.sym_int(), cute.sym_int()), (cute.sym_int64(), 1), assumed_align=TYPES[variant.index].width // 8
    )
    tiles = cute.runtime.make_fake_tensor(Int32, (cute.sym_int(), 4), (4, 1), assumed_align=16)
    return [
        ids,
        flat("int32") if variant.mapped else None,
        flat("int32"),
        flat("int32"),
        tiles,
        flat("int32", align=16),
        flat("int32") if variant.method in ("count", "scatter") else None,
        *(Int32(1) for _ in range(6)),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    ]
