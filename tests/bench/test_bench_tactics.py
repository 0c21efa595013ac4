"""The GPU's part of ``moe-backend tune`` on the CPU: the kernels are the reference, and graphs are calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

from moe_backend_plugin.bench import tactics as bench
from moe_backend_plugin.moe import cuda, reference, route, tactics, tuner, workspace
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.tuner import Conditions
from moe_backend_plugin.nvfp4 import hopper

sys.path.insert(0, str(Path(__file__).parents[1] / "moe"))
from tuner_cases import Clock, Graph, without_a_gpu  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """What was launched: (data pointers of x and of the weights, tactic)."""
    found = []

    def fused_moe(x, weights, topk_weights, topk_ids, problem, out, expert_map=None, choice=None):
        found.append((x.data_ptr(), weights.w13.data_ptr(), choice))
        w13 = hopper.unpack(weights.w13, problem.w13_rows, problem.hidden, problem.activation.gated)
        w2 = hopper.unpack(weights.w2, problem.hidden, problem.intermediate, False)
        scaled = (*w13, weights.w13_scale_2, *w2, weights.w2_scale_2)
        out.copy_(reference.fused_moe(x, *scaled, topk_weights, topk_ids, problem, expert_map))

    monkeypatch.setattr(cuda, "fused_moe", fused_moe)
    monkeypatch.setattr(cuda, "prepare", lambda *_: 0)
    monkeypatch.setattr(cuda.kernels, "prepare", lambda family, variants, architecture: len(variants))
    monkeypatch.setattr(cuda.kernels, "device_architecture", lambda *_: "sm_90a")
    without_a_gpu(monkeypatch, bench)
    return found


PROBLEMS = {
    "all": (MoEProblem(8, 8, 256, 64, 2), 0),
    "rank 2 of 4": (MoEProblem(8, 2, 256, 64, 3, Activation("swigluoai", 1.702, 1.0, 7.0)), 4),
    "no gate": (MoEProblem(8, 4, 256, 64, 2, Activation("relu2")), 4),
}


def layer(problem, first, max_tokens=16):
    found = tactics.candidates(problem, max_tokens, 132)
    return bench.Layer(problem, torch.bfloat16, first, CPU, max_tokens, found), found


@pytest.mark.parametrize(("problem", "first"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_outputs_are_those_of_the_reference(calls, problem, first, tokens):
    one, found = layer(problem, first)
    case = one.case(Conditions(tokens))
    vetted = tuner.vet(case, found[0], 3)
    assert vetted.reason is None and vetted.relative < 1e-2 and len(calls) == 4
    rows, right = case.reference()
    assert rows.tolist() == list(range(tokens)) and right.dtype == torch.float32 and right.abs().sum() > 0
    assert 0.01 < right.norm(dim=1).max() / problem.hidden**0.5 < 100  # of about the inputs' size
    case._launch = lambda *_: None  # no graph of this one is kept
    assert "not finite" in tuner.vet(case, found[1], 3).reason  # memory was full of NaN


def test_each_launch_has_inputs_and_weights_of_its_own(calls):
    one, found = layer(*PROBLEMS["all"])
    case = one.case(Conditions(4))
    assert case.time(found[2], Conditions(4)) == 5.0 and one.clock.asked == [(8, 5, 1, True)]
    assert len({x for x, _, _ in calls}) == len({w for _, w, _ in calls}) == 9 and {choice for *_, choice in calls} == {found[2]}
    calls.clear()
    case.time(found[2], Conditions(4, cold_l2=False))
    assert one.clock.asked[-1] == (8, 5, 1, False) and len({(x, w) for x, w, _ in calls}) == 1


def test_graphs_are_kept_from_one_visit_to_the_next(calls, monkeypatch):
    monkeypatch.setattr(Graph, "captured", 0)
    one, found = layer(*PROBLEMS["all"])
    case = one.case(Conditions(4))
    assert tuner.vet(case, found[0], 3).reason is None and Graph.captured == 1
    for _ in range(3):
        case.time(found[0], Conditions(4))
    assert Graph.captured == 2
    case.time(found[1], Conditions(4))
    case.time(found[0], Conditions(4, cold_l2=False))
    assert Graph.captured == 6


def test_one_arena_holds_every_tactic(calls):
    problem, first = PROBLEMS["all"]
    _, found = layer(problem, first, 64)
    held = workspace.Arena.get(CPU, 0, workspace.EVERY_STREAM).bytes
    for tactic in found:
        assert workspace.plan(problem, 64, workspace.Call(tactic.tile_tokens), torch.bfloat16, route.scratch_ints).bytes <= held


def test_large_calls_are_compared_on_some_rows(calls, monkeypatch):
    monkeypatch.setattr(bench, "ROWS_COMPARED", 3)
    one, found = layer(*PROBLEMS["all"])
    rows, right = one.case(Conditions(10)).reference()
    assert rows.tolist() == [0, 3, 6] and right.shape == (3, 256)
    assert tuner.vet(one.case(Conditions(10)), found[0], 2).reason is None


def test_a_layer_that_the_kernels_do_not_serve(calls):
    with pytest.raises(RuntimeError, match="hidden size 64"):
        layer(MoEProblem(8, 8, 64, 64, 2), 0)


def test_a_whole_run(calls, monkeypatch):
    all_candidates = tactics.candidates
    monkeypatch.setattr(tactics, "candidates", lambda *arguments: all_candidates(*arguments)[:3])
    monkeypatch.setattr(Clock, "replayed", lambda *_, **__: 5.0)
    problem, first = PROBLEMS["rank 2 of 4"]
    one, _ = layer(problem, first, 4)
    found = list(tuner.tune(problem, 4, 132, one.case))
    assert [tuned.last for tuned in found] == [1, 2, 4]
    # All take 5 us here: a tie, which is the heuristic's.
    assert all(tuned.tactic == tuned.heuristic and not tuned.struck for tuned in found)
