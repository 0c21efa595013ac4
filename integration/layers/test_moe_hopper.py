"""What surrounds the Hopper kernels in vLLM and needs no GPU: which layers they get, the weights they get, and the calls."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from moe_backend_plugin.config import load_config
from moe_backend_plugin.device import Choice
from moe_backend_plugin.errors import CheckpointError, UnsupportedLayerError
from moe_backend_plugin.nvfp4 import hopper
from moe_backend_plugin.nvfp4.format import quantize

from . import hopper_kernels
from .test_moe_layer import EXPERTS, HIDDEN, TOP_K, WIDTH, build, experts, inputs, run

BITS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "nvfp4-pack-quantized",
            "weights": {**BITS, "dynamic": False},
            "input_activations": {**BITS, "dynamic": "local"},
        }
    },
    "ignore": ["lm_head"],
}


@pytest.fixture
def kernels(vllm_config, monkeypatch):
    """vLLM on its CPU build, as if it were a Hopper GPU with stand-ins for the kernels."""
    found = hopper_kernels.install(monkeypatch)
    from moe_backend_plugin.engines.vllm import configs, moe_cuda

    monkeypatch.setattr(configs, "provider", lambda kind, where: Choice("cutedsl" if kind == "moe" else "torch", "a test"))
    monkeypatch.setattr(configs, "_handed_over", set())
    monkeypatch.setattr(moe_cuda, "current_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(moe_cuda, "_progress", moe_cuda.Progress())
    moe_cuda.prepare.cache_clear()
    return found


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in compressed-tensors' names and convention."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            found[f"{name}_packed"] = tensor
        elif name.endswith(".weight_scale"):
            found[name] = tensor
        else:
            new = name.replace("weight_scale_2", "weight_global_scale").replace("input_scale", "input_global_scale")
            found[new] = tensor.reciprocal().reshape(1)
    return found


def on_cpu(vllm_config, monkeypatch, tensors, **options) -> torch.Tensor:
    """What the torch ops give for the same layer."""
    with monkeypatch.context() as patch:
        from moe_backend_plugin.engines.vllm import configs

        patch.setattr(configs, "provider", lambda kind, where: Choice("torch", "a test"))
        return run(vllm_config, build(vllm_config, **options), tensors, *inputs())


@pytest.mark.parametrize(
    "options",
    [{}, {"swiglu_limit": 0.7}, {"activation": "swigluoai_uninterleave", "swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0}],
    ids=["silu", "silu with a limit", "swigluoai"],
)
def test_a_layer_is_loaded_packed_and_called(vllm_config, kernels, monkeypatch, options):
    tensors, _ = experts()
    # Gate and up keep a global scale each.
    tensors = {name: t * 2 if name.endswith("gate_proj.weight_scale_2") else t for name, t in tensors.items()}
    runner = build(vllm_config, renormalize=True, **options)
    layer = runner.routed_experts
    out = run(vllm_config, runner, tensors, *inputs())
    expected = on_cpu(vllm_config, monkeypatch, tensors, renormalize=True, **options)
    torch.testing.assert_close(out.float(), expected.float(), atol=float(expected.abs().max()) * 2**-7, rtol=2**-6)

    assert kernels.calls == [layer.quant_method.problem]
    assert layer.w13_weight.shape == hopper.packed_shape(EXPERTS, 2 * WIDTH, HIDDEN, True)
    assert layer.w2_weight.shape == hopper.packed_shape(EXPERTS, HIDDEN, WIDTH, False)
    assert torch.equal(layer.w13_scale_2[3], torch.stack([tensors[f"3.{p}_proj.weight_scale_2"].reshape(()) for p in ("gate", "up")]))
    # Nothing of the checkpoint's own tensors stays.
    assert {name for name, _ in layer.named_parameters()} == {"w13_weight", "w2_weight", "w13_scale_2", "w2_scale_2"}


def test_compressed_tensors_are_the_same_layer(vllm_config, kernels):
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from moe_backend_plugin.engines.vllm.quantization import Nvfp4CuteDslConfig

    tensors, _ = experts()
    expected = run(vllm_config, build(vllm_config), tensors, *inputs())
    runner = FusedMoEFactory(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        params_dtype=torch.bfloat16,
        quant_config=Nvfp4CuteDslConfig.from_config(COMPRESSED),
        prefix="model.layers.0.compressed.experts",
    )
    out = run(vllm_config, runner, renamed(tensors), *inputs())
    assert len(kernels.calls) == 2
    torch.testing.assert_close(out.float(), expected.float(), atol=float(expected.abs().max()) * 2**-7, rtol=2**-6)


@pytest.mark.parametrize("missing", ["0.up_proj.weight", "5.down_proj.weight_scale", "1.gate_proj.weight_scale_2"])
def test_a_tensor_that_is_missing_is_named(vllm_config, kernels, missing):
    """The scales that were never loaded are NaN in memory that the packed weights share."""
    tensors, _ = experts()
    del tensors[missing]
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        run(vllm_config, build(vllm_config), tensors, *inputs())


def test_layers_alike_are_prepared_once_with_the_largest_batch(vllm_config, kernels, log):
    layers = [build(vllm_config).routed_experts for _ in range(3)]
    problem, tokens, index, device, most, mapped = kernels.prepared[0]
    assert len(kernels.prepared) == 1
    assert (tokens, index, device, mapped) == (torch.bfloat16, torch.int32, torch.device("cuda", 0), False)
    assert most == vllm_config.scheduler_config.max_num_batched_tokens
    assert (problem.num_experts, problem.num_local_experts, problem.top_k) == (EXPERTS, EXPERTS, TOP_K)
    assert (problem.hidden, problem.intermediate) == (HIDDEN, WIDTH)
    assert sum("Compiled 3 NVFP4 MoE kernels" in line for line in log) == 1
    assert sum(f"MiB for calls of up to {most} tokens" in line for line in log) == 1

    build(vllm_config, apply_router_weight_on_input=True)
    assert len(kernels.prepared) == 2 and kernels.prepared[1][0] == replace(problem, apply_router_weight_on_input=True)
    assert {layer.quant_method.topk_indices_dtype for layer in layers} == {torch.int32}


@pytest.mark.parametrize(
    ("dp", "pcp", "sp", "most"), [(1, 1, 1, 1000), (2, 1, 1, 2000), (2, 1, 3, 2 * 1002), (1, 2, 1, 2000), (4, 1, 1, 4000)]
)
def test_the_largest_call_counts_every_rank(vllm_config, kernels, dp, pcp, sp, most):
    from moe_backend_plugin.engines.vllm.moe_cuda import most_tokens

    moe = copy.copy(build(vllm_config).routed_experts.moe_config)
    moe.max_num_tokens = 1000
    moe.moe_parallel_config = replace(moe.moe_parallel_config, dp_size=dp, pcp_size=pcp, sp_size=sp)
    assert most_tokens(moe) == most


# --- which layers ----------------------------------------------------------------------------------------------------------------------


def changed(layer, **fields):
    """``layer`` with other fields in its configuration; dotted names reach into the parallel one."""
    layer = copy.copy(layer)
    moe = copy.copy(layer.moe_config)
    for name, value in fields.items():
        if name.startswith("parallel_"):
            moe.moe_parallel_config = replace(moe.moe_parallel_config, **{name.removeprefix("parallel_"): value})
        else:
            setattr(moe, name, value)
    layer.moe_config = moe
    return layer


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"has_bias": True}, "bias"),
        ({"is_lora_enabled": True}, "--enable-lora"),
        ({"moe_backend": "marlin"}, "--moe-backend marlin"),
        ({"parallel_enable_eplb": True}, "--enable-eplb"),
        ({"parallel_all2all_backend": "passthrough"}, "--all2all-backend passthrough"),
        ({"parallel_use_ep": True, "parallel_dp_size": 2, "parallel_all2all_backend": "deepep_low_latency"}, "deepep_low_latency"),
        ({"hidden_dim": 40}, "hidden: found 40; allowed: a positive multiple of 16"),
    ],
)
def test_layers_that_stay_vllms(vllm_config, kernels, fields, words):
    from moe_backend_plugin.engines.vllm.moe_cuda import unsupported_reason

    layer = build(vllm_config).routed_experts
    assert unsupported_reason(layer, False) is None
    assert unsupported_reason(changed(layer, parallel_use_ep=True, parallel_dp_size=2), False) is None
    reason = unsupported_reason(changed(layer, **fields), False)
    assert reason and words in reason


def test_what_the_kernels_refuse_stays_vllms(vllm_config, kernels, monkeypatch):
    from vllm.model_executor.layers.fused_moe import MoEActivation

    from moe_backend_plugin.engines.vllm.moe_cuda import unsupported_reason

    layer = build(vllm_config).routed_experts
    assert "nvfp4" in unsupported_reason(layer, True)
    assert "gelu" in unsupported_reason(changed(layer, activation=MoEActivation.GELU), False)
    kernels.reason = "experts of 3 heads"
    assert unsupported_reason(layer, False) == "experts of 3 heads"
    kernels.reason = None
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "VLLM_BATCH_INVARIANT" in unsupported_reason(layer, False)


def test_a_layer_of_vllms_is_said_once_a_reason(vllm_config, kernels, log, monkeypatch):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    layer = build(vllm_config).routed_experts
    monkeypatch.setattr(ModelOptNvFp4Config, "get_quant_method", lambda self, layer, prefix: ("vLLM's own", prefix))
    kernels.reason = "too wide"
    served = [layer.quant_config.get_quant_method(layer, f"model.layers.{i}.mlp.experts") for i in range(3)]
    assert served == [("vLLM's own", f"model.layers.{i}.mlp.experts") for i in range(3)]
    said = [line for line in log if "too wide" in line]
    assert len(said) == 1 and "model.layers.0.mlp.experts" in said[0] and "vLLM's own kernel" in said[0]


def test_strict_stops_instead(vllm_config, kernels, monkeypatch):
    from moe_backend_plugin.engines.vllm import configs

    layer = build(vllm_config).routed_experts
    monkeypatch.setattr(configs, "plugin_config", lambda: load_config({"strict": True}))
    kernels.reason = "too wide"
    with pytest.raises(UnsupportedLayerError, match=r"model\.layers\.7: found too wide; allowed: strict: false"):
        layer.quant_config.get_quant_method(layer, "model.layers.7")


def test_nvfp4_activations_stay_vllms(vllm_config, kernels, monkeypatch):
    from moe_backend_plugin.engines.vllm import configs

    layer = build(vllm_config).routed_experts
    monkeypatch.setattr(configs, "plugin_config", lambda: load_config({"strict": True, "moe": {"activations": "nvfp4"}}))
    with pytest.raises(UnsupportedLayerError, match="activation precision nvfp4"):
        layer.quant_config.get_quant_method(layer, "model.layers.7")


# --- weights ---------------------------------------------------------------------------------------------------------------------------


def projection(experts: int, rows: int, columns: int, gated: bool):
    """Random codes and scales in memory from ``allocate``, and copies of them."""
    from moe_backend_plugin.engines.packing import allocate

    codes, scales = allocate(experts, rows, columns, gated)
    assert torch.isnan(scales.float()).all()
    random = torch.Generator().manual_seed(0)
    made = quantize(torch.randn(experts, rows, columns, generator=random))
    codes.copy_(made.packed)
    scales.copy_(made.scale)
    return codes, scales, codes.clone(), scales.clone()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("part_experts", [1, 2, 100])
@pytest.mark.parametrize(("experts", "rows", "columns"), [(5, 96, 80), (7, 128, 64), (3, 2 * 48, 16), (1, 256, 144)])
def test_weights_are_rearranged_where_they_lie(vllm_config, kernels, monkeypatch, experts, rows, columns, gated, part_experts):
    from moe_backend_plugin.engines import packing

    codes, scales, *copies = projection(experts, rows, columns, gated)
    shape = hopper.packed_shape(experts, rows, columns, gated)
    monkeypatch.setattr(packing, "_PART_BYTES", part_experts * shape[1] * shape[2] * shape[3])
    packed = packing.rearrange(codes, scales, gated=gated)
    assert torch.equal(packed, hopper.pack(*copies, gated=gated))
    assert packed.data_ptr() == codes.data_ptr() and packed.untyped_storage().nbytes() == packed.nbytes
    assert packed.is_contiguous()


def test_weights_that_were_moved_are_left_whole(vllm_config, kernels):
    """vLLM moves tensors one by one to offload them, and then they share no memory."""
    from moe_backend_plugin.engines.packing import rearrange

    codes, scales, *copies = projection(4, 96, 80, True)
    moved = codes.clone(), scales.clone()
    packed = rearrange(*moved, gated=True)
    assert torch.equal(packed, hopper.pack(*copies, gated=True))
    assert torch.equal(moved[0], copies[0]) and packed.data_ptr() not in (moved[0].data_ptr(), codes.data_ptr())


def test_gates_and_ups_that_alternate_are_sorted(vllm_config, kernels, monkeypatch):
    from moe_backend_plugin.engines import packing

    codes, scales, codes_copy, scales_copy = projection(3, 64, 32, True)
    monkeypatch.setattr(packing, "_PART_BYTES", 1)
    packed = packing.rearrange(codes, scales, gated=True, interleaved=True)
    order = [*range(0, 64, 2), *range(1, 64, 2)]
    scales_sorted = scales_copy.view(torch.uint8)[:, order].view(torch.float8_e4m3fn)
    assert torch.equal(packed, hopper.pack(codes_copy[:, order].contiguous(), scales_sorted, gated=True))


def test_progress_is_said_now_and_then(vllm_config, kernels, log, monkeypatch):
    from moe_backend_plugin.engines.vllm import moe_cuda

    clock = iter(range(100, 1000, 2))
    monkeypatch.setattr(moe_cuda.time, "monotonic", lambda: float(next(clock)))
    progress = moe_cuda.Progress()
    for _ in range(6):
        progress.expect_layer()
    for _ in range(6):
        with progress.layer(500_000_000):
            pass
    assert log == [
        "Rearranging experts for Hopper: layer 2 of 6",
        "Rearranging experts for Hopper: layer 4 of 6",
        "Rearranged the experts of 6 layers for Hopper: 3.00 billion NVFP4 weights in 12.0 s",
    ]
    # A draft model that is loaded later counts for itself.
    progress.expect_layer()
    with progress.layer(1):
        pass
    assert "1 layers" in log[-1]


# --- vLLM's modular kernel ---------------------------------------------------------------------------------------------------------------


def modular(layer, problem):
    """vLLM's modular kernel over the experts, with the transport that moves nothing."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.prepare_finalize import make_moe_prepare_and_finalize_no_dp_ep

    from moe_backend_plugin.engines.vllm.moe_cuda import HopperExperts

    scales = {"g1_alphas": layer.w13_scale_2, "g2_alphas": layer.w2_scale_2}
    quant_config = FusedMoEQuantConfig.make(**scales, weight_dtype="nvfp4")
    transport = make_moe_prepare_and_finalize_no_dp_ep(False)
    return mk.FusedMoEKernel(transport, HopperExperts(layer.moe_config, quant_config, problem))


