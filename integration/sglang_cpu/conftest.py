"""The real SGLang on a CPU, without a server: resolved arguments are published once for all tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[1] / "models"
REASON = "SGLang is not installed in this environment (pip install 'moe-backend-plugin[sglang]')"


@pytest.fixture(scope="session")
def sglang():
    """SGLang with this package registered in it, as its plugin loader does."""
    found = pytest.importorskip("sglang.srt.server_args", reason=REASON)
    from moe_backend_plugin.engines.sglang import register

    register()
    register()  # every process of SGLang may call it more than once
    return found


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
