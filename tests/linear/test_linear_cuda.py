"""The Hopper kernels of a dense layer against the float32 reference, from one token to prefill.

Outputs are full of NaN before a call and lie between guard rows.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moe_backend_plugin.linear import op, reference

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("dense NVFP4 kernels: no GPU of compute capability 9.0", allow_module_level=True)
cuda = pytest.importorskip("moe_backend_plugin.linear.cuda", reason="CuTe DSL is not installed (extra: kernels)", exc_type=ImportError)
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
BOUND = 4e-3
GUARD = 7
TOKENS = (1, 7, 64, 300, 2048)
SHAPES = (  # output features, input features
    (5120, 2048),
    (2048, 4096),
    (272, 400),  # neither fills its last block of 64, nor its last stage
    (16, 16),
    (2880, 2896),
    (64, 16384),
    (17408, 1040),
)
LARGE = ((151936, 2048), (4096, 1 << 15))


class Layer:
    """Random weights of one layer, in both forms."""

    def __init__(self, rows: int, columns: int) -> None:
        random_ = torch.Generator(DEVICE).manual_seed(rows + columns)
        self.rows, self.columns = rows, columns
        self.codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE, generator=random_)
        scale = torch.rand(rows, columns // 16, device=DEVICE, generator=random_) * 4 + 2**-9
        self.scale = scale.to(torch.float8_e4m3fn)
        self.scale_2 = torch.tensor(1 / (6 * columns**0.5), device=DEVICE)
        self.packed = cuda.pack(self.codes, self.scale, self.scale_2)

    def inputs(self, tokens: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
        random_ = torch.Generator(DEVICE).manual_seed(seed)
        return torch.randn(tokens, self.columns, device=DEVICE, generator=random_).to(dtype)

    def reference(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """In float32, a part of the rows at a time."""
        step = 1 << 14
        found = [
            reference.nvfp4_linear(x.float(), self.codes[i : i + step], self.scale[i : i + step], self.scale_2)
            for i in range(0, self.rows, step)
        ]
        return torch.cat(found, dim=1) + (0 if bias is None else bias.float())

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """The kernels' result; fails if a guard row was written."""
        held = torch.full((x.shape[0] + 2 * GUARD, self.rows), float("nan"), dtype=x.dtype, device=DEVICE)
        out = held[GUARD : GUARD + x.shape[0]]
        cuda.nvfp4_linear(x, self.packed, out)
        assert held[:GUARD].isnan().all() and held[GUARD + x.shape[0] :].isnan().all()
        return out


@pytest.fixture(autouse=True)
def exact_reference():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@cache
def layer(shape: tuple[int, int]) -> Layer:
    return Layer(*shape)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-20))


