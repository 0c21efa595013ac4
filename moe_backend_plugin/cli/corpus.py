"""Text that is on every machine: the source files of the Python standard library.

Calibration and verification take different files, so that a model is not judged on what it was calibrated with.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from moe_backend_plugin.cli.output import InputError, first_line


def standard_library(part: Literal["calibration", "verification"]) -> list[Path]:
    """Half of the standard library's modules, in a fixed order that mixes packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not skip & set(path.relative_to(root).parts))
    if not files:
        raise InputError("standard library", f"no source files in {root}", "a Python with its .py files, or a text file of your own")
    random.Random(0).shuffle(files)
    return files[0::2] if part == "calibration" else files[1::2]


def load_tokenizer(model: Path):
    """The tokenizer of a model folder. Raises InputError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # each tokenizer class raises what it likes
        raise InputError(
            str(model), f"a tokenizer that transformers cannot load ({first_line(error)})", "a folder with its tokenizer"
        ) from None


def windows(tokenizer, files: Iterable[Path], length: int, count: int, per_file: int | None = None) -> list[list[int]]:
    """``count`` windows of ``length`` token ids, documents joined by the tokenizer's BOS (or EOS) token.

    ``per_file`` limits the windows a document gives, so that one long file is not most of the text. Fewer windows come back when the
    text ends. Raises InputError when it has not even one.
    """
    found: list[list[int]] = []
    stream: list[int] = []
    for tokens in _documents(tokenizer, files):
        stream += tokens if per_file is None else tokens[: per_file * length]
        while len(stream) >= length and len(found) < count:
            found.append(stream[:length])
            stream = stream[length:]
        if len(found) == count:
            return found
    if not found:
        raise InputError("text", f"fewer than {length} tokens", f"at least one window of {length} tokens")
    return found


def _documents(tokenizer, files: Iterable[Path]) -> Iterator[list[int]]:
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(str(path), f"a file that cannot be read ({error.strerror})", "a readable text file") from None
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield ([] if separator is None else [separator]) + tokens
