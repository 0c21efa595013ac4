"""NVFP4 mixture-of-experts layers in vLLM on a Hopper GPU: which ones this package's kernels serve, their weights, and the calls.

A layer whose tokens stay on their rank (one GPU, tensor parallel, expert parallel under one data-parallel rank) is one call of the
kernels. Where vLLM moves tokens between ranks, the kernels are the experts of vLLM's own modular kernel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch.nn import Parameter
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize, maybe_roundup_layer_hidden_size
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from ...errors import PluginError
from ...moe import cuda
from ...moe.op import nvfp4_moe_packed
from ...moe.problem import MoEProblem
from .. import experts
from ..experts import INDEX
from ..packing import allocate, rearrange
from .moe import Nvfp4MoEMethod, activation_of
from .settings import plugin_config

logger = init_logger("vllm.moe_backend_plugin")

ALL2ALL = ("allgather_reducescatter", "deepep_high_throughput")
"""vLLM's ways to move tokens between ranks that hand them over as the kernels want: bf16 or fp16 rows, ids of the whole model."""
_SECONDS_BETWEEN_LINES = 5.0


# --- which layers ----------------------------------------------------------------------------------------------------------------------


def engine_reason(layer: RoutedExperts) -> str | None:
    """What vLLM is asked to do with this layer that no kernels but its own can, or None."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    if parallel.enable_eplb:
        return "--enable-eplb, and with these kernels experts do not move between ranks"
    if moe.has_bias:
        return "experts with a bias, which these kernels do not add"
    if moe.is_lora_enabled:
        return "--enable-lora, which these kernels do not apply to experts"
    if moe.moe_backend != "auto":
        return f"--moe-backend {moe.moe_backend} names one of vLLM's own kernels"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set, and these kernels sum in another order for another number of tokens"
    if layer.expert_map_manager.num_fused_shared_experts:
        return "shared experts fused into the routed ones"
    return None


def unsupported_reason(layer: RoutedExperts, use_nvfp4: bool) -> str | None:
    """Why the kernels cannot serve this layer, or None. ``use_nvfp4``: activations are to be rounded to NVFP4."""
    if reason := engine_reason(layer):
        return reason
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    if parallel.use_passthrough_all2all or (parallel.use_all2all_kernels and parallel.all2all_backend not in ALL2ALL):
        return f"--all2all-backend {parallel.all2all_backend}; these kernels work with {' and '.join(ALL2ALL)}"
    if maybe_roundup_layer_hidden_size(moe.hidden_dim, moe.in_dtype, parallel) != moe.hidden_dim:
        return f"--all2all-backend {parallel.all2all_backend} pads the hidden size {moe.hidden_dim}"
    try:
        problem = problem_of(moe, use_nvfp4=use_nvfp4, on_input=layer.apply_router_weight_on_input)
    except PluginError as error:
        return str(error)
    return cuda.unsupported_reason(problem, moe.in_dtype)


def problem_of(moe: FusedMoEConfig, *, use_nvfp4: bool, on_input: bool) -> MoEProblem:
    """What a layer computes on this rank. Raises PluginError on sizes and activations that this package does not have."""
    return MoEProblem(
        num_experts=moe.num_experts,
        num_local_experts=moe.num_local_experts,
        hidden=moe.hidden_dim,
        intermediate=moe.intermediate_size_per_partition,
        top_k=moe.experts_per_token,
        activation=activation_of(moe),
        activation_precision="nvfp4" if use_nvfp4 else "bf16",
        # vLLM's modular kernel multiplies before it sends the tokens on.
        apply_router_weight_on_input=on_input and not is_modular(moe.moe_parallel_config),
    )


def is_modular(parallel: FusedMoEParallelConfig) -> bool:
    """Whether tokens move between ranks on their way to the experts."""
    return parallel.use_all2all_kernels or parallel.dp_size > 1 or parallel.is_sequence_parallel


def most_tokens(moe: FusedMoEConfig) -> int:
    """Tokens of the largest call: the largest batch, from every rank whose tokens are gathered here."""
    parallel = moe.moe_parallel_config
    # Under sequence parallelism a batch is cut into equal parts, the last one padded.
    batch = -(-moe.max_num_tokens // parallel.sp_size) * parallel.sp_size
    return batch * parallel.dp_size * parallel.pcp_size


# --- before the first request ------------------------------------------------------------------------------------------------------------


def current_device() -> torch.device:
    return torch.device("cuda", torch.accelerator.current_device_index())


@cache
def prepare(problem: MoEProblem, tokens: torch.dtype, device: torch.device, max_tokens: int, mapped: bool) -> None:
    """Compile or load every kernel that layers of this problem launch, and make the arena large enough; once for all of them."""
    experts.prepare(plugin_config(), problem, tokens, device, max_tokens, mapped, logger.info_once)


# --- weights ---------------------------------------------------------------------------------------------------------------------------


class Progress:
    """Says every few seconds how many layers have been rearranged, and at the end how long all of them took."""

    def __init__(self) -> None:
        self.layers = self.done = self.weights = 0
        self.seconds = self.said = 0.0

    def expect_layer(self) -> None:
        self.layers += 1

    @contextmanager
    def layer(self, weights: int) -> Iterator[None]:
        """Around one layer of so many weights."""
        start = time.monotonic()
        self.said = self.said or start
        yield
        self.done += 1
        self.weights += weights
        if self.done >= self.layers and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds += now - start
        if self.done >= self.layers:
            text = "Rearranged the experts of %d layers for Hopper: %.2f billion NVFP4 weights in %.1f s"
            logger.info_once(text, self.done, self.weights / 1e9, self.seconds)
            self.__init__()
        elif now - self.said >= _SECONDS_BETWEEN_LINES:
            logger.info_once("Rearranging experts for Hopper: layer %d of %d", self.done, self.layers)
            self.said = now


_progress = Progress()


# --- the layer -------------------------------------------------------------------------------------------------------------------------


class HopperMoEMethod(Nvfp4MoEMethod):
    """The routed experts of one layer on a Hopper GPU, one that :func:`unsupported_reason` lets through.

    After loading the layer holds, for its E local experts: ``w13_weight`` and ``w2_weight``, uint8 in the order of ``nvfp4.hopper``,
    and their global scales ``w13_scale_2`` float32 [E, 2 or 1] and ``w2_scale_2`` float32 [E].
    """

    problem: MoEProblem

    def _prepare(self, layer: RoutedExperts) -> None:
        moe = self.moe
        self.problem = problem_of(moe, use_nvfp4=self.use_nvfp4, on_input=layer.apply_router_weight_on_input)
        # A compiler that does not work should stop the server at once.
        prepare(self.problem, moe.in_dtype, current_device(), most_tokens(moe), layer.expert_map is not None)
        _progress.expect_layer()

    def _allocate(self, gemm: str, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        return allocate(experts, rows, columns, self._gated(gemm))

    def _gated(self, gemm: str) -> bool:
        return gemm == "w13" and self.activation.gated

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        p = self.problem
        with _progress.layer(p.num_local_experts * p.hidden * (p.w13_rows + p.intermediate)):
            super().process_weights_after_loading(layer)
        if is_modular(self.moe.moe_parallel_config):
            self.moe_quant_config = FusedMoEQuantConfig.make(g1_alphas=layer.w13_scale_2, g2_alphas=layer.w2_scale_2, weight_dtype="nvfp4")
            transport = maybe_make_prepare_finalize(
                self.moe, self.moe_quant_config, routing_tables=layer._expert_routing_tables(), allow_new_interface=True
            )
            assert transport is not None
            logger.info_once("NVFP4 experts get their tokens through %s", type(transport).__name__)
            self.moe_kernel = mk.FusedMoEKernel(transport, HopperExperts(self.moe, self.moe_quant_config, self.problem))

    def _keep(
        self, layer: RoutedExperts, gemm: str, weight: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor, interleaved: bool
    ) -> None:
        packed = rearrange(weight, scale, gated=self._gated(gemm), interleaved=interleaved)
        setattr(layer, f"{gemm}_weight", Parameter(packed, requires_grad=False))
        setattr(layer, f"{gemm}_scale_2", Parameter(scale_2, requires_grad=False))

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return super().topk_indices_dtype or INDEX

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.moe_kernel is not None:
            return self.moe_kernel.apply(
                x,
                layer.w13_weight,
                layer.w2_weight,
                topk_weights,
                topk_ids,
                activation=layer.activation,
                global_num_experts=layer.global_num_experts,
                expert_map=layer.expert_map,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )
        weights = cuda.Weights(layer.w13_weight, layer.w13_scale_2, layer.w2_weight, layer.w2_scale_2)
        # What is asked of the tensors here they already are, but for a model with a router of its own.
        return nvfp4_moe_packed(
            x.contiguous(), weights, topk_weights.float().contiguous(), topk_ids.contiguous(), self.problem, layer.expert_map
        )


class HopperExperts(mk.FusedMoEExpertsModular):
    """The experts inside vLLM's modular kernel, which brings the tokens of other ranks and takes the results back.

    vLLM's own choice of kernel never asks this class what it supports: :func:`unsupported_reason` has.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig, problem: MoEProblem) -> None:
        super().__init__(moe_config, quant_config)
        self.problem = problem

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return True

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        return w1.shape[0], a1.shape[0], self.problem.w13_rows, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)  # the arena has the rest

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        if apply_router_weight_on_input:  # vLLM did, and the sum is of single experts
            topk_weights = torch.ones_like(topk_weights)
        cuda.fused_moe(
            hidden_states.contiguous(),
            cuda.Weights(w1, self.g1_alphas, w2, self.g2_alphas),
            topk_weights.float().contiguous(),
            topk_ids.to(INDEX).contiguous(),  # DeepEP's are int64
            self.problem,
            output,
            expert_map,
        )
