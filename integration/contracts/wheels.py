"""The sources of a release, from the package index.

A wheel of an engine has hundreds of megabytes of binaries; the contract reads Python only.  The download is therefore
cut down to its ``.py`` files, and that small archive is what stays in the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Not one of the plugin's own variables (MOE_BACKEND_PLUGIN_...): it refuses those that name no setting.
CACHE_VARIABLE = "MOE_BACKEND_WHEELS"
DOWNLOAD_SECONDS = 1200

# What pip says when it gets no answer at all.  An index that answers "no such version" is a failure, not a skip.
UNREACHABLE = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "Connection refused",
    "Connection aborted",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "Read timed out",
    "ProxyError",
    "Max retries exceeded",
)


class IndexUnreachable(Exception):
    """The package index gives no answer."""


@dataclass(frozen=True)
class Release:
    """A published release: ``name`` on the index holds the import package ``package``."""

    name: str
    version: str
    package: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def cache_folder() -> Path:
    """Where archives are kept: ``MOE_BACKEND_WHEELS``, else a folder in the user's cache."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moe-backend-plugin" / "wheels"


def archive(release: Release, folder: Path | None = None) -> Path:
    """The archive with the release's sources: one in the folder, else a download.

    A wheel that somebody put there is read as it is, which also serves machines without an index.

    Raises:
        IndexUnreachable: nothing is cached and the index gives no answer.
        RuntimeError: the index answers, but has no such release.
    """
    folder = folder or cache_folder()
    stem = f"{release.name.replace('-', '_')}-{release.version}"
    sources = folder / f"{stem}.sources.zip"
    for candidate in (sources, *sorted(folder.glob(f"{stem}-*.whl"))):
        if zipfile.is_zipfile(candidate):
            return candidate
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        keep_sources(download(release, Path(scratch)), sources)
    return sources


def download(release: Release, folder: Path) -> Path:
    """Download the wheel into ``folder``; see :func:`archive` for what it raises."""
    requirement = f"{release.name}=={release.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        result = subprocess.run(
            [*command, "--retries", "2", "--dest", str(folder), requirement], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise IndexUnreachable(f"{requirement}: no wheel after {DOWNLOAD_SECONDS} s") from None
    if result.returncode == 0:
        return next(folder.glob("*.whl"))
    said = (result.stderr or result.stdout).strip()
    if any(sign in said for sign in UNREACHABLE):
        raise IndexUnreachable(f"{requirement}: {said.splitlines()[-1]}")
    raise RuntimeError(f"pip cannot download {requirement}:\n{said}")


def keep_sources(wheel: Path, target: Path) -> None:
    """Copy the ``.py`` files of ``wheel`` to ``target``, which appears complete or not at all."""
    partial = wheel.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as small:
        for name in full.namelist():
            if name.endswith(".py"):
                small.writestr(name, full.read(name))
    os.replace(partial, target)
