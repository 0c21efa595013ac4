"""Activations, routings and bad tensors in vLLM's MoE layer: what its models set, this package computes."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_backend_plugin.errors import CheckpointError, UnsupportedLayerError
from moe_backend_plugin.nvfp4.format import quantize

EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 8, 3, 64, 32, 17
SCHEME = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}}
_prefix = itertools.count()


# Without a gate vLLM refuses the layer on a CPU before this package is asked; tests/moe has that case.
PROJECTIONS = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}


def experts(seed: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A checkpoint's tensors by name, and each expert's weights as they stand for, in float64."""
    random = torch.Generator().manual_seed(seed)
    tensors, values = {}, []
    for expert in range(EXPERTS):
        values.append({})
        for name, shape in PROJECTIONS.items():
            # Each matrix has a range of its own, so a scale that goes to the wrong one shows.
            q = quantize(torch.randn(shape, generator=random) * (0.5 + torch.rand((), generator=random)))
            stem = f"{expert}.{name}"
            tensors |= {f"{stem}.weight": q.packed, f"{stem}.weight_scale": q.scale, f"{stem}.weight_scale_2": q.scale_2}
            tensors[f"{stem}.input_scale"] = torch.tensor(0.01)
            values[-1][name] = q.dequantize(torch.float32).double()
    return tensors, values


def build(vllm_config, quantized: bool = True, **options):
    """vLLM's MoE runner with random routing weights; ``options`` go to its factory."""
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from moe_backend_plugin.engines.vllm.quantization import Nvfp4CuteDslConfig

    torch.manual_seed(1)
    return FusedMoEFactory(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        params_dtype=torch.bfloat16,
        quant_config=Nvfp4CuteDslConfig.from_config(SCHEME) if quantized else None,
        prefix=f"model.layers.{next(_prefix)}.mlp.experts",
        **{"top_k": TOP_K, **options},
    )


def run(vllm_config, runner, tensors: dict[str, torch.Tensor], x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Load, finish loading, and one forward pass."""
    from vllm.forward_context import set_forward_context

    loaded = list(runner.routed_experts.load_weights(tensors.items()))
    assert loaded
    runner.routed_experts.quant_method.process_weights_after_loading(runner.routed_experts)
    with set_forward_context(None, vllm_config, num_tokens=x.shape[0]):
        return runner(x.clone(), logits)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randn(TOKENS, HIDDEN, generator=random).bfloat16(), torch.randn(TOKENS, EXPERTS, generator=random)


def formula(gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None) -> torch.Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


@pytest.mark.parametrize(
    ("name", "alpha", "beta", "limit"),
    [
        ("silu", 1.0, 0.0, None),
        ("silu", 1.0, 0.0, 0.7),
        ("swigluoai_uninterleave", 1.702, 1.0, 0.7),
        ("swigluoai_uninterleave", 1.0, 0.0, 7.0),
    ],
)
def test_activation(vllm_config, name, alpha, beta, limit):
    """The layer equals the formula in float64 on the weights that the checkpoint stands for."""
    tensors, values = experts()
    x, logits = inputs()
    options = {} if not name.startswith("swiglu") else {"swiglu_alpha": alpha, "swiglu_beta": beta}
    runner = build(vllm_config, activation=name, renormalize=True, swiglu_limit=limit, **options)
    out = run(vllm_config, runner, tensors, x, logits)

    weights, ids = logits.softmax(-1).topk(TOP_K, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token, slot in itertools.product(range(TOKENS), range(TOP_K)):
        expert = values[int(ids[token, slot])]
        gate, up = (expert[name] @ x[token].double() for name in ("gate_proj", "up_proj"))
        a = formula(gate, up, alpha, beta, limit)
        expected[token] += weights[token, slot] * (expert["down_proj"] @ a)
    # bf16 rounds the activation and the output: 2^-8 of the largest term.
    torch.testing.assert_close(out.double(), expected, atol=float(expected.abs().max()) * 2**-7, rtol=2**-6)


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": False},
        {"renormalize": True, "routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
        {
            **{"renormalize": True, "routed_scaling_factor": 1.8, "scoring_func": "sigmoid", "bias": True},
            **{"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
        },
        {"renormalize": True, "use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0},
    ],
    ids=["softmax", "softmax with a scaled output", "grouped with correction bias and scaling", "grouped softmax"],
)
def test_routing(vllm_config, options):
    """Whatever the router does, the layer equals vLLM's own bf16 layer on the dequantised weights."""
    options = dict(options)
    if options.pop("bias", False):
        options["e_score_correction_bias"] = torch.nn.Parameter(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3)))
    tensors, values = experts()
    plain = {f"{e}.{name}.weight": w.bfloat16() for e, expert in enumerate(values) for name, w in expert.items()}
    x, logits = inputs()
    expected = run(vllm_config, build(vllm_config, quantized=False, **options), plain, x, logits)
    out = run(vllm_config, build(vllm_config, **options), tensors, x, logits)
    torch.testing.assert_close(out.float(), expected.float(), atol=float(expected.abs().max()) * 2**-6, rtol=2**-5)


