"""The checker itself, on a small engine that drifts on purpose."""

from __future__ import annotations

import ast
import subprocess
import zipfile
from pathlib import Path

import pytest

from . import wheels
from .signatures import Call, incompatible, signature_of
from .source import Drift, External, Source
from .usage import Plugin

ENGINE = {
    "engine/__init__.py": """
import typing
TABLE = {"Server": ".core.server:Server"}
if typing.TYPE_CHECKING:
    from engine.core.server import Server
else:
    def __getattr__(name):
        return load(TABLE[name])
""",
    "engine/layers/__init__.py": "from engine.layers.base import *\nfrom .moe import Experts as Experts, Config\n",
    "engine/layers/base.py": """
from abc import ABC, abstractmethod

class Method(ABC):
    def create(self, layer, size: int, *, dtype=None): ...
    @abstractmethod
    def apply(self, layer, x, bias=None): ...
    @staticmethod
    def kind(value): ...

class Parameter:
    def __init__(self, data, loader): ...

class Row(Parameter):
    def __init__(self, row: int, **kwargs):
        super().__init__(**kwargs)

class Column(Parameter):
    def __init__(self, column: int, **kwargs):
        super().__init__(**kwargs)

class Both(Row, Column):
    pass
""",
    "engine/layers/moe.py": """
from __future__ import annotations
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch.nn as nn

if TYPE_CHECKING:
    from engine.core.server import Server

class Activation(Enum):
    SILU = "silu"

@dataclass
class Config:
    activation: Activation
    experts: int = 8
    hidden: int = field(default=0, init=False)

class Experts(nn.Module):
    def __init__(self, config: Config):
        self.config = config
        self.inner = nn.Linear(1, 1)
        self.register_buffer("expert_map", None)

    @property
    def current(self) -> Config | None:
        return self.config

    def load(self, param, weight, shard, return_success=False): ...
""",
    "engine/core/__init__.py": "",
    "engine/core/server.py": """
from ..layers import Experts

class Server:
    def __init__(self, model, *, seed=0): ...

def current() -> "Server": ...

def run(layer, quant_method):
    quant_method.apply(layer, 1, bias=None)
""",
}

PLUGIN = {
    "method.py": """
from engine.layers import Both, Experts
from engine.layers.base import Method
from engine import Server

class Ours(Method):
    def __init__(self):
        self.own = 1

    def create(self, layer: Experts, size, *, dtype=None):
        layer.weight = Both(row=1, column=0, data=None, loader=layer.load)
        use(layer.weight, layer.expert_map, layer.config.activation.value, self.own, layer.parameters())
        self.kind(3)
        super().create(layer, size)

    def apply(self, layer, x, bias=None):
        server = Server("m", seed=1)
        if isinstance(layer, Experts):
            return layer.current.experts
"""
}


