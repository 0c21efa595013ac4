"""Values, packing, quantisation: against first principles, ModelOpt's exporter and compressed-tensors' compressor."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend_plugin.nvfp4 import format as nvfp4
from moe_backend_plugin.nvfp4.unscaled import unscaled

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


@pytest.fixture(scope="module")
def modelopt():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("modelopt.torch.quantization", reason="needs nvidia-modelopt")
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
    return NVFP4QTensor


@pytest.fixture(scope="module")
def compressed_tensors():
    """``compress(w) -> (packed, scale, global_scale)`` by the library's own functions."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import NVFP4, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(targets=["Linear"], **NVFP4)

    def compress(w):
        blocks = w.unflatten(-1, (-1, 16))
        global_scale = generate_gparam(w.amin(), w.amax())
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale)
        with torch.compiler.set_stance("force_eager"):
            state = NVFP4PackedCompressor.compress({"weight": w, "weight_scale": scale, "weight_global_scale": global_scale}, scheme)
        return state["weight_packed"], state["weight_scale"], state["weight_global_scale"]

    return compress


def weights(kind: str, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(len(kind))
    w = torch.randn(48, 128, generator=g)
    if kind == "tiny":
        w *= 1e-30
    elif kind == "huge":
        w *= 1e30
    elif kind == "zero blocks":
        w[0] = 0.0
        w[1, :16] = -0.0
        w[2, 5:7] = 0.0
    elif kind == "underflow":
        w[3:9] *= torch.logspace(-4, -9, 6).unsqueeze(1)
    elif kind == "ties":
        # Scales come out as powers of two, so every element is a tie of the grid.
        w = torch.tensor([*TIES, *(-t for t in TIES), 6.0, -0.0]).mul(2.0**-7).repeat(48, 8)
        w[0, 0] = 448 * 6 * 2.0**-7
    elif kind == "outlier":
        w[7, 7] = 3e4
    elif kind == "constant":
        w = torch.full((48, 128), -0.37)
    return w.to(dtype)


KINDS = ["random", "tiny", "huge", "zero blocks", "underflow", "ties", "outlier", "constant"]


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0), st.sampled_from([(), (1,), (2, 3)]))
@settings(max_examples=40, deadline=None)
def test_pack_and_unpack_are_inverses(codes, lead):
    codes = torch.tensor(codes, dtype=torch.uint8).expand(*lead, -1)
    packed = nvfp4.pack(codes)
    assert packed.shape == (*lead, codes.shape[-1] // 2)
    assert torch.equal(nvfp4.unpack(packed), codes)


def test_low_nibble_is_the_even_column():
    assert nvfp4.pack(torch.tensor([0x3, 0xA], dtype=torch.uint8)).tolist() == [0xA3]


def test_pack_refuses_odd_and_other_dtypes():
    with pytest.raises(ValueError, match="even last dimension"):
        nvfp4.pack(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="int64"):
        nvfp4.pack(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="uint8"):
        nvfp4.unpack(torch.zeros(4))


def test_every_code_encodes_to_itself():
    codes = torch.arange(16, dtype=torch.uint8)
    expected = torch.where(codes == 8, 0, codes)  # -0.0 becomes code 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(nvfp4.encode(nvfp4.decode(codes, dtype)), expected)


@pytest.mark.parametrize(("x", "value"), TIES.items())
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_even_and_an_ulp_decides(x, value, sign):
    position = GRID.index(value)
    up = position if x < value else position + 1
    down = position - 1 if x < value else position
    for candidate, expected in ((x, position), (math.nextafter(x, 9), up), (math.nextafter(x, 0), down)):
        code = nvfp4.encode(torch.tensor([sign * candidate], dtype=torch.float64))
        assert code.item() == expected + (8 if sign < 0 else 0)
    f32 = torch.tensor([x])
    near = torch.cat((f32, torch.nextafter(f32, torch.tensor(9.0)), torch.nextafter(f32, torch.tensor(0.0))))
    assert nvfp4.encode(near).tolist() == [position, up, down]
    assert nvfp4.round_e2m1(sign * near).tolist() == [sign * GRID[p] for p in (position, up, down)]


def test_encode_saturates_and_maps_nan_to_six():
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan, -1e-30, 1e-30, -0.0])
    assert nvfp4.encode(x).tolist() == [7, 15, 7, 15, 7, 8, 0, 0]
    with pytest.raises(ValueError, match="floating-point"):
        nvfp4.encode(torch.tensor([1]))


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=32))
@settings(max_examples=60, deadline=None)
def test_encode_picks_a_nearest_value(xs):
    x = torch.tensor(xs, dtype=torch.float64)
    grid = torch.tensor(sorted({*GRID, *(-g for g in GRID)}), dtype=torch.float64)
    error = (nvfp4.decode(nvfp4.encode(x), torch.float64) - x).abs()
    assert torch.equal(error, (x.unsqueeze(-1) - grid).abs().amin(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_is_modelopts_bit_for_bit(modelopt, kind, dtype):
    if dtype == torch.float16 and kind in ("tiny", "huge"):
        pytest.skip("outside float16's range")
    w = weights(kind, dtype)
    theirs, scale, scale_2 = modelopt.quantize(w.clone(), 16)
    ours = nvfp4.quantize(w)
    assert same_bytes(ours.scale_2, scale_2.squeeze())
    assert same_bytes(ours.scale, scale)
    assert same_bytes(ours.packed, theirs._quantized_data)
    assert not (ours.scale.view(torch.uint8) == 0).any()


def test_quantize_with_a_shared_global_scale_is_modelopts(modelopt):
    w, shared = weights("random", torch.bfloat16), torch.tensor(0.01)
    scale, _ = modelopt.get_weights_scaling_factor(w, 16, shared)
    theirs = modelopt.quantize(w.clone(), 16, scale, shared)[0]
    ours = nvfp4.quantize(w, shared)
    assert same_bytes(ours.scale, scale) and same_bytes(ours.packed, theirs._quantized_data)


def test_modelopt_breaks_on_a_zero_matrix_and_we_do_not(modelopt):
    w = torch.zeros(16, 32)
    _, scale, scale_2 = modelopt.quantize(w.clone(), 16)
    assert scale_2 == 0 and scale.float().isnan().all()  # why the checkpoint check refuses such tensors
    ours = nvfp4.quantize(w)
    assert ours.scale_2 == 1 and (ours.scale.float() == 1).all() and not ours.packed.any()
    assert not ours.dequantize().any()


@pytest.mark.parametrize("kind", [*KINDS, "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_reciprocal_is_compressed_tensors_bit_for_bit(compressed_tensors, kind, dtype):
    w = torch.zeros(16, 32, dtype=dtype) if kind == "zeros" else weights(kind, dtype)
    packed, scale, global_scale = compressed_tensors(w)
    ours, ours_global = nvfp4.quantize_reciprocal(w)
    assert same_bytes(ours_global, global_scale)
    assert same_bytes(ours.scale, scale)
    assert same_bytes(ours.packed, packed)
    assert not (ours.scale.view(torch.uint8) == 0).any()


def test_the_producers_treat_zero_blocks_differently():
    w = weights("zero blocks", torch.float32)
    assert (nvfp4.quantize(w).scale[0].float() == 1).all()
    assert (nvfp4.quantize_reciprocal(w)[0].scale[0].float() == 0.125).all()


@pytest.mark.parametrize("function", [nvfp4.quantize, lambda w: nvfp4.quantize_reciprocal(w)[0]])
def test_experts_are_quantised_one_by_one(function):
    w = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 100.0, 1e-3]).view(3, 1, 1)
    stacked = function(w)
    assert stacked.shape == w.shape and stacked.scale_2.shape == (3,)
    for e in range(3):
        alone = function(w[e])
        assert alone.scale_2.shape == ()
        for name in ("packed", "scale", "scale_2"):
            assert same_bytes(getattr(stacked, name)[e].contiguous(), getattr(alone, name))
        assert torch.equal(stacked.dequantize()[e], alone.dequantize())


@given(st.integers(0, 2**31 - 1), st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_a_dequantised_tensor_quantises_to_itself(seed, size):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * size
    once = nvfp4.quantize(w)
    # With the largest code of every block at 6, block maxima and so all scales are reproduced.
    codes = nvfp4.unpack(once.packed).view(8, 4, 16)
    codes[..., 0] = 7
    exact = nvfp4.decode(codes).mul(once.scale.float().unsqueeze(-1)).flatten(-2) * 0.5
    again = nvfp4.quantize(exact, torch.tensor(0.5))
    assert torch.equal(nvfp4.dequantize(again.packed, again.scale, again.scale_2, torch.float32), exact)


def test_error_is_within_half_a_step():
    w = weights("random", torch.float32)
    q = nvfp4.quantize(w)
    blocks, step = w.view(48, 8, 16), q.scale.float() * q.scale_2
    error = (q.dequantize(torch.float32).view(48, 8, 16) - blocks).abs()
    # Half of the widest step (4 to 6), or what an E4M3 scale rounded down cuts off 6.
    assert (error <= step.unsqueeze(-1) * 1.0001).all()


@pytest.mark.parametrize("shape", [(16,), (4, 24), (4, 0)])
def test_quantize_refuses_shapes(shape):
    with pytest.raises(ValueError, match="allowed"):
        nvfp4.quantize(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (5,), (3, 7), (2, 3, 4)])
def test_unscaled_is_the_exact_product(dtype, lead):
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (*lead, 24), dtype=torch.uint8, generator=g)
    scale = torch.randint(0, 256, (*lead, 3), dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)
    expected = (nvfp4.decode(nvfp4.unpack(packed), torch.float64).unflatten(-1, (3, 16)) * scale.double().unsqueeze(-1)).flatten(-2)
    result = unscaled(packed, scale, dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=0, equal_nan=True)
    out = torch.full_like(result, 3)
    assert unscaled(packed, scale, out=out) is out
    torch.testing.assert_close(out, result, rtol=0, atol=0, equal_nan=True)


def test_every_product_is_exact_in_bfloat16():
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).view(1, 256, 8).expand(256, -1, -1)
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(-1, 256, -1).contiguous().view(torch.float8_e4m3fn)
    a, b = unscaled(packed, scale, torch.bfloat16), unscaled(packed, scale, torch.float32)
    torch.testing.assert_close(a.float(), b, rtol=0, atol=0, equal_nan=True)