@pytest.mark.parametrize("on_input", [False, True])
def test_vllms_modular_kernel_gives_what_the_direct_call_gives(vllm_config, kernels, on_input):
    tensors, _ = experts()
    top_k = {"top_k": 1} if on_input else {}
    runner = build(vllm_config, apply_router_weight_on_input=on_input, **top_k)
    layer = runner.routed_experts
    direct = run(vllm_config, runner, tensors, *inputs())

    from vllm.forward_context import set_forward_context

    x, logits = inputs()
    method = layer.quant_method
    method.moe_kernel = modular(layer, replace(method.problem, apply_router_weight_on_input=False))
    assert method.topk_indices_dtype is torch.int32
    with set_forward_context(None, vllm_config, num_tokens=x.shape[0]):
        assert torch.equal(runner(x.clone(), logits), direct)
    assert [problem.apply_router_weight_on_input for problem in kernels.calls] == [on_input, False]


def test_experts_of_other_ranks_are_left_out(vllm_config, kernels):
    """DeepEP hands over int64 ids of the whole model."""
    from vllm.model_executor.layers.fused_moe import MoEActivation

    tensors, _ = experts()
    runner = build(vllm_config)
    run(vllm_config, runner, tensors, *inputs())
    layer = runner.routed_experts
    kernel = modular(layer, layer.quant_method.problem)
    x, _ = inputs()
    ids = torch.arange(x.shape[0] * TOP_K).view(-1, TOP_K) % EXPERTS
    weights = torch.full(ids.shape, 0.5)
    # This rank's slots hold the experts in turned order; half of them are elsewhere.
    mapping = torch.tensor([-1, 1, -1, 3, -1, 5, -1, 7], dtype=torch.int32)

    def call(ids, weights, mapping):
        return kernel.apply(x, layer.w13_weight, layer.w2_weight, weights, ids, MoEActivation.SILU, EXPERTS, mapping, False)

    expected = call(ids, torch.where(ids % 2 == 1, weights, 0.0), None)
    torch.testing.assert_close(call(ids, weights, mapping), expected)


