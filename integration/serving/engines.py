"""The tests' side of :mod:`.engine_host`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import Answer
from .process import Child, tail

HOST = Path(__file__).with_name("engine_host.py")
QUANTIZATION = "nvfp4_cutedsl"
WINDOW = 500
PATIENCE = 900
"""Seconds for any answer: what takes one minute on an idle machine took more than five beside other tests; only a hang takes this long."""


@dataclass(frozen=True)
class Refusal:
    """An engine that did not start."""

    error: str
    message: str


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a text's tokens, in order, and the model's first choice at each."""

    logprobs: list[float]
    best: list[int]

    @property
    def mean(self) -> float:
        """Mean log-probability; perplexity is ``exp(-mean)``."""
        return sum(self.logprobs) / len(self.logprobs)

    def first(self, count: int) -> Score:
        """The score of the first ``count`` tokens that were scored."""
        return Score(self.logprobs[:count], self.best[:count])

    def difference(self, other: Score) -> float:
        """Mean absolute difference of log-probabilities."""
        return sum(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True)) / len(self.logprobs)

    def agreement(self, other: Score) -> float:
        """Share of positions with the same first choice."""
        return sum(a == b for a, b in zip(self.best, other.best, strict=True)) / len(self.best)


class EngineHost:
    """Starts the helper process when it is first needed, and again after it died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._child: Child | None = None
        self._answers: Any = None

    @property
    def log(self) -> Path:
        return self._folder / f"engines-{self._count}.log"

    def logging(self, ask: Callable[[], Any]) -> tuple[Any, str]:
        """What ``ask`` gives, and what the engines wrote to their log meanwhile."""
        before = self.log
        start = len(before.read_text(errors="replace")) if before.exists() else 0
        answer = ask()
        return answer, self.log.read_text(errors="replace")[start if self.log == before else 0 :]

    def score(self, model: Path | str, *, tokens: int = 4000, env: Mapping[str, str] | None = None, **args: Any) -> Score:
        """Log-probabilities of ``tokens`` tokens (in windows of 500) of the standard library."""
        return Score(**self._engine(model, {"score": tokens // WINDOW, "length": WINDOW}, env, args))

    def generate(self, model: Path | str, prompts: list[str], tokens: int, **args: Any) -> list[Answer]:
        """Greedy continuations of exactly ``tokens`` tokens."""
        found = self._engine(model, {"generate": prompts, "tokens": tokens}, {}, args)
        # JSON has no integer keys; as strings, tokens and keys are alike again.
        tokens_as_text = [[str(token) for token in one] for one in found["tokens"]]
        return [Answer(*parts) for parts in zip(tokens_as_text, found["top"], found["text"], strict=True)]

    def watch_gdn(self, model: Path | str, prompts: list[str], tokens: int, **args: Any) -> dict:
        """What :mod:`.gdn_watch` saw while the prompts were continued; see its ``report``."""
        return self._engine(model, {"generate": prompts, "tokens": tokens, "watch_gdn": True}, {}, args)

    def config(self, model: Path | str, *, env: Mapping[str, str] | None = None, **args: Any) -> dict[str, str] | Refusal:
        """What an API server's first step makes of these arguments."""
        return self._ask({"op": "config", "model": str(model), "args": self._arguments(args), "env": dict(env or {})})

    def start(self, model: Path | str, *, env: Mapping[str, str] | None = None, **args: Any) -> Refusal | None:
        """Start an engine and end it; the refusal if it does not start."""
        found = self._ask({"op": "engine", "model": str(model), "args": self._arguments(args), "env": dict(env or {}), "jobs": []})
        return found if isinstance(found, Refusal) else None

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _engine(self, model, job: dict, env, args: dict) -> dict:
        answer = self._ask({"op": "engine", "model": str(model), "args": self._arguments(args), "env": dict(env or {}), "jobs": [job]})
        assert not isinstance(answer, Refusal), f"{answer.error}: {answer.message}\n{tail(self.log)}"
        return answer[0]

    @staticmethod
    def _arguments(args: dict) -> dict:
        defaults = {"quantization": QUANTIZATION, "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 32}
        return {name: value for name, value in {**defaults, **args}.items() if value is not None}

    def _ask(self, request: dict) -> Any:
        child = self._running()
        child.process.stdin.write(json.dumps(request).encode() + b"\n")
        child.process.stdin.flush()
        deadline = time.monotonic() + PATIENCE
        while not select.select([self._answers], [], [], 1)[0]:
            if time.monotonic() > deadline or not child.running:
                state = f"no answer in {PATIENCE} s" if child.running else f"ended with status {child.process.returncode}"
                self.close()
                raise AssertionError(f"the engine process: {state}\n{tail(self.log)}")
        line = self._answers.readline()
        if not line:
            self.close()
            raise AssertionError(f"the engine process ended\n{tail(self.log)}")
        answer = json.loads(line)
        return answer["ok"] if "ok" in answer else Refusal(answer["error"], answer["message"])

    def _running(self) -> Child:
        if self._child is None or not self._child.running:
            self.close()
            self._count += 1
            read, write = os.pipe()
            self._answers = os.fdopen(read)
            self._child = Child([sys.executable, str(HOST), str(write)], self.log, stdin=subprocess.PIPE, pass_fds=(write,))
            os.close(write)
        return self._child
