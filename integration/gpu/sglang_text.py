"""On a GPU: what pycoder-moe and pycoder-next say in SGLang is what transformers says of the same tokens, and what vLLM said.

    python integration/gpu/sglang_text.py --providers sglang                    # first of all: is SGLang alone right?
    python integration/gpu/sglang_text.py [--models pycoder-moe-nvfp4 ...] [--providers cutedsl sglang] [--vllm-texts FILE] [--out FILE]

A server with decode graphs gets 64 prompts of 256 tokens at once and continues each by 256 greedy tokens (decoded_text.py says how they
are compared). ``--vllm-texts``: what `moe_text.py --texts FILE` stored in vLLM's environment. The first 32 prompts are compared with what
the same experts made of them there: "as_vllm_N" go on with the same N tokens, beside "in_vllm_N", as many as this package's and Marlin's
experts continue alike in vLLM itself.
Stores one row a run; exits 1 where the perplexity of prompts or of decoded tokens differs by more than 0.5 % from transformers' on the
dequantised weights, where fewer than 30 of 32 prompts go on as in vLLM for 16 tokens, or where layers were served by another provider than
the one asked for. (Later, texts part where two tokens are all but tied, whatever computes them: in_vllm_64 says how many.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import sglang_server
from decoded_text import (
    MODELS,
    NEW_TOKENS,
    PROMPTS,
    RESULTS,
    add_options,
    hand_back,
    measure,
    options_of,
    prompts_of,
    record,
    same_perplexity,
)
from mixed_load import stop
from sglang_checkpoint import loadable

from moe_backend_plugin.bench.moe import KERNELS

PROVIDERS = ("cutedsl", "sglang")
PROMPT_TOKENS = 256
COMPARED, ENOUGH, LENGTHS = 32, 30, (16, 64, 256)
BOUND_LENGTH = 16
IN_VLLM = {"cutedsl": "plugin", "sglang": "vllm"}
"""moe_text.py's name of the same experts; SGLang's own and vLLM's are both Marlin."""

VERIFIED = "verification of drafts: this package's"
"""What the log says where gated-delta-net layers verify on this package's kernel."""


async def ask(prompts: Sequence[Sequence[int]]) -> dict:
    """All prompts at once, in the form of ``decoded_text.generate``."""
    async with sglang_server.client() as client:
        answers = await asyncio.gather(*(client.generate(prompt, NEW_TOKENS, score_prompt=True) for prompt in prompts))
    texts, logprobs = zip(*map(sglang_server.chosen, answers), strict=True)
    scores = [sglang_server.prompt_scores(answer) for answer in answers]
    return {"prompts": prompts, "texts": texts, "logprobs": logprobs, "prompt_logprobs": scores}


def child(
    name: str,
    provider: str,
    attention_backend: str,
    sampling_backend: str,
    drafts: int,
    fp32_logits: bool,
    gpus: int,
    expert_parallel: bool,
    dtype: str,
    state_dtype: str | None,
    dp_attention: bool,
) -> dict:
    """Serve a model and ask; the server's log goes to the parent, which looks in it for who served the layers."""
    model = MODELS / name
    prompts = prompts_of(model, PROMPT_TOKENS, PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        served = loadable(model, Path(folder))
        further = ["--attention-backend", attention_backend, "--sampling-backend", sampling_backend]
        further += ["--dtype", dtype, *sglang_server.further_of(name, gpus, state_dtype, dp_attention)]
        further += ["--ep-size", str(gpus)] if expert_parallel else []
        further += ["--enable-fp32-lm-head"] if fp32_logits else []
        further += sglang_server.drafting(drafts)
        server = sglang_server.start(served, provider, log, *further)
        try:
            found = asyncio.run(ask(prompts))
        finally:
            stop(server)
            print(log.read_text(errors="replace"))
        if unsaid := sglang_server.missing(log, name, provider):
            raise SystemExit(f"the log does not say: {', '.join(unsaid)}")
        found["gdn_line"] = sglang_server.gdn_line(log)
    return found


def as_vllm(found: dict, stored: dict, provider: str) -> dict[str, int]:
    """How many of the first prompts go on as in vLLM, for the first tokens of each length; and how many do so with either experts there,
    if vLLM ran both. Raises SystemExit if the prompts differ."""
    if [list(prompt) for prompt in found["prompts"]] != stored["prompts"]:
        raise SystemExit("--vllm-texts: found other prompts; allowed: those of `moe_text.py --texts` from the same tree")

    def equal(name: str, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, int]:
        pairs = list(zip(ours, theirs, strict=True))[:COMPARED]
        return {f"{name}_{n}": sum(list(a[:n]) == list(b[:n]) for a, b in pairs) for n in LENGTHS}

    in_vllm = equal("in_vllm", *map(stored.get, IN_VLLM.values())) if all(name in stored for name in IN_VLLM.values()) else {}
    return (equal("as_vllm", found["texts"], stored[IN_VLLM[provider]]) if IN_VLLM[provider] in stored else {}) | in_vllm


def with_gdn_line(row: dict) -> dict:
    """Who decodes and who verifies drafts is a second line of the log, and part of the same column."""
    said = [part for part in (row["served_by"], row["gdn_line"]) if part]
    return {name: value for name, value in row.items() if name != "gdn_line"} | {"served_by": "; ".join(said) or None}


def within(row: dict) -> bool:
    """The bounds of a row."""
    said, verifies = row["served_by"] or "", row["drafts"] and sglang_server.has_states(row["model"])
    served = row["provider"] != "cutedsl" or said.startswith("cutedsl") and (not verifies or VERIFIED in said)
    return same_perplexity(row) and served and row.get(f"as_vllm_{BOUND_LENGTH}", ENOUGH) >= ENOUGH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sglang_server.MODELS, default=sglang_server.MODELS)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--sampling-backend", default="pytorch")
    parser.add_argument("--vllm-texts", type=Path)
    parser.add_argument("--drafts", type=int, default=0, help="n-gram drafts a step, in a chain: GDN verifies them in one call")
    add_options(parser)
    sglang_server.add_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "sglang_text_h200.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, run = arguments.child
        hand_back(child(name, **json.loads(run)))
        return
    stored = json.loads(arguments.vllm_texts.read_text()) if arguments.vllm_texts else {}
    columns = {"attention_backend": arguments.attention_backend, "sampling_backend": arguments.sampling_backend}
    columns |= {"drafts": arguments.drafts, **options_of(arguments), "dp_attention": arguments.dp_attention}

    def rows(name: str) -> Iterator[dict]:
        state_dtype = arguments.state_dtype if sglang_server.has_states(name) else None
        runs = [{"provider": provider, **columns, "state_dtype": state_dtype} for provider in arguments.providers]

        def more(found: dict, run: dict) -> dict:
            return {"gdn_line": found["gdn_line"], **(as_vllm(found, stored[name], run["provider"]) if name in stored else {})}

        for row in measure(__file__, MODELS / name, runs, said="NVFP4 moe layers are served by", more=more):
            yield with_gdn_line(row)

    record(
        chain.from_iterable(map(rows, arguments.models)),
        arguments.out,
        __file__,
        (*KERNELS, "gdn_decode"),
        within,
    )


if __name__ == "__main__":
    main()
