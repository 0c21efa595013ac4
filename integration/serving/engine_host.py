"""The helper process that runs vLLM's engine for tests: imports vLLM once, then forks for every engine.

vLLM 0.32 cannot always build a second engine in one process (its CPU kernels are registered anew each time, over
whatever was imported since), and no test should see what another one left behind.  A fork of a process that has done
nothing but import starts clean and in no time.

Reads one JSON request a line from standard input and writes one JSON answer a line to the descriptor given as its
argument.  Standard output is vLLM's: it logs there.

``{"op": "engine", "model": ..., "args": {...}, "env": {...}, "jobs": [...]}``
    build an engine, run the jobs, tear it down.  Jobs: ``{"generate": [prompts], "tokens": n}``, the same with
    ``"watch_gdn": true`` (what :mod:`gdn_watch` saw meanwhile, instead of the texts), and ``{"score": windows, "length": n}``
    (log-probability of every token of the standard library's text, in windows).
``{"op": "config", "model": ..., "args": {...}, "env": {...}}``
    only what an API server does before it starts a process: read the arguments, make the configuration.

Answers: ``{"ok": ...}``, or ``{"error": type, "message": text}``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

# The engine core shares this process: no second import of torch and vLLM for each engine.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def generate(llm, job: dict) -> dict:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True, logprobs=8)
    outputs = llm.generate(job["generate"], sampling, use_tqdm=False)
    made = [output.outputs[0] for output in outputs]
    top = [[{token: entry.logprob for token, entry in step.items()} for step in one.logprobs] for one in made]
    return {"tokens": [list(one.token_ids) for one in made], "top": top, "text": [one.text for one in made]}


def watch_gdn(llm, job: dict) -> dict:
    from gdn_watch import Watch

    with Watch() as watch:
        generate(llm, job)
    return watch.report


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

    llm = LLM(request["model"], **request["args"])
    try:
        return [(score if "score" in job else watch_gdn if job.get("watch_gdn") else generate)(llm, job) for job in request["jobs"]]
    finally:
        llm.llm_engine.engine_core.shutdown()


def config(request: dict) -> dict:
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(model=request["model"], **request["args"]).create_engine_config()
    return {
        "quantization": made.model_config.quantization,
        "quant_config": f"{type(made.quant_config).__module__}.{type(made.quant_config).__name__}",
    }


def answer(request: dict) -> dict:
    os.environ.update(request["env"])
    try:
        return {"ok": {"engine": engine, "config": config}[request["op"]](request)}
    except Exception as error:
        # Whatever an engine raises is the answer.
        traceback.print_exc()
        return {"error": type(error).__name__, "message": str(error)}


def main() -> None:
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    answers = int(sys.argv[1])
    for line in sys.stdin:
        sys.stdout.flush()
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                code = os.waitstatus_to_exitcode(status)
                os.write(answers, json.dumps({"error": "Died", "message": f"the engine's process ended with {code}"}).encode() + b"\n")
            continue
        text = json.dumps(answer(json.loads(line))).encode() + b"\n"
        with os.fdopen(answers, "wb") as out:
            out.write(text)
        sys.stdout.flush()
        # No clean-up: the exit handlers belong to the process that was forked.
        os._exit(0)


if __name__ == "__main__":
    main()
