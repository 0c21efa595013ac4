"""The MoE runner of this package in SGLang, and what the experts of a layer compute.

SGLang's standard dispatcher hands over the tokens and, under expert parallelism, ids of this rank's experts with -1 for the others; shared
experts that are fused into the routed ones are the last of them. Router weights come with ``routed_scaling_factor`` applied: SGLang does
that in its top-k where a method says ``fuse_routed_scaling_factor_in_topk``, as both methods of this package do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore, MoeQuantInfo, MoeRunnerConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_a2a_backend, get_moe_runner_backend, resolve_moe_runner_backend
from sglang.srt.runtime_context import get_flags, process_model_config

from ...errors import PluginError, UnsupportedLayerError
from ...moe import cuda
from ...moe.op import nvfp4_moe, nvfp4_moe_packed
from ...moe.problem import MoEProblem
from ...nvfp4.scheme import TensorNames
from .. import experts
from ..experts import INDEX
from . import MOE_BACKEND, arguments, settings
from .activation import activation_of
from .weights import ExpertWeights

logger = logging.getLogger("sglang.moe_backend_plugin")


def register_core(module: Any) -> None:
    """Put the runner into SGLang's registry of cores; ``module`` is the one that holds it."""
    try:
        module.register_moe_runner_core(MOE_BACKEND, PluginRunnerCore)
    except ValueError as error:
        arguments.claim_failed(f"another plugin's runner ({error})")


def selected() -> bool:
    """Whether the runner of the model that is being built (a draft model may have another) is this package's."""
    return get_moe_runner_backend().value == MOE_BACKEND


def of_a_draft() -> bool:
    """Whether the model that is being built is a draft model."""
    return get_flags().moe.in_speculative_scope


def with_triton(create: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call SGLang's ``create_moe_runner`` as if the flag said triton.

    For FP8 experts SGLang makes no runner where the name is none that it knows; beside its own NVFP4 runners it takes Triton's.
    """
    flags = get_flags().moe
    chosen = flags.runner_backend
    flags.runner_backend = MoeRunnerBackend.TRITON
    try:
        return create(*args, **kwargs)
    finally:
        flags.runner_backend = chosen


@dataclass
class PluginQuantInfo(MoeQuantInfo):
    """The weights of one layer on their way to :class:`PluginRunnerCore`."""

    layer: torch.nn.Module
    weights: ExpertWeights

    def apply(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        layer, problem = self.layer, self.weights.problem
        if self.weights.provider == "cutedsl":
            tensors = cuda.Weights(layer.w13_weight, layer.w13_scale_2, layer.w2_weight, layer.w2_scale_2)
            return nvfp4_moe_packed(x, tensors, topk_weights, topk_ids, problem)
        return nvfp4_moe(
            *(x, layer.w13_weight, layer.w13_planes_scale, layer.w13_scale_2, layer.w2_weight, layer.w2_planes_scale, layer.w2_scale_2),
            *(topk_weights, topk_ids, problem.activation),
            apply_router_weight_on_input=problem.apply_router_weight_on_input,
        )


class PluginRunnerCore(DispatchMoeRunnerCore):
    """``--moe-runner-backend cutedsl``: one call of this package's kernels a layer."""

    def __init__(self, config: MoeRunnerConfig) -> None:
        super().__init__(config)
        self._backend = resolve_moe_runner_backend(MOE_BACKEND)

    @property
    def runner_backend(self) -> Any:
        return self._backend

    def run_from_dispatch(self, dispatch_output: Any, quant_info: Any, runner_config: MoeRunnerConfig, hooks: Any = None) -> Any:
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
        from sglang.srt.layers.moe.topk import TopKOutputChecker

        if not isinstance(quant_info, PluginQuantInfo):
            allowed = "NVFP4 experts of a ModelOpt or compressed-tensors checkpoint"
            raise UnsupportedLayerError(arguments.FLAG, f"experts described by {type(quant_info).__name__}", allowed)
        topk = dispatch_output.topk_output
        if TopKOutputChecker.format_is_bypassed(topk):
            topk = topk.to_standard()
        # What is asked of the tensors here they already are, but for a model with a router of its own.
        out = quant_info.apply(
            dispatch_output.hidden_states.contiguous(), topk.topk_weights.float().contiguous(), topk.topk_ids.to(INDEX).contiguous()
        )
        return StandardCombineInput(hidden_states=out)


def new_weights(
    layer: torch.nn.Module, names: TensorNames, experts: int, hidden: int, intermediate: int, tokens: torch.dtype, biased: bool
) -> ExpertWeights:
    """The weights of one layer, after checking that somebody serves it, with its kernels compiled and the workspace large enough.

    Raises:
        UnsupportedLayerError: nobody does.
    """
    where, config = f"{layer.layer_name}", layer.moe_runner_config
    choice = settings.moe_provider(where)
    allowed = "another --moe-runner-backend"
    if not get_moe_a2a_backend().is_none():
        raise UnsupportedLayerError(where, f"--moe-a2a-backend {get_moe_a2a_backend().value}", "none")
    if biased or config.no_combine or getattr(layer, "inference_moe_w13_interleaved", False):
        found = "experts with a bias" if biased else "no_combine" if config.no_combine else "gate and up rows that alternate"
        raise UnsupportedLayerError(where, found, allowed)
    try:
        problem = problem_of(config, experts, hidden, intermediate, top_k_of(layer))
    except PluginError as error:
        raise UnsupportedLayerError(where, str(error), allowed) from None
    if choice.provider == "cutedsl":
        if (reason := cuda.unsupported_reason(problem, tokens)) is not None:
            raise UnsupportedLayerError(where, reason, allowed)
        # Before any weight is read: a compiler that does not work should stop the server at once.
        _prepare(problem, tokens, torch.cuda.current_device(), settings.largest_call())
    _say(choice.provider, choice.reason)
    return ExpertWeights(names, choice.provider, problem)


def top_k_of(layer: torch.nn.Module) -> int:
    """Experts a token. Llama-4, OLMoE and Hunyuan tell only their router: then by the model's configuration, 0 if that does not say."""
    if layer.moe_runner_config.top_k is not None or of_a_draft():  # the configuration is the target's
        return layer.moe_runner_config.top_k or 0
    text = process_model_config().hf_text_config
    found = getattr(text, "moe_topk", None) or getattr(text, "num_experts_per_tok", None) or 0
    return found[layer.layer_id] if isinstance(found, list) else found


def problem_of(config: MoeRunnerConfig, experts: int, hidden: int, intermediate: int, top_k: int) -> MoEProblem:
    """What a layer computes on this rank, which has ``experts``; ids are those of its own. Raises PluginError on what is not served."""
    return MoEProblem(
        num_experts=max(config.num_experts or 0, experts),  # which tokens come here, and what was tuned for such a rank
        num_local_experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        top_k=top_k,
        activation=activation_of(config),
        apply_router_weight_on_input=config.apply_router_weight_on_input,
    )


@cache
def _prepare(problem: MoEProblem, tokens: torch.dtype, device: int, max_tokens: int) -> None:
    """Compile or load every kernel that layers of this problem launch, and make the arena large enough; once for all of them."""
    experts.prepare(settings.plugin_config(), problem, tokens, torch.device("cuda", device), max_tokens, False, logger.info)


@cache
def _say(provider: str, reason: str) -> None:
    logger.info("NVFP4 moe layers are served by: %s (%s)", provider, reason)
