"""What the plugin relies on in SGLang where its own code and type annotations do not tell, and the releases that must have it."""

from __future__ import annotations

from .signatures import Call
from .usage import Use
from .wheels import Release

RELEASES = (Release("sglang", "0.5.22", "sglang"), Release("sglang", "0.5.23", "sglang"))
ENGINE = "sglang"

SRT = "sglang.srt"
MOE = f"{SRT}.layers.moe"
FUSED_MOE = f"{MOE}.fused_moe_triton.layer.FusedMoE"
RUNNER_CONFIG = f"{MOE}.moe_runner.base.MoeRunnerConfig"
MODELOPT = f"{SRT}.layers.quantization.modelopt_quant"
FP8 = f"{SRT}.layers.quantization.fp8.Fp8MoEMethod"
CT = f"{SRT}.layers.quantization.compressed_tensors"
LINEAR = f"{SRT}.layers.attention.linear"
DISPATCHER = f"{LINEAR}.gdn_backend.GDNKernelDispatcher"
FIELDS = f"{SRT}.arg_groups.fields"

VIEWS = tuple(
    f"{SRT}.{view}()."
    for view in (
        *("arg_groups.model_override_base.resolved_view", "runtime_context.get_exec", "runtime_context.get_model"),
        *("runtime_context.get_flags", "runtime_context.get_parallel", "runtime_context.get_schedule"),
    )
)
"""Their attributes are the fields of the arguments, which are in USES under the namespaces that declare them."""


def attributes(owner: str, names: str) -> list[Use]:
    return [Use(f"{owner}.{name}") for name in names.split()]


USES: list[Use] = [
    # register() and hooks.py
    Use(f"{SRT}.arg_groups.choices.add_moe_runner_backend_choices"),
    Use(f"{SRT}.arg_groups.choices.add_linear_attn_kernel_backend_choices"),
    Use(f"{MOE}.moe_runner.runner.register_moe_runner_core", Call(2)),
    Use(f"{SRT}.entrypoints.engine.Engine.server_args_class"),
    # Arguments that are read through views of what has been resolved, and through bags of what is published.
    *attributes(f"{FIELDS}.exec_.ExecMoe", "moe_runner_backend moe_a2a_backend enable_eplb ep_num_redundant_experts"),
    *attributes(f"{FIELDS}.exec_.ExecOverlap", "enable_two_batch_overlap"),
    *attributes(
        f"{FIELDS}.exec_.ExecMamba",
        "linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend enable_linear_replayssm",
    ),
    *attributes(f"{FIELDS}.model.Model", "quantization load_format"),
    *attributes(f"{FIELDS}.lora.Lora", "enable_lora lora_paths"),
    *attributes(f"{FIELDS}.schedule.Schedule", "chunked_prefill_size max_prefill_tokens"),
    *attributes(f"{FIELDS}.parallel.Parallel", "attn_dp_size pp_size"),
    *attributes(f"{FIELDS}.disagg.Disagg", "enable_pdmux"),
    *attributes(f"{FIELDS}.device.Device", "use_ray"),
    # The model's configuration, for the arguments and for what a layer is not told.
    *attributes(f"{SRT}.configs.model_config.ModelConfig", "quantization nvfp4_moe_meta hf_text_config"),
    *attributes(f"{SRT}.configs.linear_attn_model_registry.LinearAttnModelSpec", "backend_class_name"),
    # The runner of the model that is being built, and whether that is a draft.
    *attributes(f"{SRT}.runtime_context.MoeFlags", "runner_backend in_speculative_scope"),
    # The layer, which is a torch module wherever the plugin sees it.
    *attributes(FUSED_MOE, "layer_id layer_name moe_runner_config num_experts num_local_experts quant_method weight_loader"),
    Use(f"{FUSED_MOE}._map_global_expert_id_to_local_expert_id", Call(1)),
    *attributes(
        RUNNER_CONFIG,
        "activation is_gated top_k no_combine apply_router_weight_on_input gemm1_alpha gemm1_beta gemm1_clamp_limit swiglu_limit",
    ),
    Use(f"{MODELOPT}.ModelOptNvFp4FusedMoEMethod", Call(1)),
    *attributes(f"{MODELOPT}.ModelOptFp4Config", "is_checkpoint_nvfp4_serialized"),
    Use(f"{FP8}.is_fp4_expert"),
    Use(f"{CT}.schemes.CompressedTensorsMoEScheme.create_moe_runner", Call(2)),
    Use(f"{CT}.schemes.CompressedTensorsW4A16Nvfp4MoE.has_input_global_scale"),
    # What a dispatch hands over, and what a runner gives back.
    *attributes(f"{MOE}.token_dispatcher.standard.StandardDispatchOutput", "hidden_states topk_output"),
    *attributes(f"{MOE}.topk.StandardTopKOutput", "topk_weights topk_ids format"),
    Use(f"{MOE}.topk.BypassedTopKOutput.to_standard", Call(0)),
    # The GDN dispatcher as its constructor leaves it, and the model's states.
    *attributes(DISPATCHER, "decode_kernel verify_kernel verify_kernel_is_flashinfer tree_verify_kernel supports_packed_decode"),
    *attributes(f"{LINEAR}.gdn_backend.GDNAttnBackend", "kernel_dispatcher"),
    *attributes(f"{SRT}.mem_cache.memory_pool.MambaPool", "mamba_cache"),
    *attributes(f"{SRT}.mem_cache.memory_pool.MambaPool.State", "temporal"),
    *attributes(f"{SRT}.mem_cache.memory_pool.MambaPool.SpeculativeState", "intermediate_ssm"),
    *attributes(f"{SRT}.layers.radix_linear_attention.RadixLinearAttention", "dt_bias A_log head_k_dim head_v_dim num_k_heads num_v_heads"),
    *attributes(f"{SRT}.model_executor.model_runner.ModelRunner", "dtype is_draft_worker model req_to_token_pool"),
]

