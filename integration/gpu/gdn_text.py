"""On a GPU: what pycoder-next says while it decodes is what transformers says of the same tokens.

    python integration/gpu/gdn_text.py [--out FILE]

Prompt log-probabilities say nothing of decode kernels, since prefills compute them.  So 64 prompts are continued by 256 greedy tokens, and
the log-probabilities vLLM gave its own tokens are compared with those of transformers (float32, dequantised weights) for the same text:
with this package's kernels and with vLLM's, without drafts and with n-gram drafts of 1, 3 and 5 tokens, for both types of state.
Stores one row a run; exits 1 where the two perplexities differ by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integration/bench"))
from child import hand_back, run_child  # noqa: E402
from stamp import gpu_stamp  # noqa: E402

MODEL = ROOT / "integration/models/pycoder-next-nvfp4"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 64, 256
BOUND = 0.005


def generate(provider: str, drafts: int, state: str) -> dict:
    from vllm import LLM, SamplingParams

    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    prompts = windows(load_tokenizer(MODEL), standard_library("verification"), PROMPT_TOKENS, PROMPTS, per_file=2)
    speculation = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    llm = LLM(
        str(MODEL),
        quantization="nvfp4_cutedsl",
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.5,
        mamba_ssm_cache_dtype=state,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        speculative_config=speculation if drafts else None,
        additional_config={"moe_backend_plugin": {"gdn": {"provider": provider}}},
    )
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    texts = [list(request.outputs[0].token_ids) for request in done]
    chosen = [
        [step[token].logprob for token, step in zip(request.outputs[0].token_ids, request.outputs[0].logprobs, strict=True)]
        for request in done
    ]
    return {"prompts": prompts, "texts": texts, "logprobs": chosen}


def compare(found: dict, reference: Path) -> dict:
    from moe_backend_plugin.verify import score_transformers

    whole = [prompt + text for prompt, text in zip(found["prompts"], found["texts"], strict=True)]
    scores = score_transformers(reference, whole, device="cuda", batch_size=16).logprobs
    width = PROMPT_TOKENS + NEW_TOKENS - 1
    theirs = [scores[i * width + PROMPT_TOKENS - 1 : (i + 1) * width] for i in range(len(whole))]
    pairs = [pair for ours, row in zip(found["logprobs"], theirs, strict=True) for pair in zip(ours, row, strict=True)]
    ours_mean, theirs_mean = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return {
        "tokens": len(pairs),
        "perplexity": math.exp(-ours_mean),
        "transformers_perplexity": math.exp(-theirs_mean),
        "relative_perplexity": math.exp(theirs_mean - ours_mean) - 1,
        "mean_logprob_difference": sum(abs(a - b) for a, b in pairs) / len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "integration/bench/results/gdn_text_h200.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        provider, drafts, state = arguments.child
        hand_back(generate(provider, int(drafts), state))
        return

    from moe_backend_plugin.verify import dequantize_checkpoint

    rows, texts = [], {}
    runs = [
        ("cutedsl", 0, "float32"),
        ("engine", 0, "float32"),
        ("cutedsl", 3, "float32"),
        ("cutedsl", 0, "bfloat16"),
        ("cutedsl", 5, "bfloat16"),
    ]
    runs += [("cutedsl", 1, "float32"), ("engine", 3, "float32")]
    with tempfile.TemporaryDirectory() as scratch:
        reference = dequantize_checkpoint(MODEL, Path(scratch) / "reference")
        for provider, drafts, state in runs:
            found, log = run_child(__file__, "--child", provider, str(drafts), state)
            said = [line for line in log.splitlines() if "Gated-delta-net layers are served by" in line]
            texts[provider, drafts, state] = found["texts"]
            same = sum(a == b for a, b in zip(found["texts"], texts["cutedsl", 0, "float32"], strict=True))
            row = {"model": MODEL.name, "provider": provider, "drafts": drafts, "state_dtype": state, **compare(found, reference)}
            rows.append({**row, "texts_as_first_run": same, "served_by": said[0].split("served by: ")[-1] if said else None})
            print(json.dumps(rows[-1]), flush=True)
            arguments.out.write_text(
                json.dumps({"stamp": gpu_stamp("python integration/gpu/gdn_text.py"), "ceilings": {}, "rows": rows}, indent=1) + "\n"
            )
    raise SystemExit(any(abs(row["relative_perplexity"]) > BOUND for row in rows))


if __name__ == "__main__":
    main()
