"""NVFP4 mixture-of-experts layers in vLLM on this package's MoE op: loading, checking, and the CPU's way to keep and apply weights.

:mod:`.moe_cuda` has the GPU's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.utils import set_weight_attrs

from ...errors import CheckpointError, UnsupportedLayerError
from ...moe.op import nvfp4_moe
from ...moe.problem import Activation
from ...nvfp4.format import BLOCK
from ...nvfp4.scheme import TensorNames
from ...nvfp4.unscaled import to_planes
from ..loading import MISSING, WEIGHT_ALLOWED, check_block_scales, check_global_scales, checked, nan_filled


def activation_of(moe: FusedMoEConfig) -> Activation:
    """The function between a layer's projections. Raises PluginError (a ValueError) where this package has none of that name."""
    return Activation.parse(moe.activation.value, alpha=moe.swiglu_alpha, beta=moe.swiglu_beta, limit=moe.swiglu_limit)


class Nvfp4MoEMethod(FusedMoEMethodBase):
    """The routed experts of one layer.  Routing, shared experts and reductions stay vLLM's.

    After loading the layer holds, for its E local experts of width I and in the form of ``to_planes``: ``w13_weight`` uint8
    [E, 2I/4, 2H] (gate rows, then up rows; [E, I/4, 2H] without a gate), ``w2_weight`` uint8 [E, H/4, 2I], their block scales
    ``w13_weight_scale`` and ``w2_weight_scale`` (bfloat16, K/16 columns); and their global scales ``w13_scale_2`` float32
    [E, 2 or 1] and ``w2_scale_2`` float32 [E].  Gate and up keep their own global scale each.
    """

    def __init__(self, names: TensorNames, checkpoint_activations: str, use_nvfp4: bool, prefix: str, moe_config: FusedMoEConfig) -> None:
        super().__init__(moe_config)
        self.names = names
        self.has_input_scale = checkpoint_activations == "nvfp4"
        self.use_nvfp4 = use_nvfp4
        self.prefix = prefix
        self.loaded: dict[str, set[tuple[int, str]]] = {}
        try:
            self.activation = activation_of(moe_config)
        except ValueError as error:
            found = f"activation {moe_config.activation.value!r}"
            raise UnsupportedLayerError(prefix, found, f"{error}; or moe.provider: engine") from None
        if moe_config.moe_parallel_config.enable_eplb:
            raise UnsupportedLayerError(
                prefix,
                "--enable-eplb with the torch provider",
                "no EPLB: the experts of this provider do not move between ranks; drop --enable-eplb, or set moe.provider to engine",
            )
        if moe_config.has_bias:
            raise UnsupportedLayerError(prefix, "experts with a bias", "experts without bias, or moe.provider: engine")

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        for what, size in (("hidden size", hidden_size), ("expert width a rank", intermediate_size_per_partition)):
            if size % BLOCK:
                raise CheckpointError(f"{self.prefix}: {what}", str(size), f"a multiple of {BLOCK}")
        layer.num_experts = num_experts
        layer.params_dtype = params_dtype
        halves = 2 if self.moe.is_act_and_mul else 1
        rows = {"w13": halves * intermediate_size_per_partition, "w2": hidden_size}
        columns = {"w13": hidden_size, "w2": intermediate_size_per_partition}
        for gemm in ("w13", "w2"):
            parts = (num_experts, halves) if gemm == "w13" else (num_experts,)
            weight, scale = self._allocate(gemm, num_experts, rows[gemm], columns[gemm])
            self._register(layer, gemm, self.names.weight, weight, layer.weight_loader)
            # vLLM slices tensors marked "block" by rank exactly as it slices the weights.
            self._register(layer, gemm, self.names.scale, scale, layer.weight_loader, quant_method="block")
            for name in (self.names.global_scale, self.names.input_scale):
                self._register(layer, gemm, name, nan_filled(parts, torch.float32), self._scalar_loader(layer))
        self._prepare(layer)

    def _prepare(self, layer: RoutedExperts) -> None:
        """What the layer's kernels need before any weight is read: the CPU's nothing."""

    def _allocate(self, gemm: str, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the checkpoint's tensors of one projection: codes uint8 [E, N, K/2], scales float8_e4m3fn [E, N, K/16], all NaN."""
        weight = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
        return weight, nan_filled((experts, rows, columns // BLOCK), torch.float8_e4m3fn)

    def _register(self, layer: RoutedExperts, gemm: str, suffix: str, data: torch.Tensor, loader: Any, **attributes: Any) -> None:
        name = f"{gemm}_{suffix}"
        seen = self.loaded.setdefault(name, set())

        # vLLM gives whether to return success by name; its reload gives all by position.
        def where(weight_name: str, shard_id: str, expert_id: int, *_: Any, **__: Any) -> str:
            return self._tensor_name(layer, expert_id, shard_id, suffix)

        def note(weight_name: str, shard_id: str, expert_id: int, *_: Any, **__: Any) -> None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                seen.add((local, shard_id))

        parameter = Parameter(data, requires_grad=False)
        layer.register_parameter(name, parameter)
        set_weight_attrs(parameter, {"weight_loader": checked(loader, where, note), **attributes})

    @staticmethod
    def _scalar_loader(layer: RoutedExperts) -> Any:
        """vLLM's generic loader broadcasts a scalar over gate and up; this one keeps them apart."""

        def load(
            param: torch.Tensor, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int, return_success: bool = False
        ) -> bool | None:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                value = loaded_weight.reshape(())
                if shard_id == "w2":
                    param.data[local] = value
                else:
                    param.data[local, 0 if shard_id == "w1" else 1] = value
            return local != -1 if return_success else None

        load.supports_moe_loading = True
        return load

    def _tensor_name(self, layer: RoutedExperts, expert: int, shard_id: str, suffix: str) -> str:
        """Checkpoint name of a tensor of a global expert."""
        # An expert without a gate stores its one input projection as vLLM's "w1", under the name of ckpt_gate_proj_name.
        projection = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}[shard_id]
        return f"{self.prefix}.{expert}.{projection}.{suffix}"

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        names = self.names
        self._check(layer)
        for gemm in ("w13", "w2"):
            weight = self._take(layer, f"{gemm}_{names.weight}")
            scale = self._take(layer, f"{gemm}_{names.scale}")
            scale_2 = self._take(layer, f"{gemm}_{names.global_scale}")
            input_scale = self._take(layer, f"{gemm}_{names.input_scale}")
            if names.reciprocal:
                scale_2, input_scale = scale_2.reciprocal(), input_scale.reciprocal()
            # This activation's checkpoints interleave gate and up rows; the ops want all gates, then all ups.
            interleaved = gemm == "w13" and self.moe.activation is MoEActivation.SWIGLUOAI
            self._keep(layer, gemm, weight, scale, scale_2, interleaved)
            setattr(layer, f"{gemm}_activation_scale", input_scale if self.use_nvfp4 else None)

    def _keep(
        self, layer: RoutedExperts, gemm: str, weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor, interleaved: bool
    ) -> None:
        """Give the layer one projection's tensors, which it no longer has, in the form that ``apply`` wants."""
        if interleaved:
            weight, scale = (torch.cat((t[:, 0::2], t[:, 1::2]), dim=1) for t in (weight, scale))
        weight, scale = to_planes(weight, scale)
        setattr(layer, f"{gemm}_weight", Parameter(weight, requires_grad=False))
        setattr(layer, f"{gemm}_weight_scale", Parameter(scale, requires_grad=False))
        setattr(layer, f"{gemm}_scale_2", Parameter(scale_2, requires_grad=False))

    @staticmethod
    def _take(layer: RoutedExperts, name: str) -> torch.Tensor:
        tensor = getattr(layer, name).data
        delattr(layer, name)
        return tensor

    def _check(self, layer: RoutedExperts) -> None:
        """Refuse what is missing or no number.  Raises CheckpointError with the tensor's checkpoint name."""
        names, width = self.names, self.moe.intermediate_size_per_partition
        loaded = {name: set(seen) for name, seen in self.loaded.items()}
        for seen in self.loaded.values():
            seen.clear()  # weights that are loaded again have to come whole again
        to_global = self._global_ids(layer)
        shards = {"w13": ("w1", "w3") if self.moe.is_act_and_mul else ("w1",), "w2": ("w2",)}
        for gemm, ids in shards.items():

            def name(suffix: str, expert: int, part: int, ids: tuple[str, ...] = ids) -> str:
                return self._tensor_name(layer, to_global[expert], ids[part], suffix)

            seen = loaded[f"{gemm}_{names.weight}"]
            for expert, part in itertools.product(range(layer.local_num_experts), range(len(ids))):
                if (expert, ids[part]) not in seen:
                    raise CheckpointError(name(names.weight, expert, part), MISSING, WEIGHT_ALLOWED)
            rows_a_part = width if gemm == "w13" else layer.hidden_size
            scale = getattr(layer, f"{gemm}_{names.scale}").data
            check_block_scales(scale, lambda expert, row, name=name, rows=rows_a_part: name(names.scale, expert, row // rows))
            for suffix in (names.global_scale, names.input_scale) if self.use_nvfp4 else (names.global_scale,):
                scales = getattr(layer, f"{gemm}_{suffix}").data
                check_global_scales(scales, lambda expert, part=0, name=name, suffix=suffix: name(suffix, expert, part))

    @staticmethod
    def _global_ids(layer: RoutedExperts) -> list[int]:
        """The global id of each local expert."""
        mapping = layer.expert_map_manager.expert_map
        if mapping is None:
            return list(range(layer.local_num_experts))
        local = sorted((int(slot), expert) for expert, slot in enumerate(mapping.tolist()) if slot >= 0)
        return [expert for _, expert in local]

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None  # Only vLLM's own kernels read it.

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return nvfp4_moe(
            x,
            layer.w13_weight,
            layer.w13_weight_scale,
            layer.w13_scale_2,
            layer.w2_weight,
            layer.w2_weight_scale,
            layer.w2_scale_2,
            topk_weights,
            topk_ids,
            self.activation,
            expert_map=layer.expert_map,
            w13_input_scale=layer.w13_activation_scale,
            w2_input_scale=layer.w2_activation_scale,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )
