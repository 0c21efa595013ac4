"""On a GPU: what pycoder-next says while it decodes is what transformers says of the same tokens.

    python integration/gpu/gdn_text.py [--out FILE]

64 prompts are continued by 256 greedy tokens (decoded_text.py says how they are compared), with this package's kernels and with vLLM's,
without drafts and with n-gram drafts of 1, 3 and 5 tokens, for both types of state.
Stores one row a run; exits 1 where the two perplexities differ by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from decoded_text import MODELS, RESULTS, generate, hand_back, measure, record, same_perplexity
from mixed_load import ngrams

MODEL = MODELS / "pycoder-next-nvfp4"
RUNS = [
    ("cutedsl", 0, "float32"),
    ("engine", 0, "float32"),
    ("cutedsl", 3, "float32"),
    ("cutedsl", 0, "bfloat16"),
    ("cutedsl", 5, "bfloat16"),
    ("cutedsl", 1, "float32"),
    ("engine", 3, "float32"),
]


def child(model: str, provider: str, drafts: int, state_dtype: str) -> dict:
    return generate(
        MODELS / model,
        prompt_tokens=64,
        settings={"gdn": {"provider": provider}},
        score_prompts=False,
        mamba_ssm_cache_dtype=state_dtype,
        speculative_config=ngrams(drafts) if drafts else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gdn_text_h200.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, run = arguments.child
        hand_back(child(model, **json.loads(run)))
        return
    runs = [dict(zip(("provider", "drafts", "state_dtype"), run, strict=True)) for run in RUNS]
    rows = measure(__file__, MODEL, runs, said="Gated-delta-net layers are served by")
    record(rows, arguments.out, __file__, "gdn_decode", within=same_perplexity)


if __name__ == "__main__":
    main()
