"""The stamps of figures taken by scripts: the package's own, and a hash over the sources they depend on."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from moe_backend_plugin.bench import stamp as package_stamp

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("nvfp4", "moe", "linear", "gdn")
"""The package's folders whose code a timing on a CPU depends on."""


def source_hash() -> str:
    """SHA-256 over the sources of the ops, names and contents, in a fixed order."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / "moe_backend_plugin" / folder).rglob("*.py")):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def processor() -> str:
    """The CPU's model name and the number of cores this process may use."""
    name = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def stamp(device: str, driver: str | None = None) -> dict:
    """Commit, source hash, device, driver and package versions."""
    return {**package_stamp.stamp(device, driver), "source_hash": source_hash()}


def gpu_stamp(script: str, kernel: str | Sequence[str] = "gdn_decode") -> dict:
    """The stamp of a figure that ``script`` (its ``__file__``) takes and that depends on a kernel family, or on several."""
    from moe_backend_plugin.device import find_device

    command = package_stamp.as_run(f"python {Path(script).resolve().relative_to(ROOT)}")
    return package_stamp.gpu_stamp(find_device("cuda").name, command, kernel)