def worst_row(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of tokens: a token that is wrong among many that are not shows."""
    return float(((found.float() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-20)).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_reference(shape, tokens):
    case = layer(shape)
    x = case.inputs(tokens, seed=tokens)
    found, wanted = case.call(x), case.reference(x)
    assert relative(found, wanted) < BOUND and worst_row(found, wanted) < 4 * BOUND


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_the_largest_layers(shape, tokens):
    case = Layer(*shape)
    x = case.inputs(tokens)
    assert worst_row(case.call(x), case.reference(x)) < 4 * BOUND


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_float16(shape, tokens):
    case = layer(shape)
    x = case.inputs(tokens, torch.float16)
    found = case.call(x)
    assert found.dtype is torch.float16 and relative(found, case.reference(x)) < BOUND


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_every_number_of_tokens_around_the_tiles(shape):
    """Each choice of kernel, and lists with first tiles of every size."""
    case = layer(shape)
    x = case.inputs(700)
    wanted = case.reference(x)
    for tokens in (*range(1, 50), *range(60, 700, 17), *range(127, 130), *range(143, 146)):
        assert worst_row(case.call(x[:tokens]), wanted[:tokens]) < 4 * BOUND, tokens


def test_strides_are_respected():
    """Parts of wider rows, on both sides; what lies between is left alone."""
    case = layer(SHAPES[2])
    wide = torch.full((40, case.columns + 24), float("nan"), dtype=BF16, device=DEVICE)
    x = wide[:, 8 : 8 + case.columns].copy_(case.inputs(40))
    held = torch.full((40, case.rows + 16), float("nan"), dtype=BF16, device=DEVICE)
    cuda.nvfp4_linear(x, case.packed, held[:, 8 : 8 + case.rows])
    assert torch.equal(held[:, 8 : 8 + case.rows], case.call(x.contiguous()))
    assert held[:, :8].isnan().all() and held[:, 8 + case.rows :].isnan().all()


@pytest.mark.parametrize("tokens", [1, 12, 300])
def test_nan_stays_in_its_row(tokens):
    case = layer(SHAPES[2])
    x = case.inputs(tokens)
    clean = case.call(x)
    x[tokens // 2, -1] = float("nan")
    found = case.call(x)
    # Where the last weight is zero, zero times NaN is NaN too.
    assert found[tokens // 2].isnan().all()
    kept = [row for row in range(tokens) if row != tokens // 2]
    assert torch.equal(found[kept], clean[kept])


@pytest.mark.parametrize("tokens", [4, 64, 256])
def test_a_row_does_not_depend_on_the_others(tokens):
    case = layer(SHAPES[0])
    x = case.inputs(tokens)
    first = case.call(x)[:2]
    for seed in range(4):
        other = case.inputs(tokens, seed=100 + seed)
        other[:2] = x[:2]
        assert torch.equal(case.call(other)[:2], first)


@pytest.mark.parametrize("tokens", [1, 16, 700])
def test_results_repeat_and_replay_bit_for_bit(tokens):
    case = layer(SHAPES[0])
    x = case.inputs(tokens)
    out = torch.empty(tokens, case.rows, dtype=BF16, device=DEVICE)
    cuda.nvfp4_linear(x, case.packed, out)
    once = out.clone()
    for _ in range(20):
        out.fill_(float("nan"))
        cuda.nvfp4_linear(x, case.packed, out)
        assert torch.equal(out, once)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.nvfp4_linear(x, case.packed, out)
    for seed in range(5):
        x.copy_(case.inputs(tokens, seed=seed))
        cuda.nvfp4_linear(x, case.packed, out)
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_layers_one_after_another_wait_for_each_other(tokens):
    """A launch begins while the one before it runs: in a graph of many, each must read what that wrote, and nothing older."""
    up, down = layer(SHAPES[0]), Layer(2048, 5120)
    x = up.inputs(tokens)
    h = torch.empty(tokens, up.rows, dtype=BF16, device=DEVICE)
    y = torch.empty(tokens, down.rows, dtype=BF16, device=DEVICE)

    def chain(wait: bool) -> None:
        y.copy_(x)
        for _ in range(6):
            cuda.nvfp4_linear(y, up.packed, h)
            if wait:
                torch.cuda.synchronize()
            cuda.nvfp4_linear(h, down.packed, y)
            if wait:
                torch.cuda.synchronize()

    chain(wait=True)
    wanted = y.clone()
    assert wanted.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(wait=False)
    for run in (lambda: chain(wait=False), graph.replay):
        for _ in range(10):
            h.fill_(float("nan"))
            y.fill_(float("nan"))
            run()
            assert torch.equal(y, wanted)


def test_no_tokens():
    case = layer(SHAPES[0])
    assert case.call(case.inputs(0)).shape == (0, case.rows)
    assert op.nvfp4_linear_packed(case.inputs(0), case.packed, case.rows).shape == (0, case.rows)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_the_op_adds_the_bias_and_compiles(dtype):
    case = layer(SHAPES[2])
    x, bias = case.inputs(30, dtype).view(2, 15, -1), torch.randn(case.rows, device=DEVICE).to(dtype)
    found = op.nvfp4_linear_packed(x, case.packed, case.rows, bias)
    assert found.shape == (2, 15, case.rows)
    assert relative(found.view(30, -1), case.reference(x.view(30, -1), bias)) < BOUND
    compiled = torch.compile(lambda x: op.nvfp4_linear_packed(x, case.packed, case.rows, bias), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), found)
    torch.library.opcheck(
        torch.ops.moe_backend_plugin.nvfp4_linear_packed.default,
        (x, *case.packed, case.rows, bias),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_prepare_compiles_what_calls_launch_and_then_nothing_is_allocated():
    from moe_backend_plugin.kernels import compile as kernels

    case = layer(SHAPES[0])
    cuda.prepare(case.rows, case.columns, BF16, DEVICE, 1500)
    known, lists = set(kernels._loaded), dict(cuda._Lists._made)
    x, out = case.inputs(1500), torch.empty(1500, case.rows, dtype=BF16, device=DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    for tokens in range(1, 1501, 7):
        cuda.nvfp4_linear(x[:tokens], case.packed, out[:tokens])
    assert torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] == before
    assert set(kernels._loaded) == known and cuda._Lists._made == lists


def test_nothing_is_asked_of_the_device():
    case = layer(SHAPES[0])
    x, out = case.inputs(64), torch.empty(64, case.rows, dtype=BF16, device=DEVICE)
    cuda.nvfp4_linear(x, case.packed, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.nvfp4_linear(x, case.packed, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lists_lie_in_no_pool_of_the_thread_that_loads_a_model():
    """vLLM's sleep gives up what is in such a pool."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = torch.empty(1 << 20, device=DEVICE)
        lists = cuda._Lists(DEVICE, 48, 5000)

    def held(tensor: torch.Tensor) -> bool:
        return any(part["address"] <= tensor.data_ptr() < part["address"] + part["total_size"] for part in pool.snapshot())

    assert held(inside) and not held(lists.tiles) and not held(lists.counts)


def test_a_capture_of_more_tokens_than_were_prepared_is_refused():
    case = layer(SHAPES[4])
    most = 1 + max(lists.most * lists.tile_tokens for lists in cuda._Lists._made.values())
    x, out = case.inputs(most), torch.empty(most, case.rows, dtype=BF16, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="while a graph is captured"), torch.cuda.graph(graph):
        cuda.nvfp4_linear(x, case.packed, out)
    torch.cuda.synchronize()
    assert relative(case.call(x), case.reference(x)) < BOUND
