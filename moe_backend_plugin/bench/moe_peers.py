"""vLLM's own expert layers as vLLM builds them, for ``moe-backend bench moe``.

The layer comes from vLLM's factory and keeps its weights and kernel as after loading a ModelOpt checkpoint; what is called is the
layer's quantisation method, with the router's choice given. Expert parallelism needs no second process: the factory is told that there
are ``ep`` ranks, of which this is the first, and nothing is communicated in the method.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..nvfp4.unscaled import unscaled

if TYPE_CHECKING:
    from .moe import Checkpoint, Layer, Model

BACKENDS = {"marlin": "marlin", "humming": "humming", "triton_bf16": "triton"}
"""vLLM's ``--moe-backend`` of each provider."""
SCHEME = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": []}}
EXPERTS_AT_A_TIME = 8


class Engine:
    """As much of vLLM as a layer needs: one rank, the workspace, and a configuration for each backend. Needs vLLM, once a process."""

    def __init__(self, device: torch.device) -> None:
        from vllm.config import CompilationConfig, KernelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
        from vllm.distributed import parallel_state
        from vllm.v1.worker.workspace import init_workspace_manager

        self.device = device
        self.configs = {
            backend: VllmConfig(
                kernel_config=KernelConfig(moe_backend=backend),
                parallel_config=ParallelConfig(enable_expert_parallel=True),
                compilation_config=CompilationConfig(mode=0),
            )
            for backend in BACKENDS.values()
        }
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with set_current_vllm_config(self.configs["marlin"]):
            parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
            parallel_state.initialize_model_parallel(1, 1, backend="gloo")
        init_workspace_manager(device)
        self._numbers = itertools.count()

    def layers(self, provider: str, model: Model, checkpoint: Checkpoint, copies: int) -> list[Layer]:
        """``copies`` layers of ``provider`` ("marlin", "humming", "triton_bf16"), each with weights of its own."""
        return [self._layer(BACKENDS[provider], model, checkpoint) for _ in range(copies)]

    def _layer(self, backend: str, model: Model, checkpoint: Checkpoint) -> Layer:
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory
        from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

        config = self.configs[backend]
        quantized = backend != "triton"
        with set_current_vllm_config(config), self.device:
            experts = FusedMoEFactory(
                num_experts=model.experts,
                top_k=model.top_k,
                hidden_size=model.hidden,
                intermediate_size=model.intermediate,
                params_dtype=torch.bfloat16,
                quant_config=ModelOptNvFp4Config.from_config(SCHEME) if quantized else None,
                tp_size=model.ep,
                dp_size=1,
                pcp_size=1,
                prefix=f"model.layers.{next(self._numbers)}.mlp.experts",
                **_activation(model),
            ).routed_experts
            with torch.no_grad():
                (_fill_nvfp4 if quantized else _fill_bf16)(experts, checkpoint)
            experts.quant_method.process_weights_after_loading(experts)

        def run(x: Tensor, router: Tensor, ids: Tensor, out: Tensor) -> Tensor:
            with set_forward_context(None, config, num_tokens=x.shape[0]):  # Humming asks it for the number of ranks
                return experts.quant_method.apply(experts, x, router, ids, None, None)

        return run

    def forget(self) -> None:
        """Drop the layers that vLLM's configurations know by name; their weights go with the last reference."""
        for config in self.configs.values():
            config.compilation_config.static_forward_context.clear()
            config.compilation_config.static_all_moe_layers.clear()

    def close(self) -> None:
        from vllm.distributed import parallel_state
        from vllm.v1.worker.workspace import reset_workspace_manager

        self.forget()
        reset_workspace_manager()
        with contextlib.suppress(Exception):  # the device may be lost
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


def _activation(model: Model) -> dict[str, object]:
    """The factory's arguments; gate and up lie in halves, which vLLM calls "uninterleave" for swigluoai."""
    a = model.activation
    if a.kind == "silu":
        return {"activation": "silu", "swiglu_limit": a.limit}
    if a.kind == "swigluoai":
        return {"activation": "swigluoai_uninterleave", "swiglu_alpha": a.alpha, "swiglu_beta": a.beta, "swiglu_limit": a.limit}
    raise ValueError(f"activation: found {a.kind}; allowed: silu, swigluoai")


def _fill_nvfp4(experts: torch.nn.Module, checkpoint: Checkpoint) -> None:
    for gemm, (weight, scale, scale_2) in (("w13", checkpoint[:3]), ("w2", checkpoint[3:])):
        parts = {"weight": weight, "weight_scale": scale, "weight_scale_2": scale_2}
        for name, source in parts.items():
            getattr(experts, f"{gemm}_{name}").data.copy_(source)
        getattr(experts, f"{gemm}_input_scale").data.fill_(1.0)  # of activations, which stay bf16


def _fill_bf16(experts: torch.nn.Module, checkpoint: Checkpoint) -> None:
    for gemm, (weight, scale, scale_2) in (("w13", checkpoint[:3]), ("w2", checkpoint[3:])):
        target = getattr(experts, f"{gemm}_weight").data
        for at in range(0, len(weight), EXPERTS_AT_A_TIME):
            some = slice(at, at + EXPERTS_AT_A_TIME)
            values = unscaled(weight[some], scale[some], torch.bfloat16)
            # Powers of two, the same for gate and up: exact.
            target[some].copy_(values.mul_(scale_2[some].reshape(len(values), -1)[:, :1, None]))
