"""With torch.compile, as vLLM runs by default: the other tests run without, because it takes a minute more."""

from __future__ import annotations

from pathlib import Path

import pytest

from .answers import python_prompts
from .engines import EngineHost
from .test_gdn import count_same

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def test_a_compiled_model_gives_the_same_text(engines: EngineHost, next_model: Path) -> None:
    """Experts, dense layers and gated-delta-net layers in one model. On a GPU vLLM also cuts the graph in pieces, which a CPU does not."""
    prompts = python_prompts(8)
    eager = engines.generate(next_model, prompts, 64)
    compiled, said = engines.logging(lambda: engines.generate(next_model, prompts, 64, enforce_eager=None))
    assert count_same(compiled, eager) == len(prompts)
    assert "enforce_eager=False" in said and "CompilationMode.NONE" not in said, said[-3000:]
