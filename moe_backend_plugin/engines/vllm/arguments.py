"""``--additional-config`` while vLLM reads its arguments: checked first, and visible to what is decided there.

vLLM picks the quantization method and builds its configuration before a ``VllmConfig`` exists that could be asked, and has
no hook that sees the arguments.  So :func:`create_engine_config` wraps the one function every engine start goes through.
"""

from __future__ import annotations

import difflib
from contextvars import ContextVar
from typing import Any

from ...errors import ConfigError

EXTRA_KEY = "moe_backend_plugin"
"""The key of this package in ``--additional-config``."""

current_extra: ContextVar[dict | None] = ContextVar("moe_backend_plugin_extra", default=None)
"""This package's part of the arguments that are being read."""


def extra_config(owner: object | None) -> dict | None:
    """This package's part of the ``additional_config`` of ``owner`` (engine arguments or VllmConfig), or None.

    Raises:
        ConfigError: another key looks like a misspelling of this package's.
    """
    return plugin_part(getattr(owner, "additional_config", None))


def plugin_part(additional: object) -> dict | None:
    """This package's part of an ``additional_config``, or None. Raises ConfigError as :func:`extra_config` does."""
    if not isinstance(additional, dict):
        return None
    # The dictionary is shared with other plugins: only a near miss can be told from theirs.
    for key in additional:
        if key != EXTRA_KEY and difflib.SequenceMatcher(None, str(key).lower().replace("-", "_"), EXTRA_KEY).ratio() > 0.85:
            raise ConfigError("--additional-config", f"the key {key!r}", f"the key {EXTRA_KEY!r} for this package's settings")
    return additional.get(EXTRA_KEY)


def create_engine_config(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """Around ``EngineArgs.create_engine_config``: refuse bad settings before anything else happens."""
    from ...config import load_config  # not when vLLM imports its plugins: that has to be quick

    extra = extra_config(instance)
    load_config(extra)
    token = current_extra.set(extra)
    try:
        return wrapped(*args, **kwargs)
    finally:
        current_extra.reset(token)