def files(folder: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def engine(folder: Path, old: str = "", new: str = "") -> Source:
    """The engine as a wheel, with one text replaced."""
    assert not old or any(old in text for text in ENGINE.values())
    with zipfile.ZipFile(folder / "engine.whl", "w") as wheel:
        for name, text in ENGINE.items():
            wheel.writestr(name, text.replace(old, new) if old else text)
    return Source(folder / "engine.whl", "engine 2")


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(files(tmp_path / "plugin", PLUGIN), "engine")


def drifts(source: Source, plugin: Plugin) -> list[str]:
    found = []
    for use in plugin.uses():
        try:
            source.check(use.symbol, use.call)
        except Drift as error:
            found.append(str(error))
    return found


def test_scan(plugin: Plugin):
    assert {str(use) for use in plugin.uses()} == {
        "engine.Server(_, seed=)",
        "engine.layers.Both(row=, column=, data=, loader=)",
        "engine.layers.Experts",
        "engine.layers.Experts.config",
        "engine.layers.Experts.config.activation",
        "engine.layers.Experts.config.activation.value",
        "engine.layers.Experts.current",
        "engine.layers.Experts.current.experts",
        "engine.layers.Experts.expert_map",
        "engine.layers.Experts.load",
        "engine.layers.Experts.parameters()",
        "engine.layers.base.Method",
        "engine.layers.base.Method.create(_, _)",
        "engine.layers.base.Method.kind(_)",
    }


def test_no_drift(tmp_path: Path, plugin: Plugin):
    assert drifts(engine(tmp_path), plugin) == []


@pytest.mark.parametrize(
    ("old", "new", "symbol"),
    [
        ("class Both(Row, Column)", "class Pair(Row, Column)", "engine.layers.Both"),
        ("class Both(Row, Column)", "class Both(Row)", "engine.layers.Both"),
        ("row: int", "rows: int", "engine.layers.Both(row=, column=, data=, loader=)"),
        ("data, loader", "data, weight_loader", "engine.layers.Both(row=, column=, data=, loader=)"),
        ("Experts as Experts, ", "", "engine.layers.Experts"),
        ('"expert_map"', '"map"', "engine.layers.Experts.expert_map"),
        ("def load(", "def load_weight(", "engine.layers.Experts.load"),
        ("self.config = config", "self._config = config", "engine.layers.Experts.config"),
        ("activation: Activation", "act: Activation", "engine.layers.Experts.config.activation"),
        ("(Enum)", "", "engine.layers.Experts.config.activation.value"),
        ("def current(self)", "def now(self)", "engine.layers.Experts.current"),
        ("experts: int = 8", "num_experts: int = 8", "engine.layers.Experts.current.experts"),
        ("size: int, *, dtype=None", "size: int, rank: int, *, dtype=None", "engine.layers.base.Method.create(_, _)"),
        ("@staticmethod", "", "engine.layers.base.Method.kind(_)"),
        ('"Server": ', '"Serve": ', "engine.Server"),
        ("*, seed=0", "*, random_seed=0", "engine.Server(_, seed=)"),
        ("class Server:", "class HttpServer:", "engine.Server"),
    ],
)
def test_drift_names_the_symbol(tmp_path: Path, plugin: Plugin, old: str, new: str, symbol: str):
    found = drifts(engine(tmp_path, old, new), plugin)
    assert any(message.startswith(symbol) and "engine 2" in message for message in found), found


def test_unknown_types_are_no_drift(tmp_path: Path):
    source = engine(tmp_path)
    assert isinstance(source.resolve("engine.layers.Experts.inner.weight.anything"), External)
    # What only a type checker imports is not there when the program runs.
    with pytest.raises(Drift, match=r"engine\.layers\.moe\.Server"):
        source.check("engine.layers.moe.Server")


def test_return_types_are_followed(tmp_path: Path):
    source = engine(tmp_path)
    with pytest.raises(Drift, match=r"engine\.core\.server\.current\(\)\.port"):
        source.check("engine.core.server.current().port")


def test_dataclass_constructor(tmp_path: Path):
    source = engine(tmp_path)
    source.check("engine.layers.Config", Call(1, ("experts",)))
    for wrong in (Call(0), Call(1, ("hidden",))):
        with pytest.raises(Drift, match=r"engine\.layers\.Config"):
            source.check("engine.layers.Config", wrong)


def test_calls(tmp_path: Path):
    source = engine(tmp_path)
    assert [str(call) for call in source.calls("engine.core.server", "quant_method.apply")] == ["(_, _, bias=)"]
    assert source.calls("engine.core.server", "method.apply") == []


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        ("layer, x", "layer, x", True),
        ("layer, x, extra=None", "layer, x", True),
        ("*args, **kwargs", "layer, x, *, bias=None", True),
        ("layer, *rest, **extra", "layer, *args, **kwargs", True),
        ("layer, x, y", "layer, *args, **kwargs", True),
        ("layer, x, extra", "layer, x", False),
        ("layer, y", "layer, x", False),
        ("layer", "layer, x=None", False),
        ("x, layer", "layer, x", False),
        ("layer, x", "layer, x, *, bias=None", False),
    ],
)
def test_override(ours: str, theirs: str, fits: bool):
    mine, base = (signature_of(ast.parse(f"lambda {text}: 0", mode="eval").body) for text in (ours, theirs))
    assert (incompatible(mine, base) is None) is fits


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(wheels.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheels.cache_folder() == tmp_path / "moe-backend-plugin" / "wheels"
    monkeypatch.setenv(wheels.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert wheels.cache_folder() == tmp_path / "mine"


RELEASE = wheels.Release("tiny-engine", "1.0", "engine")


def test_a_download_is_cut_down_to_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def pip(command: list[str], **_):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "tiny_engine-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("engine/__init__.py", "X = 1")
            wheel.writestr("engine/_C.so", b"binary")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    found = wheels.archive(RELEASE, tmp_path / "cache")
    assert zipfile.ZipFile(found).namelist() == ["engine/__init__.py"]
    assert [path.name for path in found.parent.iterdir()] == [found.name]
    monkeypatch.setattr(wheels.subprocess, "run", None)
    assert wheels.archive(RELEASE, tmp_path / "cache") == found


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("WARNING: Retrying: Failed to establish a new connection\nERROR: No matching distribution found", wheels.IndexUnreachable),
        ("ERROR: No matching distribution found for tiny-engine==1.0", RuntimeError),
    ],
)
def test_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception]):
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(error, match="tiny-engine==1.0"):
        wheels.archive(RELEASE, tmp_path)


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_unreachable_index(source_of, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]):
    def unreachable(*_: object):
        raise wheels.IndexUnreachable("no answer")

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(wheels, "download", unreachable)
    # A version of its own for each case: the session remembers what it could not open.
    with pytest.raises(outcome, match="no answer"):
        source_of(wheels.Release("tiny-engine", f"2.{ci or 0}", "engine"))
