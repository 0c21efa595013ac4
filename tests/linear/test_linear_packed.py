"""Dense layers on the expert kernel, as far as no GPU is needed: weights, choice of kernels, lists of tiles, and the operator."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moe_backend_plugin import linear
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.linear import cuda, op
from moe_backend_plugin.moe import tactics, tiles
from moe_backend_plugin.nvfp4 import hopper
from moe_backend_plugin.nvfp4.unscaled import unscaled

CPU = torch.device("cpu")
BF16 = torch.bfloat16
SIXTEENS = st.integers(1, 2048).map(lambda n: 16 * n)


def checkpoint(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random_ = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=random_)
    scale = (torch.rand(rows, columns // 16, generator=random_) * 400).to(torch.float8_e4m3fn)
    return codes, scale, torch.tensor(0.003)


@pytest.fixture
def lists(monkeypatch):
    monkeypatch.setattr(cuda._Lists, "_made", {})
    monkeypatch.setattr(cuda._Lists, "_kept", [])
    return cuda._Lists


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (128, 64), (272, 400), (80, 1040)])
def test_packed_weights_are_the_checkpoint_s(rows, columns):
    codes, scale, scale_2 = checkpoint(rows, columns)
    packed = cuda.pack(codes, scale, scale_2)
    assert packed.packed.shape == hopper.packed_shape(1, rows, columns, gated=False) and packed.packed.dtype is torch.uint8
    assert torch.equal(hopper.dequantise(packed.packed, rows, columns, gated=False)[0], unscaled(codes, scale))
    assert packed.scale_2.shape == (1, 1) and packed.scale_2.dtype is torch.float32 and float(packed.scale_2) == float(scale_2)


def test_weights_that_are_no_layer_are_refused():
    codes, scale, scale_2 = checkpoint(32, 64)
    for wrong in ((codes[None], scale[None], scale_2), (codes, scale, scale_2.expand(2)), (codes, scale[:16], scale_2)):
        with pytest.raises(ValueError):
            cuda.pack(*wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5120, 2048, torch.float32), "float32; the kernels serve torch.bfloat16, torch.float16"),
        ((5120, 2048, BF16, "nvfp4"), "activations in nvfp4"),
        ((5128, 2048, BF16), "5128 output features"),
        ((5120, 2056, BF16), "2056 input features"),
        ((5120, 1 << 16, BF16), "multiples of 16 from 16 to 32768"),
        ((1 << 20, 2048, BF16), "multiples of 16 from 16 to 524288"),
        ((0, 2048, BF16), "0 output features"),
    ],
)
def test_layers_that_are_not_served(arguments, words):
    assert words in cuda.unsupported_reason(*arguments)


@pytest.mark.parametrize("rows", [16, 5120, 151936, 1 << 19])
@pytest.mark.parametrize("columns", [16, 2064, 1 << 15])
@pytest.mark.parametrize("tokens", [BF16, torch.float16], ids=str)
def test_layers_that_are_served(rows, columns, tokens):
    assert cuda.unsupported_reason(rows, columns, tokens) is None


def test_parts_must_share_their_global_scale():
    assert cuda.scales_reason(torch.tensor([0.25])) is None and cuda.scales_reason(torch.tensor([0.1, 0.1, 0.1])) is None
    near = torch.tensor([0.1, 0.1]).nextafter(torch.tensor([0.1, 1.0]))
    assert "(0.100000001, 0.100000009)" in cuda.scales_reason(near)


# --- choice of kernels ------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(rows=SIXTEENS, columns=SIXTEENS, tokens=st.integers(1, 40000), multiprocessors=st.sampled_from((78, 114, 132)))
def test_every_choice_is_a_kernel(rows, columns, tokens, multiprocessors):
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    from moe_backend_plugin.kernels.moe_gemm import Variant
    from moe_backend_plugin.moe.cuda import variant_fields

    shape = cuda.choose(rows, columns, tokens, multiprocessors)
    assert tactics.shape_reason(shape) is None
    variant = Variant(**variant_fields(cuda.problem_of(rows, columns), "down", shape, BF16))  # checks itself
    assert (variant.use, variant.weighted, variant.pairs, variant.gated) == ("down", False, 0, False)
    assert variant.ragged == (-(-columns // 64) % shape.stage_blocks != 0)


@pytest.mark.parametrize(("rows", "columns"), [(5120, 2048), (512, 2048), (151936, 2048), (2048, 2112)])
def test_what_is_prepared_is_what_calls_choose(rows, columns):
    prepared = cuda.shapes(rows, columns, 3000, 132)
    assert {cuda.choose(rows, columns, tokens, 132) for tokens in range(1, 3001)} == set(prepared)
    assert len(set(prepared)) == len(prepared) <= len(tactics.SHIPPED)


@settings(max_examples=300, deadline=None)
@given(rows=SIXTEENS, tokens=st.integers(1, 20000))
def test_the_choice_is_an_moe_layer_s_where_that_has_work_for_all(rows, tokens):
    usual = tiles.choose(cuda.problem_of(rows, 2048), tokens, 132).down
    assert cuda.choose(rows, 2048, tokens, 132) == usual or cuda._pieces(usual, rows, tokens) < 132 * usual.blocks


@pytest.mark.parametrize(("rows", "tokens"), [(2048, 16), (2048, 64), (5120, 16), (512, 2048)])
def test_few_rows_are_cut_into_more_pieces_than_an_moe_layer_s(rows, tokens):
    usual = tiles.choose(cuda.problem_of(rows, 2048), tokens, 132).down
    found = cuda._pieces(cuda.choose(rows, 2048, tokens, 132), rows, tokens)
    assert found >= 40 and found > 1.5 * cuda._pieces(usual, rows, tokens)


def test_prepare_has_every_kernel_and_list(monkeypatch, lists):
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    asked, device = [], torch.device("cpu", 0)
    monkeypatch.setattr(
        cuda.kernels, "prepare", lambda family, needed, architecture: asked.append((family, list(needed), architecture)) or 5
    )
    monkeypatch.setattr(cuda.kernels, "device_architecture", lambda index, allowed: allowed[0])
    monkeypatch.setattr(cuda.moe, "multiprocessors_of", lambda index: 132)
    assert cuda.prepare.__wrapped__(5120, 2048, torch.float16, device, 700) == 5
    ((family, needed, architecture),) = asked
    assert (family, architecture) == ("moe_gemm", "sm_90a") and {v.tokens for v in needed} == {"float16"}
    assert {v.tile_tokens for v in needed} == {tile for _, tile in lists._made} and len(set(needed)) == len(needed)
    before = dict(lists._made)
    for tokens in range(1, 701):
        lists.get(device, cuda.choose(5120, 2048, tokens, 132).tile_tokens, tokens)
    assert lists._made == before


# --- lists of tiles ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(tokens=st.integers(1, 3000), tile=st.sampled_from(sorted(tiles.COSTS)))
def test_lists_cover_every_token_once(tokens, tile):
    listed, counts = made(tile).of(tokens)
    assert listed.dtype is counts.dtype is torch.int32 and int(counts[0]) == len(listed) == -(-tokens // tile)
    expert, first, count, rest = listed.unbind(1)
    assert not expert.any() and not rest.any() and 1 <= int(count.min()) and int(count.max()) <= tile
    assert first[0] == 0 and torch.equal(first[1:], (first + count)[:-1]) and int(first[-1] + count[-1]) == tokens


@pytest.mark.parametrize("tile", tiles.COSTS)
def test_lists_are_as_the_kernel_reads_them(tile):
    """Contiguous from a 16-byte aligned address on, and small."""
    lists = made(tile)
    for tokens in (1, tile - 1, tile, tile + 1, 3000):
        for tensor in lists.of(tokens):
            assert tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    assert lists.tiles.nbytes + lists.counts.nbytes < 40 * 3000


@cache
def made(tile: int) -> cuda._Lists:
    return cuda._Lists(CPU, tile, 3000)


def test_lists_are_shared_and_only_grow(lists):
    first = lists.get(CPU, 48, 100)
    held = first.of(90)[0].clone()
    assert lists.get(CPU, 48, 20) is first is lists.get(CPU, 48, 144) and lists.get(CPU, 16, 20) is not first
    second = lists.get(CPU, 48, 145)
    assert second is not first and second is lists.get(CPU, 48, 10) and first in lists._kept
    assert torch.equal(first.of(90)[0], held) and torch.equal(second.of(90)[0], held)


def test_lists_are_not_made_in_the_thread_that_loads_a_model(lists):
    """vLLM's sleep empties what that thread allocates meanwhile (``torch.cuda.use_mem_pool``); its default device is the GPU."""
    here: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            here.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.device("meta"), torch.inference_mode(), Watch():
        found, elsewhere = lists.get(CPU, 48, 100), lists.get(torch.device("meta"), 48, 100)
    assert not here and elsewhere.tiles.is_meta and elsewhere.counts.is_meta
    assert torch.equal(found.tiles, cuda._Lists(CPU, 48, 100).tiles) and not found.tiles.is_inference()


