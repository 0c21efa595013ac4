"""A script that runs itself once more for each engine: the child's result on a marked line, since vLLM logs to stdout as well."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

MARK = "result: "


def run_child(script: str, *arguments: str) -> tuple[Any, str]:
    """What ``script`` with ``arguments`` handed back, and all that it printed; ends the program with the child's words if it failed."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{printed[-6000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    return json.loads(line.removeprefix(MARK)), printed


def hand_back(result: Any) -> None:
    """In the child: its result."""
    print(MARK + json.dumps(result), flush=True)
