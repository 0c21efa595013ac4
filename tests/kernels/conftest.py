"""Compiling all kernels takes a minute: other processes begin when the tests begin, and what looks at the machine code comes last."""

from __future__ import annotations

import pytest
import resources


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    last = {item for item in items if "test_kernel_resources" in item.nodeid and "found" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item in last)
    if last and len(last) < len(items) and not config.option.collectonly and resources.missing() is None:
        resources.begin()


def pytest_unconfigure() -> None:
    resources.end()