SIGNATURES: dict[str, str] = {
    # Exactly these parameters in this order, because the plugin passes them by position or takes their place.
    f"{DISPATCHER}.__init__": "decode_backend prefill_backend verify_backend",
    f"{LINEAR}.gdn_backend.GDNAttnBackend.__init__": "model_runner",
    f"{SRT}.arg_groups.resolution_hooks.register_resolution_hook": "name",
    f"{FUSED_MOE}.weight_loader": "param loaded_weight weight_name shard_id expert_id",
    f"{MODELOPT}.ModelOptNvFp4FusedMoEMethod.__init__": "quant_config",
    f"{CT}.compressed_tensors.CompressedTensorsConfig.get_moe_scheme": "layer layer_name",
    f"{FP8}.create_moe_runner": "layer moe_runner_config",
    f"{SRT}.ray.engine.RayEngine._launch_scheduler_processes": "server_args port_args run_scheduler_process_func placement_group",
}

VALUES: dict[str, object] = {
    f"{SRT}.plugins.GENERAL_PLUGINS_GROUP": "sglang.srt.plugins",
    f"{LINEAR}.utils.LinearAttnKernelBackend.CUSTOM": "custom",
    f"{LINEAR}.utils.LinearAttnKernelBackend.TRITON": "triton",
    f"{FIELDS}.exec_.ExecMamba.linear_attn_backend": "triton",
    f"{FIELDS}.exec_.ExecMoe.moe_a2a_backend": "none",
    f"{MOE}.fused_moe_triton.layer.FusedMoeWeightScaleSupported.BLOCK": "block",
    f"{MOE}.fused_moe_triton.layer.FusedMoeWeightScaleSupported.TENSOR": "tensor",
}

