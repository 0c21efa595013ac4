"""``moe-backend bench serve``: a whole model in an engine's offline class, once for each provider of its expert layers.

The model has the shape of one of :data:`MODELS` as ModelOpt quantises it (NVFP4 everywhere but embeddings, routers, output and what else
its recipe leaves alone) and random weights that are valid NVFP4, so that routing spreads over the experts. Its tensors go through the
engine's own loading; nothing but a config.json is on the disk. Each provider runs in a process of its own: :mod:`.serve_vllm` or
:mod:`.serve_sglang`, as a script. Of a model with gated-delta-net layers, a provider serves their decode step too.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .moe import KERNELS, global_scale

ENGINES = ("vllm", "sglang")
BATCHES = (1, 8, 32, 128, 256)
PROMPT, NEW = 32, 128
PREFILL_BATCH, PREFILL = 32, 2048
WARM_UPS, RUNS = 3, 5
BATCHED_TOKENS = 16384

LAYERS = 48
"""Of every model."""


@dataclass(frozen=True)
class Model:
    """A shape that is served.

    ``name`` is what rows say. ``config`` is the config.json but for its quantisation. ``bf16`` are linear layers of a decoder layer, by
    name within it, that the recipe of the published checkpoint leaves alone where ModelOpt's default quantises them. ``kernels`` are the
    families that the plugin's figures are of. ``period``: layers come in groups of so many.
    """

    name: str
    title: str
    config: Mapping[str, Any]
    bf16: tuple[str, ...] = ()
    kernels: tuple[str, ...] = KERNELS
    period: int = 1

    @property
    def parts(self) -> tuple[str, ...]:
        """What a provider serves: keys of an engine's ``SAID``."""
        return ("experts", "GDN decode") if "gdn_decode" in self.kernels else ("experts",)

    def of_layers(self, layers: int) -> dict[str, Any]:
        """The config.json of a model with so many layers, its quantisation included."""
        config = {**self.config, "num_hidden_layers": layers}
        return {**config, "quantization_config": quantization(config, self.bf16)}


_QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": LAYERS,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "num_hidden_layers": LAYERS,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_theta": 10000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "use_cache": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
MODELS = {
    "qwen3-30b-a3b": Model("qwen3-30b-a3b", "Qwen3-30B-A3B", _QWEN3_30B),
    "qwen3-next": Model(
        "qwen3-next-80b",
        "Qwen3-Next-80B-A3B",
        _QWEN3_NEXT,
        # NVIDIA's recipe for this architecture; SGLang 0.5.23 cannot load these in NVFP4.
        bf16=("linear_attn.in_proj_qkvz", *_QKV),
        kernels=(*KERNELS, "gdn_decode"),
        period=_QWEN3_NEXT["full_attention_interval"],
    ),
}
"""By the name that the command line gives them."""
MODEL = "qwen3-30b-a3b"
"""The default of :data:`MODELS`."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; None is the default.

    ``settings``: further arguments of the engine, by name.
    """

    engine: str = "vllm"
    providers: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    layers: int = LAYERS
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = MODEL


def child_of(engine: str) -> ModuleType:
    """The module that serves with an engine of :data:`ENGINES`; imports no engine.

    It has ``PROVIDERS`` (by model, then by name), ``engine_arguments(model, provider, batches)``,
    ``serve(arguments, config, batches, folder)`` and ``SAID``: by part of a model, patterns of what its log says about who runs it.
    """
    return import_module(f".serve_{engine}", __package__)


def run(options: Options, say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """Serve with one provider after the other; yields the growing result {"ceilings", "rows", "errors"} after each."""
    result: dict[str, Any] = {"ceilings": {}, "rows": [], "errors": []}
    name = MODELS[options.model].name
    for provider in options.providers or child_of(options.engine).PROVIDERS[options.model]:
        found = _in_a_child(provider, options)
        if "error" in found:
            result["errors"].append({"model": name, "provider": provider, **found})
            say(f"{provider}: {found['error']}")
        for row in found.get("rows", []):
            cell = {"model": name, **({"layers": options.layers} if options.layers != LAYERS else {}), "provider": provider}
            result["rows"].append({**cell, **row})
            say(json.dumps(result["rows"][-1]))
        yield result


def _in_a_child(provider: str, options: Options) -> dict[str, Any]:
    """{"rows"} of a provider, or {"error"} with the end of what its process printed."""
    with tempfile.TemporaryDirectory() as folder:
        work = {"model": options.model, "provider": provider, "batches": options.batches or BATCHES, "layers": options.layers}
        work |= {"settings": {**options.settings}, "folder": folder}
        command = [sys.executable, "-m", child_of(options.engine).__name__, json.dumps(work)]
        done = subprocess.run(command, capture_output=True, text=True)
        file = Path(folder) / "rows.json"
        if done.returncode or not file.exists():
            return {"error": f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-4000:]}"}
        rows = json.loads(file.read_text())
    log, said = done.stdout + done.stderr, child_of(options.engine).SAID
    served = served_by(log, {part: said[part] for part in MODELS[options.model].parts})
    return {"rows": [{**row, "served_by": served} for row in rows]}


