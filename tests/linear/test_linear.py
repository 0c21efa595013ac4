import math

import pytest
import torch

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.linear import op, reference
from moe_backend_plugin.linear.op import prepare
from moe_backend_plugin.linear.scratch import SCRATCH_VALUES, scratch
from moe_backend_plugin.nvfp4.format import quantize, quantize_activations
from moe_backend_plugin.nvfp4.unscaled import to_planes, unscaled, unscaled_planes

OP = torch.ops.moe_backend_plugin.nvfp4_linear.default
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ULP = {torch.float32: 2.0**-19, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make(rows=80, columns=96, seed=0):
    """Weights whose rows have different global scales, as a fused qkv projection's have."""
    rng = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=rng)
    scale = (torch.rand(rows, columns // 16, generator=rng) * 400).to(torch.float8_e4m3fn)
    row_scale = (0.5 + torch.rand(rows, generator=rng)) / (600 * math.sqrt(columns))
    return packed, scale, row_scale


def nvfp4_linear(x, packed, scale, row_scale, *others):
    """The op on weights as the reference takes them."""
    return op.nvfp4_linear(x, *prepare(packed, scale, row_scale), *others)


def naive(x, packed, scale, row_scale, bias=None):
    """float64, with its own decoding."""
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64)
    w = torch.stack((values[packed.long() % 16], values[packed.long() // 16]), -1).flatten(1)
    w = w * scale.double().repeat_interleave(16, dim=1) * torch.as_tensor(row_scale).double().view(-1, 1)
    out = x.double() @ w.t()
    return out if bias is None else out + bias.double()


def assert_close(got, want):
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    if got.numel():
        error = (got.double() - want.double()).nan_to_num().abs()
        assert (error <= ULP[got.dtype] * want.double().nan_to_num().abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), ()])
def test_both_are_the_formula(dtype, bias, shape):
    packed, scale, row_scale = make()
    x = torch.randn(*shape, 96).to(dtype)
    b = torch.randn(80).to(dtype) if bias else None
    want = naive(x, packed, scale, row_scale, b)
    for function in (reference.nvfp4_linear, nvfp4_linear):
        got = function(x, packed, scale, row_scale, b)
        assert got.dtype == dtype and got.shape == (*shape, 80)
        assert_close(got, want)


@pytest.mark.parametrize("row_scale", [0.003, torch.tensor(0.003), torch.tensor([0.003])], ids=["float", "[]", "[1]"])
def test_one_scale_for_all_rows(row_scale):
    packed, scale, _ = make()
    x = torch.randn(3, 96)
    want = naive(x, packed, scale, row_scale)
    assert_close(reference.nvfp4_linear(x, packed, scale, row_scale), want)
    if isinstance(row_scale, torch.Tensor):
        assert_close(nvfp4_linear(x, packed, scale, row_scale), want)
        assert_close(nvfp4_linear(x, packed, scale, row_scale, torch.zeros(80)), want)


def test_rows_cut_into_chunks(monkeypatch):
    arguments = (torch.randn(5, 96), *make())
    want = nvfp4_linear(*arguments)
    monkeypatch.setattr(op, "SCRATCH_VALUES", 96 * 7 + 5)
    assert_close(nvfp4_linear(*arguments), want)
    monkeypatch.setattr(op, "SCRATCH_VALUES", 1)
    assert_close(nvfp4_linear(*arguments), want)


def test_w4a4():
    packed, scale, row_scale = make()
    x = torch.randn(9, 96)
    input_scale = x.abs().max() / 2688
    got = nvfp4_linear(x, packed, scale, row_scale, None, input_scale)
    assert_close(got, reference.nvfp4_linear(x, packed, scale, row_scale, None, input_scale))
    assert_close(got, naive(quantize_activations(x, input_scale), packed, scale, row_scale))
    exact = naive(x, packed, scale, row_scale)
    assert 0.01 < (got - exact).norm() / exact.norm() < 0.3


def test_against_a_quantised_layer():
    w = torch.randn(64, 128)
    q = quantize(w)
    x = torch.randn(4, 128)
    got = nvfp4_linear(x, q.packed, q.scale, q.scale_2)
    torch.testing.assert_close(got, x @ q.dequantize(torch.float32).t(), rtol=1e-4, atol=1e-3)
    assert (got - x @ w.t()).norm() / (x @ w.t()).norm() < 0.15


def test_empty_batch_and_nan_rows():
    weights = make()
    assert nvfp4_linear(torch.empty(0, 96), *weights).shape == (0, 80)
    x = torch.randn(4, 96)
    clean = nvfp4_linear(x, *weights)
    x[2, 5] = math.nan
    for function in (reference.nvfp4_linear, nvfp4_linear):
        out = function(x, *weights)
        assert out[2].isnan().all()
        assert_close(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_a_row_does_not_depend_on_the_others():
    weights = make()
    x = torch.randn(33, 96)
    whole = nvfp4_linear(x, *weights)
    for rows in (slice(0, 1), slice(5, 12), slice(0, 33, 4)):
        assert_close(nvfp4_linear(x[rows], *weights), whole[rows])


@pytest.mark.parametrize("what", ["columns", "row_scale", "bias", "dtype", "packed"])
def test_wrong_arguments_are_refused(what):
    packed, scale, row_scale = make()
    x, bias = torch.randn(3, 96), torch.zeros(80)
    if what == "columns":
        x = x[:, :80]
    elif what == "row_scale":
        row_scale = row_scale[:7]
    elif what == "bias":
        bias = bias[:7]
    elif what == "dtype":
        x = x.double()
    else:
        packed = packed.char()
    for function in (reference.nvfp4_linear, nvfp4_linear):
        with pytest.raises(ValueError) as error:
            function(x, packed, scale, row_scale, bias)
        assert isinstance(error.value, PluginError) or what == "packed"


@pytest.mark.parametrize("extras", [(), ("bias",), ("bias", "input_scale")], ids=str)
def test_opcheck(extras):
    x = torch.randn(5, 96).bfloat16()
    bias = torch.randn(80) if "bias" in extras else None
    input_scale = torch.tensor(0.002) if "input_scale" in extras else None
    # test_schema compares inputs with allclose, which torch lacks for float8: the next test takes its place.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, (x, *prepare(*make()), bias, input_scale), test_utils=utils)


@pytest.mark.parametrize("w4a4", [False, True])
def test_inputs_are_not_changed(w4a4):
    arguments = [torch.randn(5, 96), *prepare(*make()), torch.randn(80)] + ([torch.tensor(0.002)] if w4a4 else [])
    before = [t.clone() for t in arguments]
    op.nvfp4_linear(*arguments)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, arguments, strict=True) if a.ndim)
    assert not any(a.alias_info for a in OP._schema.arguments)


def test_opaque_to_torch_compile():
    weights = prepare(*make())
    compiled = torch.compile(lambda x: op.nvfp4_linear(x + 1, *weights) * 2, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((4, 96), (2, 5, 96)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), op.nvfp4_linear(x + 1, *weights) * 2)


def test_planes_are_exact():
    """Every byte with every scale, zero and subnormal ones too, to the bit."""
    packed = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).repeat(2, 128, 1)
    scale = torch.arange(254, dtype=torch.uint8).remainder_(127).repeat(33)[: 2 * 128 * 32].view(2, 128, 32).view(torch.float8_e4m3fn)
    words, planes_scale = to_planes(packed, scale)
    assert words.nbytes + planes_scale.nbytes == 0.625 * packed.numel() * 2
    out = unscaled_planes(words, planes_scale, torch.empty(2 * 128 * 512, dtype=torch.int16), torch.empty(2, 128, 512))
    assert torch.equal(out.view(torch.int32), unscaled(packed, scale).view(torch.int32))


def test_planes_want_rows_by_four():
    packed, scale, _ = make(rows=6)
    with pytest.raises(ValueError, match="multiple of 4"):
        to_planes(packed, scale)


@pytest.mark.parametrize("rows", [5, 79, 82])
def test_any_number_of_rows(rows):
    weights = make(rows=rows)
    x = torch.randn(3, 96)
    got = nvfp4_linear(x, *weights)
    assert got.is_contiguous()
    assert_close(got, naive(x, *weights))
    assert_close(nvfp4_linear(x, *weights, torch.ones(rows)), naive(x, *weights, torch.ones(rows)))


def test_scratch_is_bounded():
    assert scratch(10).data_ptr() == scratch(20).data_ptr()
    assert scratch(SCRATCH_VALUES).untyped_storage().nbytes() == SCRATCH_VALUES * 4
    assert scratch(SCRATCH_VALUES + 1).data_ptr() != scratch(1).data_ptr()
