"""Tile order of block scales by an independent index formula; interleaved gate and up rows."""

import pytest
import torch

from moe_backend_plugin.nvfp4.layout import interleave_gate_up, padded_scale_shape, split_gate_up, swizzle_scales, unswizzle_scales

SHAPES = [(128, 4), (256, 8), (384, 12), (1, 1), (130, 5), (127, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzle_puts_each_scale_where_the_formula_says(shape):
    rows, columns = shape
    scale = torch.randint(1, 256, shape, dtype=torch.uint8)
    padded_rows, padded_columns = padded_scale_shape(rows, columns)
    assert padded_rows % 128 == 0 and padded_columns % 4 == 0 and padded_rows - rows < 128 and padded_columns - columns < 4
    expected = torch.zeros(padded_rows * padded_columns, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * (padded_columns // 4) + c // 4
            expected[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scale[r, c]
    swizzled = swizzle_scales(scale)
    assert swizzled.shape == (padded_rows, padded_columns)
    assert torch.equal(swizzled.flatten(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_unswizzle_inverts(shape, lead):
    scale = torch.randint(0, 256, (*lead, *shape), dtype=torch.uint8).view(torch.float8_e4m3fn)
    swizzled = swizzle_scales(scale)
    assert swizzled.dtype == scale.dtype and swizzled.is_contiguous()
    back = unswizzle_scales(swizzled, *shape)
    assert back.dtype == scale.dtype and torch.equal(back.view(torch.uint8), scale.view(torch.uint8))


def test_experts_swizzle_one_by_one():
    scale = torch.randint(0, 256, (3, 130, 6), dtype=torch.uint8)
    swizzled = swizzle_scales(scale)
    for e in range(3):
        assert torch.equal(swizzled[e], swizzle_scales(scale[e]))


def test_swizzle_refuses():
    with pytest.raises(ValueError, match="one-byte"):
        swizzle_scales(torch.zeros(128, 4))
    with pytest.raises(ValueError, match=r"\[E, N, G\]"):
        swizzle_scales(torch.zeros(128, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"128, 4"):
        unswizzle_scales(torch.zeros(128, 8, dtype=torch.uint8), 100, 4)


def test_interleave_by_hand():
    rows = torch.arange(8).view(8, 1)
    assert interleave_gate_up(rows).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave_gate_up(rows, 2).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("group", [1, 4, 8])
def test_split_inverts_interleave(group):
    w13 = torch.randint(0, 256, (3, 32, 5), dtype=torch.uint8)
    assert torch.equal(split_gate_up(interleave_gate_up(w13, group), group), w13)
    with pytest.raises(ValueError, match="multiple"):
        interleave_gate_up(w13[:, :6], 4)