def served_by(log: str, said: Mapping[str, Sequence[str]]) -> str | None:
    """What the engine said about who runs each part of the model; of one part, its name is left out.

    ``said``: patterns by part. What counts is the group of the first of them that the log has; None where it has none for any part.
    """
    found = {}
    for part, patterns in said.items():
        matches = (re.search(pattern, log) for pattern in patterns)
        found[part] = next((match[1].strip() for match in matches if match), None)
    if not any(found.values()):
        return None
    return "; ".join(f"{part}: {served}" for part, served in found.items()) if len(found) > 1 else next(iter(found.values()))


# --- in the child --------------------------------------------------------------------------------------------------------------------


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """The model's config.json, as ModelOpt leaves it: with the quantisation that it has, or ModelOpt's default."""
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": _quantization_of(config)}))


def measure(generate: Callable[[list[list[int]], int], Any], config: Mapping[str, Any], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of one provider. ``generate(prompts, new)``: continue all of these token ids at once, each by ``new`` tokens, and wait."""

    def seconds(batch: int, length: int, new: int) -> float:
        dice = random.Random(batch)
        prompts = [[dice.randrange(3, config["vocab_size"]) for _ in range(length)] for _ in range(batch)]
        times = []
        for _ in range(WARM_UPS + RUNS):
            begin = time.perf_counter()
            generate(prompts, new)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[WARM_UPS:])

    rows = []
    for batch in batches:
        first, whole = seconds(batch, PROMPT, 1), seconds(batch, PROMPT, NEW)
        rows.append({"batch": batch, "output_tok_s": round(batch * NEW / whole, 1), "first_token_ms": round(first * 1e3, 2)})
    prompt = min(PREFILL, config["max_position_embeddings"] - NEW)
    rows.append({"batch": PREFILL_BATCH, "prefill_tok_s": round(PREFILL_BATCH * prompt / seconds(PREFILL_BATCH, prompt, 1), 1)})
    return rows


def quantization(config: Mapping[str, Any], bf16: Sequence[str] = ()) -> dict[str, Any]:
    """``quantization_config`` as ModelOpt writes it.

    ``bf16``: linear layers of a decoder layer, by name within it, that a recipe leaves alone besides those that no recipe quantises.
    """
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    ignore = ["lm_head", "model.embed_tokens"]
    for layer in range(config["num_hidden_layers"]):
        modules = [*_linear_layers(config, layer), *(["linear_attn.conv1d"] if is_gdn(config, layer) else [])]
        ignore += [f"model.layers.{layer}.{name}" for name in sorted(modules) if name in UNQUANTISED or name in bf16]
    return {
        "config_groups": {"group_0": {"input_activations": four_bits, "weights": four_bits, "targets": ["Linear"]}},
        "ignore": ignore,
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def _quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config's own, or ModelOpt's default."""
    return config["quantization_config"] if "quantization_config" in config else quantization(config)


UNQUANTISED = ("linear_attn.conv1d", "linear_attn.in_proj_ba", "mlp.gate", "mlp.shared_expert_gate")
"""Modules of a decoder layer that ModelOpt's recipes leave alone. Norms, A_log and dt_bias are no linear layers, and not named either."""


def is_gdn(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer's attention is a gated delta net."""
    return bool((layer + 1) % config.get("full_attention_interval", 1))


def _linear_layers(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every linear layer of a decoder layer, by its name there."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    found = {}
    if is_gdn(config, layer):
        heads = config["linear_num_value_heads"]
        keys, values = config["linear_num_key_heads"] * config["linear_key_head_dim"], heads * config["linear_value_head_dim"]
        shapes = {"in_proj_qkvz": (2 * keys + 2 * values, hidden), "in_proj_ba": (2 * heads, hidden), "out_proj": (hidden, values)}
        found |= {f"linear_attn.{name}": shape for name, shape in shapes.items()}
    else:
        queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
        # Qwen3-Next's attention has a gate as wide as its queries, in the same projection.
        rows = 2 * queries if config["model_type"] == "qwen3_next" else queries
        shapes = {"q_proj": (rows, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
        found |= {f"self_attn.{name}": shape for name, shape in shapes.items()}
    found["mlp.gate"] = (config["num_experts"], hidden)
    if shared := config.get("shared_expert_intermediate_size", 0):
        found["mlp.shared_expert_gate"] = (1, hidden)
        found |= {f"mlp.shared_expert.{name}": shape for name, shape in _mlp(hidden, shared).items()}
    experts = _mlp(hidden, width)
    return found | {f"mlp.experts.{i}.{name}": shape for i in range(config["num_experts"]) for name, shape in experts.items()}


def _mlp(hidden: int, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}


def tensors(config: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a ModelOpt NVFP4 checkpoint of a Qwen3-MoE or Qwen3-Next model with this config.json, by name, with random values.

    What the config's ``quantization_config`` ignores is bf16; without one, what ModelOpt leaves alone by default. NVFP4 tensors are views
    of two pools of random bytes at random places, so that tens of GB cost no time to make.
    """
    hidden, head = config["hidden_size"], config["head_dim"]
    layers = range(config["num_hidden_layers"])
    ignored = {*_quantization_of(config)["ignore"]}
    generator = torch.Generator(device).manual_seed(0)
    dice = random.Random(0)
    quantised = (
        rows * columns for n in layers for m, (rows, columns) in _linear_layers(config, n).items() if f"model.layers.{n}.{m}" not in ignored
    )
    size = 2 * max(quantised)
    codes = torch.randint(256, (size,), dtype=torch.uint8, device=device, generator=generator)
    scales = torch.randint(0x60, 0x7F, (size // 8,), dtype=torch.uint8, device=device, generator=generator).view(torch.float8_e4m3fn)

    def some(pool: Tensor, rows: int, columns: int) -> Tensor:
        start = dice.randrange(0, pool.numel() - rows * columns, 16)
        return pool[start : start + rows * columns].view(rows, columns)

    def nvfp4(name: str, rows: int, columns: int, scale_2: float) -> Iterator[tuple[str, Tensor]]:
        yield f"{name}.weight", some(codes, rows, columns // 2)
        yield f"{name}.weight_scale", some(scales, rows, columns // 16)
        yield f"{name}.weight_scale_2", torch.tensor(scale_2, dtype=torch.float32, device=device)
        yield f"{name}.input_scale", torch.tensor(1e-3, dtype=torch.float32, device=device)

    def bf16(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float32, device=device, generator=generator).mul_(columns**-0.5).bfloat16()

    def norm(columns: int) -> Tensor:
        # Qwen3-Next's norms add one to their weights, but for that of a gated delta net.
        return torch.full((columns,), 0.0 if config["model_type"] == "qwen3_next" else 1.0, dtype=torch.bfloat16, device=device)

    def gdn(here: str) -> Iterator[tuple[str, Tensor]]:
        """All but the projections; decay as transformers begins a training with."""
        heads, values = config["linear_num_value_heads"], config["linear_value_head_dim"]
        channels = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] + heads * values
        decay = torch.rand(heads, dtype=torch.float32, device=device, generator=generator).mul_(15).add_(1)
        yield f"{here}.A_log", decay.log_().bfloat16()
        yield f"{here}.dt_bias", torch.ones(heads, dtype=torch.bfloat16, device=device)
        yield f"{here}.conv1d.weight", bf16(channels, config["linear_conv_kernel_dim"]).unsqueeze(1)
        yield f"{here}.norm.weight", torch.ones(values, dtype=torch.bfloat16, device=device)

    yield "model.embed_tokens.weight", bf16(config["vocab_size"], hidden)
    for layer in layers:
        here = f"model.layers.{layer}"
        yield f"{here}.input_layernorm.weight", norm(hidden)
        yield f"{here}.post_attention_layernorm.weight", norm(hidden)
        if is_gdn(config, layer):
            yield from gdn(f"{here}.linear_attn")
        else:
            yield f"{here}.self_attn.q_norm.weight", norm(head)
            yield f"{here}.self_attn.k_norm.weight", norm(head)
        for module, (rows, columns) in _linear_layers(config, layer).items():
            name = f"{here}.{module}"
            if name in ignored:
                yield f"{name}.weight", bf16(rows, columns)
            else:
                # q, k and v share a global scale, as vLLM's kernels want.
                yield from nvfp4(name, rows, columns, global_scale(columns))
    yield "model.norm.weight", norm(hidden)
    yield "lm_head.weight", bf16(config["vocab_size"], hidden)


def main(engine: str, work: str) -> None:
    """In a child: serve with one provider and leave its rows in the folder."""
    child, wanted = child_of(engine), json.loads(work)
    config = MODELS[wanted["model"]].of_layers(wanted["layers"])
    folder = Path(wanted["folder"])
    write_config(config, folder)
    arguments = {**child.engine_arguments(wanted["model"], wanted["provider"], wanted["batches"]), **wanted["settings"]}
    rows = child.serve(arguments, config, wanted["batches"], folder)
    (folder / "rows.json").write_text(json.dumps(rows))
