"""The real SGLang on a CPU: resolved arguments are published once for all tests of a process; servers are processes of their own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

MODELS = Path(__file__).resolve().parents[1] / "models"
REASON = "SGLang is not installed in this environment: `make test-sglang` makes one that has it"


@pytest.fixture(scope="session")
def sglang():
    """SGLang with every plugin that is installed, by its own loader: this package, and those that SGLang depends on."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:  # a folder of tests with that name is none
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


@pytest.fixture
def qwen3_next(arguments, published, monkeypatch):
    """Builds SGLang's Qwen3-Next of a folder's config.json, has it load (name, tensor) pairs, and says which parameters got none."""
    # Where there is no GPU, its rotary embedding imports this name from vLLM, and never calls it here.
    operators = ModuleType("vllm._custom_ops")
    operators.rotary_embedding = None
    monkeypatch.setitem(sys.modules, operators.__name__, operators)
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.model_loader.loader import _get_quantization_config
    from sglang.srt.models.qwen3_next import Qwen3NextForCausalLM

    def build(folder, tensors, **fields):
        backends = {"moe_runner_backend": "cutedsl", "linear_attn_decode_backend": "cutedsl_plugin"}
        found = model_config_of(arguments(folder, **backends, disable_radix_cache=True, **fields))
        initialize_moe_config()
        only = SimpleNamespace(rank_in_group=0, world_size=1, is_first_rank=True, is_last_rank=True)
        default = torch.get_default_dtype()
        with runtime_context.get_parallel().override(attn_tp_rank=0, attn_tp_size=1, pp_group=only):
            try:
                torch.set_default_dtype(torch.bfloat16)  # as its loader does
                model = Qwen3NextForCausalLM(found.hf_config, _get_quantization_config(found, LoadConfig()))
                loaded = model.load_weights(tensors)
            finally:
                torch.set_default_dtype(default)
        return model, {name for name, _ in model.named_parameters()} - loaded

    return build
