"""On a Hopper GPU: vLLM's MoE layer on this package's kernels, from a checkpoint's tensors to replayed CUDA graphs.

    python integration/gpu/moe_layer.py [--format compressed-tensors] [--activation relu2] [--modular] [--experts 128 --top-k 8 ...]

Builds the layers as vLLM does, loads random tensors, and holds what they compute to the float32 reference; then whether a graph replayed on
other routings gives the bits of eager calls, and what loading took: memory beyond the weights, seconds a billion weights, and what
the calls allocate.  ``--modular`` calls the kernels through vLLM's modular kernel, as where tokens move between ranks; here they do not.
Prints one JSON object; exits 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import contextmanager

import torch
from mixed_load import free_port

_BITS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
_GROUP = {"targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": {**_BITS, "dynamic": False}}
SCHEMES = {
    "modelopt": {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**_GROUP, "input_activations": {**_BITS, "dynamic": "local"}}},
        "ignore": ["lm_head"],
    },
}
NAMES = {"silu": ("gate_proj", "up_proj"), "swigluoai": ("gate_proj", "up_proj"), "relu2": ("up_proj",)}
"""The matrices beside down_proj."""
TOKENS = (1, 2, 7, 64, 300, 2048)
BOUND = 4e-3
"""Norm of the error over the norm, against float32; the output's own rounding to bf16 is half of it."""