def test_gate_and_up_keep_their_own_scale(vllm_config):
    """Doubling gate's global scale doubles gate, and nothing else."""
    tensors, values = experts()
    doubled = {name: t * 2 if name.endswith("gate_proj.weight_scale_2") else t for name, t in tensors.items()}
    halved_blocks = {
        name: (t.float() / 2).to(t.dtype) if name.endswith("gate_proj.weight_scale") else t for name, t in doubled.items()
    }  # block scales of these weights are above E4M3's subnormals, so halving is exact
    x, logits = inputs()
    expected = run(vllm_config, build(vllm_config), tensors, x, logits)
    out = run(vllm_config, build(vllm_config), halved_blocks, x, logits)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    assert not torch.allclose(run(vllm_config, build(vllm_config), doubled, x, logits).float(), expected.float(), rtol=0.05)


def with_value(tensor: torch.Tensor, index: tuple[int, ...], byte: int) -> torch.Tensor:
    raw = tensor.view(torch.uint8).clone()
    raw[index] = byte
    return raw.view(tensor.dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"3.up_proj.weight_scale": lambda t: with_value(t, (5, 1), 0x7F)}, r"experts\.3\.up_proj\.weight_scale: found NaN.*row"),
        (
            {"2.down_proj.weight_scale": lambda t: with_value(t, (5, 1), 0x81)},
            r"experts\.2\.down_proj\.weight_scale: found a negative scale",
        ),
        ({"1.gate_proj.weight_scale_2": lambda t: t * 0}, r"experts\.1\.gate_proj\.weight_scale_2: found 0; allowed: a finite positive"),
        ({"1.down_proj.weight_scale_2": lambda t: -t}, r"experts\.1\.down_proj\.weight_scale_2: found -"),
        ({"0.up_proj.weight": None}, r"experts\.0\.up_proj\.weight: found no such tensor"),
        ({"0.up_proj.weight_scale": None}, r"experts\.0\.up_proj\.weight_scale: found NaN, or the tensor is missing"),
        ({"0.down_proj.weight_scale_2": None}, r"experts\.0\.down_proj\.weight_scale_2: found NaN, or the tensor is missing"),
        ({"7.gate_proj.weight": lambda t: t.bfloat16()}, r"experts\.7\.gate_proj\.weight: found dtype bfloat16; allowed: uint8"),
    ],
)
def test_a_bad_tensor_is_named_while_loading(vllm_config, change, message):
    """Without a check beforehand (a model that is downloaded while the engine starts), loading itself refuses the tensor."""
    tensors, _ = experts()
    for name, edit in change.items():
        if edit is None:
            del tensors[name]
        else:
            tensors[name] = edit(tensors[name])
    with pytest.raises(CheckpointError, match=message):
        run(vllm_config, build(vllm_config), tensors, *inputs())


def test_what_the_op_cannot_compute_is_refused_by_name(vllm_config):
    with pytest.raises(UnsupportedLayerError, match=r"mlp\.experts: found activation 'gelu'"):
        build(vllm_config, activation="gelu")
    with pytest.raises(UnsupportedLayerError, match=r"mlp\.experts: found experts with a bias"):
        build(vllm_config, has_bias=True)
