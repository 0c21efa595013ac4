"""On a GPU: layers that `--quantization nvfp4_cutedsl` hands to vLLM give the same tokens as vLLM's own method.

    python integration/gpu/engine_path.py

With `moe.provider: engine` every NVFP4 layer is vLLM's on a GPU, and gated-delta-net layers are this package's in both runs, so the two
must agree to the token.  Prints one JSON object; exits 1 on a difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integration/bench"))
from child import hand_back, run_child  # noqa: E402

PROMPTS = ["class Stack:\n    def __init__(self):", "import os\nimport sys\n\ndef main(", "def read_lines(path):\n    with open(path) as"]


def generate(model: str, quantization: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        quantization=quantization,
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        additional_config={"moe_backend_plugin": {"moe": {"provider": "engine"}}},
    )
    done = llm.generate(PROMPTS, SamplingParams(max_tokens=64, temperature=0, ignore_eos=True), use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in done]


def child(model: str, quantization: str) -> tuple[list[list[int]], list[str]]:
    tokens, text = run_child(__file__, model, quantization)
    said = sorted({line.split("] ", 1)[-1] for line in text.splitlines() if "are served by" in line or "NvFp4" in line or "NVFP4" in line})
    return tokens, said


def main() -> None:
    if len(sys.argv) == 3:
        hand_back(generate(*sys.argv[1:]))
        return
    report, same = {}, True
    for name in ("pycoder-moe-nvfp4", "pycoder-next-nvfp4"):
        model = str(ROOT / "integration" / "models" / name)
        ours, said = child(model, "nvfp4_cutedsl")
        theirs, _ = child(model, "modelopt_fp4")
        report[name] = {"same_tokens": ours == theirs, "log": said}
        same &= ours == theirs
    print(json.dumps(report, indent=1))
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
