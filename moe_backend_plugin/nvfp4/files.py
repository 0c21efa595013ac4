"""The safetensors files of a checkpoint: which there are, what their headers say, and bytes of a tensor without loading it.

A file is 8 bytes of little-endian header length, a JSON header of ``{name: {dtype, shape, data_offsets}}``, and the data.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .scheme import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"^(.*-)(\d+)(-of-)(\d+)\.safetensors$")
_HEADER_LIMIT = 100_000_000  # the format's own limit
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_BITS |= {"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64}
_OTHER_FORMATS = ("*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: name, safetensors dtype ("U8", "F8_E4M3", "F32", ...), shape, and its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.file.name}: {self.name}"


def _corrupt(path: Path, found: str) -> CheckpointError:
    return CheckpointError(str(path), found, "a whole safetensors file; copy or download it again")


def read_header(path: Path) -> list[Stored]:
    """Tensors of one file, from its header alone. Raises :class:`CheckpointError` for a truncated or corrupt file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _corrupt(path, f"a truncated file of {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > _HEADER_LIMIT:
            raise _corrupt(path, f"a corrupt header ({length} bytes long by its own account)")
        if 8 + length > size:
            raise _corrupt(path, f"a truncated file: {size} bytes, and a header that ends at {8 + length}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("not a mapping")
        header.pop("__metadata__", None)
        tensors = [_entry(path, name, entry, 8 + length) for name, entry in header.items()]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _corrupt(path, f"a corrupt header ({error})") from None
    end = max((t.end for t in tensors), default=8 + length)
    if end > size:
        raise _corrupt(path, f"a truncated file: {size} bytes, and data that ends at {end}")
    if end < size:
        raise _corrupt(path, f"{size - end} bytes after the data's end at {end}")
    return tensors


def _entry(path: Path, name: str, entry: dict[str, Any], base: int) -> Stored:
    shape = tuple(int(n) for n in entry["shape"])
    start, end = (int(n) for n in entry["data_offsets"])
    bits = _BITS.get(entry["dtype"])
    if start < 0 or end < start or any(n < 0 for n in shape):
        raise ValueError(f"{name}: data_offsets {start}, {end}, shape {list(shape)}")
    if bits is not None and (end - start) * 8 != math.prod(shape) * bits:
        raise _corrupt(path, f"{name} with {end - start} bytes for {entry['dtype']} {list(shape)}")
    return Stored(name, entry["dtype"], shape, path, base + start, base + end)


def _no_files(folder: Path) -> CheckpointError:
    for pattern in _OTHER_FORMATS:
        if other := sorted(folder.glob(pattern)):
            found = f"{other[0].name} and no *.safetensors"
            return CheckpointError(str(folder), found, "safetensors files (convert the checkpoint with its own library's save_pretrained)")
    return CheckpointError(str(folder), "no *.safetensors files", f"{INDEX} and its shards, or {SINGLE}")


def list_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Weight files of a folder, and the index's ``{tensor: file name}`` (empty without an index).

    With an index, the files it names; else ``model.safetensors``; else every ``*.safetensors``.
    Raises :class:`CheckpointError` if there are none or if one that is named, or numbered, is missing.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map", type(weight_map).__name__, "a mapping of tensor names to file names")
        first: dict[str, str] = {}
        for tensor, file in weight_map.items():
            first.setdefault(file, tensor)
        for file in sorted(first):
            if not (folder / file).is_file():
                raise CheckpointError(f"{INDEX}: {first[file]}", f"its shard {file} is missing", "every shard that the index names")
        return [folder / file for file in sorted(first)], weight_map
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _no_files(folder)
    for file in files:
        if match := _NUMBERED.match(file.name):
            stem, digits, of, total = match.groups()
            for number in range(1, int(total) + 1):
                wanted = f"{stem}{number:0{len(digits)}d}{of}{total}.safetensors"
                if not (folder / wanted).is_file():
                    raise CheckpointError(str(folder), f"{file.name} without {wanted}", f"all {int(total)} shards")
    return files, {}


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name, from headers and the index.

    Raises :class:`CheckpointError` for what :func:`list_files` and :func:`read_header` refuse, a tensor that its shard
    lacks, and a name that two files hold.
    """
    files, weight_map = list_files(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        for tensor in read_header(file):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(tensor.name, f"two copies, in {other.file.name} and {file.name}", "one")
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != Path(file).name:
            raise CheckpointError(f"{INDEX}: {name}", f"no such tensor in {file}", "every tensor in the shard that the index names")
    return tensors


class Reader:
    """Bytes of tensors through one memory map a file; only the pages that are looked at are read."""

    def __init__(self) -> None:
        self._maps: dict[Path, np.ndarray] = {}

    def bytes_of(self, tensor: Stored) -> np.ndarray:
        """A tensor's bytes as a read-only uint8 array ``[nbytes]``."""
        whole = self._maps.get(tensor.file)
        if whole is None:
            with tensor.file.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            whole = self._maps[tensor.file] = np.frombuffer(mapped, dtype=np.uint8)
        return whole[tensor.start : tensor.end]

    def floats_of(self, tensor: Stored) -> np.ndarray:
        """A float32 tensor's values as an array ``[numel]``."""
        return self.bytes_of(tensor).view("<f4") if tensor.start % 4 == 0 else np.frombuffer(self.bytes_of(tensor).tobytes(), "<f4")