@pytest.mark.parametrize("gathered", [False, True])
def test_tokens_of_other_ranks_come_through_vllms_modular_kernel(vllm_config, kernels, monkeypatch, log, gathered):
    """With data-parallel ranks the layer gets a modular kernel at load, and vLLM then leaves the gathering to it."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize import make_moe_prepare_and_finalize_no_dp_ep

    from moe_backend_plugin.engines.vllm import moe_cuda

    monkeypatch.setattr(moe_cuda, "is_modular", lambda parallel: gathered)
    asked = []

    def transport(moe, quant_config, **options):
        asked.append(options)
        return make_moe_prepare_and_finalize_no_dp_ep(False)

    monkeypatch.setattr(moe_cuda, "maybe_make_prepare_finalize", transport)
    tensors, _ = experts()
    runner = build(vllm_config, apply_router_weight_on_input=True, top_k=1)
    run(vllm_config, runner, tensors, *inputs())
    method = runner.routed_experts.quant_method
    assert method.supports_internal_mk is gathered and len(asked) == gathered
    assert method.problem.apply_router_weight_on_input is not gathered
    if gathered:
        assert asked == [{"routing_tables": None, "allow_new_interface": True}]
        assert any("NVFP4 experts get their tokens through" in line for line in log)


# --- shared experts ----------------------------------------------------------------------------------------------------------------------


class Shared(torch.nn.Module):
    """What every token passes, whatever its router says."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.events.append("shared")
        return x * 0.5