def test_unscaled_spans_chunks_and_takes_views(monkeypatch):
    monkeypatch.setattr("moe_backend_plugin.nvfp4.unscaled._CHUNK", 5)
    q = nvfp4.quantize(torch.randn(6, 9, 32))
    view = unscaled(q.packed[1::2], q.scale[1::2], torch.bfloat16)
    monkeypatch.undo()
    assert torch.equal(view, unscaled(q.packed, q.scale, torch.bfloat16)[1::2])
    assert unscaled(q.packed[:0], q.scale[:0]).shape == (0, 9, 32)


def test_unscaled_refuses_mismatches():
    q = nvfp4.quantize(torch.randn(4, 32))
    with pytest.raises(ValueError, match=r"shapes \[4, 16\], \[4, 1\]"):
        unscaled(q.packed, q.scale[:, :1])
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        unscaled(q.packed, q.scale.float())
    with pytest.raises(ValueError, match="float16"):
        unscaled(q.packed, q.scale, torch.float16)
    with pytest.raises(ValueError, match="contiguous"):
        unscaled(q.packed, q.scale, out=torch.empty(32, 4).t())


def test_dequantize_rounds_once():
    q = nvfp4.quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(3)))
    values = nvfp4.decode(nvfp4.unpack(q.packed)).unflatten(-1, (4, 16)) * q.scale.float().unsqueeze(-1)
    expected = (values.flatten(-2).double() * q.scale_2.double()).float().bfloat16()
    assert torch.equal(q.dequantize(), expected)
    assert torch.equal(nvfp4.dequantize(q.packed, q.scale, q.scale_2.view(1)), expected)


