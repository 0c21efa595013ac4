"""Dense NVFP4 layers in vLLM on a Hopper GPU: which ones this package's kernels serve, their weights, and the calls."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import Parameter
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ...errors import CheckpointError
from ...kernels import compile as kernels
from ...linear import cuda
from ...linear.op import nvfp4_linear_packed
from ..packing import allocate, rearrange
from .linear import Nvfp4LinearMethod
from .moe_cuda import current_device
from .settings import name_graphs, plugin_config

logger = init_logger("vllm.moe_backend_plugin")


def unsupported_reason(layer: LinearBase | ParallelLMHead, use_nvfp4: bool) -> str | None:
    """Why the kernels cannot serve this layer, or None. ``use_nvfp4``: activations are to be rounded to NVFP4.

    vLLM asks before the layer is complete: what it does not have yet, it does not split among ranks, or has as torch's default.
    """
    if (backend := get_current_vllm_config().kernel_config.linear_backend) != "auto":
        return f"--linear-backend {backend} names one of vLLM's own kernels"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set, and these kernels sum in another order for another number of tokens"
    rows = getattr(layer, "output_size_per_partition", layer.output_size)
    columns = getattr(layer, "input_size_per_partition", layer.input_size)
    tokens = getattr(layer, "params_dtype", torch.get_default_dtype())
    return cuda.unsupported_reason(rows, columns, tokens, "nvfp4" if use_nvfp4 else "bf16")


@cache
def prepare(rows: int, columns: int, tokens: torch.dtype, device: torch.device, max_tokens: int) -> None:
    """Compile or load every kernel that layers of this size launch, and list their tiles; once for all of them."""
    kernels.use_cache_folder(plugin_config().kernel_cache)
    if compiled := cuda.prepare(rows, columns, tokens, device, max_tokens):
        folder = str(kernels.cache_folder())
        logger.info_once("Compiled %d dense NVFP4 kernels for layers of %d by %d; they are kept in %s", compiled, rows, columns, folder)


@register_weight_loader_v2_supported_method
class HopperLinearMethod(Nvfp4LinearMethod):
    """A linear layer, or the output matrix, on a Hopper GPU, one that :func:`unsupported_reason` lets through.

    After loading the layer holds, for its N output and K input features on this rank: ``weight`` uint8 [1, N/64, K/64, 2304] in the
    order of ``nvfp4.hopper`` and ``weight_scale_2`` float32 [1, 1]. That is one global scale: a fused layer whose parts differ in theirs
    cannot be served without requantising it, and raises CheckpointError when it has been loaded.
    """

    def _prepare(self, layer: torch.nn.Module, tokens: torch.dtype) -> None:
        name_graphs("dense layers", "cutedsl")
        # A compiler that does not work should stop the server at once.
        most = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        prepare(layer.output_size_per_partition, layer.input_size_per_partition, tokens, current_device(), most)

    def _allocate(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, scale = allocate(1, rows, columns, gated=False)
        return weight[0], scale[0]

    def _keep(self, layer: torch.nn.Module, weight: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> None:
        if reason := cuda.scales_reason(global_scale):
            raise CheckpointError(
                f"{self.prefix}.{self.names.global_scale}",
                reason,
                "one global scale for all parts of a fused layer; linear.provider: engine serves such a layer",
            )
        packed = rearrange(weight.unsqueeze(0), scale.unsqueeze(0), gated=False)
        layer.weight = Parameter(packed, requires_grad=False)
        layer.weight_scale_2 = Parameter(global_scale[:1].clone().view(1, 1), requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nvfp4_linear_packed(x, cuda.Weights(layer.weight, layer.weight_scale_2), layer.output_size_per_partition, bias)