@pytest.mark.parametrize("overlapped", [False, True])
def test_shared_experts_run_when_vllm_says(vllm_config, kernels, monkeypatch, overlapped):
    """The runner has them, and starts them on a stream of its own before the router; the method is handed them and leaves them alone."""
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.runner import shared_experts as vllms

    tensors, _ = experts()
    events: list[str] = []
    routed = run(vllm_config, build(vllm_config), tensors, *inputs())
    runner = build(vllm_config, shared_experts=Shared(events))
    shared, method = runner.shared_experts, runner.routed_experts.quant_method
    assert isinstance(shared, vllms.SharedExperts)
    # Either would take the overlap from the runner: a kernel that asks for scores, and one that runs shared experts itself.
    assert not method.is_monolithic and not method.mk_can_overlap_shared_experts

    # Streams are a GPU's; which side of the experts vLLM waits on is what shows here.
    def begin(x: torch.Tensor) -> bool:
        events.append("begin")
        shared._output[0] = shared._layer(x)
        return True

    if overlapped:
        monkeypatch.setattr(shared, "maybe_forward_async", begin)
        monkeypatch.setattr(shared, "_determine_shared_experts_order", lambda x: vllms.SharedExpertsOrder.MULTI_STREAM_OVERLAPPED)
        monkeypatch.setattr(shared, "wait", lambda: events.append("wait"))
    handed = []

    def apply(*arguments, right=method.apply, **named):
        events.append("experts")
        handed.append((arguments, named))
        return right(*arguments, **named)

    monkeypatch.setattr(method, "apply", apply)
    out = run(vllm_config, runner, tensors, *inputs())
    assert events == (["begin", "shared", "experts", "wait"] if overlapped else ["shared", "experts"])
    ((arguments, named),) = handed
    assert any(value is shared for value in (*arguments, *named.values()))
    x, _ = inputs()
    assert torch.equal(out, x * 0.5 + routed)

    # Through vLLM's modular kernel too, where tokens go no further than this rank.
    method.moe_kernel = modular(runner.routed_experts, method.problem)
    assert not method.mk_can_overlap_shared_experts
    events.clear()
    with set_forward_context(None, vllm_config, num_tokens=x.shape[0]):
        assert torch.equal(runner(x.clone(), inputs()[1]), out)
    assert events == (["begin", "shared", "experts", "wait"] if overlapped else ["shared", "experts"])


def test_vllm_overlaps_shared_experts_of_a_layer_of_this_package(vllm_config, kernels, monkeypatch):
    """On a GPU, where there is a second stream, up to the number of tokens that vLLM sets."""
    from vllm import envs
    from vllm.model_executor.layers.fused_moe.runner import shared_experts as vllms

    tensors, _ = experts()
    runner = build(vllm_config, shared_experts=Shared([]))
    run(vllm_config, runner, tensors, *inputs())
    shared = runner.shared_experts
    monkeypatch.setattr(type(vllms.current_platform), "is_cuda_alike", lambda self: True)
    monkeypatch.setattr(shared, "_stream", object())
    few = envs.VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD
    order = vllms.SharedExpertsOrder
    assert shared._determine_shared_experts_order(torch.empty(few, 1)) is order.MULTI_STREAM_OVERLAPPED
    assert shared._determine_shared_experts_order(torch.empty(few + 1, 1)) is order.NO_OVERLAP