def test_dequantize_agrees_with_modelopt(modelopt):
    w = weights("random", torch.float32)
    theirs, scale, scale_2 = modelopt.quantize(w.clone(), 16)
    back = theirs.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    torch.testing.assert_close(nvfp4.quantize(w).dequantize(torch.float32), back, rtol=2**-22, atol=0)


def reference_activations(x, input_scale):
    out = torch.empty_like(x)
    for m in range(x.shape[0]):
        for b in range(x.shape[1] // 16):
            block = x[m, b * 16 : b * 16 + 16].double()
            scale = torch.tensor(block.abs().max().item() / 6 / input_scale).clamp(max=448).to(torch.float8_e4m3fn).double()
            step = (scale * input_scale).item()
            values = nvfp4.decode(nvfp4.encode(block / step), torch.float64) * step if step else torch.zeros(16, dtype=torch.float64)
            out[m, b * 16 : b * 16 + 16] = values
    return out


def test_activations_follow_the_definition():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    x[1] *= 1e-7  # block scales underflow
    x[2] *= 1e3  # beyond the calibrated range: saturates
    x[3, :16] = 0
    got = nvfp4.quantize_activations(x, 2.0**-9)
    torch.testing.assert_close(got, reference_activations(x, 2.0**-9), rtol=1e-6, atol=0)
    assert not got[1].any() and not got[3, :16].any()
    assert got[2].abs().max() == 6 * 448 * 2.0**-9
    assert nvfp4.quantize_activations(x.bfloat16(), torch.tensor(2.0**-9)).dtype == torch.bfloat16
    assert nvfp4.quantize_activations(x.bfloat16(), 2.0**-9, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_stays_alone(bad):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    clean = nvfp4.quantize_activations(x, 0.001)
    x[2, 3] = bad
    got = nvfp4.quantize_activations(x, 0.001)
    rest = [0, 1, 3]
    assert torch.equal(got[rest], clean[rest])
    assert torch.equal(got[2, 16:], clean[2, 16:])
    if math.isnan(bad):
        assert got[2, :16].isnan().all()
    else:
        assert got[2, 3] == math.copysign(6 * 448 * torch.tensor(0.001), bad)
