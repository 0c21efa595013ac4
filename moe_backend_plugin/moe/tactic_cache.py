"""Where tuned tactics are kept: one JSON file a kind of device, that any number of processes read and write at once.

A file holds entries, one for each problem and each state of the software that tuned it (:meth:`Kind.stamp`); those of another version,
driver or kernel source are left as they are, and not used. The kind of device says which family of tactics the names are of
(:mod:`.families`). The file is replaced as a whole, under a lock, after every bucket: whoever reads sees it before or after, and a
tuning run that is killed loses at most the bucket it was at.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..device import driver_version
from ..errors import PluginError
from ..kernels import compile as kernels
from . import buckets, families, tactics
from .families import Family
from .problem import Activation, MoEProblem

logger = logging.getLogger("moe_backend_plugin.tactics")

FORMAT = 1
"""Of the file; one of another format is not read, and set aside when it is written."""
FAMILIES = ("moe_gemm", "moe_route", "moe_combine")
DRIVING = ("moe/blackwell.py", "moe/memset.py", "nvfp4/blackwell.py")
"""Sources of this package that call FlashInfer's kernels."""
SHIPPED = Path(__file__).parent / "tuned"
"""Files that came with the package, read where the user's file has no entry. Their kernels must be these, their driver may differ."""


@cache
def kernel_hash() -> str:
    """Of the sources of the kernels of a call: 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(f"{family} {kernels.source_hash(family)}" for family in FAMILIES).encode()).hexdigest()[:16]


@cache
def _driving_hash() -> str:
    """Of the sources through which FlashInfer's kernels are called: 16 hexadecimal digits."""
    sources = (Path(__file__).parents[1] / name for name in DRIVING)
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def flashinfer_hash() -> str:
    """Of the kernels of a call on Blackwell: FlashInfer's version, whose they are, and 16 hexadecimal digits of what calls them here."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        version = "absent"
    return f"flashinfer {version} {_driving_hash()}"


@dataclass(frozen=True)
class Kind:
    """A kind of device: what its tactics are tuned for. ``capability``, its compute capability, says which family they are of."""

    name: str
    multiprocessors: int
    driver: str | None = None
    capability: tuple[int, int] = (9, 0)

    @classmethod
    def of(cls, device: int) -> Kind:
        """Of a CUDA device of this process."""
        found = torch.cuda.get_device_properties(device)
        return cls(found.name, found.multi_processor_count, driver_version(), (found.major, found.minor))

    @property
    def family(self) -> Family:
        return families.of(self.capability)

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".json"

    @property
    def stamp(self) -> dict[str, Any]:
        """What has to be the same for an entry to be used."""
        return {
            "package": __version__,
            "kernel": flashinfer_hash() if self.family is families.BLACKWELL else kernel_hash(),
            "device": self.name,
            "multiprocessors": self.multiprocessors,
            "driver": self.driver,
        }


def folder() -> Path:
    """Beside the compiled kernels."""
    return kernels.cache_folder() / "tactics"


def path_of(kind: Kind) -> Path:
    """The user's file of a kind of device, whether it exists or not."""
    return folder() / kind.file_name


def describe(problem: MoEProblem, dtype: torch.dtype) -> dict[str, Any]:
    """A problem as it stands in a file."""
    return {**asdict(problem), "tokens": kernels.name_of(dtype)}


def problem_of(described: Mapping[str, Any]) -> MoEProblem:
    """The problem of what :func:`describe` gave, or ``asdict`` of the problem."""
    fields = {name: value for name, value in described.items() if name != "tokens"}
    return MoEProblem(**fields | {"activation": Activation(**described["activation"])})


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file that can be read as such, of any stamp; none if there is no file. What is wrong with it is a warning."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s is ignored: it cannot be read (%s)", path, error)
        return []
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("entries"), list):
        logger.warning("%s is ignored: found no entries of format %d", path, FORMAT)
        return []
    good = [entry for entry in found["entries"] if _well_formed(entry)]
    if len(good) < len(found["entries"]):
        logger.warning("%s: %d entries are ignored, which are damaged", path, len(found["entries"]) - len(good))
    return good


def _well_formed(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("stamp"), dict)
        and isinstance(entry.get("problem"), dict)
        and isinstance(entry.get("buckets"), dict)
    )


