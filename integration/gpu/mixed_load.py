"""Minutes of mixed load on a server, with aborts, and no answer changed: shared by gdn_load.py, moe_load.py and sglang_load.py.

128 prompts of 16 to 800 tokens are first answered one at a time, and a second time from what the first left in the prefix cache.  Then
every client asks for them in random order: one request in five is given up in mid-stream, every other answer must be one of the two from
the start, or part from it where two tokens were all but tied (bfloat16 sums depend on the batch).  What resuming from the cache alone
changes is counted apart: an engine rounds the states that it keeps there, whoever computes them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integration/bench"))
from stamp import gpu_stamp  # noqa: E402

MODELS = ROOT / "integration/models"
RESULTS = ROOT / "integration/bench/results"
REPORT_SECONDS = 60
NOISE = 0.13
"""Two steps of bfloat16 logits between 8 and 16: each of two runs may be off by one."""


def parser(description: str | None, out: str, log: str, providers: Sequence[str] = ("plugin", "vllm")) -> argparse.ArgumentParser:
    """The options of every load script; ``providers``: this package's kernels, and the engine's own."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--provider", choices=providers, default=providers[0])
    found.add_argument("--minutes", type=float, default=8)
    found.add_argument("--clients", type=int, default=256)
    found.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="float16 ties least")
    found.add_argument("--out", type=Path, default=RESULTS / out)
    found.add_argument("--log", type=Path, default=Path(log))
    return found


def free_port() -> int:
    """A port that nobody listens on, so that several servers can run side by side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


CACHE = {"kv_cache_memory_bytes": 16 << 30, "gpu_memory_utilization": 0.15}
"""vLLM's arguments for keys, values and states: with a size it does not measure what is free, and several engines can start on a GPU at
once."""


def ngrams(drafts: int) -> dict[str, Any]:
    """vLLM's speculative config for so many n-gram drafts a step."""
    return {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def command_of(model: Path, settings: dict, port: int, further: Sequence[str]) -> list[str]:
    """vLLM's server with this package's ``settings`` and ``further`` arguments."""
    found = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--quantization", "nvfp4_cutedsl"]
    found += ["--max-model-len", "1024", "--max-num-seqs", "256", "--port", str(port), "--served-model-name", "m"]
    found += ["--enable-prefix-caching", "--no-enable-log-requests"]
    for name, value in CACHE.items():
        found += [f"--{name.replace('_', '-')}", str(value)]
    found += ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})]
    return [*found, "--additional-config", json.dumps({"moe_backend_plugin": settings}), *further]


def start(command: Sequence[str], log: Path, port: int) -> subprocess.Popen:
    """The server, once it answers."""
    server = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"})
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return server
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"the server did not answer\n{log.read_text(errors='replace')[-6000:]}")


def stop(server: subprocess.Popen) -> None:
    """Ask a server to end, and end it where it does not."""
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@dataclass(frozen=True)
class Answer:
    """Tokens, the log-probabilities of the likeliest tokens at each of their positions, and the prompt's tokens that a cache had."""

    tokens: list
    tops: list[dict]
    cached: int = 0


class Client(Protocol):
    """One server, greedy requests: :class:`OpenAI`, or sglang_load.py's."""

    async def answer(self, prompt: Sequence[int], tokens: int) -> Answer: ...

    async def give_up(self, prompt: Sequence[int], tokens: int, after: int) -> None: ...


class OpenAI:
    """vLLM's server, by the OpenAI client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    @asynccontextmanager
    async def connect(cls, port: int):
        import openai

        # A connection for each request: one that the server closes as idle while a request is sent on it would count as an error.
        options = {"api_key": "none", "max_retries": 0, "timeout": 300, "default_headers": {"Connection": "close"}}
        yield cls(openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", **options))

    def _ask(self, prompt: Sequence[int], tokens: int, **options):
        extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
        return self._client.completions.create(
            model="m", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=5, extra_body=extra, **options
        )

    async def answer(self, prompt: Sequence[int], tokens: int) -> Answer:
        found = (await self._ask(prompt, tokens)).choices[0].logprobs
        return Answer(found.tokens, found.top_logprobs)

    async def give_up(self, prompt: Sequence[int], tokens: int, after: int) -> None:
        stream = await self._ask(prompt, tokens, stream=True)
        async for _ in stream:
            after -= 1
            if after < 0:
                break
        await stream.close()


def parting(alone: Answer, answer: Answer) -> tuple[int, float] | None:
    """The first position whose token differs, and by how much the answer given alone preferred its own there; None if all are equal."""
    for position, (a, b) in enumerate(zip(alone.tokens, answer.tokens, strict=True)):
        if a != b:
            return position, alone.tops[position][a] - alone.tops[position].get(b, float("-inf"))
    return None


class Load:
    """The requests and what became of them; ``alone``: the answers to each prompt without company, first and resumed."""

    def __init__(self, client: Client, prompts: list[list[int]], lengths: list[int]) -> None:
        self.client, self.prompts, self.lengths = client, prompts, lengths
        self.alone: list[list[Answer]] = [[] for _ in prompts]
        self.done = self.tokens = self.aborted = self.equal = self.cached = 0
        self.ties: list[tuple[int, int, float]] = []
        self.wrong: list[tuple[int, int, float]] = []
        self.errors: list[str] = []

    async def one(self, i: int) -> None:
        answer = await self.client.answer(self.prompts[i], self.lengths[i])
        self.done += 1
        self.tokens += len(answer.tokens)
        self.cached += answer.cached
        partings = [parting(alone, answer) for alone in self.alone[i]]
        if None in partings:
            self.equal += 1
            return
        position, gap = min(partings, key=lambda found: found[1])
        (self.ties if gap < NOISE else self.wrong).append((i, position, gap))

    async def ask_alone(self) -> None:
        """Every prompt once more, one at a time."""
        for alone, prompt, length in zip(self.alone, self.prompts, self.lengths, strict=True):
            alone.append(await self.client.answer(prompt, length))

    @property
    def changed_by_cache(self) -> int:
        """Prompts whose second answer without company is not the first, beyond a tie."""
        return sum(found is not None and found[1] >= NOISE for found in (parting(*alone[:2]) for alone in self.alone))

    @property
    def changed_at(self) -> list[dict[str, float]]:
        """Where answers parted beyond a tie, the most frequent place first: the same places with another provider are the engine's."""
        found = Counter((i, at, round(gap, 3)) for i, at, gap in self.wrong).most_common()
        return [{"prompt": i, "token": at, "preferred_by": gap, "answers": count} for (i, at, gap), count in found]

    async def abort(self, i: int, after: int) -> None:
        await self.client.give_up(self.prompts[i], self.lengths[i], after)
        self.aborted += 1

    async def worker(self, seed: int, until: float) -> None:
        dice = random.Random(seed)
        while time.monotonic() < until:
            i = dice.randrange(len(self.prompts))
            try:
                await (self.abort(i, dice.randrange(self.lengths[i])) if dice.random() < 0.2 else self.one(i))
            except Exception as error:  # noqa: BLE001  a lost request is what this run looks for
                self.errors.append(f"{type(error).__name__}: {error}"[:300])


