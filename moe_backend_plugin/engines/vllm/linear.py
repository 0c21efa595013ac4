"""Dense NVFP4 layers in vLLM, on this package's linear op: loading, checking, and the CPU's way to keep and apply weights.

:mod:`.linear_cuda` has the GPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter, PerTensorScaleParameter

from ...errors import CheckpointError
from ...linear.op import nvfp4_linear, prepare
from ...nvfp4.format import BLOCK
from ...nvfp4.scheme import TensorNames
from ..loading import MISSING, WEIGHT_ALLOWED, check_block_scales, check_global_scales, checked, nan_filled


@register_weight_loader_v2_supported_method
class Nvfp4LinearMethod(LinearMethodBase):
    """A column-, row- or merged-parallel linear layer, or the output matrix, with NVFP4 weights.

    After loading the layer holds what the op's ``prepare`` made of its weights: ``weight`` uint8 [N/4, 2K], ``weight_scale``
    bfloat16 [N, K/16] and ``row_scale`` float32 [N]; and, where activations are rounded to NVFP4 as well, ``input_scale``
    float32 [].  A fused layer (q, k and v; gate and up) keeps each part's own global scale: ``row_scale`` says it once a row,
    so nothing is requantised.
    """

    def __init__(self, names: TensorNames, checkpoint_activations: str, use_nvfp4: bool, prefix: str) -> None:
        self.names = names
        self.has_input_scale = checkpoint_activations == "nvfp4"
        self.use_nvfp4 = use_nvfp4
        self.prefix = prefix
        self.loaded: set[str] = set()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        if input_size_per_partition % BLOCK:
            raise CheckpointError(
                f"{self.prefix}.{self.names.weight}",
                f"{input_size_per_partition} input features a rank (of {input_size})",
                f"a multiple of {BLOCK}",
            )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = rows = sum(output_partition_sizes)
        loader = extra_weight_attrs["weight_loader"]
        parts = len(output_partition_sizes)

        def register(name: str, data: torch.Tensor, cls: type, **dims: int) -> None:
            layer.register_parameter(name, cls(data=data, weight_loader=self._loader(name, loader), **dims))

        columns = {"input_dim": 1, "output_dim": 0}
        weight, scale = self._allocate(rows, input_size_per_partition)
        register(self.names.weight, weight, ModelWeightParameter, **columns)
        register(self.names.scale, scale, ModelWeightParameter, **columns)
        register(self.names.global_scale, nan_filled((parts,), torch.float32), PerTensorScaleParameter)
        if self.has_input_scale:
            register(self.names.input_scale, nan_filled((parts,), torch.float32), PerTensorScaleParameter)
        self._prepare(layer, params_dtype)

    def _prepare(self, layer: torch.nn.Module, tokens: torch.dtype) -> None:
        """What the layer's kernels need before any weight is read: the CPU's nothing."""

    def _allocate(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the checkpoint's tensors: codes uint8 [N, K/2], scales float8_e4m3fn [N, K/16], all NaN."""
        return torch.empty(rows, columns // 2, dtype=torch.uint8), nan_filled((rows, columns // BLOCK), torch.float8_e4m3fn)

    def _loader(self, name: str, loader: Callable) -> Callable:
        def where(shard_id: object = None, **_: object) -> str:
            return f"{self.prefix}.{name}" + ("" if shard_id is None else f" (part {shard_id})")

        return checked(loader, where, lambda *args, **kwargs: self.loaded.add(name))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        names = self.names
        if names.weight not in self.loaded:
            raise CheckpointError(f"{self.prefix}.{names.weight}", MISSING, WEIGHT_ALLOWED)
        weight, scale = getattr(layer, names.weight).data, getattr(layer, names.scale).data
        global_scale = getattr(layer, names.global_scale).data
        check_block_scales(scale.unsqueeze(0), lambda expert, row: f"{self.prefix}.{names.scale}")
        check_global_scales(global_scale, lambda part: f"{self.prefix}.{names.global_scale} (part {part})")
        if names.reciprocal:
            global_scale = global_scale.reciprocal()

        input_scale = None
        if self.use_nvfp4:
            if not self.has_input_scale:
                raise CheckpointError(
                    f"{self.prefix}.{names.input_scale}",
                    MISSING,
                    "linear.activations: bf16, or a W4A4 checkpoint",
                )
            scales = getattr(layer, names.input_scale).data
            check_global_scales(scales, lambda part: f"{self.prefix}.{names.input_scale} (part {part})")
            # The parts of a fused layer see one input: the widest range of the parts covers it.
            input_scale = scales.min().reciprocal() if names.reciprocal else scales.max()
        for name in (names.weight, names.scale, names.global_scale, names.input_scale):
            if hasattr(layer, name):
                delattr(layer, name)
        self._keep(layer, weight, scale, global_scale)
        layer.input_scale = input_scale

    def _keep(self, layer: torch.nn.Module, weight: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> None:
        """Give the layer its tensors, which it no longer has, in the form that ``apply`` wants; ``global_scale``: float32 [parts]."""
        widths = torch.tensor(layer.logical_widths, device=global_scale.device)
        weight, scale, row_scale = prepare(weight, scale, global_scale.repeat_interleave(widths))
        layer.weight = Parameter(weight, requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)
        layer.row_scale = Parameter(row_scale, requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nvfp4_linear(x, layer.weight, layer.weight_scale, layer.row_scale, bias, layer.input_scale)
