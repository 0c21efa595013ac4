"""integration/bench/moe_kernels.py without a GPU: which weights its launches take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "integration/bench"))
    import moe_kernels

    return moe_kernels


def test_weights_are_cold_or_warm(script, monkeypatch):
    """Each cold launch has weights of its own, with no other between them; warm launches share one set, and nothing empties the cache."""
    launches, asked = [], []

    class Clock:
        def __init__(self, device):
            pass

        def time(self, launch, *, cold):
            asked.append(cold)
            for i in range(script.LAUNCHES + 1):
                launch(i)
            return 5.0

    monkeypatch.setattr(script, "Clock", Clock)
    monkeypatch.setattr(script.kernels, "load", lambda *_: lambda *arguments: launches.append(arguments[1]))
    case = script.Case("tiny", 4, script.LAUNCHES + 1, "cpu")
    assert (case.problem.num_experts, case.problem.num_local_experts, case.problem.hidden) == (4, 4, 272)
    variant = script.Variant(use="gate_up")
    case.run(variant, 8, False, 132)
    case.run(variant, 8, False, 132, warm=True)
    cold, warm = launches[: script.LAUNCHES + 1], launches[script.LAUNCHES + 1 :]
    assert asked == [True, False]
    assert len({weights.data_ptr() for weights in cold}) == script.LAUNCHES + 1 and all(torch.equal(w, cold[0]) for w in cold)
    assert {weights.data_ptr() for weights in warm} == {cold[0].data_ptr()} and len(warm) == script.LAUNCHES + 1
