"""``moe-backend tune`` with a made-up GPU: the file it writes, the table, the plot, and one line for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_backend_plugin.bench import tune_report
from moe_backend_plugin.cli import tune as command
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.moe import blackwell, tactic_cache, tactics, tiles
from moe_backend_plugin.moe.families import BLACKWELL
from moe_backend_plugin.moe.tactic_cache import Kind

sys.path.insert(0, str(Path(__file__).parents[1] / "moe"))
from tuner_cases import FakeGpu, formula  # noqa: E402

MODELS = Path(__file__).parents[2] / "integration" / "models"
KIND = Kind("NVIDIA H200", 132, "570.1")
B200 = Kind("NVIDIA B200", 148, "580.1", (10, 0))


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("MOE_BACKEND_PLUGIN_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(kernels, "_folder", "")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_KERNEL_CACHE", str(tmp_path / "kernels"))


@pytest.fixture
def gpu(monkeypatch):
    """Every run finds this GPU."""
    found = FakeGpu(lambda tactic, conditions: 0.0)
    found.asked = []

    def machine(problem, dtype, first, edges_of, forced):
        found.us = formula(problem)
        found.asked.append((problem, dtype, first, edges_of(KIND.multiprocessors), forced))
        return command.Machine(KIND, problem, found.make)

    monkeypatch.setattr(command, "_machine", machine)
    return found


def run(*arguments: object):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_tunes_a_shape(gpu, tmp_path):
    result = run("qwen3-30b-a3b", "--max-tokens", 16, "--report", tmp_path / "plot.svg")
    assert result.exit_code == 0, result.output
    path = tmp_path / "kernels" / "tactics" / "nvidia-h200.json"
    problem, dtype, first, edges, forced = gpu.asked[0]
    assert (problem.num_experts, problem.num_local_experts, dtype, first, forced) == (128, 128, torch.bfloat16, 0, None)
    assert {1, 2, 4, 8, 16} <= set(edges) and edges == sorted(edges) and edges[-1] == 16
    (entry,) = json.loads(path.read_text())["entries"]
    assert list(entry["buckets"]) == list(map(str, edges)) and entry["stamp"] == KIND.stamp
    assert str(path) in result.stdout and "gain" in result.stdout and f"{edges[-2] + 1}..16" in result.stdout
    assert f"of {len(edges)} buckets left the heuristic's tactic" in result.stdout
    # In a log, where there is no bar, a line says that a bucket is done.
    said = [line.partition(":")[0] for line in result.stderr.splitlines() if line.startswith("bucket ")]
    assert said == [f"bucket {n} of {len(edges)}, to {edge} tokens" for n, edge in enumerate(edges, 1)]
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")
    assert tactic_cache.table(problem, dtype, KIND).of(9) == tactics.parse(entry["buckets"]["16"]["tactic"])


def test_a_coarse_run_tunes_powers_of_two_and_what_is_named(gpu, tmp_path):
    out = tmp_path / "coarse.json"
    result = run("qwen3-30b-a3b", "--max-tokens", 20, "--sizes", 12, "--coarse", "--out", out)
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(out.read_text())["entries"]
    assert list(entry["buckets"]) == ["1", "2", "4", "8", "12", "16", "20"]
    edges = gpu.asked[0][3]
    assert [b["first"] for b in entry["buckets"].values()] == [
        max((e for e in edges if e < n), default=0) + 1 for n in (1, 2, 4, 8, 12, 16, 20)
    ]


def test_tunes_a_model_folder_and_further_sizes(gpu, tmp_path):
    result = run(MODELS / "pycoder-moe-nvfp4", "--max-tokens", 24, "--sizes", "3,24", "--out", tmp_path / "t.json", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    problem, dtype, _, edges, _ = gpu.asked[0]
    assert problem.num_experts == 16 and problem.top_k == 4 and dtype is torch.float16 and {1, 2, 3, 4, 8, 16, 24} <= set(edges)


@pytest.mark.parametrize(
    ("arguments", "local", "first", "width"),
    [
        (("deepseek-v3", "--ep", 16, "--rank", 3), 16, 48, 2048),
        (("deepseek-v3-ep8", "--rank", 7), 32, 224, 2048),
        (("deepseek-v3", "--tp", 8), 256, 0, 256),
    ],
)
def test_simulates_a_rank(gpu, tmp_path, arguments, local, first, width):
    assert run(*arguments, "--max-tokens", 1, "--out", tmp_path / "t.json").exit_code == 0
    problem = gpu.asked[0][0]
    assert (problem.num_experts, problem.num_local_experts, problem.intermediate, gpu.asked[0][2]) == (256, local, width, first)


def test_forces_a_tactic_and_resumes(gpu, tmp_path):
    out, name = tmp_path / "t.json", tactics.name(tiles.Choice(tiles.FEW, tiles.FEW))
    assert run("qwen3-30b-a3b", "--max-tokens", 4, "--force", name, "--out", out).exit_code == 0
    (entry,) = json.loads(out.read_text())["entries"]
    assert {bucket["tactic"] for bucket in entry["buckets"].values()} == {name}
    result = run("qwen3-30b-a3b", "--max-tokens", 8, "--resume", "--out", out)
    assert result.exit_code == 0
    (entry,) = json.loads(out.read_text())["entries"]
    assert {int(edge): bucket["tactic"] == name for edge, bucket in entry["buckets"].items()} == {
        int(edge): int(edge) <= 4 for edge in entry["buckets"]
    }
    assert "..8" in result.stdout and " 4 " in result.stdout


KILLED = """
import sys, time
sys.path[:0] = sys.argv[1:3]
import test_tune
from moe_backend_plugin.cli import tune
from tuner_cases import FakeGpu, formula

