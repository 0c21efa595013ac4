"""Copies of a checkpoint with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


@dataclass
class Checkpoint:
    """The parts of a checkpoint, to be changed in place."""

    tensors: dict[str, torch.Tensor]
    config: dict
    hf_quant_config: dict

    @property
    def quantization(self) -> dict:
        """What ModelOpt wrote into config.json."""
        return self.config["quantization_config"]

    @property
    def legacy(self) -> dict:
        """What ModelOpt wrote into hf_quant_config.json."""
        return self.hf_quant_config["quantization"]

    def set_both(self, field: str, value: object) -> None:
        """Change a field that both descriptions have."""
        self.quantization[field] = self.legacy[field] = value


Edit = Callable[[Checkpoint], None]


def edited(source: Path, target: Path, edit: Edit, shards: int = 1) -> Path:
    """Write a changed copy of ``source`` to the new folder ``target``, split into ``shards`` files."""
    parts = Checkpoint(load_file(source / FILE), _json(source / "config.json"), _json(source / "hf_quant_config.json"))
    edit(parts)
    target.mkdir()
    for path in source.iterdir():
        if path.name not in (FILE, "config.json", "hf_quant_config.json"):
            shutil.copyfile(path, target / path.name)
    (target / "config.json").write_text(json.dumps(parts.config))
    if parts.hf_quant_config:
        (target / "hf_quant_config.json").write_text(json.dumps(parts.hf_quant_config))
    tensors = {name: tensor.contiguous() for name, tensor in parts.tensors.items()}
    if shards == 1:
        save_file(tensors, target / FILE, metadata={"format": "pt"})
        return target
    index = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        shard = dict(list(tensors.items())[number::shards])
        save_file(shard, target / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    (target / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return target


def to_compressed_tensors(parts: Checkpoint) -> None:
    """The same numbers as llm-compressor would store them: other names, and reciprocal global scales."""
    renamed = {}
    for name, tensor in parts.tensors.items():
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight_scale_2" not in parts.tensors:
            renamed[name] = tensor
        elif leaf == "weight":
            renamed[f"{module}.weight_packed"] = tensor
        elif leaf == "weight_scale":
            renamed[name] = tensor
        else:
            new = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}[leaf]
            renamed[f"{module}.{new}"] = tensor.reciprocal().reshape(1)
    parts.tensors = renamed
    four_bits = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    group = {
        "targets": ["Linear"],
        "format": "nvfp4-pack-quantized",
        "weights": {**four_bits, "dynamic": False, "observer": "memoryless_minmax"},
        "input_activations": {**four_bits, "dynamic": "local", "observer": "static_minmax"},
    }
    parts.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name in parts.quantization["ignore"] if name != "model.embed_tokens"],
    }
    parts.hf_quant_config.clear()


def weights_alone(parts: Checkpoint) -> None:
    """ModelOpt's NVFP4 in name, with inputs that nothing quantises and that have no scales."""
    parts.tensors = {name: tensor for name, tensor in parts.tensors.items() if not name.endswith(".input_scale")}
    for group in parts.quantization["config_groups"].values():
        group["input_activations"] = None
    parts.hf_quant_config.clear()  # which cannot say so


def layers_beside(parts: Checkpoint) -> None:
    """A mixed checkpoint of an older ModelOpt, which lists its layers in hf_quant_config.json alone. All of them are NVFP4."""
    suffix = ".weight_scale_2"
    names = [name.removesuffix(suffix) for name in parts.tensors if name.endswith(suffix)]
    parts.set_both("quant_algo", "MIXED_PRECISION")
    parts.legacy["quantized_layers"] = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names}
    del parts.quantization["config_groups"]


ROTATION = "model.layers.0.self_attn.q_proj.rotation_input"


def rotate_inputs(parts: Checkpoint) -> None:
    """compressed-tensors with inputs of attention's projections that are to be rotated."""
    to_compressed_tensors(parts)
    apply = [{"targets": ["re:.*self_attn[.][qkv]_proj$"], "location": "input"}]
    parts.config["quantization_config"]["transform_config"] = {"config_groups": {"rotation": {"type": "random-hadamard", "apply": apply}}}
    parts.tensors[f"{ROTATION}.weight"] = torch.eye(parts.config["hidden_size"], dtype=torch.bfloat16)


def quantize_lm_head(parts: Checkpoint) -> None:
    """Give the output matrix NVFP4 values, and take it off the exclude lists."""
    from moe_backend_plugin.nvfp4.format import quantize

    made = quantize(parts.tensors["lm_head.weight"])
    parts.tensors |= {
        "lm_head.weight": made.packed,
        "lm_head.weight_scale": made.scale,
        "lm_head.weight_scale_2": made.scale_2,
        "lm_head.input_scale": torch.tensor(1.0),
    }
    parts.quantization["ignore"].remove("lm_head")
    parts.legacy["exclude_modules"].remove("lm_head")


def round_lm_head(parts: Checkpoint) -> None:
    """The values that :func:`quantize_lm_head` stores, in bfloat16."""
    from moe_backend_plugin.nvfp4.format import quantize

    parts.tensors["lm_head.weight"] = quantize(parts.tensors["lm_head.weight"]).dequantize(torch.bfloat16)


def double_gates(parts: Checkpoint) -> None:
    """Twice the global scale for every expert's gate: gate and up then differ in it."""
    for name in parts.tensors:
        if ".experts." in name and name.endswith("gate_proj.weight_scale_2"):
            parts.tensors[name] = parts.tensors[name] * 2


def rescale_gates(parts: Checkpoint) -> None:
    """The same weights with other scales: twice the global scale of every gate over half its block scales, both exact."""
    for name in [n for n in parts.tensors if ".experts." in n and n.endswith("gate_proj.weight_scale_2")]:
        blocks = name.removesuffix("_2")
        half = (parts.tensors[blocks].float() / 2).to(torch.float8_e4m3fn)
        assert torch.equal(half.float() * 2, parts.tensors[blocks].float()), f"{blocks}: no exact halves"
        parts.tensors[blocks] = half
        parts.tensors[name] = parts.tensors[name] * 2


def _json(path: Path) -> dict:
    return json.loads(path.read_text())
