"""``moe-backend bench serve --engine vllm``: one provider in vLLM's offline class; as a script, in a process of its own.

The random weights come under a load format that this module registers with vLLM.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import serve as bench

LOAD_FORMAT = "nvfp4_random"


def _settings(**providers: str) -> dict[str, Any]:
    """Arguments that name who serves what, by kind of layer; what is named does not give way to vLLM's."""
    return {"additional_config": {"moe_backend_plugin": {kind: {"provider": provider} for kind, provider in providers.items()}}}


PROVIDERS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": {
        "plugin": {"quantization": "nvfp4_cutedsl", **_settings(moe="cutedsl")},
        # Dense layers as well, which the others leave to vLLM's own choice.
        "plugin_linear": {"quantization": "nvfp4_cutedsl", **_settings(moe="cutedsl", linear="cutedsl")},
        "marlin": {"quantization": "modelopt_fp4", "moe_backend": "marlin"},
        "humming": {"quantization": "modelopt_fp4", "moe_backend": "humming"},
    },
    # This package's gated-delta-net layer comes with every quantisation: it must be told to leave vLLM's kernels alone.
    "qwen3-next": {
        "plugin": {"quantization": "nvfp4_cutedsl", **_settings(moe="cutedsl", gdn="cutedsl")},
        "marlin": {"quantization": "modelopt_fp4", "moe_backend": "marlin", **_settings(gdn="engine")},
        "humming": {"quantization": "modelopt_fp4", "moe_backend": "humming", **_settings(gdn="engine")},
    },
}
"""Arguments of vLLM's LLM class for each provider, by model."""
SAID = {
    "experts": (r"NVFP4 moe layers are served by: (.*)", r"Using (.* NvFp4 MoE backend) out of"),
    "GDN decode": (r"Gated-delta-net layers are served by: (.*)",),
}


def engine_arguments(model: str, provider: str, batches: Sequence[int]) -> dict[str, Any]:
    """Of the LLM class on a GPU: decode through CUDA graphs of the batches that are timed, no torch.compile."""
    return {
        "max_model_len": bench.PREFILL + bench.NEW,
        "max_num_seqs": max(*batches, bench.PREFILL_BATCH),
        "max_num_batched_tokens": bench.BATCHED_TOKENS,
        "gpu_memory_utilization": 0.85,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted({*batches})},
        **PROVIDERS[model][provider],
    }


def serve(arguments: Mapping[str, Any], config: Mapping[str, Any], batches: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Rows of one provider; ``arguments`` are further ones of the LLM class, ``folder`` has the config.json."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), load_format=LOAD_FORMAT, skip_tokenizer_init=True, enable_prefix_caching=False, **arguments)

    def generate(prompts: list[list[int]], new: int) -> None:
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    return bench.measure(generate, config, batches)


def register() -> None:
    """Make LOAD_FORMAT known to vLLM in this process, and let this package take a folder that holds no weights."""
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader
    from vllm.platforms import current_platform

    from ..engines.vllm import configs
    from ..engines.vllm import register as register_plugin

    register_plugin()  # a checkout need not be installed
    configs.check_checkpoint = lambda *_, **__: None

    @register_model_loader(LOAD_FORMAT)
    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            config = json.loads((Path(model_config.model) / "config.json").read_text())
            model.load_weights(bench.tensors(config, torch.device(current_platform.device_type)))


# vLLM's engine runs in a child of its own, which is forked, or imports this module again.
if __name__ in ("__main__", "__mp_main__"):
    register()
if __name__ == "__main__":
    bench.main("vllm", sys.argv[1])
