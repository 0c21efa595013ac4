"""Sources of engine releases for the contract tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import pytest

from .source import Source
from .wheels import IndexUnreachable, Release, archive


@cache
def _opened(release: Release) -> Source | Exception:
    # A failure is kept as well: hundreds of tests must not each wait for an index that gives no answer.
    try:
        return Source(archive(release), str(release))
    except (IndexUnreachable, RuntimeError) as error:
        return error


@pytest.fixture(scope="session")
def source_of() -> Callable[[Release], Source]:
    """The sources of a release.

    Without an answer from the package index the test is skipped, but never in continuous integration: there a contract
    that was not checked is a failure.
    """

    def get(release: Release) -> Source:
        opened = _opened(release)
        if isinstance(opened, Source):
            return opened
        if isinstance(opened, IndexUnreachable) and not os.environ.get("CI"):
            pytest.skip(f"the package index cannot be reached: {opened}")
        pytest.fail(f"no sources of {release}: {opened}", pytrace=False)

    return get
