"""A gated-delta-net model behind ``vllm serve`` without ``--quantization``: the YAML file of the plugin claims the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .answers import assert_answers_do_not_depend_on_the_batch, complete, mixed_requests
from .process import tail
from .server import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(logs: Path, tmp_path_factory: pytest.TempPathFactory, next_model: Path) -> Iterator[Server]:
    settings = tmp_path_factory.mktemp("settings") / "plugin.yaml"
    settings.write_text("take_nvfp4_checkpoints: true\nstrict: true\n")
    server = Server(
        [str(next_model), "--enforce-eager", "--max-model-len", "2048"],
        logs / "server-next.log",
        env={"MOE_BACKEND_PLUGIN_CONFIG": str(settings)},
    )
    try:
        yield server.ready()
    finally:
        server.terminate()


def test_plugin_serves_every_kind_of_layer(server: Server) -> None:
    for kind in ("moe", "linear"):
        assert f"NVFP4 {kind} layers" in server.text(), tail(server.log)


def test_completes_python(server: Server) -> None:
    answer = complete(server, "class Stack:\n    def __init__(self):", 48)
    assert "self." in answer.text, answer.text


def test_64_concurrent_requests_answer_as_when_sent_alone(server: Server) -> None:
    # Half of them alone, to save time: one after the other they take ten times as long as together.
    assert_answers_do_not_depend_on_the_batch(server, mixed_requests(64), every=2)