def tensors(options: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """ModelOpt's names and random NVFP4 tensors of one layer: weights of about unit size over the square root of their columns."""
    random = torch.Generator("cuda").manual_seed(seed)
    shapes = {name: (options.width, options.hidden) for name in NAMES[options.activation]}
    shapes["down_proj"] = (options.hidden, options.width)
    found = {}
    for expert in range(options.experts):
        for name, (rows, columns) in shapes.items():
            codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda", generator=random)
            scale = torch.rand(rows, columns // 16, device="cuda", generator=random) * 400 + 1
            spread = 0.5 + torch.rand((), device="cuda", generator=random)  # a scale that goes to the wrong matrix shows
            found |= {
                f"{expert}.{name}.weight": codes,
                f"{expert}.{name}.weight_scale": scale.to(torch.float8_e4m3fn),
                f"{expert}.{name}.weight_scale_2": spread / (800 * columns**0.5),
                f"{expert}.{name}.input_scale": torch.tensor(0.01, device="cuda"),
            }
    return found


def named(options: argparse.Namespace, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in the names and the convention of the format."""
    if options.format == "modelopt":
        return found
    renamed = {}
    for name, tensor in found.items():
        if name.endswith(("_scale_2", "input_scale")):
            name, tensor = (
                name.replace("weight_scale_2", "weight_global_scale").replace("input_scale", "input_global_scale"),
                1 / tensor[None],
            )
        renamed[f"{name}_packed" if name.endswith(".weight") else name] = tensor
    return renamed


def stacked(options: argparse.Namespace, found: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The arguments of ``reference.fused_moe``."""

    def of(name: str, suffix: str) -> torch.Tensor:
        every = [found[f"{expert}.{name}.{suffix}"] for expert in range(options.experts)]
        return torch.stack([t.view(torch.uint8) if suffix == "weight_scale" else t for t in every])

    first = NAMES[options.activation]
    w13, s13 = (torch.cat([of(name, suffix) for name in first], 1) for suffix in ("weight", "weight_scale"))
    scale_2 = torch.stack([of(name, "weight_scale_2") for name in first], 1)
    if options.format == "compressed-tensors":  # what a reciprocal there and back gives
        scale_2 = 1 / (1 / scale_2)
    e4m3, down = torch.float8_e4m3fn, "down_proj"
    return w13, s13.view(e4m3), scale_2, of(down, "weight"), of(down, "weight_scale").view(e4m3), of(down, "weight_scale_2")


@contextmanager
def engine():
    """One rank of vLLM, and its configuration."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.v1.worker.workspace import init_workspace_manager

    from moe_backend_plugin.engines.vllm import register

    register()
    config = VllmConfig(additional_config={"moe_backend_plugin": {"strict": True, "moe": {"provider": "cutedsl"}}})
    with set_current_vllm_config(config):
        init_workspace_manager(torch.device("cuda", 0))
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "nccl")
        parallel_state.initialize_model_parallel(1, 1)
        yield config
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def build(options: argparse.Namespace, index: int):
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory, activation_without_mul

    from moe_backend_plugin.engines.vllm.quantization import Nvfp4CuteDslConfig

    # As vLLM's models with such experts build them: Nemotron-H; and those whose checkpoints have gates and ups apart.
    special = {
        "relu2": {"activation": activation_without_mul("relu2"), "ckpt_names": ("up_proj", "down_proj", None)},
        "swigluoai": {"activation": "swigluoai_uninterleave", "swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 7.0},
    }
    with torch.device("cuda"):
        return FusedMoEFactory(
            num_experts=options.experts,
            top_k=options.top_k,
            hidden_size=options.hidden,
            intermediate_size=options.width,
            params_dtype=torch.bfloat16,
            renormalize=True,
            quant_config=Nvfp4CuteDslConfig.from_config(SCHEMES[options.format]),
            prefix=f"model.layers.{index}.mlp.experts",
            **special.get(options.activation, {}),
        )


def make_modular(layer: torch.nn.Module) -> None:
    """Have a loaded layer's calls go through vLLM's modular kernel, with the transport that moves nothing."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.prepare_finalize import make_moe_prepare_and_finalize_no_dp_ep

    from moe_backend_plugin.engines.vllm.moe_cuda import HopperExperts

    method = layer.quant_method
    method.moe_quant_config = FusedMoEQuantConfig.make(g1_alphas=layer.w13_scale_2, g2_alphas=layer.w2_scale_2, weight_dtype="nvfp4")
    experts = HopperExperts(layer.moe_config, method.moe_quant_config, method.problem)
    method.moe_kernel = mk.FusedMoEKernel(make_moe_prepare_and_finalize_no_dp_ep(False), experts)


def batch(options: argparse.Namespace, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, options.hidden, device="cuda", generator=random).bfloat16()
    return x, torch.randn(tokens, options.experts, device="cuda", generator=random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("experts", 128), ("top-k", 8), ("hidden", 2048), ("width", 768), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--format", choices=SCHEMES, default="modelopt")
    parser.add_argument("--activation", choices=NAMES, default="silu")
    parser.add_argument("--modular", action="store_true", help="the experts of vLLM's modular kernel")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    torch.cuda.set_device(0)

    from vllm.forward_context import set_forward_context

    from moe_backend_plugin.moe import reference

    report: dict = {"options": vars(options), "errors": {}, "wrong": []}
    with engine() as config, torch.no_grad():
        runners = [build(options, index) for index in range(options.layers)]
        checkpoint = tensors(options, 0)
        for index, runner in enumerate(runners):
            list(runner.routed_experts.load_weights(named(options, checkpoint if index == 0 else tensors(options, index)).items()))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        for runner in runners:
            runner.routed_experts.quant_method.process_weights_after_loading(runner.routed_experts)
        torch.cuda.synchronize()
        weights = (1 + len(NAMES[options.activation])) * options.experts * options.hidden * options.width
        layer_bytes = sum(p.nbytes for p in runners[0].routed_experts.parameters())
        report["load"] = {
            "seconds_per_billion_weights": (time.perf_counter() - start) / (weights * options.layers / 1e9),
            "extra_bytes": torch.cuda.max_memory_allocated() - before,
            "layer_bytes": layer_bytes,
        }
        if report["load"]["extra_bytes"] > layer_bytes or report["load"]["seconds_per_billion_weights"] > 0.5:
            report["wrong"].append("load")
        if options.modular:
            for runner in runners:
                make_modular(runner.routed_experts)

        def forward(x: torch.Tensor, logits: torch.Tensor, runner=runners[0]) -> torch.Tensor:
            with set_forward_context(None, config, num_tokens=x.shape[0]):
                return runner(x, logits)

        arguments, method = stacked(options, checkpoint), runners[0].routed_experts.quant_method
        for tokens in TOKENS:
            x, logits = batch(options, tokens, tokens)
            out = forward(x.clone(), logits).float()
            chosen, ids = logits.softmax(-1).topk(options.top_k)
            expected = reference.fused_moe(x, *arguments, chosen / chosen.sum(-1, keepdim=True), ids.int(), method.problem).float()
            error = float((out - expected).norm() / expected.norm())
            report["errors"][tokens] = error
            if not error < BOUND:
                report["wrong"].append(f"{tokens} tokens: error {error:.2e}")

            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            static = x.clone(), logits.clone()
            with torch.cuda.stream(stream):
                forward(*static)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                captured = forward(*static)
            for seed in range(1000, 1003):
                fresh = batch(options, tokens, seed)
                for place, value in zip(static, fresh, strict=True):
                    place.copy_(value)
                graph.replay()
                if not torch.equal(captured, forward(*fresh)):
                    report["wrong"].append(f"{tokens} tokens: a graph gives other bits than an eager call")
        x, logits = batch(options, 64, 0)
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            forward(x, logits)
        report["allocations_in_a_captured_layer"] = torch.cuda.memory_stats()["allocation.all.allocated"] - allocations
    print(json.dumps(report, indent=1))
    raise SystemExit(1 if report["wrong"] else 0)


if __name__ == "__main__":
    main()
