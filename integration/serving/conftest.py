"""Servers and the engine process, started once for all tests that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .engines import EngineHost


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers and engines write; failed tests quote it."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def engines(logs: Path) -> Iterator[EngineHost]:
    host = EngineHost(logs)
    yield host
    host.close()


@pytest.fixture(scope="session")
def once() -> Callable:
    """Remember a costly result for all tests: ``once(name, function)``."""
    found: dict = {}

    def call(name, function):
        if name not in found:
            found[name] = function()
        return found[name]

    return call