def machine(problem, *_):
    us = formula(problem)
    return tune.Machine(test_tune.KIND, problem, FakeGpu(lambda *call: time.sleep(0.001) or us(*call)).make)

tune._machine = machine
test_tune.app(["tune", "qwen3-30b-a3b", "--max-tokens", "64", "--out", sys.argv[3]])
"""


def test_a_run_that_is_killed_keeps_what_it_had(gpu, tmp_path):
    out = tmp_path / "tactics.json"
    folders = Path(__file__).parent, Path(__file__).parents[1] / "moe"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, folders), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def held() -> dict:
        return {last: bucket for entry in tactic_cache.read(out) for last, bucket in entry["buckets"].items()}

    deadline = time.monotonic() + 120
    while len(held()) < 3 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    before = held()
    child.kill()
    child.wait()
    kept = held()
    assert len(before) >= 3 and before.items() <= kept.items()
    result = run("qwen3-30b-a3b", "--max-tokens", 64, "--resume", "--out", out)
    assert result.exit_code == 0, result.output
    assert kept.items() <= held().items() and set(held()) == set(map(str, gpu.asked[0][3]))


def test_names_what_is_struck_out(gpu, tmp_path):
    name = tactics.name(tiles.Choice(tiles.FEW, tiles.SOME))
    gpu.wrong = {name: "nan"}
    result = run("qwen3-30b-a3b", "--max-tokens", 2, "--out", tmp_path / "t.json")
    assert result.exit_code == 0 and f"struck out: {name}: 1 tokens: not finite" in result.stdout


@pytest.fixture
def favourite(monkeypatch):
    """The name of a tactic that is by far the fastest at every number of tokens."""
    name = tactics.name(tiles.Choice(tiles.FEW, tiles.FEW))

    def favouring(problem, us=formula):
        return lambda tactic, conditions: us(problem)(tactic, conditions) * (0.1 if tactics.name(tactic) == name else 1)

    monkeypatch.setattr(sys.modules[__name__], "formula", favouring)
    return name


def test_what_is_struck_out_later_wins_nowhere(gpu, favourite, tmp_path):
    """Neither in earlier buckets of the run nor in those of the run that it resumes: servers would use none of them."""
    out, make = tmp_path / "t.json", gpu.make
    assert run("qwen3-30b-a3b", "--max-tokens", 1, "--out", out).exit_code == 0
    (entry,) = json.loads(out.read_text())["entries"]
    assert entry["buckets"]["1"]["tactic"] == favourite
    gpu.make = lambda conditions: gpu.wrong.update({favourite: "nan"} if conditions.tokens == 4 else {}) or make(conditions)
    result = run("qwen3-30b-a3b", "--max-tokens", 4, "--resume", "--out", out)
    assert result.exit_code == 0 and f"struck out: {favourite}: at 4 tokens not finite" in result.stdout, result.output
    assert "bucket 3 of 3, to 4 tokens" in result.stderr and "once more, to 1 tokens" in result.stderr
    (entry,) = json.loads(out.read_text())["entries"]
    assert len(entry["buckets"]) >= 3 and all(bucket["tactic"] != favourite for bucket in entry["buckets"].values())


def test_a_resumed_run_remembers_what_was_struck_out(gpu, favourite, tmp_path):
    out = tmp_path / "t.json"
    gpu.wrong = {favourite: "nan"}
    assert run("qwen3-30b-a3b", "--max-tokens", 2, "--out", out).exit_code == 0
    gpu.wrong = {}
    assert run("qwen3-30b-a3b", "--max-tokens", 4, "--resume", "--out", out).exit_code == 0
    (entry,) = json.loads(out.read_text())["entries"]
    assert entry["buckets"]["4"]["struck"][favourite] == "at 1 tokens not finite: 1 of 4 values"
    assert all(bucket["tactic"] != favourite for bucket in entry["buckets"].values())


@pytest.mark.parametrize("damaged", [7, {"first": 1}, {"first": 1, "tactic": "t8", "struck": 3}], ids=str)
def test_a_resumed_run_tunes_damaged_buckets_again(gpu, tmp_path, damaged):
    out = tmp_path / "t.json"
    assert run("qwen3-30b-a3b", "--max-tokens", 2, "--out", out).exit_code == 0
    found = json.loads(out.read_text())
    whole, found["entries"][0]["buckets"]["2"] = found["entries"][0]["buckets"]["2"], damaged
    out.write_text(json.dumps(found))
    result = run("qwen3-30b-a3b", "--max-tokens", 2, "--resume", "--out", out)
    assert result.exit_code == 0 and "bucket 1 of 1, to 2 tokens" in result.stderr, result.output
    assert json.loads(out.read_text())["entries"][0]["buckets"]["2"]["tactic"] == whole["tactic"]


def test_a_forced_tactic_that_is_wrong(gpu, tmp_path):
    name = tactics.name(tiles.Choice(tiles.SOME, tiles.SOME))
    gpu.wrong = {name: "wrong"}
    result = run("qwen3-30b-a3b", "--max-tokens", 2, "--force", name, "--out", tmp_path / "t.json")
    assert result.exit_code == 1 and "error: 1 tokens: tactic" in result.stderr and not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [("warm-l2", {"cold_l2": False}), ("random-inputs", {"loads": "random"}), ("unequal-allocations", {"preallocated": False})],
)
def test_biases(gpu, tmp_path, bias, wanted):
    assert run("qwen3-30b-a3b", "--max-tokens", 128, "--bias", bias, "--out", tmp_path / "t.json").exit_code == 0
    assert any(all(getattr(conditions, name) == value for name, value in wanted.items()) for _, conditions in gpu.timed)
    assert "without --out" in refused("qwen3-30b-a3b", "--bias", bias)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nope",), ["MODEL", "'nope'", "qwen3-30b-a3b", "deepseek-v3"]),
        (("qwen3-30b-a3b", "--max-tokens", 0), ["--max-tokens", "131072"]),
        (("qwen3-30b-a3b", "--max-tokens", 131073), ["--max-tokens", "131072"]),
        (("qwen3-30b-a3b", "--max-tokens", 8, "--sizes", "9"), ["--sizes", "'9'", "1 to 8"]),
        (("qwen3-30b-a3b", "--sizes", "1,x"), ["--sizes", "'x'"]),
        (("qwen3-30b-a3b", "--ep", 3), ["--ep", "divisor", "128"]),
        (("qwen3-30b-a3b", "--ep", 4, "--rank", 4), ["--rank", "0 to 3"]),
        (("deepseek-v3-ep8", "--ep", 2), ["--ep", "deepseek-v3 with --ep"]),
        (("qwen3-30b-a3b", "--tp", 32), ["--tp", "768"]),
        (("qwen3-30b-a3b", "--dtype", "fp8"), ["--dtype", "bfloat16, float16"]),
        (("qwen3-30b-a3b", "--force", "t8"), ["tactic", "'t8'", "a name such as"]),
        (("qwen3-30b-a3b", "--force", "t128.r4x2k1x2b1.r4x2k1x2b1"), ["--force", "need 192 registers"]),
        (("qwen3-30b-a3b", "--report", "plot.txt"), ["--report", ".png"]),
        (("qwen3-30b-a3b", "--out", "/tmp"), ["--out", "a folder"]),
        (("qwen3-30b-a3b", "--bias", "cold"), ["--bias", "'cold'", "warm-l2"]),
    ],
    ids=str,
)
def test_bad_input(gpu, arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words), line
    assert not gpu.asked


def test_needs_a_gpu_that_the_kernels_run_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device that torch can use" in refused("qwen3-30b-a3b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    line = refused("qwen3-30b-a3b")
    assert "NVIDIA A100, compute capability 8.0" in line and "compute capability 9.0" in line
    assert all(name in line for name in ("H100, H200", "10.0 or 10.3 with FlashInfer", "B200, B300"))
    for capability in ((12, 0), (11, 0), (10, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert "allowed: a machine with an NVIDIA GPU of compute capability 9.0" in refused("qwen3-30b-a3b")


# --- Blackwell --------------------------------------------------------------------------------------------------------


@pytest.fixture
def blackwell_gpu(monkeypatch):
    """This process's GPU is a B200, as far as anybody asks; its layer is made up."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from moe_backend_plugin.bench import tactics as bench

    found = FakeGpu(lambda tactic, conditions: 90.0 if tactic == blackwell.Tactic(256) else 100.0, family=BLACKWELL)
    found.asked = []

    class Layer:
        def __init__(self, *arguments):
            found.asked.append(arguments)
            self.case = found.make

    monkeypatch.setattr(bench, "BlackwellLayer", Layer)
    monkeypatch.setattr(command, "check_gpu", lambda *_: None)
    monkeypatch.setattr(Kind, "of", classmethod(lambda cls, device: B200))
    monkeypatch.setattr(blackwell, "missing", lambda: None)
    for name, answer in (("get_device_capability", (10, 0)), ("get_device_name", "NVIDIA B200"), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=answer: found)
    return found


