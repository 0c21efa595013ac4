"""``moe-backend bench serve --engine sglang``: one provider in SGLang's offline engine; as a script, in a process of its own.

SGLang has no registry of loaders for a plugin, so its default one is given the random tensors where it would read files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from . import serve as bench

PROVIDERS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": {
        "plugin": {"moe_runner_backend": "cutedsl"},
        "marlin": {"moe_runner_backend": "marlin"},
        # Takes dense layers too, where the other two leave them to SGLang's Marlin.
        "humming": {"quantization": "humming"},
    },
    "qwen3-next": {
        "plugin": {"moe_runner_backend": "cutedsl", "linear_attn_decode_backend": "cutedsl_plugin"},
        # The same experts with SGLang's own GDN decode kernels.
        "plugin_triton_gdn": {"moe_runner_backend": "cutedsl", "linear_attn_decode_backend": "triton"},
        "plugin_cutedsl_gdn": {"moe_runner_backend": "cutedsl", "linear_attn_decode_backend": "cutedsl"},
        "marlin": {"moe_runner_backend": "marlin", "linear_attn_decode_backend": "triton"},
    },
}
"""Arguments of SGLang's Engine for each provider that may serve NVFP4 experts on Hopper, by model."""
# SGLang says who serves experts only in the arguments that it prints.
SAID = {
    "experts": (r"NVFP4 moe layers are served by: (.*)", r"'moe_runner_backend': '(\w+)'"),
    # Of this package's kernel, SGLang knows that it is none of its own.
    "GDN decode": (r"Gated-delta-net decode is served by: (\S+)", r"Linear attention kernel backend: decode=(\w+)"),
}


def engine_arguments(model: str, provider: str, batches: Sequence[int]) -> dict[str, Any]:
    """Of the Engine on a GPU: decode through CUDA graphs of the batches that are timed, nothing remembered of earlier prompts."""
    return {
        "skip_tokenizer_init": True,
        "log_level": "info",
        "context_length": bench.PREFILL + bench.NEW,
        "max_running_requests": max(*batches, bench.PREFILL_BATCH),
        "chunked_prefill_size": bench.BATCHED_TOKENS,
        "max_prefill_tokens": bench.BATCHED_TOKENS,
        "mem_fraction_static": 0.8,
        "disable_radix_cache": True,
        "cuda_graph_bs_decode": sorted({*batches}),
        # By default dozens, whose capture takes minutes.
        "cuda_graph_bs_prefill": sorted({*(bench.PROMPT * batch for batch in batches), bench.BATCHED_TOKENS}),
        **PROVIDERS[model][provider],
    }


def serve(arguments: Mapping[str, Any], config: Mapping[str, Any], batches: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Rows of one provider; ``arguments`` are those of the Engine, ``folder`` has the config.json."""
    from sglang.srt.entrypoints.engine import Engine

    with Engine(model_path=str(folder), **arguments) as engine:

        def generate(prompts: list[list[int]], new: int) -> None:
            sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
            done = engine.generate(input_ids=prompts, sampling_params=sampling)
            short = [len(answer["output_ids"]) for answer in done if len(answer["output_ids"]) != new]
            if short:
                raise RuntimeError(f"{len(short)} of {len(done)} answers have {short[0]} tokens instead of {new}")

        return bench.measure(generate, config, batches)


def random_weights(_loader: Any, model_config: Any, model: Module) -> Iterator[tuple[str, Tensor]]:
    """In place of ``DefaultModelLoader._get_all_weights``."""
    config = json.loads((Path(model_config.model_path) / "config.json").read_text())
    return bench.tensors(config, next(model.parameters()).device)


def register() -> None:
    """Give SGLang's loader the random tensors as soon as a process imports it, and register this package."""
    from wrapt.importer import register_post_import_hook

    from ..engines.sglang import register as register_plugin

    def patch(module: Any) -> None:
        module.DefaultModelLoader._get_all_weights = random_weights

    register_plugin()  # a checkout need not be installed
    register_post_import_hook(patch, "sglang.srt.model_loader.loader")


# SGLang's scheduler is a process that imports this module again.
if __name__ in ("__main__", "__mp_main__"):
    register()
if __name__ == "__main__":
    bench.main("sglang", sys.argv[1])
