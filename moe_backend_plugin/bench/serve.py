"""``moe-backend bench serve``: a whole model in an engine's offline class, once for each provider of its expert layers.

The model has Qwen3-30B-A3B's shape as ModelOpt quantises it (NVFP4 everywhere but embeddings, routers and output) and random weights that
are valid NVFP4, so that routing spreads over the experts. Its tensors go through the engine's own loading; nothing but a config.json is on
the disk. Each provider runs in a process of its own: :mod:`.serve_vllm` or :mod:`.serve_sglang`, as a script.
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

from .moe import KERNELS as KERNELS
from .moe import global_scale

ENGINES = ("vllm", "sglang")
MODEL = "qwen3-30b-a3b"
BATCHES = (1, 8, 32, 128, 256)
PROMPT, NEW = 32, 128
PREFILL_BATCH, PREFILL = 32, 2048
WARM_UPS, RUNS = 3, 5
BATCHED_TOKENS = 16384

LAYERS = 48
CONFIG: dict[str, Any] = {
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


def child_of(engine: str) -> ModuleType:
    """The module that serves with an engine of :data:`ENGINES`; imports no engine.

    It has ``PROVIDERS``, ``engine_arguments(provider, batches)``, ``serve(arguments, config, batches, folder)`` and ``SAID``:
    patterns of what its log says about who runs the experts.
    """
    return import_module(f".serve_{engine}", __package__)


def run(options: Options, say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """Serve with one provider after the other; yields the growing result {"ceilings", "rows", "errors"} after each."""
    result: dict[str, Any] = {"ceilings": {}, "rows": [], "errors": []}
    for provider in options.providers or child_of(options.engine).PROVIDERS:
        found = _in_a_child(provider, options)
        if "error" in found:
            result["errors"].append({"model": MODEL, "provider": provider, **found})
            say(f"{provider}: {found['error']}")
        for row in found.get("rows", []):
            cell = {"model": MODEL, **({"layers": options.layers} if options.layers != LAYERS else {}), "provider": provider}
            result["rows"].append({**cell, **row})
            say(json.dumps(result["rows"][-1]))
        yield result


def _in_a_child(provider: str, options: Options) -> dict[str, Any]:
    """{"rows"} of a provider, or {"error"} with the end of what its process printed."""
    with tempfile.TemporaryDirectory() as folder:
        work = {"provider": provider, "batches": options.batches or BATCHES, "layers": options.layers, "settings": {**options.settings}}
        command = [sys.executable, "-m", child_of(options.engine).__name__, json.dumps({**work, "folder": folder})]
        done = subprocess.run(command, capture_output=True, text=True)
        file = Path(folder) / "rows.json"
        if done.returncode or not file.exists():
            return {"error": f"exit code {done.returncode}: {(done.stdout + done.stderr).strip()[-4000:]}"}
        rows = json.loads(file.read_text())
    said = served_by(done.stdout + done.stderr, child_of(options.engine).SAID)
    return {"rows": [{**row, "served_by": said} for row in rows]}


def served_by(log: str, said: Sequence[str]) -> str | None:
    """What the engine said about who runs the experts: the group of the first pattern of ``said`` that the log has."""
    found = (re.search(pattern, log) for pattern in said)
    return next((match[1].strip() for match in found if match), None)


# --- in the child --------------------------------------------------------------------------------------------------------------------


def write_config(config: dict[str, Any], folder: Path) -> None:
    """The model's config.json, as ModelOpt leaves it."""
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization(config)}))


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


def quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` as ModelOpt writes it."""
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(config["num_hidden_layers"])]
    return {
        "config_groups": {"group_0": {"input_activations": four_bits, "weights": four_bits, "targets": ["Linear"]}},
        "ignore": ["lm_head", "model.embed_tokens", *routers],
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def tensors(config: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a ModelOpt NVFP4 checkpoint of a Qwen3-MoE model with this config.json, by name, with random values.

    NVFP4 tensors are views of two pools of random bytes at random places, so that 17 GB cost no time to make.
    """
    hidden, width, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    experts = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    generator = torch.Generator(device).manual_seed(0)
    dice = random.Random(0)
    size = 2 * max(rows * columns for rows, columns in (*projections.values(), *experts.values()))
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
        return torch.ones(columns, dtype=torch.bfloat16, device=device)

    yield "model.embed_tokens.weight", bf16(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        here = f"model.layers.{layer}"
        yield f"{here}.input_layernorm.weight", norm(hidden)
        yield f"{here}.post_attention_layernorm.weight", norm(hidden)
        yield f"{here}.self_attn.q_norm.weight", norm(head)
        yield f"{here}.self_attn.k_norm.weight", norm(head)
        for name, (rows, columns) in projections.items():
            # q, k and v share a global scale, as vLLM's kernels want.
            yield from nvfp4(f"{here}.self_attn.{name}", rows, columns, global_scale(columns))
        yield f"{here}.mlp.gate.weight", bf16(config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for name, (rows, columns) in experts.items():
                yield from nvfp4(f"{here}.mlp.experts.{expert}.{name}", rows, columns, global_scale(columns))
    yield "model.norm.weight", norm(hidden)
    yield "lm_head.weight", bf16(config["vocab_size"], hidden)


def main(engine: str, work: str) -> None:
    """In a child: serve with one provider and leave its rows in the folder."""
    child, wanted = child_of(engine), json.loads(work)
    config = {**CONFIG, "num_hidden_layers": wanted["layers"]}
    folder = Path(wanted["folder"])
    write_config(config, folder)
    arguments = {**child.engine_arguments(wanted["provider"], wanted["batches"]), **wanted["settings"]}
    rows = child.serve(arguments, config, wanted["batches"], folder)
    (folder / "rows.json").write_text(json.dumps(rows))
