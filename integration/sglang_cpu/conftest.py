"""The real SGLang on a CPU: resolved arguments are published once for all tests of a process; servers are processes of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[1] / "models"
REASON = "SGLang is not installed in this environment: `make test-sglang` makes one that has it"


@pytest.fixture(scope="session")
def sglang():
    """SGLang with every plugin that is installed, by its own loader: this package, and those that SGLang depends on."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip(REASON)
    # One that is installed and cannot be imported is a failure.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import server_args

    from moe_backend_plugin.engines.sglang import register

    register()  # every process of SGLang may call it more than once
    return server_args


@pytest.fixture(scope="session")
def arguments(sglang):
    """``ServerArgs`` for a model folder, resolved: what a server does before it starts a process."""

    def resolve(model, **fields):
        made = sglang.ServerArgs(model_path=str(model), device="cpu", **fields)
        made.resolve_once()
        return made

    return resolve


@pytest.fixture(scope="session")
def published(arguments):
    """A process that builds a model with both backends of this package."""
    from sglang.srt import runtime_context

    args = arguments(MODELS / "pycoder-moe-nvfp4", moe_runner_backend="cutedsl", linear_attn_decode_backend="cutedsl_plugin")
    runtime_context.publish(args, role="scheduler")
    # What a launcher writes: one rank of everything.
    with runtime_context.get_parallel().override(moe_ep_rank=0, moe_tp_rank=0, tp_rank=0, tp_group=None):
        yield args
