"""Routing and combine on a GPU. Outputs lie between guards, all filled with one word before a call, and every word is compared.

The order of the pairs of one expert is free, so results are judged by what they mean; ``wrong`` does that on the device, which
lets thousands of routings be checked with one wait.
"""

import math

import pytest
import torch

from moe_backend_plugin.kernels.compile import architecture_of, capabilities
from moe_backend_plugin.moe import route as r
from moe_backend_plugin.moe.routing import local_ids


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    return None if architecture_of(capability) else f"compute capability {capability}; the kernels run on {capabilities()}"


if reason := missing():
    pytest.skip(f"MoE routing kernels: {reason}", allow_module_level=True)
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

from moe_backend_plugin.kernels import compile as kernels  # noqa: E402  after the tests have been skipped where it cannot run

DEVICE = torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT32, INT64 = torch.int32, torch.int64
POISON = -0x5A5A5A5B
GUARD = 64
"""Words between two outputs; a multiple of 16 bytes."""
ROUTINGS = {32: 45_000, 600: 45_000, 9000: 10_000}
"""Adversarial routings, by the most pairs that they have."""
TOP_K = (1, 2, 5, 6, 8, 10, 22, 32)
COMBINES = [(rows, tokens, k) for k in TOP_K for rows, tokens in ((BF16, BF16), (FP16, FP16), (FP32, BF16))]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    architecture = kernels.architecture_of(torch.cuda.get_device_capability())
    routes = [v for index in r.INDEX_TYPES for mapped in (False, True) for v in r.route_variants(index, mapped)]
    combines = [v for rows, tokens, k in COMBINES for v in r.combine_variants(rows, tokens, k)]
    kernels.prepare(r.ROUTE, routes, architecture)
    kernels.prepare(r.COMBINE, combines, architecture)


# --- outputs between guards, and what may be in them ----------------------------------------------------------------------


