"""integration/bench/grouped_gemm.py without a GPU: the other layer in plain torch, its kernels in Triton's interpreter, the rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moe_backend_plugin.bench import moe as bench
from moe_backend_plugin.moe import reference
from moe_backend_plugin.moe.problem import Activation
from moe_backend_plugin.nvfp4.format import dequantize

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MODELS = {
    "all": bench.Model("all", experts=6, hidden=64, intermediate=48, top_k=3),
    "part": bench.Model("part", experts=6, hidden=64, intermediate=48, top_k=2, ep=2, activation=Activation("swigluoai", 1.702, 1.0, 2.0)),
}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "integration/bench"))
    import grouped_gemm

    yield grouped_gemm
    sys.path.remove(str(ROOT / "integration/bench"))


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr(bench, "MODELS", MODELS)


class Clock:
    """Calls what it is to time; ``times`` by the name of what was called, 10 for others."""

    def __init__(self, **times):
        self.times, self.asked = times, []

    def time(self, launch, warm, launches):
        for i in range(launches + 1):
            launch(i)
        name = getattr(launch, "func", launch).__name__ + getattr(launch, "keywords", {}).get("by", "")
        self.asked.append(name)
        return self.times.get(name, 10.0)


def checkpoint(model):
    """With global scales that differ, so that one in the wrong place shows; still powers of two."""
    found = bench.random_checkpoint(model.problem, CPU)
    found.w13_scale_2.mul_(torch.tensor([1.0, 2.0])).mul_(2.0 ** torch.arange(model.local)[:, None])
    found.w2_scale_2.mul_(0.5 ** torch.arange(model.local))
    return found


def case_of(script, name, tokens=9, routing="balanced", grouped=None):
    model, cell = MODELS[name], bench.Cell(name, tokens, routing)
    inputs, weights = bench.Inputs(cell, CPU), checkpoint(model)
    buffers = script.Buffers.make(model.problem, CPU)
    return script.Case(cell, inputs, [weights], buffers, grouped or {"torch": script.grouped_torch}), weights


def layers_of(model, weights, scale=1.0):
    def layer(x, router, ids, out):
        return out.copy_(scale * reference.fused_moe(x, *weights, router, ids, model.problem, model.expert_map(CPU)))

    return [layer]


def test_pairs_are_sorted_by_expert(script):
    ids = torch.tensor([[2, 0], [5, 2], [2, 1]], dtype=torch.int32)
    plan = script.sort_pairs(ids, MODELS["part"].problem, MODELS["part"].expert_map(CPU))
    assert plan.token.tolist() == [0, 2, 0, 1, 2] and plan.token.dtype == torch.int64
    assert plan.position.tolist() == [[2, 0], [-1, 3], [4, 1]]
    assert plan.offsets.tolist() == [1, 2, 5] and plan.starts.tolist() == [0, 1, 2, 5]
    assert plan.offsets.dtype == plan.starts.dtype == torch.int32


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("routing", ["balanced", "one-expert"])
def test_the_layer_is_the_reference(script, name, routing):
    """One-expert routing leaves experts without rows, and names an expert more than once in a row."""
    case, weights = case_of(script, name, routing=routing)
    model, inputs = MODELS[name], case.inputs
    for i in range(2):
        inputs.out[i].fill_(float("nan"))
        found = case.layer(i, "torch", "torch").float()
        expected = reference.fused_moe(
            inputs.x[i], *weights, inputs.weights[i], inputs.ids[i], model.problem, model.expert_map(CPU)
        ).float()
        assert (found - expected).norm() <= 1e-2 * expected.norm() and expected.norm() > 0


def test_parts_alone_read_what_the_parts_before_leave(script):
    expected = case_of(script, "all")[0].layer(0, "torch", "torch")
    case, _ = case_of(script, "all")
    case.keep("torch")
    case.activation(0)
    assert torch.equal(case.combine(0), expected)


def test_launches_take_weights_in_turn(script):
    cell = bench.Cell("all", 2048, "balanced")
    assert [script.set_of(cell, i, 3) for i in range(cell.launches + 1)] == [1, 2, 0]
    assert [script.set_of(cell, i, 2) for i in range(cell.launches + 1)] == [1, 0, 0]


def test_rows_of_a_cell(script):
    """The faster grouped GEMM of each product is taken, and the columns add up."""
    model, cell = MODELS["all"], bench.Cell("all", 9, "balanced")
    weights = checkpoint(model)
    grouped = {"torch": script.grouped_torch, "quack": lambda rows, w, plan: script.grouped_torch(rows, w, plan)}
    clock = Clock(ours=50.0, layer=80.0, dequantise=20.0, gate_uptorch=30.0, gate_upquack=25.0, downtorch=12.0, downquack=13.0)
    ours, theirs = script.measure(cell, [weights], layers_of(model, weights), script.Buffers.make(model.problem, CPU), grouped, clock)
    assert (ours["provider"], ours["us"], theirs["provider"], theirs["us"]) == ("plugin", 50.0, "dequantised", 80.0)
    assert (theirs["gate_up_by"], theirs["gate_up_us"], theirs["down_by"], theirs["down_us"]) == ("quack", 25.0, "torch", 12.0)
    assert (theirs["gate_up_torch_us"], theirs["down_quack_us"]) == (30.0, 13.0)
    assert (theirs["gemms_us"], theirs["bound_us"]) == (37.0, 57.0)
    assert {f"{part}_us" for part in ("dequantise", "gather", "activation", "combine")} < set(theirs)
    pairs, expert = 9 * 3, 3 * 64 * 48
    assert theirs["TFLOP_s"] == pytest.approx(2 * pairs * expert / 80 / 1e6, abs=1e-3)
    assert theirs["gate_up_TFLOP_s"] == pytest.approx(2 * pairs * 2 * 64 * 48 / 25 / 1e6, abs=1e-3)
    assert theirs["down_TFLOP_s"] == pytest.approx(2 * pairs * 64 * 48 / 12 / 1e6, abs=1e-3)
    assert theirs["dequantise_TB_s"] == pytest.approx(6 * expert * 2.5625 / 20 / 1e6, abs=1e-4)
    assert theirs["buffer_bytes"] == 6 * expert * 2
    buffers = script.Buffers.make(model.problem, CPU)
    assert theirs["buffer_bytes"] == buffers.w13.nbytes + buffers.w2.nbytes
    assert clock.asked[-1] == "layer" and clock.asked[0] == "ours"


@pytest.mark.parametrize("wrong", ["plugin", "dequantised", "nan"])
def test_a_wrong_provider_ends_the_script(script, wrong):
    model, cell = MODELS["all"], bench.Cell("all", 9, "balanced")
    weights, clock = checkpoint(model), Clock()

    def grouped(rows, w, plan):
        y = script.grouped_torch(rows, w, plan)
        return y * 1.1 if wrong == "dequantised" else y

    layers = layers_of(model, weights, {"plugin": 1.02, "nan": float("nan")}.get(wrong, 1.0))
    with pytest.raises(SystemExit, match="not finite" if wrong == "nan" else f"{wrong}.*relative error"):
        script.measure(cell, [weights], layers, script.Buffers.make(model.problem, CPU), {"torch": grouped}, clock)
    assert not clock.asked


def test_a_grouped_gemm_that_cannot_run_is_left_out(script, capsys):
    model, cell = MODELS["all"], bench.Cell("all", 9, "balanced")
    weights = checkpoint(model)

    def refused(*_):
        raise RuntimeError("no such tile")

    grouped = {"torch": script.grouped_torch, "quack": refused}
    rows = script.measure(cell, [weights], layers_of(model, weights), script.Buffers.make(model.problem, CPU), grouped, Clock())
    assert "no such tile" in capsys.readouterr().out and list(grouped) == ["torch"] and "gate_up_quack_us" not in rows[1]
    with pytest.raises(RuntimeError, match="no such tile"):
        script.measure(cell, [weights], layers_of(model, weights), script.Buffers.make(model.problem, CPU), {"torch": refused}, Clock())


def test_a_run_begins_at_the_top_and_ends_in_time(script, monkeypatch):
    monkeypatch.setattr(bench, "plugin_layers", lambda model, weights, copies, most, device: layers_of(model, weights) * copies)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    monkeypatch.setattr(script, "grouped_gemms", lambda tune: {"torch": script.grouped_torch})
    result = {"rows": [], "dropped": []}
    steps = script.run("all", [4, 16, 8], False, 600.0, result, Clock(), CPU)
    next(steps)
    assert [row["tokens"] for row in result["rows"]] == [16, 16]
    assert len(list(steps)) == 2 and [row["tokens"] for row in result["rows"]] == [4, 4, 8, 8, 16, 16]
    late = {"rows": [], "dropped": []}
    assert list(script.run("all", [4, 8], False, -1.0, late, Clock(), CPU)) == []
    assert [entry["tokens"] for entry in late["dropped"]] == [8, 4] and script.crossing(late["rows"], "us", "It") == "Nothing was measured."


def test_the_script_writes_a_stamped_file(script, monkeypatch, tmp_path, capsys):
    """The stamp's command is the one that measures this again."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from moe_backend_plugin import device
    from moe_backend_plugin.bench import timing

    class Timer(Clock):
        l2_bytes = 60 << 20

        def __init__(self, device):
            super().__init__(ours=5.0)

        def empty_us(self):
            return 1.0

    monkeypatch.setattr(device, "find_device", lambda *_, **__: device.Device("cuda", "NVIDIA H200", 0, (9, 0)))
    monkeypatch.setattr(timing, "Clock", Timer)
    monkeypatch.setattr(timing, "copy_tb_s", lambda device: 4.2)
    monkeypatch.setattr(timing, "matmul_tflop_s", lambda device: 760.0)
    monkeypatch.setattr(bench, "plugin_layers", lambda model, weights, copies, most, device: layers_of(model, weights) * copies)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    run = script.run
    monkeypatch.setattr(script, "run", lambda *arguments: run(*arguments[:-1], CPU))
    monkeypatch.setattr(sys, "argv", ["grouped_gemm.py", "--model", "part", "--tokens", "8,4", "--out", str(tmp_path / "found.json")])
    script.main()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["stamp"]["command"] == "python integration/bench/grouped_gemm.py --model part --tokens 8,4"
    assert found["stamp"]["kernel"] == list(bench.KERNELS)
    assert [(row["tokens"], row["provider"]) for row in found["rows"]] == [(n, name) for n in (4, 8) for name in script.PROVIDERS]
    assert found["ceilings"] == {"copy_TB_s": 4.2, "matmul_TFLOP_s": 760.0, "empty_us": 1.0, "l2_bytes": 60 << 20}
    said = capsys.readouterr().out
    assert "does not win up to 8 tokens" in said and f"take {MODELS['part'].set_bytes('triton_bf16')} bytes" in said


