"""What the routing kernels are compared with, their sizes, and the choice of kernel; no GPU. The kernels run in test_route_cuda.py."""

import random

import pytest
import torch

from moe_backend_plugin.moe import route as r
from moe_backend_plugin.moe.routing import local_list


def naive(ids, experts, tile_tokens, expert_map):
    """The lists that ``route_reference`` returns, by loops over Python numbers."""
    local = local_list(ids, experts, expert_map)
    order = [pair for expert in range(experts) for pair, found in enumerate(local) if found == expert]
    position = [order.index(pair) if found >= 0 else -1 for pair, found in enumerate(local)]
    tiles = []
    for expert in range(experts):
        mine = [place for place, pair in enumerate(order) if local[pair] == expert]
        tiles += [[expert, mine[i], len(mine[i : i + tile_tokens]), 0] for i in range(0, len(mine), tile_tokens)]
    return order, position, tiles, [len(tiles), len(order), len({found for found in local if found >= 0}), 0]


@pytest.mark.parametrize("seed", range(40))
def test_the_reference_is_what_loops_find(seed):
    rng = random.Random(seed)
    tokens, k, experts, known = rng.randrange(30), rng.randrange(1, 9), rng.randrange(1, 20), rng.randrange(1, 40)
    wild = [-1, -(2**31), 2**31 - 1, known, known + 1] + [2**32, 2**32 + 1, -(2**63), 2**63 - 1] * (seed % 2)
    rows = [[rng.choice(wild) if rng.random() < 0.2 else rng.randrange(known) for _ in range(k)] for _ in range(tokens)]
    ids = torch.tensor(rows, dtype=torch.int64 if seed % 2 else torch.int32).reshape(tokens, k)
    entries = [rng.choice([-1, -7, experts, 2**31 - 1]) if rng.random() < 0.3 else rng.randrange(experts) for _ in range(known)]
    expert_map = torch.tensor(entries, dtype=torch.int32) if seed % 4 < 2 else None
    tile = rng.choice([4, 8, 24, 1000])
    found = r.route_reference(ids, experts, tile, expert_map)
    assert all(x.dtype == torch.int32 for x in found)
    assert [x.tolist() for x in found] == list(naive(ids, experts, tile, expert_map))


def test_the_most_tiles_are_not_exceeded_and_can_be_reached():
    for pairs in range(60):
        for experts in (1, 2, 7, 70):
            for tile in (4, 8, 16):
                active = min(pairs, experts)
                spread = list(range(active)) + [0] * (pairs - active)  # one pair for each expert, the rest to one
                found = r.route_reference(torch.tensor([spread], dtype=torch.int32), experts, tile)[3][0]
                assert found <= r.max_tiles(pairs, experts, tile)
    # Every expert leaves one pair in its last tile.
    assert r.route_reference(torch.tensor([[0, 1, 1, 1, 1, 1]]), 2, 4)[3][0] == r.max_tiles(6, 2, 4) == 3


@pytest.mark.parametrize("pairs", [1, 31, 32, 33, 128, 129, 1024, 1025, 4096, 4097, 8191, 131072, 131073, 524288, 1 << 22])
def test_a_call_fits_its_kernel(pairs):
    method, threads, held = r.route_shape(pairs)
    if method == "scatter":
        blocks, share = r.shares(pairs)
        assert blocks <= r.MAX_BLOCKS and share % threads == 0 and (blocks - 1) * share < pairs <= blocks * share
        assert r.scratch_ints(pairs, 7) >= blocks * 7
    else:
        assert pairs <= threads * held and r.scratch_ints(pairs, 7) == 0


def test_scratch_for_the_largest_call_serves_every_smaller_one():
    sizes = [r.scratch_ints(pairs, 64) for pairs in (*range(0, 300_000, 501), 1 << 19, 1 << 22)]
    assert sizes == sorted(sizes) and sizes[-1] == r.MAX_BLOCKS * 64


