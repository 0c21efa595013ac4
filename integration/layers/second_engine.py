"""Two vLLM engines one after the other in this process, with settings of their own; prints JSON: {"texts": [first, second, third]}.

    python second_engine.py MODEL

The third has the first one's settings again: what the second left behind would show.
"""

from __future__ import annotations

import gc
import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def texts(model: str, activations: str) -> list[str]:
    from vllm import LLM, SamplingParams

    settings = {"moe_backend_plugin": {"moe": {"activations": activations}}}
    llm = LLM(model, quantization="nvfp4_cutedsl", enforce_eager=True, max_model_len=256, additional_config=settings)
    made = llm.generate(["def add(a, b):", "import os"], SamplingParams(max_tokens=24, temperature=0, ignore_eos=True), use_tqdm=False)
    return [one.outputs[0].text for one in made]


def main() -> None:
    found = []
    for activations in ("bf16", "nvfp4", "bf16"):
        found.append(texts(sys.argv[1], activations))
        gc.collect()  # the engine's own cycles
    # vLLM logs to standard output.
    print("\n" + json.dumps({"texts": found}))


if __name__ == "__main__":
    main()
