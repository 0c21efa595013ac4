"""SGLang's HTTP server and its own /generate, for the scripts beside this one.

/generate takes and gives token ids, and tells how many tokens of a prompt the radix cache had; the OpenAI routes do neither for all of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mixed_load import free_port, stop

PORT = free_port()
START_SECONDS = 420
MODELS = ("pycoder-moe-nvfp4", "pycoder-next-nvfp4")
GDN_SAID = "Gated-delta-net decode is served by"
SAID = {"pycoder-moe-nvfp4": ("NVFP4 moe layers are served by",)}
SAID["pycoder-next-nvfp4"] = (*SAID["pycoder-moe-nvfp4"], GDN_SAID)
"""What the log of a server with this package's kernels says."""


def provider_arguments(provider: str, model: str) -> list[str]:
    """Who runs experts and gated-delta-net decode: "cutedsl" (this package) or "sglang" (its own: Marlin and Triton)."""
    ours = provider == "cutedsl"
    found = ["--moe-runner-backend", "cutedsl" if ours else "marlin"]
    if has_states(model):
        found += ["--linear-attn-decode-backend", "cutedsl_plugin" if ours else "triton"]
    return found


def command(model: Path, provider: str, further: Sequence[str] = ()) -> list[str]:
    """The server's command line: graphs and radix cache are on, as they are by default."""
    found = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(PORT)]
    found += ["--context-length", "1024", "--max-running-requests", "256", "--chunked-prefill-size", "16384"]
    # SGLang counts what other processes take while it starts as its own: a large share, of which it may use little.
    found += ["--mem-fraction-static", "0.8", "--max-total-tokens", "1000000"]
    found += ["--max-mamba-cache-size", "4096"] if has_states(model.name) else []
    # A few sizes of graphs: for prefill SGLang would capture dozens.
    for phase, sizes in (("decode", (1, 2, 4, 8, 16, 32, 64, 128, 256)), ("prefill", (64, 512, 4096))):
        found += [f"--cuda-graph-bs-{phase}", *map(str, sizes)]
    return [*found, *provider_arguments(provider, model.name), *further]


def drafting(drafts: int) -> list[str]:
    """Arguments for so many n-gram drafts a step, none for 0. SGLang counts the token that they follow, and calls a chain breadth 1."""
    if not drafts:
        return []
    found = ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(drafts + 1)]
    return [*found, "--speculative-ngram-max-bfs-breadth", "1"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What only SGLang is asked for."""
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16"], help="of gated-delta-net states; without it, the model's own")
    parser.add_argument("--dp-attention", action="store_true", help="with --gpus: each has attention for requests of its own")


def further_of(model: str, gpus: int, state_dtype: str | None, dp_attention: bool) -> list[str]:
    """The server's arguments for them. Raises SystemExit on data parallel attention of one GPU."""
    if dp_attention and gpus < 2:
        raise SystemExit(f"--dp-attention: found --gpus {gpus}; allowed: 2 or more")
    found = ["--tp-size", str(gpus)]
    found += ["--enable-dp-attention", "--dp-size", str(gpus)] if dp_attention else []
    return found + (["--mamba-ssm-dtype", state_dtype] if state_dtype and has_states(model) else [])


def has_states(model: str) -> bool:
    """Whether a model has gated-delta-net layers."""
    return "next" in model


def start(model: Path, provider: str, log: Path, *further: str) -> subprocess.Popen:
    """The server, once it has answered a request of its own; ends the program with the log if it does not."""
    server = subprocess.Popen(command(model, provider, further), stdout=log.open("wb"), stderr=subprocess.STDOUT)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health_generate", timeout=30)
            return server
        except OSError:
            time.sleep(1)
    stop(server)
    raise SystemExit(f"the server did not answer\n{log.read_text(errors='replace')[-6000:]}")


def missing(log: Path, model: str, provider: str) -> list[str]:
    """What the log should say of this package's kernels and does not."""
    text = log.read_text(errors="replace")
    return [words for words in SAID[model] if words not in text] if provider == "cutedsl" else []


def gdn_line(log: Path) -> str | None:
    """What the log says of who decodes in gated-delta-net layers and who verifies drafts, if it does."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line[line.index(GDN_SAID) :] for line in lines if GDN_SAID in line), None)


def payload(prompt: Sequence[int], tokens: int, *, tops: int = 0, score_prompt: bool = False, stream: bool = False) -> dict[str, Any]:
    """A greedy request for exactly ``tokens`` tokens; ``score_prompt``: and for the prompt's log-probabilities."""
    return {
        "input_ids": list(prompt),
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0 if score_prompt else -1,
        "top_logprobs_num": tops,
        "stream": stream,
    }


def chosen(answer: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """The tokens of an answer and their log-probabilities; SGLang's entries are (log-probability, token, text)."""
    entries = answer["meta_info"]["output_token_logprobs"]
    return [entry[1] for entry in entries], [entry[0] for entry in entries]


def prompt_scores(answer: Mapping[str, Any]) -> list[float]:
    """Of the prompt's second token to its last; the first has none."""
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


def alternatives(answer: Mapping[str, Any]) -> list[dict[int, float]]:
    """The likeliest tokens at each position, with their log-probabilities."""
    return [{entry[1]: entry[0] for entry in position} for position in answer["meta_info"]["output_top_logprobs"]]


class Client:
    """Requests to a server on this machine; see :func:`payload`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._url = f"http://127.0.0.1:{PORT}/generate"

    async def generate(self, prompt: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """An answer. Raises RuntimeError on one that has another number of tokens, or none."""
        async with self._session.post(self._url, json=payload(prompt, tokens, **options)) as response:
            answer = await response.json()
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {json.dumps(answer)[:300]}")
        found = len(answer["meta_info"]["output_token_logprobs"])
        if found != tokens or not answer["text"]:
            raise RuntimeError(f"{found} tokens of {tokens}, text {answer['text']!r:.60}")
        return answer

    async def give_up(self, prompt: Sequence[int], tokens: int, after: int) -> None:
        """Ask for a stream and leave after so many pieces of it, which is how a client aborts."""
        async with self._session.post(self._url, json=payload(prompt, tokens, stream=True)) as response:
            if response.status != 200:
                raise RuntimeError(f"status {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                after -= line.startswith(b"data:")
                if after < 0:
                    response.close()
                    return


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    import aiohttp

    # A connection for each request: one that the server closes as idle while a request is sent on it would count as an error.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300), read_bufsize=2**22) as session:
        yield Client(session)
