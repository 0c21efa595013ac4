"""Minutes of mixed load on a server, with aborts, and no answer changed: shared by gdn_load.py and moe_load.py.

128 prompts of 16 to 800 tokens are first answered one at a time.  Then every client asks for them in random order: one request in five
is given up in mid-stream, every other answer must be the one from the start, or part from it where two tokens were all but tied
(bfloat16 sums depend on the batch).  Prefix caching is on, so prompts resume from what earlier requests left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integration/bench"))
from stamp import gpu_stamp  # noqa: E402

MODELS = ROOT / "integration/models"
RESULTS = ROOT / "integration/bench/results"
PORT = 8123
NOISE = 0.13
"""Two steps of bfloat16 logits between 8 and 16: each of two runs may be off by one."""


def parser(description: str | None, out: str, log: str) -> argparse.ArgumentParser:
    """The options of every load script."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--minutes", type=float, default=8)
    found.add_argument("--clients", type=int, default=256)
    found.add_argument("--out", type=Path, default=RESULTS / out)
    found.add_argument("--log", type=Path, default=Path(log))
    return found


def start(model: Path, settings: dict, log: Path, *further: str) -> subprocess.Popen:
    """vLLM's server with this package's ``settings`` and ``further`` arguments, once it answers."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--quantization", "nvfp4_cutedsl"]
    command += ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "256", "--port", str(PORT), "--served-model-name", "m"]
    command += ["--enable-prefix-caching", "--gpu-memory-utilization", "0.5", "--no-enable-log-requests"]
    command += ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})]
    command += ["--additional-config", json.dumps({"moe_backend_plugin": settings}), *further]
    server = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"the server did not answer\n{log.read_text(errors='replace')[-6000:]}")


class Load:
    """The requests and what became of them."""

    def __init__(self, client, prompts: list[list[int]], lengths: list[int]) -> None:
        self.client, self.prompts, self.lengths = client, prompts, lengths
        self.alone: list = []
        self.done = self.tokens = self.aborted = self.equal = 0
        self.ties: list[tuple[int, int, float]] = []
        self.wrong: list[tuple[int, int, float]] = []
        self.errors: list[str] = []

    def ask(self, i: int, **options):
        extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
        return self.client.completions.create(
            model="m", prompt=self.prompts[i], max_tokens=self.lengths[i], temperature=0, logprobs=5, extra_body=extra, **options
        )

    async def one(self, i: int) -> None:
        answer = (await self.ask(i)).choices[0].logprobs
        self.done += 1
        self.tokens += len(answer.tokens)
        alone = self.alone[i]
        for position, (a, b) in enumerate(zip(alone.tokens, answer.tokens, strict=True)):
            if a != b:
                gap = alone.top_logprobs[position][a] - alone.top_logprobs[position].get(b, float("-inf"))
                (self.ties if gap < NOISE else self.wrong).append((i, position, gap))
                return
        self.equal += 1

    async def abort(self, i: int, after: int) -> None:
        stream = await self.ask(i, stream=True)
        async for _ in stream:
            after -= 1
            if after < 0:
                break
        await stream.close()
        self.aborted += 1

    async def worker(self, seed: int, until: float) -> None:
        dice = random.Random(seed)
        while time.monotonic() < until:
            i = dice.randrange(len(self.prompts))
            try:
                await (self.abort(i, dice.randrange(self.lengths[i])) if dice.random() < 0.2 else self.one(i))
            except Exception as error:  # noqa: BLE001  a lost request is what this run looks for
                self.errors.append(f"{type(error).__name__}: {error}"[:300])


async def run(model: Path, minutes: float, clients: int) -> Load:
    """The prompts alone, then all clients for so many minutes."""
    import openai

    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    dice = random.Random(0)
    texts = windows(load_tokenizer(model), standard_library("verification"), 800, 128, per_file=1)
    prompts = [text[: dice.randrange(16, 800)] for text in texts]
    lengths = [dice.randrange(16, 160) for _ in prompts]
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=300)
    load = Load(client, prompts, lengths)
    for i in range(len(prompts)):
        load.alone.append((await load.ask(i)).choices[0].logprobs)
    until = time.monotonic() + 60 * minutes
    await asyncio.gather(*(load.worker(seed, until) for seed in range(clients)))
    return load


def measure(
    arguments: argparse.Namespace, model: Path, cell: dict[str, Any], settings: dict, further: Sequence[str], command: str, kernel: Any
) -> None:
    """Serve ``model``, load it, print and store one row that begins with ``cell``; ends the program, with 1 if anything went wrong."""
    server = start(model, settings, arguments.log, *further)
    try:
        load = asyncio.run(run(model, arguments.minutes, arguments.clients))
        alive = server.poll() is None
    finally:
        server.terminate()
        server.wait(60)
    served = [line for line in arguments.log.read_text(errors="replace").splitlines() if "layers are served by: " in line]
    row = {
        "model": model.name,
        **cell,
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "answers": load.done,
        "equal": load.equal,
        "parted_at_a_tie": len(load.ties),
        "changed": len(load.wrong),
        "aborted": load.aborted,
        "errors": len(load.errors),
        "output_tok_s": round(load.tokens / (60 * arguments.minutes)),
        "served_by": sorted({line.split("] ")[-1] for line in served}),
    }
    print(json.dumps(row), *load.errors[:3])
    for (prompt, position, gap), count in Counter((i, at, round(gap, 3)) for i, at, gap in load.wrong).most_common():
        print(f"prompt {prompt} of {len(load.prompts[prompt])} tokens changes at token {position}: preferred by {gap}, {count} times")
    arguments.out.write_text(json.dumps({"stamp": gpu_stamp(command, kernel), "ceilings": {}, "rows": [row]}, indent=1) + "\n")
    raise SystemExit(not alive or bool(load.errors or load.wrong))
