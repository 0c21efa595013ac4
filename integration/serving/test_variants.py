"""Other checkpoints and settings through the engine: compressed-tensors, a quantised output matrix, W4A4."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from .checkpoints import Edit, edited, layers_beside, quantize_lm_head, round_lm_head, to_compressed_tensors, weights_alone
from .engines import EngineHost, Score
from .test_parallel import TOKENS
from .test_settings import TAKE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


@pytest.fixture
def whole_baseline(engines: EngineHost, once: Callable, moe_model: Path) -> Score:
    """The ModelOpt checkpoint as it is; the tests of parallelism compare with it as well, on more text."""
    return once(("score", "moe_model"), lambda: engines.score(moe_model, tokens=TOKENS))


@pytest.fixture
def baseline(whole_baseline: Score) -> Score:
    # Windows of 500 tokens, of which 499 are scored: eight of them.
    return whole_baseline.first(8 * 499)


def test_compressed_tensors_checkpoint_scores_as_modelopts(engines: EngineHost, baseline: Score, moe_model: Path, tmp_path: Path) -> None:
    found = engines.score(edited(moe_model, tmp_path / "model", to_compressed_tensors))
    print(f"mean logprob difference {found.difference(baseline):.6f}")
    # The reciprocal of a reciprocal may differ in the last float32 bit, which moves a few roundings to bfloat16.
    assert found.difference(baseline) < 0.01 and found.agreement(baseline) >= 0.99


@pytest.mark.parametrize("edit", [weights_alone, layers_beside])
@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_other_descriptions_of_the_same_weights(
    named: bool, edit: Edit, engines: EngineHost, once: Callable, moe_model: Path, tmp_path: Path
) -> None:
    """Described as vLLM's own methods take it too: the same layers, and the same numbers."""
    settings = {"quantization": "nvfp4_cutedsl"} if named else {"quantization": None, "env": TAKE}
    found = engines.score(edited(moe_model, tmp_path / "model", edit), tokens=500, **settings)
    assert found == once("500 tokens", lambda: engines.score(moe_model, tokens=500))


def test_quantised_output_matrix(engines: EngineHost, baseline: Score, moe_model: Path, tmp_path: Path) -> None:
    quantised = engines.score(edited(moe_model, tmp_path / "nvfp4", quantize_lm_head))
    rounded = engines.score(edited(moe_model, tmp_path / "bf16", round_lm_head))
    print(f"to the same values in bf16: {quantised.difference(rounded):.5f}; to the original: {quantised.difference(baseline):.5f}")
    assert quantised.difference(rounded) < 0.02 and quantised.agreement(rounded) >= 0.98
    assert quantised.difference(rounded) < quantised.difference(baseline) / 2, "as near to the unquantised matrix: was it used?"


def test_activations_in_nvfp4(engines: EngineHost, baseline: Score, moe_model: Path) -> None:
    """The checkpoint's static input scales in use: other numbers, nearly as good a model."""
    settings = {"moe": {"activations": "nvfp4"}, "linear": {"activations": "nvfp4"}}
    found = engines.score(moe_model, additional_config={"moe_backend_plugin": settings})
    ratio = math.exp(baseline.mean - found.mean)
    print(f"perplexity with W4A4 {math.exp(-found.mean):.4f}, with W4A16 {math.exp(-baseline.mean):.4f}")
    assert math.isfinite(found.mean) and ratio < 1.15, f"perplexity is {ratio:.3f} times that of W4A16"
    assert found.difference(baseline) > 0.01, "the same numbers as without: the setting had no effect"