def test_tunes_flashinfers_kernels_on_blackwell(blackwell_gpu, tmp_path):
    result = run("deepseek-v3-ep8", "--max-tokens", 16)
    assert result.exit_code == 0, result.output
    problem, dtype, first, device, most, found = blackwell_gpu.asked[0]
    assert (problem.activation_precision, dtype, first, str(device), most) == ("nvfp4", torch.bfloat16, 0, "cuda:0", 16)
    assert set(found) == set(blackwell.every(problem))
    path = tmp_path / "kernels" / "tactics" / "nvidia-b200.json"
    (entry,) = json.loads(path.read_text())["entries"]
    assert list(entry["buckets"]) == ["1", "2", "4", "8", "16"] and {b["tactic"] for b in entry["buckets"].values()} == {"s256.128.128x1"}
    assert entry["stamp"] == B200.stamp and entry["problem"]["activation_precision"] == "nvfp4"
    # A server's layers find it.
    assert tactic_cache.table(problem, torch.bfloat16, B200).of(9) == blackwell.Tactic(256)
    assert result.stderr.count("has never run on a Blackwell GPU") == 1 and "5 of 5 buckets left the heuristic's tactic" in result.stdout


def test_forces_and_strikes_out_tactics_of_blackwell(blackwell_gpu, tmp_path):
    out = tmp_path / "t.json"
    assert run("deepseek-v3-ep8", "--max-tokens", 4, "--force", "s128.256.256x2o", "--out", out).exit_code == 0
    assert set(blackwell_gpu.asked[0][-1]) == {blackwell.Tactic(), blackwell.Tactic(128, 256, 256, 2, True)}
    (entry,) = json.loads(out.read_text())["entries"]
    assert {bucket["tactic"] for bucket in entry["buckets"].values()} == {"s128.256.256x2o"}
    blackwell_gpu.wrong = {"s256.128.128x1": "nan"}
    result = run("deepseek-v3-ep8", "--max-tokens", 2, "--out", tmp_path / "u.json")
    assert result.exit_code == 0 and "struck out: s256.128.128x1: 1 tokens: not finite" in result.stdout
    assert run("deepseek-v3-ep8", "--max-tokens", 2, "--force", "s256.128.128x1", "--out", tmp_path / "v.json").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("qwen3-30b-a3b", "--force", tactics.name(tiles.Choice(tiles.FEW, tiles.FEW))),
            ["--force", "NVIDIA B200", "a tactic of Blackwell"],
        ),
        (("qwen3-30b-a3b", "--dtype", "float16"), ["MODEL", "float16", "bfloat16"]),
        (("qwen3-30b-a3b", "--force", "s64.128.128x1"), ["--force", "tile_tokens 64"]),
    ],
    ids=str,
)
def test_bad_input_on_blackwell(blackwell_gpu, arguments, words):
    result = run(*arguments)
    line = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and line.startswith("error: ") and all(word in line for word in words), result.stderr
    assert not blackwell_gpu.asked


def test_blackwell_needs_flashinfer(blackwell_gpu, monkeypatch):
    monkeypatch.setattr(blackwell, "missing", lambda: "no package flashinfer (pip install flashinfer-python)")
    result = run("qwen3-30b-a3b")
    assert result.exit_code == 2 and "found no package flashinfer (pip install flashinfer-python)" in result.stderr


def test_a_tactic_of_blackwell_is_no_tactic_of_hopper(blackwell_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(Kind, "of", classmethod(lambda cls, device: KIND))
    assert "a tactic of Hopper" in refused("qwen3-30b-a3b", "--force", "s128.128.128x1")


def test_report_without_times():
    name = tactics.name(tiles.Choice(tiles.FEW, tiles.FEW))
    bucket = {"first": 1, "tactic": name, "us": 5.0, "heuristic": name, "heuristic_us": None, "rounds": 1, "struck": {"x": "wrong"}}
    assert tune_report.lines({"4": bucket}) == [("1..4", name, None, "the same", "5.0", None, 1, 1)]
    assert tune_report.summary({"4": bucket}) == "nothing was timed"


def test_errors_are_the_packages_own():
    with pytest.raises(PluginError):
        command._problem("nope", 1, 0, 1)
