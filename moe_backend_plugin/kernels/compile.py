"""One way to a compiled kernel: memory, then the disk, then the compiler.

A kernel family is a module of this package with ``KERNEL`` (a class that takes a variant) and ``fake_arguments(variant)``.
Compiled kernels are stored as object files that any later process loads in a millisecond; the file's name is a hash of all
that went into it, so a stale file is never read.  Nothing here needs a GPU: compiling for a named architecture and storing
the result works on any machine, loading works wherever the CUDA driver is.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("moe_backend_plugin.kernels")

_ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
# Code for an architecture with an "a" loads on no other compute capability.
ARCHITECTURES = tuple(_ARCHITECTURES.values())
"""What the kernels are written for."""
CACHE_VARIABLE = "MOE_BACKEND_PLUGIN_KERNEL_CACHE"
ENTRY = "kernel"
"""The name of the function inside an object file."""
FORMAT = "1"
"""Changes with anything here that changes the object files: options of the compiler, ``ENTRY``."""

_loaded: dict[str, Callable] = {}
_folder: str = ""


def architecture_of(capability: tuple[int, int]) -> str | None:
    """The architecture to compile for on a GPU of this compute capability, or None where no kernel of this package runs."""
    return _ARCHITECTURES.get(capability)


@cache
def device_architecture(index: int, allowed: tuple[str, ...] = ARCHITECTURES) -> str:
    """The architecture to compile for on this process's GPU number ``index``. Raises RuntimeError if it is none of ``allowed``."""
    import torch

    capability = torch.cuda.get_device_capability(index)
    found = architecture_of(capability)
    if found not in allowed:
        raise RuntimeError(f"device {index}: compute capability {shown(capability)}, allowed {capabilities(allowed)}")
    return found


def shown(capability: tuple[int, int]) -> str:
    """A compute capability in words: "9.0"."""
    return ".".join(map(str, capability))


def capabilities(architectures: Iterable[str] = ARCHITECTURES) -> str:
    """The compute capabilities of these architectures, in words."""
    found = [shown(capability) for capability, architecture in _ARCHITECTURES.items() if architecture in architectures]
    return " or ".join(filter(None, (", ".join(found[:-1]), found[-1])))


def name_of(dtype: Any) -> str:
    """A torch dtype's name, as variants have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@cache
def source_hash(family: str) -> str:
    """SHA-256 of the source (16 hexadecimal digits) of the family and of what it imports from this package: which kernel a stored
    object, or a stored figure, is of."""
    found: dict[str, bytes] = {}
    wanted = [family]
    while wanted:
        name = wanted.pop(0)
        if name not in found:
            found[name] = (Path(__file__).parent / f"{name}.py").read_bytes()
            wanted += [imported.decode() for imported in re.findall(rb"^from \.(\w+) import", found[name], re.MULTILINE)]
    return hashlib.sha256(b"".join(found.values())).hexdigest()[:16]


def use_cache_folder(path: str) -> None:
    """Keep object files in ``path`` in this process; an empty path restores the default."""
    global _folder
    _folder = path


def cache_folder() -> Path:
    """Where object files lie: as ``use_cache_folder`` said, else ``$MOE_BACKEND_PLUGIN_KERNEL_CACHE``, else the user's cache."""
    named = _folder or os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_backend_plugin" / "kernels"


def object_file(family: str, variant: Any, architecture: str) -> Path:
    """The file that holds this kernel, whether it exists or not."""
    text = "\0".join([FORMAT, family, repr(variant), architecture, source_hash(family), platform.machine(), *_versions()])
    return cache_folder() / f"{family}-{architecture}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.o"


@cache
def _versions() -> tuple[str, ...]:
    return tuple(importlib.metadata.version(name) for name in ("nvidia-cutlass-dsl", "apache-tvm-ffi"))


def compile_for(family: str, variant: Any, architecture: str, *, options: str = "") -> Any:
    """Run the compiler; returns CuTe DSL's compiled function. ``options`` are further options of ``cute.compile``."""
    import cutlass.cute as cute

    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: found {architecture!r}, allowed {', '.join(ARCHITECTURES)}")
    module = importlib.import_module(f"{__package__}.{family}")
    kernel = module.KERNEL(variant, architecture)
    return cute.compile(kernel, *module.fake_arguments(variant), options=f"--enable-tvm-ffi --gpu-arch {architecture} {options}".strip())