class Outputs:
    """The outputs of calls of up to ``pairs`` pairs, in one buffer of poison."""

    def __init__(self, pairs, experts, tile, device=None):
        self.pairs = pairs
        sizes = {
            "order": pairs,
            "position": pairs,
            "tiles": 4 * r.max_tiles(pairs, experts, tile),
            "counts": 4,
            "scratch": r.scratch_ints(pairs, experts),
        }
        padded = {name: -(-size // 4) * 4 for name, size in sizes.items()}
        self.buffer = torch.full((sum(padded.values()) + GUARD * (len(sizes) + 1),), POISON, dtype=INT32, device=device or DEVICE)
        start = GUARD
        self.guards = torch.ones_like(self.buffer, dtype=torch.bool)
        for name, size in sizes.items():
            setattr(self, name, self.buffer[start : start + size])
            self.guards[start : start + size] = False
            start += padded[name] + GUARD
        self.tiles = self.tiles.view(-1, 4)

    def poison(self):
        self.buffer.fill_(POISON)

    def route(self, ids, experts, tile, expert_map=None):
        r.route(
            ids, experts, tile, self.order, self.position, self.tiles, self.counts, expert_map=expert_map, scratch=self.scratch
        )  # fmt: skip


def wrong(out, ids, experts, tile, expert_map=None):
    """bool [7]: which of the outputs of ``out.route(ids, experts, tile, expert_map)`` are not as they must be. Waits for nothing."""
    device = ids.device
    local = local_ids(ids, experts, expert_map).reshape(-1)
    pairs = local.numel()
    valid = local < experts
    count = torch.zeros(experts + 1, dtype=INT64, device=device).scatter_add_(0, local, torch.ones_like(local))[:experts]
    first = count.cumsum(0) - count
    tile_count = (count + tile - 1) // tile
    last_tile = tile_count.cumsum(0)
    total = count.sum()

    counts = torch.stack([last_tile[-1], total, (count > 0).sum(), torch.zeros_like(total)])
    pair = torch.arange(pairs, device=device)
    position, order = out.position[:pairs].long(), out.order[:pairs].long()
    expert = local.clamp(max=experts - 1)
    inside = (position >= first[expert]) & (position < first[expert] + count[expert])
    back = order[position.clamp(0, pairs - 1)] == pair  # two pairs of one position cannot both be in it

    row = torch.arange(out.tiles.shape[0], device=device)
    owner = torch.searchsorted(last_tile, row, right=True).clamp(max=experts - 1)
    begin = (row - (last_tile - tile_count)[owner]) * tile
    size = (count[owner] - begin).clamp(max=tile)
    tiles = torch.stack([owner, first[owner] + begin, size, torch.zeros_like(row)], dim=1)
    tiles = tiles.where((row < last_tile[-1])[:, None], POISON)
    return torch.stack(
        [
            (out.counts.long() != counts).any(),
            torch.where(valid, ~inside, position != -1).any(),
            (valid & ~back).any(),
            ((pair >= total) & (order != POISON)).any(),
            (out.tiles.long() != tiles).any(),
            (out.order[pairs:] != POISON).any() | (out.position[pairs:] != POISON).any(),
            ((out.buffer != POISON) & out.guards).any(),
        ]
    )


WRONG = ("counts", "position", "order", "order behind the valid pairs", "tiles", "words behind the pairs", "guards")


def check(ids, experts, tile, expert_map=None):
    out = Outputs(ids.numel(), experts, tile)
    out.route(ids, experts, tile, expert_map)
    found = wrong(out, ids, experts, tile, expert_map).tolist()
    assert not any(found), [name for name, bad in zip(WRONG, found, strict=True) if bad]
    return out


# --- routings ---------------------------------------------------------------------------------------------------------------


def randint(low, high, shape, dtype=INT64):
    return torch.randint(low, high, shape, device=DEVICE).to(dtype)


def wild_ids(shape, known, dtype, share=0.3):
    """Ids of which a share is out of range at either end; 64-bit ones also equal to an expert in their lower half."""
    low = [-1, -2, -(2**31), known, known + 1, 2**31 - 1]
    if dtype == INT64:
        low += [2**31, 2**32, 2**32 + 1, -(2**32), -(2**32) + 1, 2**63 - 1, -(2**63), (1 << 40) + 3]
    wild = torch.tensor(low, device=DEVICE)[randint(0, len(low), shape)]
    return wild.where(torch.rand(shape, device=DEVICE) < share, randint(0, known, shape)).to(dtype)


def wild_map(known, experts):
    """Entries of every kind: local experts (some of them twice), -1, and numbers that are no local expert."""
    low = torch.tensor([-1, -1, -1, -9, -(2**31), experts, experts + 1, 2**31 - 1], device=DEVICE)[randint(0, 8, (known,))]
    return low.where(torch.rand(known, device=DEVICE) < 0.4, randint(0, experts, (known,))).to(INT32)


def range_map(known, experts, rank):
    """Rank ``rank`` of those that share ``known`` experts, ``experts`` each."""
    expert_map = torch.full((known,), -1, dtype=INT32, device=DEVICE)
    expert_map[rank * experts : (rank + 1) * experts] = torch.arange(experts, dtype=INT32, device=DEVICE)
    return expert_map


def top_k(tokens, experts, k, dtype):
    """k different experts a token."""
    return torch.rand(tokens, experts, device=DEVICE).topk(k).indices.to(dtype)


@pytest.mark.parametrize("dtype", [INT32, INT64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 16, 17, 32, 33, 64, 100, 128, 129, 256, 400, 512, 513, 1000, 2048, 16384])
def test_like_a_router(tokens, dtype):
    """Sizes on both sides of every border between kernels, k = 8."""
    for experts, tile in ((128, 8), (256, 64)):
        check(top_k(tokens, experts, 8, dtype), experts, tile)
    ids = top_k(tokens, 256, 8, dtype)
    for rank in (0, 5, 7):
        check(ids, 32, 16, range_map(256, 32, rank))


@pytest.mark.parametrize("k", range(1, 33))
def test_every_top_k(k):
    for tokens in (1, 4, 40, 130, 700):
        check(top_k(tokens, 64, k, INT32), 64, 8)
        check(wild_ids((tokens, k), 50, INT64), 50, 16)


@pytest.mark.parametrize("experts", [1, 2, 3, 16, 31, 32, 33, 60, 128, 160, 255, 256, 257, 384, 512, 513, 768, 1000, 1023, 1024])
def test_every_number_of_experts(experts):
    for tokens in (1, 4, 13, 100, 500, 1500):
        check(randint(0, experts, (tokens, 8), INT32), experts, 8)
        check(wild_ids((tokens, 8), 2 * experts, INT32), experts, 32, wild_map(2 * experts, experts))


@pytest.mark.parametrize("tile", [4, 8, 16, 24, 32, 48, 64, 80, 96, 100, 128, 192, 256, 1000, 1024])
def test_every_tile(tile):
    for tokens in (1, 4, 16, 100, 512, 3000):
        check(top_k(tokens, 8, 4, INT32), 8, tile)


@pytest.mark.parametrize("dtype", [INT32, INT64])
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 128, 500, 512, 1024, 16384])
def test_extremes(tokens, dtype):
    shape = (tokens, 8)
    for experts in (1, 7, 256, 1024):
        for expert in (0, experts - 1):
            check(torch.full(shape, expert, device=DEVICE, dtype=dtype), experts, 8)  # duplicates, and all to one
        for nowhere in (-1, experts, 2**31 - 1, -(2**31)):
            check(torch.full(shape, nowhere, device=DEVICE, dtype=dtype), experts, 8)
        check(randint(0, 64, shape, dtype), experts, 8, torch.full((64,), -1, dtype=INT32, device=DEVICE))
        check(torch.arange(tokens * 8, device=DEVICE).view(shape).to(dtype), experts, 8)
        one = torch.full(shape, -1, device=DEVICE, dtype=dtype)
        one[-1, -1] = experts - 1
        check(one, experts, 8)
        check(one, 1, 8, torch.zeros(experts, dtype=INT32, device=DEVICE))


