"""``moe-backend tune`` with a made-up GPU: the file it writes, the table, the plot, and one line for bad input."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_backend_plugin.bench import tune_report
from moe_backend_plugin.cli import tune as command
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.moe import tactic_cache, tactics, tiles
from moe_backend_plugin.moe.tactic_cache import Kind

sys.path.insert(0, str(Path(__file__).parents[1] / "moe"))
from tuner_cases import FakeGpu, formula  # noqa: E402

MODELS = Path(__file__).parents[2] / "integration" / "models"
KIND = Kind("NVIDIA H200", 132, "570.1")


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
        return command.Machine(KIND, found.make)

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
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")
    assert tactic_cache.table(problem, dtype, KIND).of(9) == tactics.parse(entry["buckets"]["16"]["tactic"])


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


def test_names_what_is_struck_out(gpu, tmp_path):
    name = tactics.name(tiles.Choice(tiles.FEW, tiles.SOME))
    gpu.wrong = {name: "nan"}
    result = run("qwen3-30b-a3b", "--max-tokens", 2, "--out", tmp_path / "t.json")
    assert result.exit_code == 0 and f"struck out: {name}: 1 tokens: not finite" in result.stdout


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


def test_needs_a_hopper_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device that torch can use" in refused("qwen3-30b-a3b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100")
    line = refused("qwen3-30b-a3b")
    assert "NVIDIA A100, compute capability 8.0" in line and "compute capability 9.0" in line


def test_report_without_times():
    name = tactics.name(tiles.Choice(tiles.FEW, tiles.FEW))
    bucket = {"first": 1, "tactic": name, "us": 5.0, "heuristic": name, "heuristic_us": None, "rounds": 1, "struck": {"x": "wrong"}}
    assert tune_report.lines({"4": bucket}) == [("1..4", name, None, "the same", "5.0", None, 1, 1)]
    assert tune_report.summary({"4": bucket}) == "nothing was timed"


def test_errors_are_the_packages_own():
    with pytest.raises(PluginError):
        command._problem("nope", 1, 0, 1)
