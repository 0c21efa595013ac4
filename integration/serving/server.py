"""``vllm serve`` as a user starts it: the console script, a real port, the official client."""

from __future__ import annotations

import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import openai

from .process import Child, tail, until

START_SECONDS = 600
"""Generous: two cores that do other work besides need minutes for what takes 25 s on an idle machine."""


def vllm_command() -> list[str]:
    """The ``vllm`` beside this interpreter, which need not be on PATH."""
    return [str(Path(sys.executable).parent / "vllm")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server(Child):
    """A ``vllm serve`` process; usable after :meth:`ready`."""

    def __init__(self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [*vllm_command(), "serve", *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        super().__init__(command, log, env or {})

    def ready(self) -> Server:
        """Wait for the first healthy answer; AssertionError with the log if the process ends or the time is up."""

        def answers() -> bool:
            assert self.running, f"the server ended with status {self.process.returncode} before it answered\n{tail(self.log)}"
            return self.healthy()

        until("the server's first answer", answers, START_SECONDS, lambda: tail(self.log))
        self.family()
        # No retries: a lost request must be seen, not sent again.  A connection each: vLLM closes an idle one after 5 seconds, and a
        # request sent on it in that moment is lost before any server has seen it.
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600, default_headers={"Connection": "close"}
        )
        self.model = self.client.models.list().data[0].id
        return self

    def healthy(self) -> bool:
        try:
            return self._get("/health").status == 200
        except (urllib.error.URLError, OSError):
            return False

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        text = self._get("/metrics").read().decode()
        values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"the server has no metric {name}"
        return sum(map(float, values))

    def requests(self) -> float:
        """How many requests the engine has, running or waiting."""
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")

    def _get(self, path: str):
        return urllib.request.urlopen(self.url + path, timeout=60)