def test_lists_do_not_grow_while_a_graph_is_captured(lists, monkeypatch):
    device = torch.device("cuda", 0)
    lists._made[device, 48] = cuda._Lists(CPU, 48, 100)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert lists.get(device, 48, 144).most == 3
    with pytest.raises(RuntimeError, match="found 144 tokens while a graph is captured, and a call of 145"):
        lists.get(device, 48, 145)


# --- the call ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch, lists):
    """A CPU in place of the GPU, and the kernel as its formula says, from the lists that it gets; its variants."""
    found = []

    def gemm(device, rows, columns, shape, tokens):
        def launch(x, packed, scale_2, router, order, listed, counts, ids, expert_map, position, out, top_k, alpha, beta, limit, blocks):
            assert router is ids is expert_map is position is None and order.dtype is torch.int32 and top_k == 1
            found.append((shape, blocks))
            w = hopper.dequantise(packed, rows, columns, gated=False)[0] * scale_2
            for expert, first, count, _ in listed[: counts[0]].tolist():
                assert expert == 0 and count <= shape.tile_tokens
                out[first : first + count] = (x[first : first + count].float() @ w.t()).to(out.dtype)

        return launch

    monkeypatch.setattr(cuda, "_gemm", gemm)
    monkeypatch.setattr(cuda.moe, "multiprocessors_of", lambda device: 132)
    cuda._call.cache_clear()
    yield found
    cuda._call.cache_clear()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
