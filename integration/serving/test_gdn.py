"""Gated-delta-net layers: the package's path against vLLM's own, and under speculative decoding."""

from __future__ import annotations

from pathlib import Path

import pytest

from .answers import NOISE, Answer, divergence, python_prompts
from .engines import EngineHost

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

FP32_STATES = {"mamba_ssm_cache_dtype": "float32"}
"""What vLLM takes by itself on a CPU with bfloat16 instructions; on others it keeps states in the model's type."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def settings(provider: str) -> dict:
    return {"moe_backend_plugin": {"gdn": {"provider": provider}}}


def count_same(ours: list[Answer], theirs: list[Answer], noise: float = NOISE) -> int:
    """How many texts are equal, or part where the reference had two tokens all but tied (see ``answers.divergence``)."""
    parted = {i: found for i, pair in enumerate(zip(theirs, ours, strict=True)) if (found := divergence(*pair))}
    ties = [i for i, (_, preference) in parted.items() if preference < noise]
    print(f"{len(ours) - len(parted)} of {len(ours)} texts equal, {len(ties)} part at a tie: {parted}")
    return len(ours) - len(parted) + len(ties)


def test_512_tokens_as_vllms_own_path(engines: EngineHost, next_model: Path) -> None:
    """Of 32 texts of 512 tokens at least 30 are those of vLLM's own path, letter by letter.

    On a CPU the op rounds as vLLM's kernel does; 64 of 64 texts were equal when this was written.  Where another machine's BLAS
    adds in another order, a few texts may part at ties, so those that part must do so where vLLM had two tokens all but tied: a
    wrong state would part them where it was sure of its token, too.  Logits are fp32 on both sides, so that a tie is one of the
    model and not of bfloat16; the bound is half a step of what bfloat16 logits would have.
    """
    prompts = python_prompts(32)
    fp32 = {"hf_overrides": {"head_dtype": "float32"}, **FP32_STATES}
    ours, theirs = (engines.generate(next_model, prompts, 512, additional_config=settings(p), **fp32) for p in ("torch", "engine"))
    assert count_same(ours, theirs, noise=0.03) == len(prompts)
    assert sum(a.text == b.text for a, b in zip(ours, theirs, strict=True)) >= 30


def test_settings_choose_the_path(engines: EngineHost, next_model: Path) -> None:
    """The comparison above means something only if the two engines ran different code."""
    _, ours = engines.logging(lambda: engines.generate(next_model, ["import os\n"], 4, additional_config=settings("torch")))
    assert "gdn" in ours.lower(), ours[-3000:]


def test_ngram_speculation_keeps_the_text(engines: EngineHost, next_model: Path) -> None:
    """Drafts that are rejected must leave no trace in the recurrent state."""
    prompts = python_prompts(8)
    # On a CPU vLLM 0.32 cannot keep checkpoints of the state for its prefix cache and draft tokens at once.
    plain = engines.generate(next_model, prompts, 128, enable_prefix_caching=False)
    drafted = engines.generate(next_model, prompts, 128, enable_prefix_caching=False, speculative_config=NGRAM)
    assert count_same(drafted, plain) == len(prompts)


# Norms of differences, relative to what is expected; see gdn_watch. States are fp32, outputs of a call are bf16.
BOUNDS = {"state_error": 2**-18, "out_error": 2**-8, "conv_error": 2**-7}
# A convolved value may be the next bf16. From fp32 in everything a state may differ by three roundings of the step size to bf16,
# and by one of the inputs: 2**-9 each.
BOUNDS["fp32_error"] = 4 * 2**-9


@pytest.mark.parametrize("drafts", [False, True], ids=["decode", "drafts"])
def test_states_in_vllms_pool_are_the_references(drafts: bool, engines: EngineHost, next_model: Path) -> None:
    """Every call of the layer, recomputed in fp32 from the pool as it was; no slot of another request may change by one bit."""
    # A budget of 96 tokens a step lets prompts enter while others decode, and leaves them in pieces.
    options = {"enable_prefix_caching": False, "max_num_seqs": 4, "max_num_batched_tokens": 96, "num_gpu_blocks_override": 64}
    options |= FP32_STATES
    if drafts:
        options["speculative_config"] = NGRAM
    seen = engines.watch_gdn(next_model, python_prompts(10), 40, **options)
    print(seen)
    assert seen["slots"] == 64 and seen["rows"] > 500 and seen["mixed_calls"] > 20, seen
    if drafts:
        assert seen["rows_with_drafts"] > 200 and seen["rows_after_accepted_drafts"] > 50, seen
    assert seen["foreign"] == []
    assert all(seen[name] < bound for name, bound in BOUNDS.items()), seen
