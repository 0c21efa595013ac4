"""``moe-backend bench serve`` from its plan to its rows on a CPU: vLLM loads the random weights of each shape and answers with them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moe_backend_plugin.bench import serve

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
CHILD = Path(__file__).with_name("bench_child.py")


@pytest.mark.parametrize("model", serve.MODELS)
def test_rows_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    run = subprocess.run

    def started(command: list[str], **options):
        assert command[1:3] == ["-m", "moe_backend_plugin.bench.serve_vllm"]
        return run([command[0], str(CHILD), *command[3:]], **options)

    monkeypatch.setattr(serve.subprocess, "run", started)
    lines: list[str] = []
    *_, found = serve.run(serve.Options(model=model, providers=("plugin",), batches=(1, 2), layers=4), lines.append)
    assert found["errors"] == [], "\n".join(lines)
    decode, prefill = found["rows"][:-1], found["rows"][-1]
    assert [row["batch"] for row in decode] == [1, 2] and prefill["batch"] == 2
    assert all(row["output_tok_s"] > 0 and row["first_token_ms"] > 0 for row in decode) and prefill["prefill_tok_s"] > 0
    for row in found["rows"]:
        assert row["model"] == serve.MODELS[model].name and row["layers"] == 4
        experts, *others = row["served_by"].split("; ")
        if model == "qwen3-next":
            assert experts.startswith("experts: torch (") and [other.startswith("GDN decode: torch (") for other in others] == [True]
        else:
            assert experts.startswith("torch (") and not others