# --- what is printed -----------------------------------------------------------------------------------------------------------------


def rows_of(times):
    """Of {tokens: (plugin, alternative)}, in no order."""
    found = [{"tokens": tokens, "provider": "dequantised", "us": theirs, "bound_us": theirs - 20} for tokens, (_, theirs) in times.items()]
    return found + [{"tokens": tokens, "provider": "plugin", "us": ours} for tokens, (ours, _) in reversed(times.items())]


@pytest.mark.parametrize(
    ("times", "column", "said"),
    [
        ({8: (10, 40), 16: (30, 60)}, "us", "It does not win up to 16 tokens: at best, at 16, its speed is 0.50 of the plugin's."),
        ({8: (10, 10), 16: (30, 30)}, "us", "It does not win up to 16 tokens: at best, at 8, its speed is 1.00 of the plugin's."),
        ({16: (90, 60), 8: (10, 40), 32: (150, 120)}, "us", "It wins from 16 tokens on, where its speed is 1.50 of the plugin's."),
        (
            {16: (60, 50), 8: (10, 40), 32: (99, 120), 64: (50, 60)},
            "us",
            "It wins from 16 tokens on, where its speed is 1.20 of the plugin's, though not at 32, 64.",
        ),
        ({8: (10, 40), 16: (50, 60)}, "bound_us", "It wins from 16 tokens on, where its speed is 1.25 of the plugin's."),
    ],
)  # fmt: skip
def test_where_they_cross(script, times, column, said):
    assert script.crossing(rows_of(times), column, "It") == said