def test_ids_of_64_bits_are_not_cut():
    for tokens in (1, 10, 100, 500, 2000):
        ids = randint(0, 16, (tokens, 8)) + randint(-2, 3, (tokens, 8)) * 2**32
        out = check(ids, 16, 8)
        assert torch.equal(out.position.view(tokens, 8) >= 0, ids // 2**32 == 0)
        check(ids, 16, 8, range_map(16, 16, 0))


@pytest.mark.parametrize(
    "pairs", [*range(1, 70), 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 5119, 5120, 5121, 131072, 131073, 300_001]
)
def test_every_number_of_pairs(pairs):
    check(wild_ids((pairs, 1), 40, INT32), 40, 8)
    check(wild_ids((1, pairs), 40, INT64), 30, 64, wild_map(40, 30))


@pytest.mark.parametrize("tokens", [32768, 131072])
def test_more_tokens_than_asked_for(tokens):
    check(top_k(tokens, 64, 8, INT32), 64, 256)
    check(wild_ids((tokens, 8), 300, INT64), 256, 128, wild_map(300, 256))


def test_ids_and_maps_that_start_anywhere():
    """Only the ids' own alignment is asked for, and a smaller call may use the larger outputs."""
    flat, table = randint(0, 32, (20001,), INT32), torch.cat([range_map(64, 32, 0)[:1], range_map(64, 32, 0)])
    out = Outputs(16000, 32, 8)
    for first, tokens in ((1, 3), (3, 17), (7, 300), (5, 2000)):
        ids = flat[first : first + tokens * 8].view(tokens, 8)
        for expert_map in (None, table[1:]):
            out.poison()
            out.route(ids, 32, 8, expert_map)
            assert not wrong(out, ids, 32, 8, expert_map).any()


@pytest.mark.parametrize("largest", ROUTINGS)
def test_many_adversarial_routings(largest):
    """Random sizes, and of all kinds of bad ids some; guards and unwritten words included."""
    bad = torch.zeros(len(WRONG), dtype=INT64, device=DEVICE)
    generator = torch.Generator().manual_seed(largest)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    kinds = []
    for _ in range(20):  # a buffer for each, so that guards lie right behind every size
        k = pick(1, 33)
        tokens, experts, known, tile = pick(1, max(2, largest // k + 1)), pick(1, 1025), pick(1, 1300), (4, 8, 24, 64, 1000)[pick(0, 5)]
        kinds.append((tokens, k, experts, known, tile, Outputs(tokens * k, experts, tile)))
    for i in range(ROUTINGS[largest]):
        tokens, k, experts, known, tile, out = kinds[i % len(kinds)]
        dtype, mapped = (INT32, INT64)[pick(0, 2)], pick(0, 2)
        expert_map = wild_map(known, experts) if mapped else None
        if pick(0, 8) == 0:
            ids = torch.full((tokens, k), pick(-2, known + 2), dtype=dtype, device=DEVICE)
        else:
            ids = wild_ids((tokens, k), known if mapped else experts, dtype, share=(0.0, 0.1, 0.9, 1.0)[pick(0, 4)])
        out.poison()
        out.route(ids, experts, tile, expert_map)
        bad += wrong(out, ids, experts, tile, expert_map)
    assert not bad.any(), dict(zip(WRONG, bad.tolist(), strict=True))


def test_no_tokens():
    out = Outputs(8, 4, 8)
    out.route(torch.zeros(0, 8, dtype=INT32, device=DEVICE), 4, 8)
    assert out.counts.tolist() == [0, 0, 0, 0]
    out.counts.fill_(POISON)
    assert (out.buffer == POISON).all()


# --- combine ----------------------------------------------------------------------------------------------------------------


def rows_for(tokens, k, hidden, dtype, local=0.7, gap=0):
    """(y, position): the rows of answered pairs in random order, and NaN in all rows that belong to none."""
    pairs = tokens * k
    answered = torch.rand(pairs, device=DEVICE) < local
    place = torch.randperm(pairs, device=DEVICE)
    position = place.where(answered, -1).to(INT32)
    y = torch.randn(pairs + 3, hidden + gap, device=DEVICE).to(dtype)[:, :hidden]
    owned = torch.zeros(pairs + 3, dtype=torch.bool, device=DEVICE)
    owned[place[answered]] = True
    y[~owned] = math.nan
    return y, position


def check_combine(y, position, tokens, k, dtype, gap=0):
    """Equal to the last bit: the kernel adds in the reference's order. Columns behind H, and rows before and behind, stay as they are."""
    hidden = y.shape[-1]
    whole = torch.full((tokens + 2, hidden + gap + 8), 77.0, dtype=dtype, device=DEVICE)
    out = whole[1:-1, :hidden]
    r.combine(y, position, out, k)
    expected = r.combine_reference(y, position, k, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(*(x.nan_to_num(nan=0.0).view(torch.int16) for x in (out, expected)))
    out.fill_(77.0)
    assert (whole == 77.0).all()
    return expected


@pytest.mark.parametrize(("rows", "tokens_type", "k"), COMBINES)
def test_combine(rows, tokens_type, k):
    for tokens, hidden in ((1, 256), (1, 7168), (3, 2048), (17, 2880), (300, 1040), (2049, 512)):
        y, position = rows_for(tokens, k, hidden, rows)
        expected = check_combine(y, position, tokens, k, tokens_type)
        assert not expected.isnan().any()


def test_combine_of_many_tokens():
    for tokens, hidden, local in ((16384, 2048, 1.0), (70_000, 256, 0.1), (4096, 7168, 0.06)):
        y, position = rows_for(tokens, 8, hidden, BF16, local=local)
        check_combine(y, position, tokens, 8, BF16)


def test_combine_of_more_rows_than_32_bits_address():
    tokens, hidden = 21_000, 16384  # 2.75e9 elements
    y = torch.zeros(tokens * 8, hidden, dtype=BF16, device=DEVICE)
    y[:, 0] = torch.arange(tokens * 8, device=DEVICE) % 128
    y[:, -1] = 1
    position = torch.arange(tokens * 8 - 1, -1, -1, dtype=INT32, device=DEVICE)
    out = torch.full((tokens, hidden), math.nan, dtype=BF16, device=DEVICE)
    r.combine(y, position, out, 8)
    assert torch.equal(out[:, 0].float(), (y[:, 0].float().flip(0).view(tokens, 8).sum(1)).bfloat16().float())
    assert (out[:, -1] == 8).all() and not out[:, 1:-1].any()


def test_combine_of_rows_with_gaps():
    y, position = rows_for(30, 8, 512, BF16, gap=64)
    check_combine(y, position, 30, 8, BF16, gap=8)
    y, position = rows_for(3, 8, 512, FP32, gap=4)
    check_combine(y, position, 3, 8, BF16)


def test_tokens_without_an_expert_are_zero():
    y, position = rows_for(50, 8, 256, BF16, local=0.0)
    assert y.isnan().all() and (position == -1).all()
    assert not check_combine(y, position, 50, 8, BF16).any()


def test_nan_stays_in_its_token():
    for dtype in (BF16, FP32):
        y, position = rows_for(64, 8, 512, dtype, local=1.0)
        row = position.view(64, 8)
        y[row[9, 3], 5] = math.nan
        y[row[20, 0]], y[row[20, 7]] = math.inf, -math.inf
        expected = check_combine(y, position, 64, 8, BF16)
        assert expected[20].isnan().all() and expected[9].isnan().sum() == 1 and expected.isnan().sum() == 1 + 512


# --- both, one behind the other -----------------------------------------------------------------------------------------------


def chain(calls, out, y, results):
    """route and combine of every call in turn, through the same buffers and with nothing in between."""
    for (ids, expert_map), result in zip(calls, results, strict=True):
        out.route(ids, 16, 8, expert_map)
        r.combine(y[: ids.numel()], out.position, result, ids.shape[1])


@pytest.mark.parametrize("tokens", [1, 3, 14, 100, 500, 1500])
def test_kernels_started_early_wait_for_each_other(tokens):
    """Every row is one, so a token's output is the number of its answered slots: stale positions would show."""
    table = wild_map(40, 16)
    calls = [(wild_ids((tokens, 8), 40, INT32, share=i % 5 / 4), table if i % 2 else None) for i in range(60)]
    y = torch.ones(tokens * 8, 512, dtype=BF16, device=DEVICE)
    results = [torch.full((tokens, 512), math.nan, dtype=BF16, device=DEVICE) for _ in calls]
    out = Outputs(tokens * 8, 16, 8)
    for _ in range(3):
        torch.cuda.synchronize()
        chain(calls, out, y, results)
        for (ids, expert_map), result in zip(calls, results, strict=True):
            answered = (local_ids(ids, 16, expert_map) < 16).sum(1)
            assert torch.equal(result, answered[:, None].expand(-1, 512).bfloat16())
            result.fill_(math.nan)


@pytest.mark.parametrize("tokens", [1, 14, 100, 500, 1500])
def test_graph_replays_follow_new_ids(tokens):
    ids, table = wild_ids((tokens, 8), 40, INT64), wild_map(40, 16)
    y = torch.ones(tokens * 8, 512, dtype=BF16, device=DEVICE)
    out, result = Outputs(tokens * 8, 16, 8), torch.empty(tokens, 512, dtype=BF16, device=DEVICE)
    chain([(ids, table)], out, y, [result])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain([(ids, table)] * 3, out, y, [result] * 3)
    for i in range(8):
        ids.copy_(wild_ids((tokens, 8), 40, INT64, share=i / 7))
        table.copy_(wild_map(40, 16))
        out.poison()
        result.fill_(math.nan)
        graph.replay()
        assert not wrong(out, ids, 16, 8, table).any()
        answered = (local_ids(ids, 16, table) < 16).sum(1)
        assert torch.equal(result, answered[:, None].expand(-1, 512).bfloat16())


def test_runs_on_the_current_stream():
    ids, later = torch.full((20, 8), -1, dtype=INT32, device=DEVICE), wild_ids((20, 8), 16, INT32)
    out = Outputs(160, 16, 8)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        ids.copy_(later)
        out.route(ids, 16, 8)
    torch.cuda.synchronize()
    assert not wrong(out, later, 16, 8).any()


@pytest.mark.parametrize("tokens", [1, 100, 1500])
def test_a_call_allocates_nothing(tokens):
    ids, out = wild_ids((tokens, 8), 16, INT32), Outputs(tokens * 8, 16, 8)
    y, result = torch.ones(tokens * 8, 512, dtype=BF16, device=DEVICE), torch.empty(tokens, 512, dtype=BF16, device=DEVICE)
    chain([(ids, None)], out, y, [result])
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    chain([(ids, None)], out, y, [result])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_results_of_combine_repeat():
    y, position = rows_for(333, 8, 2048, BF16)
    outs = [torch.empty(333, 2048, dtype=BF16, device=DEVICE) for _ in range(4)]
    for out in outs:
        r.combine(y, position, out, 8)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
