"""One vLLM engine context for all layer tests: a CPU device, one rank."""

from __future__ import annotations

import os
import socket

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="package")
def vllm_config():
    platforms = pytest.importorskip("vllm.platforms", reason="vLLM is not installed")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM's CPU build is not installed")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    from moe_backend_plugin.engines.vllm import register

    register()
    config = VllmConfig()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1, backend="gloo")
        yield config
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@pytest.fixture
def log(monkeypatch):
    """Lines of this package's loggers in vLLM."""
    from moe_backend_plugin.engines.vllm import configs, linear_cuda, moe_cuda

    lines: list[str] = []
    for level in ("info_once", "warning_once"):
        for module in (configs, linear_cuda, moe_cuda):
            monkeypatch.setattr(module.logger, level, lambda text, *values, **_: lines.append(text % values))
    return lines
