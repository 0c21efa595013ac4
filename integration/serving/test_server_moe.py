"""A mixture-of-experts model behind ``vllm serve --config deploy/vllm-cpu.yaml``: what a user's first server must do."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from .answers import assert_answers_do_not_depend_on_the_batch, complete, mixed_requests
from .process import tail, until
from .server import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

PROMPT = "class Stack:\n    def __init__(self):"
# After SIGTERM running requests have 5 seconds.  The bound needs the second API server: vLLM 0.32 with one waits for its clients
# to leave, which can take for ever; with two, a parent process ends them when the time is up.
BOUNDED_END = ["--shutdown-timeout", "5", "--api-server-count", "2"]


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    server = Server(["--config", "deploy/vllm-cpu.yaml", "--max-num-seqs", "64", *BOUNDED_END], logs / "server-moe.log")
    try:
        yield server.ready()
    finally:
        server.terminate()


def test_plugin_serves_the_experts(server: Server) -> None:
    assert "NVFP4 moe layers" in server.text() and "NVFP4 linear layers" in server.text(), tail(server.log)


def test_completes_python(server: Server) -> None:
    answer = complete(server, PROMPT, 48)
    assert "self." in answer.text, answer.text


def test_streaming_equals_non_streaming(server: Server) -> None:
    whole = complete(server, PROMPT, 64)
    stream = server.client.completions.create(
        model=server.model, prompt=PROMPT, max_tokens=64, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    parts = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(parts) > 8, f"came in {len(parts)} parts"
    assert "".join(parts) == whole.text


def test_logprobs_are_those_of_greedy_decoding(server: Server) -> None:
    answer = complete(server, PROMPT, 16)
    for token, top in zip(answer.tokens, answer.top, strict=True):
        first, second = sorted(top.values(), reverse=True)[:2]
        assert top[token] == first, f"{token} is not the likeliest of {top}"
        assert second <= first <= 0


def test_logprobs_of_the_prompt(server: Server) -> None:
    """What an evaluation harness asks for: the prompt echoed with a log-probability for each token but the first."""
    answer = server.client.completions.create(model=server.model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens).startswith(PROMPT)
    assert found.token_logprobs[0] is None and all(value <= 0 for value in found.token_logprobs[1:])


def test_64_concurrent_requests_answer_as_when_sent_alone(server: Server) -> None:
    assert_answers_do_not_depend_on_the_batch(server, mixed_requests(64))


def open_streams(server: Server, count: int) -> list:
    """Streams that would go on for 1,900 tokens each, opened at once, all seen to bring text and counted by the server."""

    def open_one(number: int):
        prompt = f"{PROMPT}\n        self.size{number} ="
        stream = server.client.completions.create(
            model=server.model, prompt=prompt, max_tokens=1900, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        return stream

    with ThreadPoolExecutor(count) as pool:
        streams = list(pool.map(open_one, range(count)))
    # Text can reach a client before the server's count of its requests reaches the metrics.
    until(f"{count} requests in the server's metrics", lambda: server.requests() == count, 60, lambda: tail(server.log))
    return streams


def test_clients_that_leave_free_their_requests(server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    streams = open_streams(server, 8)
    for stream in streams:
        stream.close()
    until("the end of requests whose clients left", lambda: server.requests() == 0, 120, lambda: tail(server.log))
    generated = server.metric("vllm:generation_tokens_total") - before
    assert generated < 8 * 1900, "the requests ran to their end: leaving did not abort them"
    assert "self." in complete(server, PROMPT, 32).text


def test_sigterm_while_busy_ends_every_process(server: Server) -> None:
    """Last in this file: the server is gone afterwards, in bounded time, with all clients still there and waiting for text.

    The server gives requests 5 seconds to finish.  These are longer: what they get is the end of their connection.
    """
    streams = open_streams(server, 8)
    assert len(server.family()) >= 3, "a parent, an engine and a worker"
    with ThreadPoolExecutor(len(streams)) as clients:
        ends = [clients.submit(read_to_the_end, stream) for stream in streams]
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        status = server.wait(60)
        print(f"ended {time.monotonic() - start:.1f} s after SIGTERM with status {status}; streams: {Counter(e.result(10) for e in ends)}")
    until("the end of all helper processes", lambda: not server.family(), 60, lambda: str(server.family()))


def read_to_the_end(stream) -> str:
    """How a stream ends: properly, or with its connection; a client that is left waiting fails the test by its time limit."""
    try:
        for _ in stream:
            pass
    except openai.APIError as error:
        return type(error).__name__
    return "end of the stream"
