"""Gated-delta-net layers: the package's path against vLLM's own, and under speculative decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .answers import python_prompts
from .engines import EngineHost

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def settings(provider: str) -> dict:
    return {"moe_backend_plugin": {"gdn": {"provider": provider}}}


def test_512_tokens_as_vllms_own_path(engines: EngineHost, next_model: Path) -> None:
    prompts = python_prompts(32)
    texts = {}
    for provider in ("torch", "engine"):
        texts[provider] = engines.generate(next_model, prompts, 512, additional_config=settings(provider))["text"]
    same = sum(a == b for a, b in zip(texts["torch"], texts["engine"], strict=True))
    print(f"{same} of {len(prompts)} texts of 512 tokens equal")
    assert same >= 30


def test_settings_choose_the_path(engines: EngineHost, next_model: Path) -> None:
    """The comparison above means something only if the two engines ran different code."""
    log = engines.log
    start = len(log.read_text(errors="replace")) if log.exists() else 0
    engines.generate(next_model, ["import os\n"], 4, additional_config=settings("torch"))
    ours = engines.log.read_text(errors="replace")[start:]
    assert "gdn" in ours.lower(), ours[-3000:]


def test_ngram_speculation_keeps_the_text(engines: EngineHost, next_model: Path, once: Callable) -> None:
    """Drafts that are rejected must leave no trace in the recurrent state."""
    prompts = python_prompts(8)
    # On a CPU vLLM 0.32 cannot keep checkpoints of the state for its prefix cache and draft tokens at once.
    plain = engines.generate(next_model, prompts, 128, enable_prefix_caching=False)["text"]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    drafted = engines.generate(next_model, prompts, 128, enable_prefix_caching=False, speculative_config=speculation)["text"]
    same = sum(a == b for a, b in zip(plain, drafted, strict=True))
    print(f"{same} of {len(prompts)} texts equal with and without speculation")
    assert same >= 7
