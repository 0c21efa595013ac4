"""Tiny synthetic mixture-of-experts checkpoints of both producers, and how a refusal is checked."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_backend_plugin.errors import CheckpointError
from moe_backend_plugin.nvfp4.checkpoint import check_checkpoint
from moe_backend_plugin.nvfp4.format import quantize, quantize_reciprocal

HIDDEN, WIDTH, EXPERTS, LAYERS = 64, 32, 4, 2


def linear(tensors, name, n, k, producer):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(len(tensors)))
    if producer == "modelopt":
        q = quantize(w)
        parts = {"weight": q.packed, "weight_scale": q.scale, "weight_scale_2": q.scale_2, "input_scale": torch.tensor(0.01)}
    else:
        q, global_scale = quantize_reciprocal(w)
        parts = {"weight_packed": q.packed, "weight_scale": q.scale, "weight_global_scale": global_scale}
        parts["input_global_scale"] = torch.tensor([100.0])
    tensors.update({f"{name}.{leaf}": t for leaf, t in parts.items()})


def build(producer="modelopt"):
    """(tensors, config) of a tiny mixture of experts."""
    bf16 = torch.bfloat16
    tensors = {"model.embed_tokens.weight": torch.randn(16, HIDDEN, dtype=bf16), "lm_head.weight": torch.randn(16, HIDDEN, dtype=bf16)}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=bf16)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        tensors[f"{at}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=bf16)
        tensors[f"{at}.mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN, dtype=bf16)
        linear(tensors, f"{at}.self_attn.q_proj", HIDDEN, HIDDEN, producer)
        for e in range(EXPERTS):
            for leaf, n, k in (("gate_proj", WIDTH, HIDDEN), ("up_proj", WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
                linear(tensors, f"{at}.mlp.experts.{e}.{leaf}", n, k, producer)
    args = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    ignore = ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(LAYERS))]
    quantization = {"config_groups": {"g": {"weights": args, "input_activations": args, "targets": ["Linear"]}}, "ignore": ignore}
    if producer == "modelopt":
        quantization |= {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    else:
        quantization |= {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    config = {"num_experts": EXPERTS, "tie_word_embeddings": False, "dtype": "bfloat16", "quantization_config": quantization}
    return tensors, config


def write(folder, tensors, config, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % shards == s}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refused(folder, where, found, allowed, **options):
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder, **options)
    error = caught.value
    assert where in error.where, error
    assert found in error.found, error
    assert allowed in error.allowed, error
    return error
