"""The served model computes what its checkpoint says: log-probabilities against transformers on the dequantised weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .checkpoints import double_gates, edited, rescale_gates
from .engines import EngineHost
from .process import environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def verify(model: Path, tokens: int, *options: str) -> dict:
    """What ``moe-backend verify --json`` finds; fails when the command does."""
    command = [str(Path(sys.executable).parent / "moe-backend"), "verify", str(model), "--tokens", str(tokens), "--json", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode in (0, 1), f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    found = json.loads(done.stdout)
    print({name: value for name, value in found.items() if isinstance(value, float)})
    assert found["passed"] == (done.returncode == 0), found
    return found


def assert_parity(found: dict, tokens: int) -> None:
    # The bounds are written out: the command's own are its own business.
    assert found["tokens"] >= tokens
    assert abs(found["engine_perplexity"] / found["reference_perplexity"] - 1) < 0.005, found
    assert found["mean_logprob_difference"] < 0.02, found
    assert found["top1_agreement"] >= 0.98, found
    # Two broken models may agree as well; this one has learnt something (an even guess over its tokens has 4,096).
    assert 3 < found["reference_perplexity"] < 16, found


@pytest.mark.parametrize("model", ["moe_model", "next_model"])
def test_perplexity_and_logprobs_of_20000_tokens(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    originals = os.environ.get("MOE_BACKEND_BF16_MODELS")
    options = ["--bf16", str(Path(originals) / path.name.removesuffix("-nvfp4"))] if originals else []
    found = verify(path, 20_000, *options)
    assert_parity(found, 20_000)
    if originals:
        # The figure for the format's own cost on models of this size.
        assert found["reference_perplexity"] / found["bf16_perplexity"] - 1 < 0.1, found
    else:
        print("without MOE_BACKEND_BF16_MODELS (a folder of the unquantised originals): not compared with them")


def test_scales_of_gate_and_up_are_kept_apart_exactly(moe_model: Path, tmp_path: Path, engines: EngineHost) -> None:
    """The same weights, written with other scales for the gates, give the same numbers; one shared scale would not."""
    original = engines.score(moe_model, tokens=1000)
    same = engines.score(edited(moe_model, tmp_path / "same", rescale_gates), tokens=1000)
    assert same.difference(original) < 1e-4
    # The control: gates with twice their global scale are another model, so an engine that ignored the scale would show.
    other = engines.score(edited(moe_model, tmp_path / "other", double_gates), tokens=1000)
    assert other.difference(original) > 0.1
