"""Subprocesses with a log, a deadline and a certain end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "MOE_BACKEND_PLUGIN_"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anybody's settings of the plugin, and with ``extra``."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)} | dict(extra or {})


def until(what: str, condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    """Poll ``condition``; AssertionError with ``explain()`` when it is not true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{explain()}"
        time.sleep(0.1)


def tail(log: Path, lines: int = 60) -> str:
    """The end of a log file, for an assertion's message."""
    text = log.read_text(errors="replace") if log.exists() else "(no log)"
    return f"--- {log} ---\n" + "\n".join(text.splitlines()[-lines:])


class Child:
    """A subprocess that leads its own process group, so that it can be ended with all it has started."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, **popen) -> None:
        self.log = log
        self._output = log.open("wb")
        self._seen: dict[tuple[int, float], psutil.Process] = {}
        self.process = subprocess.Popen(
            list(command), stdout=self._output, stderr=subprocess.STDOUT, env=environment(env), cwd=ROOT, start_new_session=True, **popen
        )

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants, with those seen by earlier calls that are still alive.

        A worker whose parent died has another parent now: asking only for today's children would not find the orphan.
        """
        try:
            me = psutil.Process(self.process.pid)
            for process in [me, *me.children(recursive=True)]:
                self._seen[process.pid, process.create_time()] = process
        except psutil.NoSuchProcess:
            pass
        return [process for process in self._seen.values() if _alive(process)]

    def wait(self, seconds: float) -> int:
        """The exit status; AssertionError with the log when it has not ended in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:.0f} s\n{tail(self.log)}") from None

    def terminate(self, seconds: float = 60) -> None:
        """Ask, wait, and then make sure."""
        self.family()
        if self.running:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """End the whole group, and descendants that left it, at once."""
        family = self.family()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait(30)
        self._output.close()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