def test_the_table_has_a_line_for_each_number_of_tokens(script):
    model, cell = MODELS["all"], bench.Cell("all", 9, "balanced")
    weights = checkpoint(model)
    clock = Clock(ours=50.0, layer=100.0)
    grouped = {"torch": script.grouped_torch}
    rows = script.measure(cell, [weights], layers_of(model, weights), script.Buffers.make(model.problem, CPU), grouped, clock)
    (line,) = script.table(rows)
    assert len(line) == len(script.TABLE) and line[:5] == (9, "50", "100", "30 (1.67)", "20 (2.50)")


# --- the kernels ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(script):
    """The Triton kernels, interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import grouped_gemm_kernels

        yield grouped_gemm_kernels
    del sys.modules["grouped_gemm_kernels"]


def test_the_kernel_dequantises_every_code_and_scale(script, kernels):
    weights = bench.random_checkpoint(bench.Model("", experts=3, hidden=128, intermediate=64, top_k=1).problem, CPU)
    weights.w13_scale.view(torch.uint8).random_(0, 0x7F, generator=torch.Generator().manual_seed(0))
    weights.w13_scale_2[:] = torch.tensor([[1.0, 0.5], [2.0, 4.0], [0.25, 8.0]])
    out = torch.full((3, 128, 128), float("nan"), dtype=torch.bfloat16)
    kernels.dequantise(*weights[:3], out)
    halves = [dequantize(part[:, at : at + 64], scale[:, at : at + 64], weights.w13_scale_2[:, at // 64].contiguous())
              for part, scale in [weights[:2]] for at in (0, 64)]  # fmt: skip
    assert torch.equal(out, torch.cat(halves, 1))
    assert torch.equal(script.Torch.dequantise(*weights[:3], torch.empty_like(out)), out)
    odd = weights[0][:, :, :8].contiguous(), weights[1][:, :, :1].contiguous(), weights[2]
    with pytest.raises(ValueError, match="multiple of 4096 weights"):
        kernels.dequantise(*odd, torch.empty(3, 128, 16, dtype=torch.bfloat16))


def test_all_benchmark_models_can_be_dequantised(kernels, monkeypatch):
    monkeypatch.undo()
    for model in bench.MODELS.values():
        assert model.hidden * model.intermediate % (8 * kernels.THREADS * kernels.WORDS) == 0


@pytest.mark.parametrize("activation", [Activation(), Activation("swigluoai", 1.702, 1.0, 2.0)], ids=lambda a: a.kind)
def test_the_kernel_activates_as_torch_does(script, kernels, activation):
    both = (torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    found, expected = (
        part.activate(both, activation, torch.empty(5, 48, dtype=torch.bfloat16)).float() for part in (kernels, script.Torch)
    )
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-30)


def test_the_kernel_combines_as_torch_does(script, kernels):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(7, 1040, generator=generator).bfloat16()
    position = torch.tensor([[0, 3], [-1, 6], [2, -1], [-1, -1]], dtype=torch.int32)
    weights = torch.rand(4, 2, generator=generator)
    found, expected = (part.combine(y, position, weights, torch.empty(4, 1040, dtype=torch.bfloat16)) for part in (kernels, script.Torch))
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    assert not found[3].any() and found[1].any()
