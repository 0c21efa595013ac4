"""Decode speed of vLLM's CPU engine: NVFP4 through the plugin beside vLLM's own bf16, and the memory of the experts.

    python integration/bench/cpu.py [--bf16 DIR] [--nvfp4 DIR] [--batch 8] [--tokens 128] [--out FILE]

Without ``--bf16`` the unquantised peer is the NVFP4 checkpoint's own weights, dequantised: the same model in every respect
but the format.  Each engine runs in a process of its own, one after the other, and the pair is run ``--rounds`` times in
alternation; a row is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from child import hand_back, run_child  # noqa: E402
from expert_memory import expert_memory  # noqa: E402
from stamp import ROOT, processor, stamp  # noqa: E402

PROMPTS = [
    "class Stack:\n    def __init__(self):",
    "import os\nimport sys\n\ndef main(",
    "def read_lines(path):\n    with open(path) as",
    "for i in range(10):\n    if",
    "class Node:\n    def __init__(self, value",
    "try:\n    import json\nexcept",
    "def fibonacci(n):\n",
    "async def fetch(self, url",
]


def serve_once(model: str, quantization: str | None, batch: int, tokens: int) -> dict:
    """Tokens a second of ``batch`` sequences that generate ``tokens`` each, after one warm-up of the same shape."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # apply_model sends a function to the worker
    from vllm import LLM, SamplingParams

    llm = LLM(model, quantization=quantization, dtype="bfloat16", max_model_len=1024, enforce_eager=True, max_num_seqs=batch)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    llm.generate(prompts, sampling, use_tqdm=False)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        times.append(time.perf_counter() - start)
    memory = llm.apply_model(expert_memory)[0]
    return {"output_tok_s": batch * tokens / statistics.median(times), **memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [str(ROOT / "integration/models" / name) for name in ("pycoder-moe-nvfp4", "pycoder-next-nvfp4")]
    parser.add_argument("--nvfp4", nargs="+", default=models)
    parser.add_argument("--bf16", nargs="+", help="unquantised models, one for each of --nvfp4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "integration/bench/results/cpu.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, quantization, batch, tokens = arguments.child
        hand_back(serve_once(model, quantization or None, int(batch), int(tokens)))
        return

    from moe_backend_plugin.verify import dequantize_checkpoint

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for index, nvfp4 in enumerate(arguments.nvfp4):
            bf16 = arguments.bf16[index] if arguments.bf16 else str(dequantize_checkpoint(nvfp4, Path(scratch) / f"bf16-{index}"))
            runs: dict[str, list[dict]] = {"plugin": [], "vllm-bf16": []}
            size = (str(arguments.batch), str(arguments.tokens))
            for _ in range(arguments.rounds):
                runs["plugin"].append(run_child(__file__, "--child", nvfp4, "nvfp4_cutedsl", *size)[0])
                runs["vllm-bf16"].append(run_child(__file__, "--child", bf16, "", *size)[0])
            for provider, found in runs.items():
                held, weights = found[0]["expert_bytes"], found[0]["expert_weights"]
                rows.append(
                    {
                        "model": Path(nvfp4).name,
                        "provider": provider,
                        "batch": arguments.batch,
                        "tokens": arguments.tokens,
                        "output_tok_s": round(statistics.median(r["output_tok_s"] for r in found), 1),
                        "output_tok_s_runs": [round(r["output_tok_s"], 1) for r in found],
                        "expert_bytes_per_weight": round(held / weights, 4),
                    }
                )
                print(json.dumps(rows[-1]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"stamp": stamp(processor()), "ceilings": {}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
