"""On a GPU: a small model that was put to sleep says what it said before, its weights kept (level 1) or given up and loaded anew (level 2).

    python integration/gpu/sleep_reload.py [--models pycoder-moe-nvfp4 ...] [--linear engine cutedsl] [--out FILE]

16 prompts are continued by 64 greedy tokens through CUDA graphs; then vLLM sleeps at level 1 and wakes up, and they are continued again;
then at level 2, wakes up and reloads the weights in place, which is what reinforcement learning does in every step.  The graphs are
those from the start.  Stores a row for each model, provider of dense layers and level; exits 1 unless all texts are the first ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from decoded_text import MODELS, RESULTS, engine_of, hand_back, prompts_of, record, run_child
from moe_text import NAMES

from moe_backend_plugin.bench.moe import KERNELS

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64


def child(model: str, linear: str) -> dict[str, list[list[int]]]:
    """The texts by what the engine did before: "start", "level 1", "level 2"."""
    from vllm import SamplingParams

    prompts = prompts_of(MODELS / model, PROMPT_TOKENS, PROMPTS)
    settings = {"moe": {"provider": "cutedsl"}, "linear": {"provider": linear}}
    llm = engine_of(MODELS / model, settings, enable_sleep_mode=True, enable_prefix_caching=False)

    def texts() -> list[list[int]]:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in done]

    found = {"start": texts()}
    llm.sleep(level=1)
    llm.wake_up()
    found["level 1"] = texts()
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    found["level 2"] = texts()
    return found


def rows(models: list[str], providers: list[str]) -> Iterator[dict[str, Any]]:
    for model in models:
        for linear in providers:
            found, _ = run_child(__file__, "--child", model, linear)
            for level in ("level 1", "level 2"):
                same = sum(a == b for a, b in zip(found[level], found["start"], strict=True))
                yield {"model": model, "provider": "plugin", "linear": linear, "slept": level, "texts": PROMPTS, "equal": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--linear", nargs="+", choices=["engine", "cutedsl"], default=["engine", "cutedsl"])
    parser.add_argument("--out", type=Path, default=RESULTS / "sleep_h200.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        hand_back(child(*arguments.child))
        return
    found = rows(arguments.models, arguments.linear)
    record(found, arguments.out, __file__, (*KERNELS, "gdn_decode"), within=lambda row: row["equal"] == row["texts"])


if __name__ == "__main__":
    main()