TEXTS: dict[str, tuple[str, ...]] = {
    # What the code of a function or class must say, as ``ast.unparse`` writes it: behaviour that has no name to hold on to.
    # Free slots are 1 .. size, and the pool has size + 1: the last slot is a request's.
    f"{SRT}.mem_cache.allocator.mamba.MambaSlotAllocator.clear": ("torch.arange(1, self.size + 1,",),
    f"{SRT}.mem_cache.memory_pool.MambaPool.__init__": ("size=(num_mamba_layers, size + 1) + temporal_state_shape",),
    # Slot 0 is nobody's, in this pool as in the one of requests, whose row 0 pads eager batches.
    f"{SRT}.mem_cache.memory_pool.ReqToTokenPool.__init__": ("self.free_slots = list(range(1, self._alloc_size))",),
    f"{SRT}.model_executor.forward_batch_info.ForwardBatch": ("self._pad_tensor_to_size(self.req_pool_indices, bs)",),
    # Padded rows of a graph have -1.
    f"{SRT}.layers.attention.hybrid_linear_attn_backend.MambaAttnBackendBase": ("mamba_indices[bs - num_padding:] = -1",),
    # A loader goes by these; the input scales of a ModelOpt checkpoint are those of every expert of the model.
    f"{FUSED_MOE}._weight_loader_impl": ("'ModelOpt' in method.__class__.__name__", "isinstance(method, ModelOptNvFp4FusedMoEMethod)"),
    f"{MODELOPT}.ModelOptNvFp4FusedMoEMethod.create_weights": ("w13_input_scale._sglang_require_global_experts = True",),
    # Router weights come scaled where the method says so.
    f"{MOE}.fused_moe_triton.layer._fuses_routed_scaling_factor_in_topk": (
        "getattr(quant_method, 'fuse_routed_scaling_factor_in_topk', False)",
    ),
    # A runner that SGLang does not know gets ids of the rank's own experts.
    f"{MOE}.token_dispatcher.standard.StandardDispatcher.dispatch": ("not self.skip_local_expert_mapping",),
    # The runner core is built, and called with what a dispatch hands over.
    f"{MOE}.moe_runner.runner.MoeRunner.__init__": ("self.runner_core = custom_factory(config)",),
    f"{MOE}.moe_runner.runner.MoeRunner.run": ("isinstance(self.runner_core, DispatchMoeRunnerCore)",),
    # Steps of the resolution of arguments that the plugin may wrap.
    f"{SRT}.arg_groups.resolution_hooks": ("'handle_moe_kernel_config'", "'handle_linear_attn_backend'"),
    f"{SRT}.arg_groups.pipeline": ("run_hook(handle_moe_kernel_config, server_args)", "run_hook(handle_linear_attn_backend, server_args)"),
    # The class is built anew from its namespace, so its methods have no signature to read.
    f"{SRT}.server_args": ("def add_cli_args(parser: argparse.ArgumentParser):", "ServerArgs.add_cli_args(parser)"),
    # Plugins are loaded before arguments are parsed or constructed, and where models are built.
    f"{SRT}.entrypoints.engine.Engine.__init__": ("load_plugins()", "self.server_args_class(**kwargs)"),
    f"{SRT}.managers.scheduler": ("load_plugins()",),
    "sglang.cli.serve": ("load_plugins()",),
    # Weights that are loaded again.
    f"{SRT}.model_loader.loader.DefaultModelLoader.restore_weights_before_loading": (
        "quant_method.restore_weights_before_loading(module)",
    ),
    # FP8 experts get no runner from a name that is not built in; beside SGLang's own NVFP4 runners they get Triton's. So do schemes.
    f"{FP8}.create_moe_runner": ("moe_runner_backend.is_triton()", "moe_runner_backend = MoeRunnerBackend.TRITON"),
    f"{CT}.compressed_tensors.CompressedTensorsFusedMoEMethod.create_moe_runner": ("layer.scheme.create_moe_runner(layer,",),
    f"{MOE}.utils.draft_model_build_scope": ("moe.in_speculative_scope = True",),
    # Ray's actors construct a scheduler and load no plugins; both ways to start one come through here.
    f"{SRT}.entrypoints.engine.Engine._launch_subprocesses": ("cls._launch_scheduler_processes(server_args, port_args",),
    # A clamp without alpha comes after silu.
    f"{MOE}.moe_runner.triton_utils.fused_moe._swiglu_silu_clamp_mul": ("gate = gate.clamp(min=None, max=gemm1_limit)",),
    # The name of a backend that is not built in: KDA layers refuse it, the registry names the backend of a model's class.
    f"{LINEAR}.kda_backend.KDAKernelDispatcher.__init__": ("Unsupported KDA decode backend",),
    f"{SRT}.configs.gigachat35": ("sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend",),
    # An unknown backend is CUSTOM, and no verify backend follows that.
    f"{LINEAR}.utils.LinearAttnKernelBackend": ("return cls.CUSTOM",),
    f"{LINEAR}.gdn_backend.GDNKernelDispatcher.__init__": ("self.tree_verify_kernel = triton_kernel",),
    # Drafts: rows of the batch are rows of the buffer.
    f"{LINEAR}.utils.build_verify_intermediate_state_indices": ("torch.arange(pool_size, dtype=torch.int32, device=device)",),
}
