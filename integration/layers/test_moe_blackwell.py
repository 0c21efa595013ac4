"""What surrounds FlashInfer's kernels in vLLM and needs no GPU: which layers they get, the weights they get, the check, and the calls.

The kernels are emulated (tests/moe/flashinfer_emulation.py); nothing here runs on a Blackwell GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_backend_plugin.config import load_config
from moe_backend_plugin.device import Choice
from moe_backend_plugin.errors import UnsupportedLayerError
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.moe import blackwell, kernel_check, reference, tactic_cache, tactics, workspace
from moe_backend_plugin.moe.tactic_cache import Kind
from moe_backend_plugin.nvfp4 import blackwell as layout

from . import test_moe_layer as plain
from .test_moe_layer import EXPERTS, TOP_K, build, experts, inputs, run

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "moe"))
from flashinfer_emulation import Emulation  # noqa: E402

HIDDEN, WIDTH = 256, 64
KIND = Kind("NVIDIA B200", 148, "580.1", (10, 0))


@pytest.fixture
def emulation(vllm_config, monkeypatch, tmp_path):
    """vLLM on its CPU build, as if it were a Blackwell GPU with an emulation of FlashInfer's kernels."""
    from moe_backend_plugin.engines.vllm import configs, moe_blackwell, moe_cuda

    monkeypatch.setattr(plain, "HIDDEN", HIDDEN)
    monkeypatch.setattr(plain, "PROJECTIONS", {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)})
    monkeypatch.setattr(plain, "WIDTH", WIDTH)
    found = Emulation()
    library = found.library()
    monkeypatch.setattr(blackwell, "library", lambda: library)
    monkeypatch.setattr(blackwell, "missing", lambda: None)
    monkeypatch.setattr(kernel_check, "TOKENS", (3,))
    kernel_check._wrong.cache_clear()
    monkeypatch.setattr(configs, "provider", lambda kind, where: Choice("flashinfer" if kind == "moe" else "torch", "a test"))
    monkeypatch.setattr(configs, "_handed_over", set())
    monkeypatch.setattr(moe_cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(moe_blackwell, "most_tokens", lambda moe: 64)
    monkeypatch.setattr(Kind, "of", classmethod(lambda cls, device: KIND))
    monkeypatch.setenv(kernels.CACHE_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(kernels, "_folder", "")
    monkeypatch.setattr(tactics, "_tables", {})
    monkeypatch.setattr(tactics, "_mode", "cache")
    moe_blackwell.prepare.cache_clear()
    yield found
    moe_blackwell.prepare.cache_clear()
    kernel_check._wrong.cache_clear()


def right(tensors, runner) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference on the checkpoint's tensors: W4A4, and without rounded activations."""
    x, logits = inputs()
    problem = runner.routed_experts.quant_method.problem

    def of(projection: str, suffix: str) -> torch.Tensor:
        found = [tensors[f"{expert}.{projection}_proj.{suffix}"] for expert in range(EXPERTS)]
        return torch.stack([t.view(torch.uint8) if suffix == "weight_scale" else t for t in found])

    first = [torch.cat((of("gate", name), of("up", name)), 1) for name in ("weight", "weight_scale")]
    scales = torch.stack((of("gate", "weight_scale_2"), of("up", "weight_scale_2")), 1)
    second = of("down", "weight"), of("down", "weight_scale").view(torch.float8_e4m3fn), of("down", "weight_scale_2")
    weights = (first[0], first[1].view(torch.float8_e4m3fn), scales, *second)
    chosen, ids = logits.softmax(-1).topk(TOP_K)
    chosen = chosen / chosen.sum(-1, keepdim=True)
    inputs_of = of("gate", "input_scale"), of("down", "input_scale")
    rounded = reference.fused_moe(x, *weights, chosen, ids.int(), problem, None, *inputs_of)
    return rounded.float(), reference.fused_moe(x, *weights, chosen, ids.int(), replace(problem, activation_precision="bf16")).float()


def same_scale(tensors):
    """Gate and up with one global scale, and input scales that fit the values."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith("up_proj.weight_scale_2"):
            found[name] = tensors[name.replace("up_proj", "gate_proj")]
        elif name.endswith("input_scale"):
            found[name] = torch.tensor((200.0 if "down" in name else 5.0) / 2688)
    return found


def test_a_layer_is_checked_loaded_prepared_and_called(vllm_config, emulation):
    tensors = same_scale(experts()[0])
    runner = build(vllm_config, renormalize=True)
    checked = len(emulation.calls)
    assert checked, "the kernels are held to the reference before a weight is read"
    out = run(vllm_config, runner, tensors, *inputs()).float()
    rounded, _ = right(tensors, runner)
    assert float((out - rounded).norm() / rounded.norm()) < 0.03
    layer = runner.routed_experts
    assert layer.w13_weight.shape == (EXPERTS, 2 * WIDTH, HIDDEN // 2) and layer.w2_weight_scale.shape == (EXPERTS, HIDDEN, WIDTH // 16)
    assert {name for name, _ in layer.named_parameters()} == {
        *("w13_weight", "w13_weight_scale", "w13_alpha", "w2_weight", "w2_weight_scale", "w2_alpha", "h_scale", "x_scale")
    }
    codes, _ = layout.unpack_first(layer.w13_weight.data, layer.w13_weight_scale.data, WIDTH, gated=True)
    assert torch.equal(codes[3, :WIDTH], tensors["3.gate_proj.weight"]) and torch.equal(codes[3, WIDTH:], tensors["3.up_proj.weight"])
    # A second layer of the shape is not checked again.
    count = len(emulation.calls)
    build(vllm_config)
    assert len(emulation.calls) == count


def test_gate_and_up_keep_their_scales(vllm_config, emulation):
    tensors = same_scale(experts()[0])
    tensors = {name: t * 3 if name.endswith("up_proj.weight_scale_2") else t for name, t in tensors.items()}
    runner = build(vllm_config, renormalize=True)
    out = run(vllm_config, runner, tensors, *inputs()).float()
    rounded, exact = right(tensors, runner)
    assert float((out - exact).norm()) < 1.2 * float((rounded - exact).norm())


def test_experts_that_one_alpha_cannot_hold_are_refused_by_name(vllm_config, emulation):
    runner = build(vllm_config, swiglu_limit=0.7)
    with pytest.raises(ValueError, match=r"experts: weight_scale_2: found gate and up .* apart by"):
        run(vllm_config, runner, experts()[0], *inputs())


@pytest.mark.parametrize("wrong", ["gate and up swapped", "last row left out"])
def test_a_server_with_wrong_kernels_does_not_start(vllm_config, emulation, wrong):
    emulation.wrong = wrong
    with pytest.raises(UnsupportedLayerError, match=r"mlp.experts: found FlashInfer's kernel s128.*wrong: relative error"):
        build(vllm_config)


def tune(problem, tactic: str) -> None:
    """As ``moe-backend tune`` leaves it for calls of up to 64 tokens."""
    bucket = {"first": 1, "tactic": tactic, "struck": {}}
    tactic_cache.write_bucket(tactic_cache.path_of(KIND), problem, torch.bfloat16, KIND, 64, bucket)


def ran(emulation) -> str:
    """The tactic of the last call."""
    first, second = ([kwargs for name, _, kwargs in emulation.calls if name == stage][-1] for stage in ("first", "second"))
    tile, columns = second["mma_tiler_mn"]
    found = (tile, first["mma_tiler_mn"][1], columns, second["cluster_shape_mn"][1], not second["use_fused_finalize"])
    return blackwell.Tactic(*found).name


def test_a_server_runs_what_was_tuned(vllm_config, emulation):
    """Read when the first layer is made, checked against the reference, and run; a call changes neither arena nor choice."""
    from moe_backend_plugin.engines.vllm import moe_blackwell

    problem = build(vllm_config).routed_experts.quant_method.problem
    assert tactics.tuned(problem, 17, torch.bfloat16) is None
    tune(problem, "s256.128.256x2o")
    moe_blackwell.prepare.cache_clear()  # another process
    emulation.calls.clear()
    runner = build(vllm_config, renormalize=True)
    assert emulation.calls and ran(emulation) == "s256.128.256x2o", "what will run is what is checked"
    held = workspace.Arena.get(torch.device("cpu"), 0, workspace.EVERY_STREAM).bytes
    tensors = same_scale(experts()[0])
    out = run(vllm_config, runner, tensors, *inputs()).float()
    rounded, _ = right(tensors, runner)
    assert ran(emulation) == "s256.128.256x2o" and float((out - rounded).norm() / rounded.norm()) < 0.03
    assert workspace.Arena.get(torch.device("cpu"), 0, workspace.EVERY_STREAM).bytes == held


def test_a_server_told_to_use_the_heuristic_does(vllm_config, emulation, monkeypatch):
    from moe_backend_plugin.engines.vllm import moe_blackwell

    problem = build(vllm_config).routed_experts.quant_method.problem
    tune(problem, "s256.128.256x2o")
    monkeypatch.setattr(moe_blackwell, "plugin_config", lambda: load_config({"moe": {"tactics": "heuristic"}}))
    moe_blackwell.prepare.cache_clear()
    run(vllm_config, build(vllm_config), same_scale(experts()[0]), *inputs())
    assert ran(emulation) == "s128.128.128x1"


def test_a_server_whose_tuned_kernels_are_wrong_does_not_start(vllm_config, emulation, monkeypatch):
    from moe_backend_plugin.engines.vllm import moe_blackwell

    problem = build(vllm_config).routed_experts.quant_method.problem
    tune(problem, "s128.128.128x1o")
    moe_blackwell.prepare.cache_clear()
    library = blackwell.library()._replace(combine=lambda **arguments: arguments["output"].zero_())
    monkeypatch.setattr(blackwell, "library", lambda: library)
    message = r"mlp.experts: found FlashInfer's kernel s128.128.128x1o .*wrong: relative error .*moe.tactics: heuristic"
    with pytest.raises(UnsupportedLayerError, match=message):
        build(vllm_config)


@pytest.mark.parametrize(
    ("activations", "options", "words"),
    [("bf16", {}, "moe.activations: nvfp4"), ("auto", {"has_bias": True}, "bias")],
)
def test_layers_that_stay_vllms(vllm_config, emulation, monkeypatch, activations, options, words):
    from moe_backend_plugin.engines.vllm import configs

    monkeypatch.setattr(configs, "plugin_config", lambda: load_config({"moe": {"activations": activations}, "strict": True}))
    with pytest.raises(UnsupportedLayerError, match=words):
        build(vllm_config, **options)


def test_no_flashinfer_no_layer(vllm_config, emulation, monkeypatch):
    from moe_backend_plugin.engines.vllm import configs

    monkeypatch.setattr(blackwell, "missing", lambda: "no package flashinfer (pip install flashinfer-python)")
    monkeypatch.setattr(configs, "plugin_config", lambda: load_config({"strict": True}))
    with pytest.raises(UnsupportedLayerError, match="no package flashinfer"):
        build(vllm_config)
