"""What every command shares: tables, JSON, and bad input as one line with exit code 2."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import typer

from moe_backend_plugin.errors import PluginError

EXIT_WRONG = 1  # the command ran and found something wrong
EXIT_BAD_INPUT = 2  # the command could not run


class InputError(PluginError):
    """An argument of a command cannot be used."""


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Report this package's errors as one line on stderr instead of a traceback."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except PluginError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_BAD_INPUT) from None

    return run


def print_json(value: Any) -> None:
    """JSON on stdout; dataclasses and paths included."""
    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout, as wide as the terminal; full width when piped, so that nothing is cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print()


def _cell(cell: Any) -> str:
    from rich.markup import escape

    return escape({True: "true", False: "false", None: "-"}.get(cell, str(cell)) if isinstance(cell, bool | None) else str(cell))


def size(count: int) -> str:
    """Bytes in the largest unit that keeps the number above one."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def model_folder(model: Path, name: str = "MODEL") -> dict[str, Any]:
    """The config.json of a local model folder. Raises InputError when the folder is not one."""
    path = model / "config.json"
    if not model.is_dir():
        raise InputError(name, f"{str(model)!r}, which is not a folder", "a local folder in Hugging Face format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(name, f"{str(model)!r} without config.json", "a local folder in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"a file that cannot be read ({error})", "the JSON file of a model in Hugging Face format") from None
    if not isinstance(config, dict):
        raise InputError(str(path), f"a JSON {type(config).__name__}", "a JSON object")
    if not any(model.glob("*.safetensors")):
        raise InputError(name, f"{str(model)!r} without *.safetensors", "a folder that holds the weights as safetensors")
    return config


def is_quantized(model: Path, config: dict[str, Any]) -> bool:
    """Whether the folder of this config.json says that its weights are quantised."""
    described = any("quantization_config" in part for part in (config, config.get("text_config", {})))
    return described or (model / "hf_quant_config.json").exists()


def check_files(out: Path | None, option: str, picture: Path | None) -> None:
    """Refuse what cannot be written to: ``--out``, and the picture of ``option``. Raises InputError."""
    for name, file in (("--out", out), (option, picture)):
        if file is not None and file.is_dir():
            raise InputError(name, f"{str(file)!r}, which is a folder", "a file's name")
    if picture is not None and picture.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(option, repr(str(picture)), "a file's name that ends in .png, .svg or .pdf")


def check_gpu(name: str, allowed: str) -> None:
    """Refuse a machine without a GPU that torch can use, or without what the kernels and their timing need. Raises InputError."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(name, "no CUDA device that torch can use", allowed)
    for module, install in (("cutlass", 'pip install "moe-backend-plugin[kernels]"'), ("triton", "pip install triton")):
        if importlib.util.find_spec(module) is None:
            raise InputError(name, f"no package with the module {module}", install)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
