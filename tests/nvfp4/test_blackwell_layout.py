"""Experts in FlashInfer's order on Blackwell: every byte where an index formula written down here says, back again, and the scales."""

from __future__ import annotations

import pytest
import torch

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.nvfp4 import blackwell as layout
from moe_backend_plugin.nvfp4.format import quantize_activations

SHAPES = [(2, 64, 64, True), (3, 192, 256, True), (2, 48, 320, True), (1, 100, 128, False), (2, 128, 256, False), (1, 16, 64, False)]
"""Experts, width, hidden, gated."""


def random_projection(experts: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(1, 127, (experts, rows, columns // 16), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)


def row_of(row: int, intermediate: int, gated: bool) -> int | None:
    """The checkpoint's row that lies in row ``row``: 64 of up, 64 of gate, and so on; None for padding."""
    if not gated:
        return row if row < intermediate else None
    group, part = divmod(row, 128)
    column = group * 64 + part % 64
    if column >= intermediate:
        return None
    return intermediate + column if part < 64 else column


def scale_at(memory: torch.Tensor, expert: int, row: int, group: int, rows: int, groups: int) -> int:
    """The byte of the scale of a row and a group of 16 columns."""
    tile = (row // 128) * (groups // 4) + group // 4
    return int(memory[expert * rows * groups + tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4])


@pytest.mark.parametrize(("experts", "intermediate", "hidden", "gated"), SHAPES)
def test_every_byte_of_the_first_projection(experts, intermediate, hidden, gated):
    rows = intermediate * (2 if gated else 1)
    codes, scale = random_projection(experts, rows, hidden)
    packed, tiled = layout.pack_first(codes, scale, gated=gated)
    padded = layout.padded_width(intermediate, gated) * (2 if gated else 1)
    tile_rows = -(-padded // 128) * 128
    assert packed.shape == (experts, padded, hidden // 2) and tiled.shape == (experts, tile_rows, hidden // 16) and padded % 128 == 0
    raw, memory = scale.view(torch.uint8), tiled.view(torch.uint8).flatten()
    for expert in range(experts):
        for row in range(padded):
            source = row_of(row, intermediate, gated)
            expected = codes[expert, source] if source is not None else torch.zeros(hidden // 2, dtype=torch.uint8)
            assert torch.equal(packed[expert, row], expected), (expert, row)
            for group in (0, 1, hidden // 32, hidden // 16 - 1):
                wanted = 0 if source is None else int(raw[expert, source, group])
                assert scale_at(memory, expert, row, group, tile_rows, hidden // 16) == wanted, (expert, row, group)
    back = layout.unpack_first(packed, tiled, intermediate, gated=gated)
    assert torch.equal(back[0], codes) and torch.equal(back[1].view(torch.uint8), raw)


@pytest.mark.parametrize(("experts", "intermediate", "hidden", "gated"), SHAPES)
def test_every_byte_of_the_second_projection(experts, intermediate, hidden, gated):
    intermediate -= intermediate % 16
    codes, scale = random_projection(experts, hidden, intermediate)
    packed, tiled = layout.pack_second(codes, scale, gated=gated)
    width, rows = layout.padded_width(intermediate, gated), -(-hidden // 128) * 128
    assert packed.shape == (experts, hidden, width // 2) and tiled.shape == (experts, rows, width // 16)
    assert torch.equal(packed[..., : intermediate // 2], codes) and not packed[..., intermediate // 2 :].any()
    memory = tiled.view(torch.uint8).flatten()
    for expert, row in ((0, 0), (experts - 1, hidden - 1), (0, hidden // 2 + 3)):
        for group in range(width // 16):
            wanted = int(scale.view(torch.uint8)[expert, row, group]) if group < intermediate // 16 else 0
            assert scale_at(memory, expert, row, group, rows, width // 16) == wanted
    back = layout.unpack_second(packed, tiled, intermediate)
    assert torch.equal(back[0], codes) and torch.equal(back[1].view(torch.uint8), scale.view(torch.uint8))


def test_the_view_of_scales_is_the_same_memory_in_the_kernels_order():
    _, tiled = layout.pack_second(*random_projection(3, 256, 192), gated=True)
    view = layout.scale_view(tiled)
    assert view.shape == (32, 4, 2, 4, 3, 3) and view.data_ptr() == tiled.data_ptr() and view.stride() == (16, 4, 1536, 1, 512, 3072)
    for expert, row, group in ((0, 0, 0), (2, 255, 11), (1, 130, 7), (1, 95, 4)):
        there = view.view(torch.uint8)[row % 32, row % 128 // 32, row // 128, group % 4, group // 4, expert]
        assert int(there) == scale_at(tiled.view(torch.uint8).flatten(), expert, row, group, 256, 12)


@pytest.mark.parametrize("function", [layout.pack_first, layout.pack_second])
def test_shapes_that_disagree_are_refused(function):
    codes, scale = random_projection(2, 64, 64)
    for bad in ((codes[0], scale), (codes.int(), scale), (codes, scale[:, :32]), (codes, scale.view(torch.uint8))):
        with pytest.raises(ValueError, match="allowed"):
            function(*bad, gated=True)


# --- scales of whole tensors ------------------------------------------------------------------------------------------


def test_static_scales_stand_for_what_the_checkpoint_says():
    """alpha times the sum over rounded inputs is what scale_2 times the sum over the inputs is, with the largest input scale for all."""
    gate_up = torch.tensor([[0.5, 0.5], [2.0, 2.0]])
    found = layout.resolve(
        gate_up, torch.tensor([3.0, 7.0]), torch.tensor([[0.01, 0.02], [0.04, 0.01]]), torch.tensor([0.1, 0.3]), linear_in_up=False
    )
    assert float(found.x) == pytest.approx(25.0) and float(found.h) == pytest.approx(1 / 0.3)
    assert found.w13_alpha.tolist() == pytest.approx([0.02, 0.08]) and found.w2_alpha.tolist() == pytest.approx([0.9, 2.1])
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    # What the kernel multiplies: E2M1 values and block scales of x * 25, unscaled; then alpha.
    unscaled = quantize_activations(x * 25, 1.0)
    torch.testing.assert_close(unscaled * found.w13_alpha[1], quantize_activations(x, 0.04) * 2.0)


def test_gate_and_up_apart_are_made_up_for_where_the_activation_is_linear_in_up():
    parts, second, inputs = torch.tensor([[1.0, 4.0], [2.0, 1.0]]), torch.tensor([3.0, 5.0]), torch.tensor([0.2, 0.2])
    found = layout.resolve(parts, second, torch.ones(2), inputs, linear_in_up=True)
    assert found.w13_alpha.tolist() == [1.0, 2.0]
    # Up is carried with the gate's scale: the second input is a quarter, and twice, of what it was.
    assert float(found.h) == pytest.approx(1 / 0.4) and found.w2_alpha.tolist() == pytest.approx([3 * 4 * 0.4, 5 * 0.5 * 0.4])
    with pytest.raises(PluginError, match="apart by a factor of 4, under an activation with a clamp or an offset"):
        layout.resolve(parts, second, torch.ones(2), inputs, linear_in_up=False)


def test_a_scale_a_token_needs_no_input_scales():
    found = layout.resolve(torch.tensor([[0.5], [2.0]]), torch.tensor([3.0, 7.0]), linear_in_up=False)
    assert found.x is None and found.w13_alpha.tolist() == [0.5, 2.0] and found.w2_alpha.tolist() == [3.0, 7.0]
    assert float(found.h) == pytest.approx(1 / 2688)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_scales_that_are_no_scales_are_refused(bad, which):
    scales = [torch.ones(2, 2), torch.ones(2), torch.ones(2), torch.ones(2)]
    scales[which].view(-1)[1] = bad
    with pytest.raises(PluginError, match="finite float32 values above 0"):
        layout.resolve(*scales, linear_in_up=True)


def test_one_input_scale_alone_is_refused():
    with pytest.raises(PluginError, match="both, or none"):
        layout.resolve(torch.ones(2, 2), torch.ones(2), torch.ones(2), linear_in_up=True)
