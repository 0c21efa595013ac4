"""The Hopper weight layout against the kernel's own reading of it, one lane, one word, one bit operation at a time."""

import itertools

import pytest
import torch

from moe_backend_plugin.nvfp4 import hopper
from moe_backend_plugin.nvfp4 import unscaled as unscaled_module
from moe_backend_plugin.nvfp4.hopper import BYTES, dequantise, pack, packed_shape, unpack
from moe_backend_plugin.nvfp4.unscaled import unscaled
from moe_backend_plugin.nvfp4.values import E2M1_VALUES

ONE = 0x38


def random_weights(experts, rows, columns, seed=0, zeros=False):
    """Codes and scales of every kind: subnormal ones, 448, and zero if asked for."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    bits = torch.randint(0 if zeros else 1, 0x7F, (experts, rows, columns // 16), dtype=torch.uint8, generator=generator)
    if zeros:
        bits[torch.rand(bits.shape, generator=generator) < 0.2] = 0
    return codes, bits.view(torch.float8_e4m3fn)


def padded(size, to):
    return -(-size // to) * to


# The oracle: plain Python integers, the formulas of the kernel, nothing shared with the module.


def u32(values, at):
    return int.from_bytes(bytes(values[at : at + 4]), "little")


def rotr(x, by):
    return ((x >> by) | (x << (32 - by))) & 0xFFFFFFFF


def halves(x):
    """The two bf16 bit patterns of a register, low half first."""
    return x & 0xFFFF, x >> 16


def registers(x):
    mask = 0x81C081C0
    return (
        x & mask,
        ((x << 6) & 0xFFFFFFFF) & mask,
        rotr(x, 4) & mask,
        ((x << 2) & 0x00400040) | (rotr(x, 6) & 0x81808180),
    )


def scale_pairs(x):
    return ((x & 0x0FF00FF0) | 0x70007000, (rotr(x, 8) & 0x0FF00FF0) | 0x70007000)


def kernel_reading(unit):
    """What a warpgroup multiplies: ``{(row of 64, column of 64): (bf16 bits of the code, bf16 bits of the scale)}`` of 2304 bytes."""
    unit = unit.tolist()
    read = {}
    for w, lane in itertools.product(range(4), range(32)):
        g, t = lane // 4, lane % 4
        scales = {}
        for below in range(2):
            word = u32(unit, 2048 + 64 * w + 8 * g + 4 * below)
            pair01, pair23 = scale_pairs(word)
            scales[below] = (*halves(pair01), *halves(pair23))
        for s in range(4):
            x = u32(unit, 512 * w + 16 * lane + 4 * s)
            for i, register in enumerate(registers(x)):
                below, right = i % 2, i // 2
                for j, code in enumerate(halves(register)):
                    where = 16 * w + g + 8 * below, 16 * s + 2 * t + 8 * right + j
                    assert where not in read
                    read[where] = (code, scales[below][s])
    assert len(read) == 64 * 64
    return read


def bf16(bits):
    signed = [b - 0x10000 if b >= 0x8000 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16)


def checkpoint_row(packed_row, rows, gated):
    """The checkpoint's row at a row of the layout, or None for padding."""
    b, i = packed_row // 16, packed_row % 16
    if not gated:
        row = 16 * b + i % 8 * 2 + i // 8
        return row if row < rows else None
    width = rows // 2
    row = 8 * b + i % 8
    return None if row >= width else row if i < 8 else width + row


@pytest.mark.parametrize("module", [hopper, unscaled_module], ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_table_stays_on_a_device(module):
    """An engine gives up what lies on its GPU since a model was loaded, sleeps, and loads weights anew: tables would be lost memory."""
    elsewhere = torch.device("meta")
    first, second = module._tables(elsewhere), module._tables(elsewhere)
    assert all(a.device == b.device == elsewhere and a is not b for a, b in zip(first, second, strict=True))
    right = [table.clone() for table in module._tables(torch.device("cpu"))]
    module._host_tables.cache_clear()
    with elsewhere, torch.inference_mode():  # where vLLM makes a layer
        module._tables(elsewhere)
    found = module._tables(torch.device("cpu"))
    torch.testing.assert_close(found, tuple(right), rtol=0, atol=0, equal_nan=True)
    assert not any(table.is_inference() for table in found)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 128, 64), (1, 96, 80), (1, 160, 16)])
