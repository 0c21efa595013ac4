"""What an engine says while it decodes, beside what transformers says of the same tokens: shared by the scripts named ..._text.py.

Prompt log-probabilities say nothing of decode kernels, since prefills compute them.  So prompts are continued by greedy tokens, and the
log-probabilities that vLLM gave its own tokens are compared with those of transformers (float32, dequantised weights) for the same text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integration/bench"))
from child import hand_back as hand_back  # noqa: E402
from child import run_child  # noqa: E402
from mixed_load import CACHE  # noqa: E402
from stamp import gpu_stamp  # noqa: E402

MODELS = ROOT / "integration/models"
RESULTS = ROOT / "integration/bench/results"
PROMPTS, NEW_TOKENS = 64, 256
BOUND = 0.005


def prompts_of(model: Path, tokens: int, count: int) -> list[list[int]]:
    """So many prompts of so many tokens from the standard library."""
    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    return windows(load_tokenizer(model), standard_library("verification"), tokens, count, per_file=2)


def engine_of(model: Path, settings: dict, **further: Any) -> Any:
    """vLLM's LLM class, decode through CUDA graphs; ``settings``: this package's; ``further``: arguments that come before these."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "quantization": "nvfp4_cutedsl",
        "dtype": "bfloat16",
        "max_model_len": 1024,
        **CACHE,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "additional_config": {"moe_backend_plugin": settings},
    }
    return LLM(str(model), **(arguments | further))


def generate(model: Path, prompt_tokens: int, settings: dict, score_prompts: bool, **engine: Any) -> dict:
    """In a child: prompts from the standard library, their continuations, and the log-probabilities of these, or of both.

    ``settings`` and ``engine`` as :func:`engine_of` takes them.
    """
    from vllm import SamplingParams

    prompts = prompts_of(model, prompt_tokens, PROMPTS)
    llm = engine_of(model, settings, **engine)
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0 if score_prompts else None
    )
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    def chosen(tokens: Sequence[int], steps: Sequence) -> list[float]:
        return [step[token].logprob for token, step in zip(tokens, steps, strict=True)]

    found = {
        "prompts": prompts,
        "texts": [list(request.outputs[0].token_ids) for request in done],
        "logprobs": [chosen(request.outputs[0].token_ids, request.outputs[0].logprobs) for request in done],
    }
    if score_prompts:
        scored = [chosen(prompt[1:], request.prompt_logprobs[1:]) for prompt, request in zip(prompts, done, strict=True)]
        found["prompt_logprobs"] = scored
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """What can be asked of either engine."""
    parser.add_argument("--fp32-logits", action="store_true", help="the output matrix in float32: bfloat16 logits tie often")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of all that is computed; float16 ties least")
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallel over so many")
    parser.add_argument("--expert-parallel", action="store_true", help="with --gpus: whole experts on each instead of parts of all")


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Their columns of a row."""
    names = ("fp32_logits", "dtype", "gpus", "expert_parallel")
    return {name: getattr(arguments, name) for name in names}


def compare(found: dict, reference: Path, device: str = "cuda") -> dict[str, Any]:
    """The figures of the decoded tokens and, where they were scored, of the prompts' (named "prompt_...")."""
    from moe_backend_plugin.verify import score_transformers

    whole = [prompt + text for prompt, text in zip(found["prompts"], found["texts"], strict=True)]
    scores = score_transformers(reference, whole, device=device, batch_size=16).logprobs
    width, given = len(whole[0]) - 1, len(found["prompts"][0]) - 1
    theirs = [scores[i * width : (i + 1) * width] for i in range(len(whole))]
    figures = _figures(found["logprobs"], [row[given:] for row in theirs])
    if "prompt_logprobs" in found:
        prompt = _figures(found["prompt_logprobs"], [row[:given] for row in theirs])
        figures |= {f"prompt_{name}": value for name, value in prompt.items()}
    return figures


def _figures(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> dict[str, Any]:
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    ours_mean, theirs_mean = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return {
        "tokens": len(pairs),
        "perplexity": math.exp(-ours_mean),
        "transformers_perplexity": math.exp(-theirs_mean),
        "relative_perplexity": math.exp(theirs_mean - ours_mean) - 1,
        "mean_logprob_difference": sum(abs(a - b) for a, b in pairs) / len(pairs),
    }


def measure(
    script: str, model: Path, runs: Sequence[dict[str, Any]], said: str, more: Callable[[dict, dict], dict] | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each of ``runs``: what ``script --child MODEL RUN`` (a run as JSON) hands back, compared.

    ``said``: the line of the engine's log that says who serves the layers. ``more``: further columns, of what came back and the run.
    """
    from moe_backend_plugin.verify import dequantize_checkpoint

    first = None
    with tempfile.TemporaryDirectory() as scratch:
        reference = dequantize_checkpoint(model, Path(scratch) / "reference")
        for run in runs:
            found, log = run_child(script, "--child", model.name, json.dumps(run))
            same = first and sum(a == b for a, b in zip(found["texts"], first, strict=True))
            first = first or found["texts"]
            served = [line for line in log.splitlines() if said in line]
            yield {
                "model": model.name,
                **run,
                **compare(found, reference),
                "texts_as_first_run": same,
                **(more(found, run) if more else {}),
                "served_by": served[0].split("served by: ")[-1] if served else None,
            }


def record(rows: Iterator[dict[str, Any]], out: Path, script: str, kernel: str | Sequence[str], within: Callable[[dict], bool]) -> None:
    """Print and store each row as it comes; ends the program with 1 if one is not ``within`` bounds."""
    done: list[dict[str, Any]] = []
    for row in rows:
        done.append(row)
        print(json.dumps(row), flush=True)
        out.write_text(json.dumps({"stamp": gpu_stamp(script, kernel), "ceilings": {}, "rows": done}, indent=1) + "\n")
    raise SystemExit(not all(map(within, done)))


def same_perplexity(row: dict[str, Any]) -> bool:
    """Whether every perplexity of the row is transformers' but for 0.5 %."""
    return all(abs(value) <= BOUND for name, value in row.items() if name.endswith("relative_perplexity"))
