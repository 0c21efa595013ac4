"""Decode tokens/s of a Qwen3-Next-shaped model in vLLM, with this package's GDN kernels and with vLLM's own.

    python integration/bench/gdn_engine.py [--layers 8] [--states float32 bfloat16] [--drafts 0] [--providers engine cutedsl] [--out FILE]

Full width, fewer layers, dummy bf16 weights: what differs between the two runs is the state update alone.  128 new tokens after 32.
``--drafts``: so many from the model's own draft layer (qwen3_next_mtp) in each step, whose dummy weights guess as they guess: such rows
show that it runs, not what drafts are worth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
from child import hand_back, run_child  # noqa: E402
from stamp import gpu_stamp  # noqa: E402

from moe_backend_plugin.bench.serve import MODELS  # noqa: E402

BATCHES = (1, 16, 64, 256)
PROMPT, NEW = 32, 128
NAMES = {"engine": "vllm", "cutedsl": "plugin"}
CONFIG = {**MODELS["qwen3-next"].config, "max_position_embeddings": 32768}


def serve(provider: str, layers: int, state: str, drafts: int) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    speculative = {"speculative_config": {"method": "qwen3_next_mtp", "num_speculative_tokens": drafts}} if drafts else {}
    sizes = [batch * (1 + drafts) for batch in BATCHES]

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=max(BATCHES),
            enable_prefix_caching=False,
            mamba_ssm_cache_dtype=state,
            gpu_memory_utilization=0.85,
            compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes},
            additional_config={"moe_backend_plugin": {"gdn": {"provider": provider}}},
            **speculative,
        )
    found = {}
    for batch in BATCHES:
        prompts = [{"prompt_token_ids": [(7 * i + j) % 100000 + 3 for j in range(PROMPT)]} for i in range(batch)]
        times = {}
        for tokens in (1, NEW):  # the difference is decode alone
            sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
            for _ in range(3):  # Triton compiles for new batch shapes as they come
                llm.generate(prompts, sampling, use_tqdm=False)
            runs = []
            for _ in range(7):
                start = time.perf_counter()
                llm.generate(prompts, sampling, use_tqdm=False)
                runs.append(time.perf_counter() - start)
            times[tokens] = statistics.median(runs)
        found[str(batch)] = batch * (NEW - 1) / (times[NEW] - times[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--states", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--drafts", type=int, nargs="+", default=[0])
    parser.add_argument("--providers", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--out", type=Path, default=ROOT / "integration/bench/results/gdn_engine_h200.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        provider, layers, state, drafts = arguments.child
        hand_back(serve(provider, int(layers), state, int(drafts)))
        return
    rows = []
    for drafts, state in product(arguments.drafts, arguments.states):
        for provider in arguments.providers:
            found, _ = run_child(__file__, "--child", provider, str(arguments.layers), state, str(drafts))
            for batch, rate in found.items():
                cell = {"shape": "qwen3-next", "layers": arguments.layers, "state_dtype": state, "drafts": drafts, "batch": int(batch)}
                rows.append({**cell, "provider": NAMES[provider], "decode_tok_s": round(rate, 1)})
                print(json.dumps(rows[-1]), flush=True)
            arguments.out.write_text(json.dumps({"stamp": gpu_stamp(__file__), "ceilings": {}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