def entry_of(path: Path, problem: MoEProblem, dtype: torch.dtype, kind: Kind, any_driver: bool = False) -> dict[str, Any] | None:
    """The file's entry for this problem with this stamp; a warning if there are only others."""
    wanted, stamp = describe(problem, dtype), kind.stamp
    compared = [field for field in stamp if not (any_driver and field in ("driver", "package"))]
    own = [entry for entry in read(path) if entry["problem"] == wanted]
    for entry in own:
        if all(entry["stamp"].get(field) == stamp[field] for field in compared):
            return entry
    if own:
        last = own[-1]["stamp"]
        differs = [f"{field} {last.get(field)}, here {stamp[field]}" for field in compared if last.get(field) != stamp[field]]
        logger.warning("%s: what was tuned for this layer is ignored (%s); run moe-backend tune again", path, "; ".join(differs))
    return None


def table(problem: MoEProblem, dtype: torch.dtype, kind: Kind) -> tactics.Table | None:
    """The tuned tactics for a problem on a kind of device, from the user's file or the package's; None if there are none.

    Buckets that name no tactic, one that is not valid, or one that was struck out in any of them are ignored with a warning. Never raises.
    """
    shipped = SHIPPED / kind.file_name
    for path, any_driver in ((path_of(kind), False), (shipped, True)):
        entry = entry_of(path, problem, dtype, kind, any_driver)
        if entry is not None and (found := list(_buckets(entry, problem, kind.family, path))):
            return tactics.Table(_within_changes(found, problem, kind))
    return None


def _within_changes(found: list[tactics.Bucket], problem: MoEProblem, kind: Kind) -> list[tactics.Bucket]:
    """The same buckets, without the calls for which the heuristic would choose otherwise than at the count that was tuned: since a bucket
    was tuned it may have learnt where to change, and its answer for fewer tokens is better than what was best for more."""
    changes = sorted(buckets.changes(problem, max(bucket.last for bucket in found), kind.multiprocessors, kind.family))
    before = [changes[at - 1] if (at := bisect_left(changes, bucket.last)) else 0 for bucket in found]
    return [replace(bucket, first=max(bucket.first, change + 1)) for bucket, change in zip(found, before, strict=True)]


def _buckets(entry: dict[str, Any], problem: MoEProblem, family: Family, path: Path) -> Iterator[tactics.Bucket]:
    lists = [bucket.get("struck") for bucket in entry["buckets"].values() if isinstance(bucket, dict)]
    struck = {name for found in lists if isinstance(found, dict) for name in found}
    for last, bucket in entry["buckets"].items():
        try:
            found = tactics.Bucket(int(bucket["first"]), int(last), family.parse(bucket["tactic"]))
            reason = family.validity(problem, found.tactic)
            if bucket["tactic"] in struck:
                reason = f"tactic {bucket['tactic']} was struck out"
            if not 1 <= found.first <= found.last <= buckets.MOST_TOKENS:
                reason = f"tokens {found.first} to {found.last}"
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            logger.warning("%s: the bucket of %s tokens is ignored: %s", path, last, reason)
        else:
            yield found


# --- writing ----------------------------------------------------------------------------------------------------------


def write_bucket(path: Path, problem: MoEProblem, dtype: torch.dtype, kind: Kind, last: int, bucket: dict[str, Any]) -> None:
    """Add one bucket ("first", "tactic", "struck" {name: reason}, and figures of any name) of calls of up to ``last`` tokens to a file.

    All other buckets and entries stay, those of other processes that write at the same time too. A file that cannot be read is set
    aside as ``.damaged``. Raises OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        entries = read(path)
        if not entries and path.exists() and not _is_empty(path):
            os.replace(path, path.with_name(path.name + ".damaged"))
        problem_, stamp = describe(problem, dtype), kind.stamp
        entry = next((e for e in entries if e["problem"] == problem_ and e["stamp"] == stamp), None)
        if entry is None:
            entry = {"stamp": stamp, "problem": problem_, "buckets": {}}
            entries.append(entry)
        buckets = {**entry["buckets"], str(last): bucket}
        entry["buckets"] = dict(sorted(buckets.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else 0))
        for left in path.parent.glob(f".{path.name}*.part"):  # by a writer that died; nobody else writes now
            left.unlink(missing_ok=True)
        _replace(path, json.dumps({"format": FORMAT, "entries": entries}, indent=1))


def _is_empty(path: Path) -> bool:
    """Whether the file is a good one without entries."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT and found.get("entries") == []


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Alone among the processes that write this file; the kernel lets go of the lock of a process that dies."""
    with open(path.with_name("." + path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="." + path.name, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def refuse_unwritable(path: Path) -> None:
    """Raises PluginError if :func:`write_bucket` could not write there: better before an hour of tuning than after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            pass
    except OSError as error:
        raise PluginError(str(path), f"a file that cannot be written ({error})", "a file in a folder that can be written") from None
