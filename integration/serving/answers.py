"""Completions for the server tests: prompts of mixed lengths, and when two answers count as the same."""

from __future__ import annotations

import argparse
import json
import textwrap
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from .server import Server

NOISE = 0.07
"""Bfloat16 logits between 8 and 16, where these models have theirs, are 0.0625 apart: the bound admits one such step."""


@dataclass(frozen=True)
class Answer:
    """A completion's tokens, and the likeliest tokens (two or more, with log-probabilities) at each position."""

    tokens: list[str]
    top: list[dict[str, float]]
    text: str


def mixed_requests(count: int) -> list[tuple[str, int]]:
    """``count`` pairs of prompt and output length: 30 to 2,000 characters of Python source, 8 to 40 tokens, in no order."""
    source = _source()
    starts = [(7919 * i) % (len(source) - 2000) for i in range(count)]
    return [(source[start : start + 30 + (997 * i) % 1970], 8 + (13 * i) % 33) for i, start in enumerate(starts)]


def complete(server: Server, prompt: str, tokens: int) -> Answer:
    """A greedy completion of exactly ``tokens`` tokens."""
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    answer = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=tokens, temperature=0, logprobs=2, extra_body=extra
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and len(choice.logprobs.tokens) == tokens, f"asked for {tokens} tokens: {choice}"
    return Answer(choice.logprobs.tokens, choice.logprobs.top_logprobs, choice.text)


def complete_together(server: Server, requests: list[tuple[str, int]]) -> tuple[list[Answer], float]:
    """All requests at once: the answers in order, and the most that the server said it was running at one moment."""
    most = 0.0
    with ThreadPoolExecutor(len(requests)) as pool:
        futures: list[Future[Answer]] = [pool.submit(complete, server, *request) for request in requests]
        while wait(futures, timeout=0.1).not_done:
            most = max(most, server.metric("vllm:num_requests_running"))
    return [future.result() for future in futures], most


def assert_answers_do_not_depend_on_the_batch(server: Server, requests: list[tuple[str, int]], every: int = 1, running: int = 8) -> None:
    """All requests at once are answered as each ``every``-th is alone, with at least ``running`` of them running at one moment.

    The server's own count says how many run. A busy one gives it only now and then, mostly when few are left, so the bound is far below
    the number of requests.
    """
    alone = [complete(server, *request) for request in requests[::every]]
    most = 0.0
    for _ in range(5):
        together, seen = complete_together(server, requests)
        assert_same_answers(alone, together[::every], requests[::every])
        most = max(most, seen)
        if most >= running:
            return
    raise AssertionError(f"at most {most:.0f} requests ran at one moment: this was no test of a batch")


def divergence(alone: Answer, together: Answer) -> tuple[int, float] | None:
    """Where two answers part, and by how much the first answer preferred its own token there; None if they are equal.

    Kernels add up in another order when the batch has another size, so bfloat16 results differ in their last bits.  That
    can decide only between tokens that were all but equally likely, and what follows another token is another text.
    The rule of these tests: up to the first difference the tokens are equal, and at the first difference the answer
    that was sent alone preferred its token to the other's by less than NOISE in log-probability.
    """
    for position, (a, b) in enumerate(zip(alone.tokens, together.tokens, strict=True)):
        if a != b:
            top = alone.top[position]
            return position, top[a] - top.get(b, float("-inf"))
    return None


def assert_same_answers(alone: list[Answer], together: list[Answer], requests: list[tuple[str, int]]) -> None:
    parted = {i: found for i, pair in enumerate(zip(alone, together, strict=True)) if (found := divergence(*pair))}
    print(f"{len(alone) - len(parted)} of {len(alone)} answers equal; partings (position, preference): {parted}")
    wrong = {i: found for i, found in parted.items() if found[1] >= NOISE}
    assert not wrong, f"answers differ beyond noise, request: (position, preference) {wrong}; first: {requests[min(wrong)]}"
    # Near-ties are rare: if most answers part, something other than rounding is at work.
    assert len(parted) <= len(alone) // 4, f"{len(parted)} of {len(alone)} answers part from those sent alone: {parted}"


def python_prompts(count: int) -> list[str]:
    """``count`` pieces of some 400 characters of Python source, each from the start of a line."""
    source = _source()
    prompts = []
    for i in range(count):
        start = source.index("\n", (7919 * i) % (len(source) - 2000)) + 1
        prompts.append(source[start : start + 400])
    return prompts


def _source() -> str:
    return "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, textwrap, json))