def store(family: str, variant: Any, architecture: str) -> Path:
    """Compile and write the object file unless it is there; safe beside other processes that do the same.

    Raises OSError, before anything is compiled, where the cache folder cannot be written.
    """
    file = object_file(family, variant, architecture)
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    os.close(handle)
    try:
        compile_for(family, variant, architecture).export_to_c(object_file_path=name, function_name=ENTRY)
        os.chmod(name, 0o644)  # a cache may serve many users
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return file


def load(family: str, variant: Any, architecture: str) -> Callable:
    """The launchable kernel: from memory, from the disk, or compiled now (and stored if the disk lets it)."""
    file = object_file(family, variant, architecture)
    found = _loaded.get(file.name)
    if found is None:
        found = _loaded[file.name] = _from_disk(file) or _compile_now(family, variant, architecture, file)
    return found


def prepare(family: str, variants: Iterable[Any], architecture: str, *, jobs: int | None = None) -> int:
    """Compile what is not stored yet, ``jobs`` at a time (default: one a core, at most 8), and load all; returns how many were missing.

    Processes that prepare the same folder take turns, so that the ranks of one server compile each kernel once.
    """
    variants = list(dict.fromkeys(variants))
    with _turn():
        missing = [variant for variant in variants if not object_file(family, variant, architecture).exists()]
        workers = min(jobs or min(len(os.sched_getaffinity(0)), 8), len(missing))
        if missing:
            logger.info("compiling %d %s kernels for %s; they are kept in %s", len(missing), family, architecture, cache_folder())
        if workers > 1 and os.access(cache_folder(), os.W_OK):
            _store_in_children([missing[i::workers] for i in range(workers)], family, architecture)
        for variant in variants:
            load(family, variant, architecture)
    return len(missing)


@contextmanager
def _turn() -> Iterator[None]:
    """Alone among the processes that use this cache folder; where it cannot be written, or has no locks, not alone."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = open(cache_folder() / ".lock", "w")
    except OSError:
        yield
        return
    with lock:
        # Without locks on this filesystem they compile side by side, and the last to store a kernel leaves it.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _store_in_children(shares: list[list[Any]], family: str, architecture: str) -> None:
    """Interpreters of their own: an engine's workers may not start children through multiprocessing.

    A child that fails leaves its kernels missing; the caller then compiles them itself and meets the error.
    """
    environment = {**os.environ, CACHE_VARIABLE: str(cache_folder())}
    children = []
    for share in shares:
        work = json.dumps({"family": family, "architecture": architecture, "variants": [dataclasses.asdict(variant) for variant in share]})
        command = [sys.executable, "-m", f"{__package__}.compile", work]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for child in children:
        _, said = child.communicate()
        if child.returncode:
            logger.warning("a compiling process ended with status %d: %s", child.returncode, said.strip()[-2000:])


def _from_disk(file: Path) -> Callable | None:
    import cutlass.cute as cute

    if not file.exists():
        return None
    try:
        return getattr(cute.runtime.load_module(str(file), enable_tvm_ffi=True), ENTRY)
    except Exception as error:  # noqa: BLE001  whatever a damaged file raises, compiling again is the answer
        logger.warning("%s cannot be loaded (%s); compiling it again", file, error)
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None


def _compile_now(family: str, variant: Any, architecture: str, file: Path) -> Callable:
    try:
        store(family, variant, architecture)
    except OSError as error:
        logger.warning("%s cannot be written (%s); this kernel is compiled at every start", file, error)
        return compile_for(family, variant, architecture)
    return _from_disk(file) or compile_for(family, variant, architecture)


def main(work: str) -> None:
    """Store the kernels that ``work`` (JSON) lists: what a child of ``prepare`` does."""
    wanted = json.loads(work)
    variant = importlib.import_module(f"{__package__}.{wanted['family']}").Variant
    for fields in wanted["variants"]:
        store(wanted["family"], variant(**fields), wanted["architecture"])


if __name__ == "__main__":
    main(sys.argv[1])
