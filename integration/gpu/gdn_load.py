"""On a GPU: minutes of mixed load on pycoder-next through this package's GDN kernels, with aborts, and no answer changed.

    python integration/gpu/gdn_load.py [--minutes 8] [--clients 256] [--drafts 0] [--provider cutedsl] [--out FILE]

128 prompts of 16 to 800 tokens are first answered one at a time.  Then every client asks for them in random order: one request in five
is given up in mid-stream, every other answer must be the one from the start, or part from it where two tokens were all but tied
(bfloat16 sums depend on the batch).  Prefix caching is on, so prompts resume from copied states.  Exits 1 on an error or a changed answer.
``--provider engine`` is the control: the same load on vLLM's own kernels.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integration/bench"))
from stamp import gpu_stamp  # noqa: E402

MODEL = ROOT / "integration/models/pycoder-next-nvfp4"
PORT = 8123
NOISE = 0.13
"""Two steps of bfloat16 logits between 8 and 16: each of two runs may be off by one."""


def start(provider: str, drafts: int, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--quantization", "nvfp4_cutedsl"]
    command += ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "256", "--port", str(PORT), "--served-model-name", "m"]
    command += ["--enable-prefix-caching", "--gpu-memory-utilization", "0.5", "--no-enable-log-requests"]
    command += ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})]
    command += ["--additional-config", json.dumps({"moe_backend_plugin": {"gdn": {"provider": provider}}})]
    if drafts:
        speculation = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        command += ["--speculative-config", json.dumps(speculation)]
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


async def run(minutes: float, clients: int) -> Load:
    import openai

    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    dice = random.Random(0)
    texts = windows(load_tokenizer(MODEL), standard_library("verification"), 800, 128, per_file=1)
    prompts = [text[: dice.randrange(16, 800)] for text in texts]
    lengths = [dice.randrange(16, 160) for _ in prompts]
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0, timeout=300)
    load = Load(client, prompts, lengths)
    for i in range(len(prompts)):
        load.alone.append((await load.ask(i)).choices[0].logprobs)
    until = time.monotonic() + 60 * minutes
    await asyncio.gather(*(load.worker(seed, until) for seed in range(clients)))
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--provider", choices=["cutedsl", "engine"], default="cutedsl")
    parser.add_argument("--out", type=Path, default=ROOT / "integration/bench/results/gdn_load_h200.json")
    parser.add_argument("--log", type=Path, default=Path("gdn_load.log"))
    arguments = parser.parse_args()
    server = start(arguments.provider, arguments.drafts, arguments.log)
    try:
        load = asyncio.run(run(arguments.minutes, arguments.clients))
        alive = server.poll() is None
    finally:
        server.terminate()
        server.wait(60)
    row = {
        "model": MODEL.name,
        "provider": "plugin" if arguments.provider == "cutedsl" else "vllm",
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "drafts": arguments.drafts,
        "answers": load.done,
        "equal": load.equal,
        "parted_at_a_tie": len(load.ties),
        "changed": len(load.wrong),
        "aborted": load.aborted,
        "errors": len(load.errors),
        "output_tok_s": round(load.tokens / (60 * arguments.minutes)),
    }
    print(json.dumps(row), *load.errors[:3])
    for (prompt, position, gap), count in Counter((i, at, round(gap, 3)) for i, at, gap in load.wrong).most_common():
        print(f"prompt {prompt} of {len(load.prompts[prompt])} tokens changes at token {position}: preferred by {gap}, {count} times")
    arguments.out.write_text(
        json.dumps({"stamp": gpu_stamp("python integration/gpu/gdn_load.py"), "ceilings": {}, "rows": [row]}, indent=1) + "\n"
    )
    raise SystemExit(not alive or bool(load.errors or load.wrong))


if __name__ == "__main__":
    main()