def test_the_kernels_division_is_exact():
    """They take the upper half of a 64-bit product with ``numbers[3]``, as a signed number."""
    for tile in (*range(4, 66), 96, 127, 128, 129, 192, 255, 256, 1000, 1023, 1024):
        for pairs in (128, 4096, 131072, 1 << 22):
            reciprocal = r._plan(pairs, 8, tile)[1][3]
            assert reciprocal < 1 << 31
            top = pairs + tile - 1
            edges = {q * tile + d for q in (*range(40), top // tile - 1, top // tile) for d in (-1, 0, 1)} | {top}
            assert all(n * reciprocal >> 32 == n // tile for n in edges if 0 <= n <= top)


def test_combine_reference():
    y = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [float("nan"), 0.0]])
    position = torch.tensor([2, 0, -1, -1, 1, -1, 3, 0], dtype=torch.int32)
    out = r.combine_reference(y, position, 2, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[:3], torch.tensor([[101.0, 202.0], [0.0, 0.0], [10.0, 20.0]]).bfloat16())
    assert out[3, 0].isnan() and out[3, 1] == 2
    assert r.combine_reference(y, position[:6], 2, torch.float16).dtype == torch.float16


def outputs(pairs, experts=8, tile=8, **changed):
    made = {
        "order": torch.empty(pairs, dtype=torch.int32),
        "position": torch.empty(pairs, dtype=torch.int32),
        "tiles": torch.empty(r.max_tiles(pairs, experts, tile), 4, dtype=torch.int32),
        "counts": torch.empty(4, dtype=torch.int32),
    }
    return made | changed


@pytest.mark.parametrize(
    ("ids", "experts", "tile", "changed", "words"),
    [
        (torch.zeros(4, 8, dtype=torch.int32), 0, 8, {}, ["experts", "found 0", "1 to 1024"]),
        (torch.zeros(4, 8, dtype=torch.int32), 1025, 8, {}, ["experts", "1025"]),
        (torch.zeros(4, 8, dtype=torch.int32), 8, 2, {}, ["tile_tokens", "found 2", "4 to 1024"]),
        (torch.zeros(4, 8, dtype=torch.int16), 8, 8, {}, ["topk_ids", "int16", "int32 or int64"]),
        (torch.zeros(8, 4, dtype=torch.int32).t(), 8, 8, {}, ["topk_ids", "strides (1, 4)", "contiguous"]),
        (torch.zeros(4, 8, dtype=torch.int32), 8, 8, {"order": torch.empty(31)}, ["order, position", "31, 32", "32 or more"]),
        (torch.zeros(4, 8, dtype=torch.int32), 8, 8, {"position": torch.empty(9)}, ["order, position", "32, 9"]),
        (torch.zeros(4, 8, dtype=torch.int32), 8, 8, {"tiles": torch.empty(11, 4)}, ["tiles", "11 rows", "12 or more"]),
        (torch.zeros(4, 8, dtype=torch.int32), 8, 8, {"expert_map": torch.empty(0)}, ["expert_map", "0 experts"]),
        (torch.zeros(513, 8, dtype=torch.int32), 8, 8, {}, ["scratch", "none", "40 or more"]),
        (torch.zeros(513, 8, dtype=torch.int32), 8, 8, {"scratch": torch.empty(39)}, ["scratch", "39 words", "40 or more"]),
        (torch.zeros(1, 1, dtype=torch.int32).expand(1 << 15, 1 << 15), 8, 8, {}, ["topk_ids"]),
        (torch.zeros(1, 1, dtype=torch.int32).expand(1 << 12, 1 << 12), 8, 1000, {}, ["topk_ids", "16777216 pairs in tiles of 1000"]),
    ],
)
def test_a_route_call_that_would_write_outside_is_refused(ids, experts, tile, changed, words):
    small = min(ids.numel(), 5000)
    with pytest.raises(ValueError) as error:
        r.route(ids, experts, tile, **outputs(small, min(max(experts, 1), 1024), max(tile, 4), **changed))
    assert all(word in str(error.value) for word in words)


def test_a_combine_call_that_would_read_outside_is_refused():
    y, out = torch.zeros(16, 64).bfloat16(), torch.zeros(2, 64).bfloat16()
    with pytest.raises(ValueError, match="position: found 15 words; allowed: 16 or more"):
        r.combine(y, torch.zeros(15, dtype=torch.int32), out, 8)
    with pytest.raises(ValueError, match="y, out: found 64 and 60 columns"):
        r.combine(y, torch.zeros(16, dtype=torch.int32), out[:, :60], 8)


def test_calls_without_tokens_launch_nothing():
    made = outputs(0)
    made["counts"].fill_(-5)
    r.route(torch.zeros(0, 8, dtype=torch.int32), 8, 8, **made)
    assert made["counts"].tolist() == [0, 0, 0, 0]
    r.combine(torch.zeros(0, 64).bfloat16(), torch.zeros(0, dtype=torch.int32), torch.zeros(0, 64).bfloat16(), 8)