def test_every_unit_reads_as_the_kernel_needs_it(shape, gated):
    experts, rows, columns = shape
    codes, scales = random_weights(*shape, zeros=True)
    packed = pack(codes, scales, gated=gated)
    assert packed.shape == packed_shape(*shape, gated) == (experts, padded(rows, 128) // 64, padded(columns, 64) // 64, BYTES)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64)
    for e, rb, kb in itertools.product(*map(range, packed.shape[:3])):
        read = kernel_reading(packed[e, rb, kb])
        code = bf16([bits for bits, _ in read.values()])
        scale = bf16([bits for _, bits in read.values()])
        expected, expected_code, expected_scale = [], [], []
        for r, c in read:
            row, column = checkpoint_row(64 * rb + r, rows, gated), 64 * kb + c
            if row is None or column >= columns or scales[e, row, column // 16] == 0:
                expected_code.append(0.0)
                expected_scale.append(1.0)
            else:
                byte = int(codes[e, row, column // 2])
                expected_code.append(float(values[byte >> 4 if column % 2 else byte & 15]))
                expected_scale.append(float(scales[e, row, column // 16]))
            expected.append(expected_code[-1] * expected_scale[-1])
        # float64 holds all of these exactly.
        assert torch.equal(code.double(), torch.tensor(expected_code, dtype=torch.float64) * 2.0**-126)
        assert torch.equal(scale.double(), torch.tensor(expected_scale, dtype=torch.float64) * 2.0**116)
        product = (code.double() * scale.double()).bfloat16()
        assert torch.equal(product.double(), torch.tensor(expected, dtype=torch.float64) * 2.0**hopper.PRODUCT_EXPONENT)


def test_words_by_the_formula_of_the_layout():
    """The packing direction too: words put together from canonical registers, every byte of two codes among them."""
    codes = torch.zeros(1, 128, 32, dtype=torch.uint8)
    codes[0, :16] = torch.arange(512).view(16, 32).to(torch.uint8)
    scales = torch.full((1, 128, 4), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    unit = pack(codes, scales, gated=False)[0, 0, 0].tolist()

    def canonical(row, column):
        byte = int(codes[0, checkpoint_row(row, 128, False), column // 2])
        c = 0
        for half, code in enumerate((byte & 15, byte >> 4)):
            c |= ((code & 8) << 12 | (code & 7) << 6) << 16 * half
        return c

    def rotl(x, by):
        return rotr(x, 32 - by)

    for lane, s in itertools.product(range(32), range(4)):
        g, t = lane // 4, lane % 4
        c0, c1 = canonical(g, 16 * s + 2 * t), canonical(g + 8, 16 * s + 2 * t)
        c2, c3 = canonical(g, 16 * s + 2 * t + 8), canonical(g + 8, 16 * s + 2 * t + 8)
        parts = (c0, c1 >> 6, rotl(c2, 4), (c3 & 0x00400040) >> 2, rotl(c3 & 0x81808180, 6))
        assert all(a & b == 0 for a, b in itertools.combinations(parts, 2))
        assert u32(unit, 16 * lane + 4 * s) == sum(parts)


def test_every_pair_of_bytes_comes_back():
    """All 2^16 combinations of two bytes of a lane, in a row and in the other half."""
    codes = torch.arange(1 << 16, dtype=torch.int32).view(torch.uint8).view(-1, 4)[:, :2].contiguous().view(1, 2048, 64)
    scales = torch.full((1, 2048, 8), ONE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(unpack(pack(codes, scales, gated=False), 2048, 128, False)[0], codes)


@pytest.mark.parametrize("byte", range(1, 0x7F))
def test_every_scale_is_exact_in_every_group(byte):
    bits = torch.full((1, 128, 4), ONE, dtype=torch.uint8)
    value = float(torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn))
    for group in range(4):
        bits[0, checkpoint_row(group, 128, False), group] = byte
        bits[0, checkpoint_row(8 + group, 128, False), 3 - group] = byte
    scales = bits.view(torch.float8_e4m3fn)
    packed = pack(torch.full((1, 128, 32), 0x22, dtype=torch.uint8), scales, gated=False)
    unit = packed[0, 0, 0].tolist()
    for g, below in itertools.product(range(4), range(2)):
        word = u32(unit, 2048 + 8 * g + 4 * below)
        found = bf16([bits for pair in scale_pairs(word) for bits in halves(pair)]).double() * 2.0**-116
        expected = [1.0] * 4
        expected[3 - g if below else g] = value
        assert found.tolist() == expected
    assert torch.equal(unpack(packed, 128, 64, False)[1].view(torch.uint8), bits)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [16, 64, 96, 112, 128, 144, 272, 512])
@pytest.mark.parametrize("columns", [16, 48, 64, 112, 256])
def test_round_trip(rows, columns, gated):
    codes, scales = random_weights(3, rows, columns, seed=rows + columns)
    packed = pack(codes, scales, gated=gated)
    back = unpack(packed, rows, columns, gated)
    assert torch.equal(back[0], codes) and torch.equal(back[1].view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(dequantise(packed, rows, columns, gated), unscaled(codes, scales))


@pytest.mark.parametrize("gated", [False, True])
def test_gated_order_keeps_gate_and_up_together(gated):
    """16 rows at a time: 8 of the gate, 8 of up."""
    codes, scales = random_weights(1, 288, 64)
    order = [checkpoint_row(r, 288, gated) for r in range(padded(288, 128))]
    natural_codes = torch.zeros(1, len(order), 32, dtype=torch.uint8)
    natural_scales = torch.full((1, len(order), 4), ONE, dtype=torch.uint8)
    for r, row in enumerate(order):
        if row is not None:
            r = checkpoint_row(r, len(order), False)
            natural_codes[0, r], natural_scales[0, r] = codes[0, row], scales.view(torch.uint8)[0, row]
    expected = pack(natural_codes, natural_scales.view(torch.float8_e4m3fn), gated=False)
    assert torch.equal(pack(codes, scales, gated=gated), expected)


def test_zero_scales_become_zero_codes():
    codes, scales = random_weights(2, 128, 128, zeros=True)
    scales.view(torch.uint8)[0, 0, 0] = 0x80  # minus zero is zero
    packed = pack(codes, scales, gated=True)
    zero = scales.float() == 0
    assert zero.any()
    back = unpack(packed, 128, 128, True)
    assert (back[0].unflatten(-1, (-1, 8))[zero] == 0).all() and (back[1].float()[zero] == 1).all()
    assert torch.equal(back[0].unflatten(-1, (-1, 8))[~zero], codes.unflatten(-1, (-1, 8))[~zero])
    assert torch.equal(dequantise(packed, 128, 128, True), unscaled(codes, scales))


@pytest.mark.parametrize("words", [1, 1 << 10, 5 << 10, 1 << 30])
def test_chunks_do_not_show(monkeypatch, words):
    codes, scales = random_weights(5, 416, 144)
    expected = pack(codes, scales, gated=True)
    monkeypatch.setattr(hopper, "_CHUNK", words)
    assert torch.equal(pack(codes, scales, gated=True), expected)
    assert torch.equal(unpack(expected, 416, 144, True)[0], codes)


@pytest.mark.parametrize(
    "experts, row_blocks, column_blocks", [(1, 2, 1), (128, 24, 32), (256, 64, 112), (1, 512, 128), (7, 6, 5), (0, 2, 2)]
)
def test_chunks_cover_all_once(experts, row_blocks, column_blocks):
    seen = torch.zeros(experts, row_blocks, dtype=torch.int32)
    for e, r in hopper._chunks(experts, row_blocks, column_blocks):
        seen[e, r] += 1
        # Never more than the bound, unless a single row block is.
        count = (e.stop - e.start) * (r.stop - r.start)
        assert count == 1 or count * column_blocks * 512 <= hopper._CHUNK
    assert (seen == 1).all()


def test_memory_beyond_the_result_is_bounded():
    """Bytes alive at once while packing, counted at every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakIdKeyDictionary

    class Counter(TorchDispatchMode):
        alive, most = WeakIdKeyDictionary(), 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.alive[result.untyped_storage()] = result.untyped_storage().nbytes()
            self.most = max(self.most, sum(self.alive.values()))
            return result

    codes, scales = random_weights(8, 256, 512)
    out = torch.empty(packed_shape(8, 256, 512, True), dtype=torch.uint8)
    pack(codes[:1], scales[:1], gated=True)  # the tables
    with Counter() as counter:
        pack(codes, scales, gated=True, out=out)
    own = out.numel() + codes.numel() + scales.numel()
    assert 0 < counter.most - own < out.numel()


def test_out_and_views():
    codes, scales = random_weights(4, 128, 192)
    expected = pack(codes, scales, gated=False)
    out = torch.full((4, 2, 3, BYTES), 0xAA, dtype=torch.uint8)
    assert pack(codes, scales, gated=False, out=out) is out
    assert torch.equal(out, expected)
    # Inputs may be views at any byte, and not contiguous.
    shifted = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(codes.shape).copy_(codes)
    strided = torch.empty(4, 256, 12, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, ::2]
    strided.copy_(scales)
    assert torch.equal(pack(shifted, strided, gated=False), expected)
    assert pack(codes[:0], scales[:0], gated=False).shape == (0, 2, 3, BYTES)


def test_bad_scales_come_back_as_nan():
    codes, scales = random_weights(2, 128, 64, zeros=True)
    scales.view(torch.uint8)[1, 2, 3] = 0xB8
    scales.view(torch.uint8)[0, 1, 2] = 0x7F
    back = unpack(pack(codes, scales, gated=False), 128, 64, False)[1]
    assert back[1, 2, 3].isnan() and back[0, 1, 2].isnan() and back.float().isnan().sum() == 2


def test_refuses():
    codes, scales = random_weights(1, 128, 64)
    with pytest.raises(ValueError, match=r"\[E, N, K/2\]"):
        pack(codes[0], scales[0], gated=False)
    with pytest.raises(ValueError, match=r"\[\.\.\., K/16\]"):
        pack(codes, scales[:, :, :2], gated=False)
    with pytest.raises(ValueError, match="contiguous"):
        pack(codes, scales, gated=False, out=torch.empty(1, 2, 2, BYTES, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 16"):
        pack(codes[:, :120], scales[:, :120], gated=True)
    with pytest.raises(ValueError, match="multiple of 16"):
        pack(codes[:, :120], scales[:, :120], gated=False)
    with pytest.raises(ValueError, match="K of 16"):
        packed_shape(1, 128, 72, False)
    with pytest.raises(ValueError, match="packed: found"):
        unpack(pack(codes, scales, gated=False), 256, 64, False)
