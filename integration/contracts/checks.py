"""What the contract tests of all engines ask of a release's sources."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from .source import Class, Drift, Function, Module, Value

PLUGIN = Path(__file__).resolve().parents[2] / "moe_backend_plugin"


def per(name: str, items: Iterable):
    return pytest.mark.parametrize(name, list(items), ids=str)


def drift(message: object, where: str = "") -> NoReturn:
    raise pytest.fail.Exception(f"{message}" + (f" (used in {where})" if where else ""), pytrace=False) from None


def check_parameters(source, release: object, symbol: str, wanted: list[str]) -> None:
    """The first parameters of a function are those that the plugin relies on."""
    try:
        found = source.parameters(symbol)
    except Drift as error:
        drift(error)
    if found[: len(wanted)] != wanted:
        drift(f"{symbol}: {release} has the parameters {', '.join(found)}; the plugin relies on {', '.join(wanted)}")


def check_value(source, release: object, symbol: str, wanted: Any) -> None:
    """A constant is what the plugin takes it for."""
    try:
        found = source.resolve(symbol)
    except Drift as error:
        drift(error)
    value = ast.literal_eval(found.value) if isinstance(found, Value) and found.value is not None else found
    if value != wanted:
        drift(f"{symbol}: {release} has {value!r}; the plugin relies on {wanted!r}")


def check_texts(source, release: object, symbol: str, texts: Iterable[str]) -> None:
    """The code of a class, a function or a module says what the plugin relies on."""
    try:
        found = source.resolve(symbol)
    except Drift as error:
        drift(error)
    assert isinstance(found, (Class, Function, Module)), symbol
    code = ast.unparse(found.tree if isinstance(found, Module) else found.node)
    for text in texts:
        if text not in code:
            drift(f"{symbol}: {release} does not say {text!r} there")


def check_entry_points(engine: str, group: str) -> None:
    """Of an engine's groups of entry points the package registers itself in ``group`` alone, with functions that exist."""
    project = tomllib.loads((PLUGIN.parent / "pyproject.toml").read_text())["project"]
    assert {name for name in project["entry-points"] if name.startswith(f"{engine}.")} == {group}
    for target in project["entry-points"][group].values():
        module, _, function = target.partition(":")
        tree = ast.parse((PLUGIN.parent / module.replace(".", "/") / "__init__.py").read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), target


def names_of(module: str) -> dict[str, ast.expr]:
    """What a module of this package assigns, by name."""
    tree = ast.parse((PLUGIN / module).read_text())
    return {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
