"""What integration/gpu/moe_correctness.py stores of its children, and the random problems that it has them draw. No GPU is needed."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "integration/gpu"))
    yield importlib.import_module("moe_correctness")
    sys.path.remove(str(ROOT / "integration/gpu"))


@pytest.fixture(scope="module")
def cases():
    sys.path.insert(0, str(ROOT / "tests/moe"))
    yield importlib.import_module("moe_cases")
    sys.path.remove(str(ROOT / "tests/moe"))


# --- the rows --------------------------------------------------------------------------------------------------------------


def child(monkeypatch, status: int | None, said: str, figures: list[dict] | None = None):
    """Processes that end like this; their commands and environments."""
    met = []

    def run(command, *, env, timeout, **_):
        met.append((command, env))
        if figures is not None:
            Path(env["MOE_CUDA_FIGURES"]).write_text(json.dumps(figures))
        if status is None and timeout is not None:
            raise subprocess.TimeoutExpired(command, timeout, said.encode())
        return subprocess.CompletedProcess(command, status, said)

    monkeypatch.setattr(subprocess, "run", run)
    return met


def test_figures_of_the_tests_are_rows(script, monkeypatch):
    problems = script.checks(2000, 100_000)[0]
    figures = [{"check": "random problems", "count": 2000, "largest_relative_error": 3e-3}, {"check": "repeat and replay", "count": 1}]
    met = child(monkeypatch, 0, "..\n1 passed, 20 deselected in 50.00s", figures)
    first, last = script.run(problems, 100)
    assert first == figures[0] | {"of": "problems", "result": "passed"}
    assert (last["check"], last["count"], last["result"]) == ("problems", 1, "passed") and "last_lines" not in last
    ((command, environment),) = met
    assert command[:3] == [sys.executable, "-m", "pytest"] and command[-1] == "test_random_problems"
    assert (environment["MOE_CUDA_PROBLEMS"], environment["MOE_CUDA_ROUTINGS"]) == ("2000", "100000")


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (1, "1 failed, 3 passed in 2.00s", "exit status 1"),
        (5, "1 skipped in 2.00s", "exit status 5"),
        (0, "2 skipped in 2.00s", "exit status 0"),
        (None, "..", "no end within 100 s"),
    ],
)
def test_what_did_not_pass_is_stored_as_failed(script, monkeypatch, status, said, reason):
    child(monkeypatch, status, "\n".join([f"line {i} of {ROOT}/tests/moe" for i in range(100)] + [said]))
    (row,) = script.run(script.checks(1, 1)[2], 100)
    assert (row["result"], row["status"]) == ("failed", reason)
    assert row["last_lines"][-1] == said and len(row["last_lines"]) == script.LINES
    assert not any(str(ROOT) in line for line in row["last_lines"])


def test_a_tool_runs_the_tests_once_without_it(script, monkeypatch):
    met = child(monkeypatch, 0, "3 passed in 9.00s", [{"check": "repeat and replay", "count": 25}])
    tools = [check for check in script.checks(1, 1) if check.tool]
    assert {(check.tool, check.file) for check in tools} == {
        (tool, file) for tool in ("memcheck", "racecheck", "synccheck", "initcheck") for file in (script.MOE, script.GDN)
    }
    (row,) = script.run(tools[0], 100, "/somewhere/compute-sanitizer")
    assert (row["check"], row["count"], row["result"]) == ("memcheck", 3, "passed")
    alone, watched = (command for command, _ in met)
    assert (
        watched[:5] == ["/somewhere/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"] and watched[-len(alone) :] == alone
    )


def test_rows_of_other_checks_stay(script, tmp_path):
    one, two = script.checks(1, 1)[:2]
    tools = [check for check in script.checks(1, 1) if check.tool == "memcheck"]
    rows = [
        {"check": "random problems", "of": "problems"},
        {"check": "problems", "file": script.MOE},
        {"check": "routings", "file": script.MOE},
        *({"check": check.name, "file": check.file} for check in tools),
    ]
    assert script.kept(rows, one) == rows[2:] and script.kept(rows, two) == rows[:2] + rows[3:]
    assert script.kept(rows, tools[0]) == rows[:3] + rows[4:]
    stamp, file = {"kernel_hash": "a", "device": "GPU"}, tmp_path / "found.json"
    assert script.held(file, stamp) == []
    file.write_text(json.dumps({"stamp": stamp, "ceilings": {}, "rows": rows}))
    assert script.held(file, stamp) == rows and script.held(file, stamp | {"kernel_hash": "b"}) == []


def test_the_whole_run(script, monkeypatch, tmp_path, capsys):
    from moe_backend_plugin import device

    out = tmp_path / "found.json"
    monkeypatch.setattr(device, "find_device", lambda kind: type("Device", (), {"name": "NVIDIA H200"}))
    monkeypatch.setattr(script, "sanitizer", lambda: None)
    monkeypatch.setattr(script, "gpu_stamp", lambda *_: {"kernel_hash": "a", "device": "NVIDIA H200"})
    child(monkeypatch, 0, "2 passed in 1.00s")
    monkeypatch.setattr(sys, "argv", ["moe_correctness.py", "--out", str(out)])
    script.main()
    assert "no compute-sanitizer" in capsys.readouterr().err
    rows = json.loads(out.read_text())["rows"]
    assert [(row["check"], row["result"]) for row in rows] == [(name, "passed") for name in ("problems", "routings", "repeat", "rows")]

    child(monkeypatch, 1, "1 failed in 1.00s")
    monkeypatch.setattr(sys, "argv", ["moe_correctness.py", "--only", "rows", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == script.EXIT_WRONG
    assert [row["result"] for row in json.loads(out.read_text())["rows"]] == ["passed"] * 3 + ["failed"]

    monkeypatch.setattr(sys, "argv", ["moe_correctness.py", "--only", "racecheck", "--out", str(out)])
    with pytest.raises(SystemExit, match="compute-sanitizer"):
        script.main()


# --- the problems -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calls(cases):
    return cases.drawn(150, 1, 132)


def test_problems_need_few_kernels_and_every_tile(cases, calls):
    found, fields = calls
    needed = {tuple(sorted(map(repr, one.items()))) for call in found for one in call.kernels(132)}
    assert needed == {tuple(sorted(map(repr, one.items()))) for one in fields} and len(needed) <= cases.KERNELS
    assert {call.kernels(132)[0]["tile_tokens"] for call in found} == {tile for tile, _ in cases._TURNS}
    assert {one["ragged"] for one in fields} == {one["weighted"] for one in fields} == {False, True}
    assert {one.get("pairs", 0) for one in fields} == {0, 32, 128}
    again, _ = cases.drawn(20, 1, 132)
    assert again == found[:20] and cases.drawn(20, 2, 132)[0] != again


def test_problems_reach_the_ends_of_what_is_served_and_stay_small(cases, calls):
    from moe_backend_plugin.moe import cuda

    found, _ = calls
    for name, least, most in (("hidden", 256, 16384), ("intermediate", 64, 8192), ("num_experts", 1, 1024), ("top_k", 1, 32)):
        values = [getattr(call.problem, name) for call in found]
        assert (min(values), max(values)) == (least, most)
    for call in found:
        assert cuda.unsupported_reason(call.problem, call.dtype) is None
        assert cases.weight_bytes(call.problem) <= cases.WEIGHT_BYTES
        assert call.tokens * call.problem.top_k * (call.problem.hidden + call.problem.intermediate) * 2 <= cases.WORKSPACE_BYTES
    kinds = Counter((call.problem.activation, call.dtype, call.problem.apply_router_weight_on_input) for call in found)
    assert {kind for kind, _, _ in kinds} == set(cases.ACTIVATIONS)
    assert {dtype for _, dtype, _ in kinds} == {torch.bfloat16, torch.float16} and {on_input for _, _, on_input in kinds} == {False, True}
    assert {call.routing for call in found} == set(cases.ROUTINGS) and {call.mapped for call in found} == {False, True}


def test_the_reference_sees_rows_of_few_experts(cases):
    ids = [[row, row + 1] for row in range(0, 400, 2)]
    rows = cases.sample_rows(ids, random.Random(0), experts=10)
    assert len(rows) == 5 and rows == sorted(set(rows))
    assert cases.sample_rows([[0] * 4] * 100, random.Random(0), experts=10, rows=64) != list(range(64))
    assert len(cases.sample_rows([[0] * 4] * 100, random.Random(0))) == 64
    assert cases.sample_rows([list(range(32))], random.Random(0), experts=3) == [0]


def test_a_call_names_its_kernels(cases):
    problem = cases.MoEProblem(16, 4, 512, 256, 2)
    call = cases.Drawn(problem, torch.bfloat16, 4, "even", torch.int64, 0)
    gate_up, down = call.kernels(132)
    assert (gate_up["use"], down["use"]) == ("gate_up", "down")
    assert (gate_up["pairs"], gate_up["index"], gate_up["mapped"]) == (32, "int64", True)
    whole = replace(call, problem=replace(problem, num_local_experts=16), tokens=4096)
    assert "pairs" not in whole.kernels(132)[0] and not whole.mapped
