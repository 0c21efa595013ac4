"""The helper process that runs vLLM's engine for tests: engines one after the other, imports once.

Reads one JSON request a line from standard input and writes one JSON answer a line to the descriptor given as its
argument.  Standard output is vLLM's: it logs there.

``{"op": "engine", "model": ..., "args": {...}, "env": {...}, "jobs": [...]}``
    build an engine in this process, run the jobs, tear it down.  Jobs: ``{"generate": [prompts], "tokens": n}`` and
    ``{"score": windows, "length": n}`` (log-probability of every token of the standard library's text, in windows).
``{"op": "config", "model": ..., "args": {...}, "env": {...}}``
    only what an API server does before it starts a process: read the arguments, make the configuration.

Answers: ``{"ok": ...}``, or ``{"error": type, "message": text}``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from contextlib import contextmanager

# The engine core shares this process: no second import of torch and vLLM for each engine.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


@contextmanager
def environment(values: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        # vLLM leaves variables behind for its own children; the next engine starts as the first one did.
        os.environ.clear()
        os.environ.update(before)


def generate(llm, job: dict) -> dict:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True)
    outputs = llm.generate(job["generate"], sampling, use_tqdm=False)
    return {"token_ids": [list(o.outputs[0].token_ids) for o in outputs], "text": [o.outputs[0].text for o in outputs]}


def score(llm, job: dict) -> dict:
    from vllm import SamplingParams

    from moe_backend_plugin.cli.corpus import standard_library, windows

    texts = windows(llm.get_tokenizer(), standard_library("verification"), job["length"], job["score"])
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    outputs = llm.generate([{"prompt_token_ids": w} for w in texts], sampling, use_tqdm=False)
    logprobs, best = [], []
    for tokens, output in zip(texts, outputs, strict=True):
        # The first token has nothing before it that would predict it.
        for token, found in list(zip(tokens, output.prompt_logprobs, strict=True))[1:]:
            logprobs.append(found[token].logprob)
            best.append(next(t for t, entry in found.items() if entry.rank == 1))
    return {"logprobs": logprobs, "best": best}


def engine(request: dict) -> list[dict]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(request["model"], **request["args"])
        return [generate(llm, job) if "generate" in job else score(llm, job) for job in request["jobs"]]
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def config(request: dict) -> dict:
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(model=request["model"], **request["args"]).create_engine_config()
    return {
        "quantization": made.model_config.quantization,
        "quant_config": f"{type(made.quant_config).__module__}.{type(made.quant_config).__name__}",
    }


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            with environment(request.get("env", {})):
                answer = {"ok": {"engine": engine, "config": config}[request["op"]](request)}
        except Exception as error:  # noqa: BLE001  whatever an engine raises is the answer
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": str(error)}
            del error
        gc.collect()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