async def run(
    model: Path,
    minutes: float,
    clients: int,
    connect: Callable[[], AbstractAsyncContextManager[Client]],
    report: Callable[[Load, float], None],
) -> Load:
    """The prompts alone, twice, then all clients for so many minutes. ``report(load, minutes)`` is called now and then."""
    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    dice = random.Random(0)
    texts = windows(load_tokenizer(model), standard_library("verification"), 800, 128, per_file=1)
    prompts = [text[: dice.randrange(16, 800)] for text in texts]
    lengths = [dice.randrange(16, 160) for _ in prompts]
    async with connect() as client:
        load = Load(client, prompts, lengths)
        for _ in range(2):
            await load.ask_alone()
        begin = time.monotonic()

        async def reports() -> None:
            while True:
                await asyncio.sleep(REPORT_SECONDS)
                report(load, (time.monotonic() - begin) / 60)

        reporting = asyncio.create_task(reports())
        await asyncio.gather(*(load.worker(seed, begin + 60 * minutes) for seed in range(clients)))
        reporting.cancel()
    return load


def measure(
    arguments: argparse.Namespace,
    model: Path,
    kinds: Sequence[str],
    further: Sequence[str],
    cell: dict[str, Any],
    script: str,
    kernel: Any,
) -> None:
    """Serve ``model`` in vLLM, load it, print and store one row with the columns of ``cell``; ends the program, with 1 if anything went
    wrong.

    ``kinds``: of layer ("moe", "gdn"), which the provider runs: this package's kernels, or vLLM's own with Marlin for the experts.
    """
    port, ours = free_port(), arguments.provider == "plugin"
    settings = {kind: {"provider": "cutedsl" if ours else "engine"} for kind in kinds}
    marlin = [] if ours else ["--moe-backend", "marlin"]
    serve_command = command_of(model, settings, port, [*further, *marlin, "--dtype", arguments.dtype])

    def serve() -> subprocess.Popen:
        return start(serve_command, arguments.log, port)

    record(arguments, model, cell, serve, lambda: OpenAI.connect(port), script, kernel)


def record(
    arguments: argparse.Namespace,
    model: Path,
    cell: dict[str, Any],
    serve: Callable[[], subprocess.Popen],
    connect: Callable[[], AbstractAsyncContextManager[Client]],
    script: str,
    kernel: Any,
    cached: bool = False,
) -> None:
    """:func:`measure` for any engine: ``serve()`` starts its server. ``cached``: its clients count tokens that came from a cache, and
    none at all is an error."""

    def store(load: Load, minutes: float) -> dict[str, Any]:
        """What was seen until now, so that a run that is cut off has said something."""
        served = [line for line in arguments.log.read_text(errors="replace").splitlines() if " served by: " in line]
        row = {
            "model": model.name,
            "provider": arguments.provider,
            **cell,
            "dtype": arguments.dtype,
            "minutes": round(minutes, 1),
            "clients": arguments.clients,
            "answers": load.done,
            "equal": load.equal,
            "parted_at_a_tie": len(load.ties),
            "changed": len(load.wrong),
            "changed_at": load.changed_at,
            "prompts_changed_by_cache_alone": load.changed_by_cache,
            "aborted": load.aborted,
            "errors": len(load.errors),
            **({"cached_tokens": load.cached} if cached else {}),
            "output_tok_s": round(load.tokens / (60 * minutes)),
            "served_by": sorted({line.split("] ")[-1] for line in served}),
        }
        arguments.out.write_text(json.dumps({"stamp": gpu_stamp(script, kernel), "ceilings": {}, "rows": [row]}, indent=1) + "\n")
        return row

    server = serve()
    try:
        load = asyncio.run(run(model, arguments.minutes, arguments.clients, connect, store))
        alive = server.poll() is None
        # Before the server is asked to end, which may take a minute.
        print(json.dumps(store(load, arguments.minutes)), *load.errors[:3], flush=True)
    finally:
        stop(server)
    raise SystemExit(not alive or bool(load.errors or load.wrong) or (cached and not load.cached))
