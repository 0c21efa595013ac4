"""What a call needs against a count by hand, the arena's size against every token count, and the arena's promises."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe import workspace
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.workspace import Arena, Call, TokenRange, largest, max_tiles, plan

CPU = torch.device("cpu")
SMALL = MoEProblem(8, 8, 256, 80, 2)
DEEPSEEK = MoEProblem(256, 256, 7168, 2048, 8)


def scratch(pairs, experts):
    """A routing kernel's: none for one block, then a row of counters a block."""
    return 0 if pairs <= 4096 else -(-pairs // 1024) * experts


def needed(problem, tokens, call, dtype=torch.bfloat16):
    """Bytes of a call, region by region, without alignment."""
    p, width = tokens * problem.top_k, (problem.intermediate + 63) // 64 * 64
    tiles = min(p, problem.num_local_experts) + p // call.tile_tokens
    total = 4 * (p + p + 4 * tiles + 4 + scratch(p, problem.num_local_experts)) + (p + 256) * width * dtype.itemsize
    return total + (p + 256) * problem.hidden * call.y.itemsize


calls = st.builds(
    Call,
    tile_tokens=st.sampled_from([8, 16, 32, 64, 128, 256]),
    y=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
problems = st.builds(
    lambda experts, local, hidden, intermediate, top_k, gated: MoEProblem(
        experts, min(local, experts), 16 * hidden, 16 * intermediate, top_k, Activation("silu" if gated else "relu2")
    ),
    st.integers(1, 1024),
    st.integers(1, 1024),
    st.integers(1, 512),
    st.integers(1, 128),
    st.integers(1, 32),
    st.booleans(),
)


@settings(max_examples=200, deadline=None)
@given(problems, st.integers(1, 20000), calls, st.sampled_from([torch.bfloat16, torch.float16]))
def test_regions_are_aligned_and_apart_and_all_there(problem, tokens, call, dtype):
    found = plan(problem, tokens, call, dtype, scratch)
    end = 0
    for region in found.regions:
        assert region.offset % workspace.ALIGNMENT == 0 and end <= region.offset < end + workspace.ALIGNMENT
        assert region.bytes == torch.Size(region.shape).numel() * region.dtype.itemsize
        end = region.offset + region.bytes
    assert end <= found.bytes < end + workspace.ALIGNMENT
    assert sum(region.bytes for region in found.regions) == needed(problem, tokens, call, dtype)


@settings(max_examples=200, deadline=None)
@given(problems, st.integers(1, 300), st.sampled_from([8, 16, 64, 256]), st.integers(0, 1 << 30))
def test_no_routing_has_more_tiles(problem, tokens, tile, seed):
    pairs, experts = tokens * problem.top_k, problem.num_local_experts
    draw = random.Random(seed)
    for of in {1, draw.randint(1, experts), experts}:
        counts = [0] * of
        for _ in range(draw.randint(0, pairs)):
            counts[draw.randrange(of)] += 1
        assert sum(-(-count // tile) for count in counts) <= max_tiles(pairs, experts, tile)
    # The worst: as many experts as can be with one pair over.
    active = min(pairs, experts)
    rest = (pairs - active) // tile
    assert active + rest <= max_tiles(pairs, experts, tile) <= active + rest + active // tile + 1


@st.composite
def layers(draw):
    """A problem, max_tokens, and ranges that reach it or further."""
    max_tokens = draw(st.integers(1, 600))
    ends = sorted(draw(st.sets(st.integers(1, 700), min_size=0, max_size=5)) | {draw(st.sampled_from([max_tokens, max_tokens + 50]))})
    return draw(problems), max_tokens, [TokenRange(end, tuple(draw(st.lists(calls, min_size=1, max_size=3)))) for end in ends]


@settings(max_examples=100, deadline=None)
@given(layers())
def test_arena_is_the_largest_single_call(layer):
    problem, max_tokens, ranges = layer
    bytes = largest(problem, max_tokens, ranges, scratch_ints=scratch).bytes
    brute, exact = 0, 0
    for tokens in range(1, max_tokens + 1):
        mine = next(r for r in ranges if tokens <= r.tokens)
        for call in mine.calls:
            # Not through the cache, which this would empty.
            own = plan.__wrapped__(problem, tokens, call, torch.bfloat16, scratch).bytes
            assert own <= bytes
            brute, exact = max(brute, own), max(exact, needed(problem, tokens, call))
    assert bytes == brute
    assert bytes <= 1.1 * exact


def test_tiles_and_rows_pull_apart():
    """Of two tile sizes the smaller has more tiles; the arena holds either."""
    small, big = (plan(DEEPSEEK, 16384, Call(tile)) for tile in (128, 256))
    assert small["tiles"].shape == (256 + 16384 * 8 // 128, 4) and big["tiles"].shape == (256 + 16384 * 8 // 256, 4)
    for order in itertools.permutations((Call(128), Call(256))):
        assert largest(DEEPSEEK, 16384, [TokenRange(1 << 20, order)]).bytes == max(small.bytes, big.bytes)


def test_plan_by_hand():
    found = plan(SMALL, 3, Call(16, torch.float32), torch.float16, lambda pairs, experts: pairs * experts)
    assert [(r.name, r.offset, r.bytes, r.dtype, r.shape) for r in found.regions] == [
        ("order", 0, 24, torch.int32, (6,)),
        ("position", 256, 24, torch.int32, (6,)),
        ("tiles", 512, 96, torch.int32, (6, 4)),
        ("counts", 768, 16, torch.int32, (4,)),
        ("scratch", 1024, 192, torch.int32, (48,)),
        ("h", 1280, 262 * 128 * 2, torch.float16, (262, 128)),
        ("y", 68352, 262 * 256 * 4, torch.float32, (262, 256)),
    ]
    assert found.bytes == 68352 + 268288
    assert plan(SMALL, 3, Call(16)) is plan(SMALL, 3, Call(16))
    assert plan(SMALL, 3, Call(16))["y"].shape == (262, 256)
    assert "3 tokens, 336,640 B" in str(found) and "float16 [262, 128]" in str(found)
    with pytest.raises(KeyError, match="gate_up: found regions order"):
        plan(SMALL, 3, Call(16))["gate_up"]


def test_refuses():
    with pytest.raises(PluginError, match="plan: tokens: found 0"):
        plan(SMALL, 0, Call(8))
    with pytest.raises(PluginError, match=r"Call\.tile_tokens: found 0"):
        Call(0)
    with pytest.raises(PluginError, match=r"Call\.y: found torch\.int32"):
        Call(8, y=torch.int32)
    with pytest.raises(PluginError, match="up to 8 tokens; allowed: up to max_tokens = 9"):
        largest(SMALL, 9, [TokenRange(8, (Call(8),))])
    with pytest.raises(PluginError, match="8 tokens, 1 calls; allowed: 9 tokens or more"):
        largest(SMALL, 9, [TokenRange(8, (Call(8),)), TokenRange(8, (Call(8),))])
    with pytest.raises(PluginError, match="9 tokens, 0 calls"):
        largest(SMALL, 9, [TokenRange(9, ())])


@pytest.fixture
def device(monkeypatch):
    """A stand-in for a GPU's stream and capture: set ``stream`` and ``capturing``."""

    class Device:
        stream, capturing = 0, False

    found = Device()
    monkeypatch.setattr(Arena, "_arenas", {})
    monkeypatch.setattr(workspace, "_stream", lambda device: found.stream)
    monkeypatch.setattr(workspace, "_capturing", lambda device: found.capturing)
    return found


def test_one_arena_a_stream(device):
    first = Arena.get(CPU, 1000)
    assert Arena.get(CPU) is first and Arena.get(CPU, 1000) is first and first.bytes == 1000
    device.stream = 1
    assert Arena.get(CPU).bytes == 0 and Arena.get(CPU) is not first
    device.stream = 0
    assert Arena.get(CPU, 10) is first and first.bytes == 1000


def test_growth_keeps_what_a_graph_may_hold(device):
    one, two = plan(SMALL, 1, Call(8)), plan(SMALL, 2, Call(8))
    arena = Arena.get(CPU, one.bytes)
    old, y = arena.buffer, arena.view(one, "y")
    address = old.data_ptr()
    assert Arena.get(CPU, two.bytes) is arena and arena.bytes == two.bytes and arena.held == one.bytes + two.bytes
    assert arena.retired[0] is old and old.data_ptr() == address != arena.buffer.data_ptr()
    assert y.untyped_storage().data_ptr() == address
    # Nobody has used the second yet.
    Arena.get(CPU, 3 * two.bytes)
    assert len(arena.retired) == 1 and arena.held == one.bytes + 3 * two.bytes


def test_growth_before_any_call_keeps_nothing(device):
    """Layers of several kinds each ask for their own at start: the arena takes the largest, which is what the log's largest line says."""
    for bytes in (1000, 1100, 700, 5000):
        arena = Arena.get(CPU, bytes)
    assert arena.bytes == arena.held == 5000 and not arena.retired


def test_a_buffer_that_was_used_is_kept_even_if_its_views_were_dropped(device, monkeypatch):
    monkeypatch.setattr(workspace, "_PLANS", 1)
    plans = [plan(SMALL, tokens, Call(8)) for tokens in (1, 2, 3)]
    arena = Arena.get(CPU, plans[-1].bytes)
    for one in plans:
        arena.views(one)
    arena._views.clear()
    Arena.get(CPU, arena.bytes + 1)
    assert len(arena.retired) == 1 and arena.held == 2 * plans[-1].bytes + 1


def test_capture(device):
    arena = Arena.get(CPU, 100)
    device.capturing = True
    assert Arena.get(CPU, 100) is arena
    with pytest.raises(RuntimeError, match=r"stream 0x0: found 100 bytes while a graph is captured, and a call that needs 101; allowed"):
        Arena.get(CPU, 101)
    assert arena.bytes == 100 and not arena.retired
    device.stream = 7
    with pytest.raises(RuntimeError, match=r"stream 0x7: found 0 bytes"):
        Arena.get(CPU, 1)
    device.capturing = False
    assert Arena.get(CPU, 1).bytes == 1


def test_views_are_typed_apart_and_made_once(device):
    one = plan(SMALL, 3, Call(16))
    arena = Arena.get(CPU, one.bytes)
    views = arena.views(one)
    assert list(views) == [region.name for region in one.regions]
    for number, region in enumerate(one.regions):
        view = arena.view(one, region.name)
        assert view is views[region.name] and view.dtype == region.dtype and view.shape == region.shape and view.is_contiguous()
        assert view.untyped_storage().data_ptr() == arena.buffer.data_ptr()
        assert view.data_ptr() == arena.buffer.data_ptr() + region.offset or not view.numel()
        view.fill_(number)
    assert all((views[region.name] == number).all() for number, region in enumerate(one.regions))
    with pytest.raises(KeyError, match="workspace"):
        arena.view(one, "workspace")
    assert not views["h"].is_inference()

    larger = plan(SMALL, 4, Call(16))
    with pytest.raises(RuntimeError, match=rf"found {one.bytes:,} bytes; allowed: {larger.bytes:,} or more for 4 tokens"):
        arena.views(larger)
    Arena.get(CPU, larger.bytes)
    assert arena.view(larger, "y").shape == (264, 256)
    assert arena.view(one, "y") is not views["y"]  # in the new buffer
    assert (views["y"] == len(one.regions) - 1).all()  # the old one is as it was


def test_inference_mode_leaves_ordinary_tensors(device):
    one = plan(SMALL, 2, Call(8))
    with torch.inference_mode():
        views = Arena.get(CPU, one.bytes).views(one)
    views["h"].fill_(1.0)


def test_views_of_many_plans_are_bounded(device, monkeypatch):
    monkeypatch.setattr(workspace, "_PLANS", 4)
    plans = [plan(SMALL, tokens, Call(8)) for tokens in range(1, 11)]
    arena = Arena.get(CPU, plans[-1].bytes)
    for one in plans:
        assert arena.views(one) is arena.views(one)
        assert len(arena._views) <= 4


def test_hot_path_allocates_no_tensor(device):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    one = plan(SMALL, 2, Call(8))
    Arena.get(CPU, one.bytes).views(one)
    with Nothing():
        again = plan(SMALL, 2, Call(8))
        assert Arena.get(CPU, again.bytes).view(again, "h").dtype == torch.bfloat16


def test_threads_find_one_arena(device):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda i: Arena.get(CPU, 100), range(64)))
    assert len(found) == 1 and found.pop().held == 100


def test_cpu_has_one_stream_and_no_capture():
    assert workspace._stream(CPU) == 0 and not workspace._capturing(CPU)
