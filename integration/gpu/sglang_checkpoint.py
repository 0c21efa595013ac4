"""What SGLang 0.5.23 can load of pycoder-next, for either engine: texts are compared where both serve the same weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch

UNLOADABLE = re.compile(r"linear_attn\.in_proj_qkvz|self_attn\.[qkv]_proj")


def loadable(model: Path, folder: Path) -> Path:
    """``model``, or a copy in ``folder`` that SGLang 0.5.23 can load.

    Of Qwen3-Next it makes q, k and v in bf16 whatever the checkpoint says, and does not take the input scale of the projection in front of
    GDN. NVIDIA's own checkpoints leave these layers in bf16, and so does the copy, with the values that they have.
    """
    from safetensors.torch import load_file, save_file

    from moe_backend_plugin.nvfp4.format import dequantize

    if "next" not in model.name:
        return model
    copy = shutil.copytree(model, folder / model.name)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    modules = sorted(name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and UNLOADABLE.search(name))
    for module in modules:
        parts = [tensors.pop(f"{module}.{name}") for name in ("weight", "weight_scale", "weight_scale_2", "input_scale")]
        tensors[f"{module}.weight"] = dequantize(*parts[:3], torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    for name, key, *path in (("config.json", "ignore", "quantization_config"), ("hf_quant_config.json", "exclude_modules", "quantization")):
        content = json.loads((copy / name).read_text(encoding="utf-8"))
        content[path[0]][key] += modules
        (copy / name).write_text(json.dumps(content), encoding="utf-8")
    return copy