def test_a_call_launches_one_kernel_on_all_tokens(kernel, tokens, dtype):
    rows, columns = 272, 400
    codes, scale, scale_2 = checkpoint(rows, columns)
    x = torch.randn(tokens, columns + 8).to(dtype)[:, :columns]
    out = torch.full((tokens, rows), float("nan"), dtype=dtype)
    cuda.nvfp4_linear(x, cuda.pack(codes, scale, scale_2), out)
    torch.testing.assert_close(out, (x.float() @ (unscaled(codes, scale) * scale_2).t()).to(dtype))
    ((shape, blocks),) = kernel
    assert shape == cuda.choose(rows, columns, tokens, 132) and 1 <= blocks <= 132 * shape.blocks


def test_no_tokens_no_launch(kernel):
    packed = cuda.pack(*checkpoint(32, 64))
    cuda.nvfp4_linear(torch.empty(0, 64, dtype=BF16), packed, torch.empty(0, 32, dtype=BF16))
    assert op.nvfp4_linear_packed(torch.empty(2, 0, 64, dtype=BF16), packed, 32).shape == (2, 0, 32) and not kernel


@pytest.mark.parametrize(
    ("x", "out", "words"),
    [
        ((4, 64), (5, 32), "out: found .*5, 32.*4, N"),
        ((4, 64), (4, 256), "weights.packed: found .*2, 1, 2304.*4, 1, 2304"),
        ((4, 128), (4, 32), "weights.packed: found .*2, 1, 2304.*2, 2, 2304"),
        ((4, 72), (4, 32), "72 input features"),
    ],
)
def test_what_does_not_fit_is_refused(kernel, x, out, words):
    with pytest.raises(PluginError, match=words):
        cuda.nvfp4_linear(torch.zeros(x, dtype=BF16), cuda.pack(*checkpoint(32, 64)), torch.zeros(out, dtype=BF16))
    assert not kernel


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1,), ()])
def test_the_op_takes_any_leading_sizes_and_adds_the_bias(kernel, shape, bias):
    codes, scale, scale_2 = checkpoint(80, 96)
    x, b = torch.randn(*shape, 96).to(BF16), torch.randn(80).to(BF16) if bias else None
    found = op.nvfp4_linear_packed(x, cuda.pack(codes, scale, scale_2), 80, b)
    wanted = x.float() @ (unscaled(codes, scale) * scale_2).t() + (0 if b is None else b.float())
    assert found.shape == (*shape, 80) and found.dtype is BF16
    torch.testing.assert_close(found.float(), wanted, atol=float(wanted.abs().max()) * 2**-7, rtol=2**-7)
    with pytest.raises(PluginError, match="x, bias"):
        op.nvfp4_linear_packed(x, cuda.pack(codes, scale, scale_2), 80, torch.zeros(96))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:97],  # rows that begin anywhere
        lambda x: x[:1, 1:97],
        lambda x: x[:, :192:2],  # no unit stride
        lambda x: x.flatten()[: 3 * 100].view(3, 100)[:, :96],  # a stride that is no multiple of 16 bytes
    ],
)
def test_rows_the_kernel_cannot_read_are_copied(monkeypatch, view):
    seen = []

    def record(x, weights, out):
        assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and out.is_contiguous()
        seen.append(x)

    monkeypatch.setattr(cuda, "nvfp4_linear", record)
    packed = cuda.pack(*checkpoint(80, 96))
    whole = torch.arange(3 * 256, dtype=torch.float32).view(3, 256).to(BF16)
    x = view(whole)
    op.nvfp4_linear_packed(x, packed, 80)
    assert torch.equal(seen[0], x) and seen[0].data_ptr() != x.data_ptr()
    op.nvfp4_linear_packed(whole[:, 8:104], packed, 80)
    assert seen[1].data_ptr() == whole[:, 8:].data_ptr(), "rows of 16-byte steps are read where they are"


