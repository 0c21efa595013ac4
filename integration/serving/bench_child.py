"""What ``moe-backend bench serve --engine vllm`` starts for a provider, on a CPU: tiny models, one run of each measurement.

Its argument is that of :mod:`moe_backend_plugin.bench.serve_vllm` as a script.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Any

# The engine core shares this process: no second import of torch and vLLM.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from moe_backend_plugin.bench import serve, serve_vllm  # noqa: E402

SMALL = {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "vocab_size": 256}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64}
SMALL_NEXT = {"shared_expert_intermediate_size": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 2}


def engine_arguments(model: str, provider: str, batches: list[int]) -> dict[str, Any]:
    """This package's torch ops, or an end."""
    limits = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": max(batches)}
    quantization = serve_vllm.PROVIDERS[model][provider]["quantization"]
    return {"quantization": quantization, "additional_config": {"moe_backend_plugin": {"strict": True}}, **limits}


def main() -> None:
    serve_vllm.register()
    serve_vllm.engine_arguments = engine_arguments
    serve.WARM_UPS, serve.RUNS, serve.PROMPT, serve.NEW, serve.PREFILL, serve.PREFILL_BATCH = 0, 1, 5, 3, 16, 2
    for name, model in serve.MODELS.items():
        small = SMALL | (SMALL_NEXT if name == "qwen3-next" else {})
        serve.MODELS[name] = replace(model, config={**model.config, **small})
    serve.main("vllm", sys.argv[1])


if __name__ == "__main__":
    main()
