"""Layout and activation emulation against vLLM's own helpers (skipped without vLLM)."""

import pytest
import torch

from moe_backend_plugin.nvfp4.format import quantize_activations
from moe_backend_plugin.nvfp4.layout import swizzle_scales

pytest.importorskip("vllm")


@pytest.mark.parametrize("shape", [(128, 4), (256, 16), (130, 5), (3, 64, 8), (2, 257, 3)])
def test_swizzle_is_vllms(monkeypatch, shape):
    from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # it moves its result to a GPU
    scale = torch.randint(0, 127, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(swizzle_scales(scale).view(torch.uint8), swizzle_blockscale(scale).view(torch.uint8))


def test_activation_emulation_is_vllms():
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x[3] *= 1e-7
    x[4] *= 1e4
    input_scale = torch.tensor(5.0 / (6 * 448))
    values, scale = ref_nvfp4_quant(x, 1.0 / input_scale, 16)
    scale = scale.view(64, 16, 1).float() * input_scale
    theirs = (values.view(64, 16, 16).float() * scale).view(64, 256)
    torch.testing.assert_close(quantize_activations(x, input_scale), theirs, rtol=1e-6, atol=0)