def test_the_op_is_opaque_and_knows_its_result(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed_op = torch.ops.moe_backend_plugin.nvfp4_linear_packed.default
    assert not any(a.alias_info for a in packed_op._schema.arguments), "the op changes none of its inputs"
    packed = cuda.pack(*checkpoint(80, 96))
    with FakeTensorMode() as mode:
        x = torch.empty(2, 5, 96, dtype=torch.float16)
        found = op.nvfp4_linear_packed(x, cuda.Weights(*map(mode.from_tensor, packed)), 80)
    assert found.shape == (2, 5, 80) and found.dtype is torch.float16 and found.is_contiguous()

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return lambda *inputs: [torch.zeros(4, 80, dtype=BF16)]

    def model(x):
        return op.nvfp4_linear_packed(x, packed, 80)

    assert torch.compile(model, backend=backend, fullgraph=True)(torch.zeros(4, 96, dtype=BF16)).shape == (4, 80)
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [packed_op]


def test_the_op_needs_no_kernels_to_be_imported(monkeypatch):
    """On a machine without the kernels' compiler only a call asks for them."""
    module = ModuleType("moe_backend_plugin.linear.cuda")
    module.Weights, module.nvfp4_linear = cuda.Weights, lambda x, weights, out: out.fill_(1)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(linear, "cuda", module)
    assert op.nvfp4_linear_packed(torch.zeros(1, 64, dtype=BF16), cuda.pack(*checkpoint(32, 64)), 32).all()
