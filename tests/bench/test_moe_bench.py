"""``moe-backend bench moe`` without a GPU: cells, what is dropped, bytes and operations, routings, the figures, the run."""

from __future__ import annotations

import json
from unittest.mock import create_autospec

import pytest
import torch
from typer.testing import CliRunner

from moe_backend_plugin.bench import moe, moe_report, report, stamp
from moe_backend_plugin.bench.moe import MODELS, PROVIDERS, ROUTINGS, TOKENS, Cell, Inputs, Model, Options, fit, importance, plan
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.moe import reference
from moe_backend_plugin.nvfp4.unscaled import unscaled

CPU = torch.device("cpu")

# --- cells ---------------------------------------------------------------------------------------------------------------------------


def test_default_plan_is_the_whole_grid():
    cells = plan(Options())
    assert len(cells) == len(set(cells)) == len(MODELS) * 15 * 3
    assert TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    changes = sum(a.model != b.model for a, b in zip(cells, cells[1:], strict=False))
    assert changes == len(MODELS) - 1  # one model after the other


def test_plan_of_options():
    options = Options(models=("deepseek-v3-ep16",), tokens=(3, 7), routings=("zipf",), providers=("plugin", "triton_bf16"))
    assert plan(options) == [Cell("deepseek-v3-ep16", 3, "zipf"), Cell("deepseek-v3-ep16", 7, "zipf")]
    assert options.providers_of("zipf") == ("plugin", "triton_bf16")  # asked for by name
    assert Options().providers_of("balanced") == PROVIDERS and "triton_bf16" not in Options().providers_of("zipf")
    assert {cell.routing for cell in plan(Options(quick=True))} == {"balanced"} and len(plan(Options(quick=True))) == 3


def test_models():
    shapes = {name: (m.experts, m.local, m.hidden, m.intermediate, m.top_k) for name, m in MODELS.items()}
    assert shapes == {
        "qwen3-30b-a3b": (128, 128, 2048, 768, 8),
        "qwen3-next-80b": (512, 512, 2048, 512, 10),
        "deepseek-v3-ep8": (256, 32, 7168, 2048, 8),
        "deepseek-v3-ep16": (256, 16, 7168, 2048, 8),
        "minimax-like": (128, 128, 3072, 1536, 4),
    }
    a = MODELS["minimax-like"].activation
    assert (a.kind, a.alpha, a.beta, a.limit) == ("swigluoai", 1.702, 1.0, 7.0)
    assert MODELS["qwen3-30b-a3b"].expert_map(CPU) is None
    assert MODELS["deepseek-v3-ep16"].expert_map(CPU).tolist() == [*range(16), *[-1] * 240]
    assert MODELS["deepseek-v3-ep8"].problem.num_local_experts == 32


def test_launches():
    assert [Cell("qwen3-30b-a3b", tokens, "balanced").launches for tokens in (1, 1024, 1025, 16384)] == [8, 8, 2, 2]


# --- the time budget -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_dropped_in_time_and_all_without():
    cells = plan(Options())
    assert fit(cells, 1e9, Options()) == (cells, [])
    assert fit(cells, 0, Options()) == ([], cells)


def test_drop_order():
    """Less and less time: skewed routings go before balanced ones, in-between token counts first, Qwen3-30B last."""
    options, cells = Options(), plan(Options())
    whole = moe.total(cells, options)
    left = set(cells)
    for part in (0.9, 0.7, 0.5, 0.3, 0.1):
        kept, dropped = fit(cells, part * whole, options)
        assert sorted([*kept, *dropped]) == sorted(cells) and set(kept) < left
        assert moe.total(kept, options) <= part * whole
        assert max(map(importance, dropped)) <= min(map(importance, kept), default=99)
        left = set(kept)
    assert {(cell.model, cell.routing) for cell in left} <= {("qwen3-30b-a3b", "balanced")}


def test_importance():
    def of(model: str = "qwen3-next-80b", tokens: int = 16, routing: str = "balanced") -> int:
        return importance(Cell(model, tokens, routing))

    assert of("qwen3-30b-a3b") > of() > of(tokens=32) > of("deepseek-v3-ep16") > of("deepseek-v3-ep16", 32)
    assert of("deepseek-v3-ep16", 32) > of(routing="zipf") > of(routing="one-expert") > of(tokens=32, routing="zipf")
    assert of("qwen3-30b-a3b", 32) == of("qwen3-30b-a3b")


def test_a_slow_machine_gets_fewer_cells():
    cells = plan(Options())
    half = moe.total(cells, Options()) / 2
    assert len(fit(cells, half, Options(), pace=1.5)[0]) < len(fit(cells, half, Options())[0])


def test_default_run_is_estimated_within_its_time():
    kept, dropped = fit(plan(Options()), moe.SECONDS, Options())
    assert moe.total(kept, Options()) <= moe.SECONDS < 300
    assert {cell.routing for cell in dropped} <= {"zipf", "one-expert"} and {cell.routing for cell in kept} == set(ROUTINGS)
    assert all(cell in kept for cell in plan(Options(routings=("balanced",))))


# --- bytes and operations ------------------------------------------------------------------------------------------------------------


def test_bytes_and_operations():
    model = MODELS["qwen3-30b-a3b"]
    assert model.expert_weights == 3 * 2048 * 768
    assert moe.moved_bytes(model, 1, 8, "plugin") == 8 * 4718592 * 0.5625 + 2 * 2048 * 2
    assert moe.moved_bytes(model, 16, 81.5, "triton_bf16") == 81.5 * 4718592 * 2 + 2 * 16 * 2048 * 2
    assert moe.operations(model, 8) == 2 * 8 * 4718592
    assert model.set_bytes("marlin") == 128 * 4718592 * 9 // 16


def test_expected_active_experts():
    """As ../shared/peers_h200.json counted them for balanced routing."""
    found = [moe.expected_active(MODELS["qwen3-30b-a3b"], tokens, "balanced") for tokens in (1, 2, 8, 64)]
    assert found == pytest.approx([8, 15.4, 50.6, 126.4], rel=0.03)
    assert moe.expected_active(MODELS["deepseek-v3-ep8"], 1, "balanced") == 1.0
    assert moe.expected_active(MODELS["deepseek-v3-ep8"], 4096, "one-expert") == 1.0


def test_row():
    found = moe.row(Cell("deepseek-v3-ep8", 4, "zipf"), "plugin", 50.0, 2.5, 4.0, 0.0012345)
    weights = 3 * 7168 * 2048
    assert found == {
        "model": "deepseek-v3", "tokens": 4, "routing": "zipf", "ep": 8, "provider": "plugin", "us": 50.0,
        "TB_s": round((2.5 * weights * 0.5625 + 4 * 7168 * 4) / 50e6, 4), "TFLOP_s": round(2 * 4 * weights / 50e6, 3),
        "active_experts": 2.5, "relative_error": 0.00123,
    }  # fmt: skip


def test_copies_that_fit():
    model = MODELS["qwen3-30b-a3b"]
    plenty, each = 200 << 30, sum(model.set_bytes(name) for name in PROVIDERS)
    assert moe.copies_that_fit(model, PROVIDERS, plenty, 9) == 9
    assert moe.copies_that_fit(model, PROVIDERS, moe.RESERVE + model.set_bytes("plugin") + 3 * each, 9) == 3
    assert moe.copies_that_fit(model, PROVIDERS, 0, 9) == 1


# --- routings and inputs -------------------------------------------------------------------------------------------------------------

SMALL = Model("small", experts=16, hidden=64, intermediate=32, top_k=3, ep=4)


def routed(kind: str, tokens: int = 512, seed: int = 0):
    return moe.route(SMALL, tokens, kind, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ROUTINGS)
def test_routing_form(kind):
    weights, ids = routed(kind)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32) and weights.shape == ids.shape == (512, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(512))
    assert weights.min() > 0 and 0 <= int(ids.min()) <= int(ids.max()) < 16
    assert ids.is_contiguous()
    if kind != "one-expert":
        assert all(len(set(row)) == 3 for row in ids.tolist())
    again = routed(kind)[1]
    assert torch.equal(ids, again) and not torch.equal(ids, routed(kind, seed=1)[1])


def test_balanced_is_even_and_zipf_is_not():
    even, skewed = (torch.bincount(routed(kind, 4096)[1].flatten().long(), minlength=16).float() / 4096 for kind in ("balanced", "zipf"))
    torch.testing.assert_close(even, torch.full((16,), 3 / 16), atol=0.03, rtol=0)
    # 16 experts with weights 1 / rank, drawn one after the other: the first is among three in 0.65 of the rows, the last in 0.06.
    assert 0.6 < skewed.max() < 0.72 and 0.03 < skewed.min() < 0.09


def test_one_expert_is_local_and_changes_from_call_to_call():
    found = [routed("one-expert", seed=seed)[1].unique().tolist() for seed in range(20)]
    assert all(len(experts) == 1 and experts[0] < SMALL.local for experts in found)
    assert len({experts[0] for experts in found}) > 1


def test_unknown_routing():
    with pytest.raises(ValueError, match="routing: found 'x'; allowed: balanced, zipf, one-expert"):
        routed("x")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(moe, "MODELS", {"small": SMALL})
    return SMALL


@pytest.mark.parametrize("kind", ROUTINGS)
def test_inputs(small, kind):
    x = Inputs(Cell("small", 5, kind), CPU)
    assert len(x.x) == len(x.ids) == len(x.weights) == len(x.out) == 9
    assert x.x[0].shape == (5, 64) and not torch.equal(x.x[0], x.x[1])
    assert [arena.dtype for arena in x.warm] == [torch.int64] * 3
    assert all((t.data_ptr() - x.ids[0].data_ptr()) % 512 == 0 for t in x.ids)
    local = [[i for i in ids.flatten().tolist() if i < 4] for ids in x.ids[:8]]
    assert x.active == sum(len(set(ids)) for ids in local) / 8 and x.pairs == sum(map(len, local)) / 8
    if kind == "one-expert":
        assert (x.active, x.pairs) == (1, 15)
    again = Inputs(Cell("small", 5, kind), CPU)
    assert torch.equal(again.x[8], x.x[8]) and torch.equal(again.ids[8], x.ids[8])


def test_random_weights_are_valid_and_keep_the_size_of_the_output(small):
    w = moe.random_checkpoint(small.problem, CPU)
    assert w.w13.shape == (4, 64, 32) and w.w13_scale.shape == (4, 64, 4) and w.w13_scale_2.shape == (4, 2)
    assert w.w2.shape == (4, 64, 16) and w.w2_scale.shape == (4, 64, 2) and w.w2_scale_2.shape == (4,)
    for codes, scale, scale_2 in ((w.w13, w.w13_scale, w.w13_scale_2), (w.w2, w.w2_scale, w.w2_scale_2)):
        values = unscaled(codes, scale)
        assert values.isfinite().all() and scale.float().min() >= 32
        gain = values.square().sum(-1).mean().sqrt() * scale_2.flatten()[0]
        assert 0.5 < gain < 2
        exact = unscaled(codes, scale, torch.bfloat16) * scale_2.flatten()[0].bfloat16()
        assert torch.equal(exact.float(), values * scale_2.flatten()[0])  # what unquantised layers get


def test_plugin_calls_fit_the_kernels_functions(monkeypatch):
    """Arguments exist, and each copy of the layer has weights of its own."""
    from moe_backend_plugin.moe import cuda

    for name in ("prepare", "fused_moe"):
        monkeypatch.setattr(cuda, name, create_autospec(getattr(cuda, name), return_value=0))
    wide = Model("wide", experts=8, hidden=256, intermediate=128, top_k=2, ep=2)
    first, second = moe.plugin_layers(wide, moe.random_checkpoint(wide.problem, CPU), 2, 64, CPU)
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    weights, ids = moe.route(wide, 3, "balanced", torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    assert first(x, weights, ids, out) is out and second(x, weights, ids, out) is out
    cuda.prepare.assert_called_once_with(wide.problem, torch.bfloat16, torch.int32, CPU, 64, True)
    one, two = (call.args[1] for call in cuda.fused_moe.call_args_list)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    assert one.w13_scale_2.shape == (4, 2) and one.w2_scale_2.shape == (4,)


# --- the figures ---------------------------------------------------------------------------------------------------------------------


def measured(us: float, tokens: int, provider: str = "plugin", model: str = "qwen3-30b-a3b", routing: str = "balanced", active=8.0) -> dict:
    return moe.row(Cell(model, tokens, routing), provider, us, active, tokens * 8.0, 0.002 if provider == "plugin" else None)


def a_result() -> dict:
    rows = [
        measured(10, 1), measured(30, 1, "marlin"), measured(20, 1, "humming"), measured(25, 1, "triton_bf16"),
        measured(20, 4), measured(80, 4, "marlin"),
        measured(100, 64, active=128.0), measured(150, 64, "marlin", active=128.0),
        measured(2000, 16384, active=128.0), measured(3000, 16384, "humming"), measured(2800, 16384, "triton_bf16"),
        measured(10, 16, routing="zipf"), measured(15, 16, "marlin", routing="zipf"),
        measured(12, 1, model="deepseek-v3-ep8", active=1.0),
    ]  # fmt: skip
    kernel_stamp = {"device": "NVIDIA H200", "date": "2026-01-01T00:00:00+00:00", "kernel_hash": "0" * 16}
    ceilings = {"copy_TB_s": 4.0, "matmul_TFLOP_s": 800.0, "empty_us": 1.0, "l2_bytes": 1}
    errors = [{"model": "minimax-like", "ep": 1, "provider": "marlin", "error": "RuntimeError: no"}]
    dropped = [{"model": "deepseek-v3", "tokens": 2, "routing": "zipf", "ep": 16, "why": "no time"}]
    return {"stamp": kernel_stamp, "ceilings": ceilings, "rows": rows, "errors": errors, "dropped": dropped, "seconds": 200.0}


def test_summary():
    found = {(where, figure): values for where, figure, values in moe_report.summary(a_result())}
    qwen = {key: values["qwen3-30b-a3b"] for key, values in found.items()}
    faster = "speed-up over the best NVFP4 peer"
    assert qwen["1..4 balanced", faster] == "2.83 (2 .. 4, 2)"
    assert qwen["8..256 balanced", faster] == "1.5 (1.5 .. 1.5, 1)"
    assert qwen["512..2048 balanced", faster] == "-"
    assert qwen["4096..16384 balanced", "speed-up over Triton on bf16"] == "1.4 (1.4 .. 1.4, 1)"
    assert qwen["1..16384 zipf", faster].startswith("1.5 ") and qwen["1..16384 one-expert", faster] == "-"
    copied = (128 * 3 * 2048 * 768 * 0.5625 + 64 * 2048 * 4) / 100e6 / 4
    assert qwen["8..256 balanced", "fraction of the copy, all experts active"].startswith(f"{copied:.3g} ")
    assert qwen["1..16384", "largest relative error"] == "0.002"
    assert found["1..4 balanced", faster]["deepseek-v3 EP 8"] == "-"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    moe_report.plot(a_result(), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    moe_report.plot({**a_result(), "rows": []}, tmp_path / "b.png")


def test_file_form(tmp_path):
    file = tmp_path / "moe_h200.json"
    report.write(a_result(), file)
    stored = json.loads(file.read_text())
    assert stored == a_result() and list(stored)[:3] == ["stamp", "ceilings", "rows"]
    wanted = {"model", "tokens", "routing", "ep", "provider", "us", "TB_s", "TFLOP_s", "active_experts"}
    assert all(wanted <= set(row) for row in stored["rows"])
    assert sum('"us"' in line for line in file.read_text().splitlines()) == len(stored["rows"])


def test_rows_of_other_models_are_kept():
    old = a_result()
    new = {**a_result(), "rows": [measured(9, 1)], "errors": [], "dropped": []}
    new["stamp"] = old["stamp"] | {"date": "2026-02-02T00:00:00+00:00"}
    both = moe_report.with_others(new, old)
    assert [(row["model"], row["us"]) for row in both["rows"]] == [("qwen3-30b-a3b", 9), ("deepseek-v3", 12)]
    assert both["errors"] == old["errors"] and both["dropped"] == old["dropped"]
    (kept,) = both["stamp"]["kept"]
    assert kept["models"] == ["deepseek-v3 EP 8"] and kept["date"] == old["stamp"]["date"] and kept["ceilings"] == old["ceilings"]
    assert both["stamp"]["date"] == new["stamp"]["date"] and both["ceilings"] == new["ceilings"]

    # Once more: what was kept says still when it was measured.
    third = {**new, "rows": [measured(5, 1, model="minimax-like")], "stamp": old["stamp"] | {"date": "2026-03-03T00:00:00+00:00"}}
    stamps = {kept["date"]: kept["models"] for kept in moe_report.with_others(third, both)["stamp"]["kept"]}
    assert stamps == {old["stamp"]["date"]: ["deepseek-v3 EP 8"], new["stamp"]["date"]: ["qwen3-30b-a3b"]}


def test_stamp_of_several_families(monkeypatch):
    sources = {"moe_gemm": "a", "moe_route": "b", "moe_combine": "c", "gdn_decode": "d"}
    monkeypatch.setattr(stamp, "source_hash", sources.__getitem__)
    found = stamp.gpu_stamp("NVIDIA H200", "moe-backend bench moe", moe.KERNELS)
    assert found["kernel"] == ["moe_gemm", "moe_route", "moe_combine"]
    assert json.loads(json.dumps(found))["kernel_hash"] == stamp.kernel_hash(json.loads(json.dumps(found))["kernel"])
    before = stamp.kernel_hash(moe.KERNELS)
    assert len(before) == 16 and stamp.kernel_hash("gdn_decode") == "d"
    for family in moe.KERNELS:
        monkeypatch.setitem(sources, family, "x")
        assert stamp.kernel_hash(moe.KERNELS) != before
        monkeypatch.setitem(sources, family, {"moe_gemm": "a", "moe_route": "b", "moe_combine": "c"}[family])


# --- the run -------------------------------------------------------------------------------------------------------------------------


class Clock:
    """Launches once and says how long a launch with this number of launches takes."""

    l2_bytes = 1

    def __init__(self, device) -> None:
        self.launched: list[int] = []

    def time(self, launch, warm=(), launches=8) -> float:
        for i in (launches, *range(launches)):
            launch(i)
        return 10.0 * launches + 0 * sum(int(tensor.sum()) for tensor in warm)

    def empty_us(self) -> float:
        return 1.0


@pytest.fixture
def no_gpu_needed(monkeypatch):
    timing = pytest.importorskip("moe_backend_plugin.bench.timing")
    monkeypatch.setattr(timing, "Clock", Clock)
    for name in ("copy_tb_s", "matmul_tflop_s"):
        monkeypatch.setattr(timing, name, lambda device: 4.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 30, 0))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(moe, "ROUTINGS", ROUTINGS)
    tiny = {"silu": Model("silu", 8, 64, 32, 2), "ep": Model("shared", 8, 64, 32, 2, ep=2)}
    monkeypatch.setattr(moe, "MODELS", tiny)
    return tiny


def reference_layers(model, checkpoint, copies, max_tokens=0, device=CPU, off: float = 1.0, seen: list | None = None):
    def layer(copy: int):
        def run(x, weights, ids, out):
            if seen is not None:
                seen.append(copy)
            out.copy_(off * reference.fused_moe(x, *checkpoint, weights, ids, model.problem, model.expert_map(CPU)))
            return out

        return run

    return [layer(copy) for copy in range(copies)]


class FakeEngine:
    closed = forgotten = 0

    def __init__(self, device) -> None:
        pass

    def layers(self, provider, model, checkpoint, copies):
        if provider == "humming" and model.ep > 1:
            raise ValueError("no such kernel\nfor this layer")
        return reference_layers(model, checkpoint, copies, off=2.0 if provider == "marlin" else 1.0)

    def forget(self) -> None:
        type(self).forgotten += 1

    def close(self) -> None:
        type(self).closed += 1


def test_run(no_gpu_needed, monkeypatch):
    from moe_backend_plugin.bench import moe_peers

    seen: list[int] = []
    monkeypatch.setattr(moe, "plugin_layers", lambda *arguments: reference_layers(*arguments, seen=seen))
    monkeypatch.setattr(moe_peers, "Engine", FakeEngine)
    lines: list[str] = []
    options = Options(models=("silu", "ep"), tokens=(1, 3), routings=("balanced", "one-expert"), seconds=1e6)
    grown = [len(found["rows"]) for found in moe.run(options, CPU, say=lines.append)]
    assert grown == sorted(grown) and len(set(grown)) == 8  # every cell can be stored as soon as it is done
    *_, result = moe.run(options, CPU, say=lambda line: None)

    assert result["dropped"] == []
    rows = {(r["model"], r["tokens"], r["routing"], r["provider"]): r for r in result["rows"]}
    timed = {(m, t, "balanced", p) for m in ("silu", "shared") for t in (1, 3) for p in PROVIDERS}
    timed |= {(m, t, "one-expert", p) for m in ("silu", "shared") for t in (1, 3) for p in PROVIDERS[:3]}
    assert set(rows) == {key for key in timed if not (key[0] == "shared" and key[3] == "humming")}
    assert rows["silu", 1, "balanced", "plugin"] | {"TB_s": 0, "TFLOP_s": 0, "relative_error": 0} == {
        "model": "silu", "tokens": 1, "routing": "balanced", "ep": 1, "provider": "plugin", "us": 80.0, "TB_s": 0, "TFLOP_s": 0,
        "active_experts": 2.0, "relative_error": 0,
    }  # fmt: skip
    assert rows["silu", 1, "balanced", "plugin"]["relative_error"] < 4e-3
    assert rows["silu", 3, "balanced", "plugin"]["relative_error"] is None
    assert {"model": "shared", "ep": 2, "provider": "humming", "error": "ValueError: no such kernel"} in result["errors"]
    wrong = [e for e in result["errors"] if e["provider"] == "marlin"]
    assert wrong and all(e["tokens"] == 1 and "relative error 1.0" in e["error"] for e in wrong)
    assert (FakeEngine.forgotten, FakeEngine.closed) == (2 * 2, 2)
    assert seen[:9] == list(range(9))  # every launch has weights of its own
    assert any(line.startswith("silu M=3 balanced: plugin 80.0, marlin 80.0") for line in lines)
    assert moe_report.summary({"stamp": {}, **result})[0][2] == dict.fromkeys(("silu", "shared EP 2"), "1 (1 .. 1, 2)")


def test_a_lost_device_ends_the_run_with_what_there_is(no_gpu_needed, monkeypatch):
    def broken(model, checkpoint, copies, max_tokens, device):
        def run(x, weights, ids, out):
            raise RuntimeError("illegal memory access")

        return [run] * copies if model.ep > 1 else reference_layers(model, checkpoint, copies)

    def synchronize():
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(moe, "plugin_layers", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    options = Options(models=("silu", "ep"), tokens=(1, 3), routings=("balanced",), providers=("plugin",), seconds=1e6)
    *_, result = moe.run(options, CPU, say=lambda line: None)
    assert {row["model"] for row in result["rows"]} == {"silu"}
    assert [entry["tokens"] for entry in result["errors"]] == [1]
    assert [(entry["model"], entry["tokens"]) for entry in result["dropped"]] == [("shared", 3)]
    assert "the device was lost" in result["dropped"][0]["why"]


def test_no_time_left(no_gpu_needed, monkeypatch):
    monkeypatch.setattr(moe, "plugin_layers", reference_layers)
    options = Options(models=("silu", "ep"), tokens=(1, 3), routings=("balanced",), providers=("plugin",), seconds=1e-3)
    *_, result = moe.run(options, CPU, say=lambda line: None)
    assert result["rows"] == [] and len(result["dropped"]) == 4 and {entry["why"] for entry in result["dropped"]} == {"no time"}


@pytest.fixture
def slow_cells(no_gpu_needed, monkeypatch):
    """A second is estimated for every cell, and each takes two."""
    now = [0.0]
    monkeypatch.setattr(moe.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(moe, "plugin_layers", reference_layers)
    monkeypatch.setattr(moe, "total", lambda cells, options: float(len(list(cells))))

    class Slow(Clock):
        def time(self, *arguments) -> float:
            now[0] += 2.0
            return super().time(*arguments)

    monkeypatch.setattr("moe_backend_plugin.bench.timing.Clock", Slow)


def test_a_model_leaves_time_to_those_after_it(slow_cells, monkeypatch):
    """Estimated well, but the first model takes ten times as long: its least important cells go, the second model still runs."""
    monkeypatch.setattr(moe, "importance", lambda cell: cell.tokens)
    options = Options(models=("silu", "ep"), tokens=(1, 2, 3, 4), routings=("balanced",), providers=("plugin",), seconds=9.0)
    *_, result = moe.run(options, CPU, say=lambda line: None)
    timed = [(row["model"], row["tokens"]) for row in result["rows"]]
    assert timed[:3] == [("silu", 4), ("silu", 3), ("silu", 2)] and ("shared", 4) in timed
    assert [(entry["model"], entry["tokens"]) for entry in result["dropped"]][0] == ("silu", 1)
    assert len(timed) + len(result["dropped"]) == 8


def test_important_cells_are_not_dropped_for_others(slow_cells, monkeypatch):
    """The first model takes longer than estimated; what waits is worth less."""
    monkeypatch.setattr(moe, "importance", lambda cell: 2 if cell.model == "silu" else 1)
    options = Options(models=("silu", "ep"), tokens=(1, 2, 3, 4), routings=("balanced",), providers=("plugin",), seconds=11.0)
    *_, result = moe.run(options, CPU, say=lambda line: None)
    assert [(row["model"], row["tokens"]) for row in result["rows"]][:4] == [("silu", tokens) for tokens in (1, 2, 3, 4)]
    assert {entry["model"] for entry in result["dropped"]} == {"shared"}


# --- the command ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--models", "gpt"), "--models: found 'gpt'; allowed: qwen3-30b-a3b, qwen3-next-80b"),
        (("--tokens", "0"), "--tokens: found '0'; allowed: 1 to 16384"),
        (("--routings", "even"), "--routings: found 'even'; allowed: balanced, zipf, one-expert"),
        (("--providers", "sglang"), "--providers: found 'sglang'; allowed: plugin, marlin, humming, triton_bf16"),
        (("--seconds", "0"), "--seconds: found 0.0; allowed: more than 0"),
        (("--out", "."), "--out: found '.', which is a folder"),
    ],
)
def test_bad_options(arguments, words):
    result = CliRunner().invoke(app, ["bench", "moe", *arguments])
    assert result.exit_code == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", "moe", "--quick"])
    assert result.exit_code == 2 and "bench moe: found no CUDA device that torch can use" in result.stderr


def test_the_gpu_to_time_and_the_settings_it_is_timed_with(monkeypatch, tmp_path):
    """A server's own: its folder of kernels, its tactics."""
    from moe_backend_plugin.cli import bench
    from moe_backend_plugin.kernels import compile as kernels
    from moe_backend_plugin.moe import tactics

    capability = (10, 0)
    monkeypatch.setattr(bench, "check_gpu", lambda *_: None)
    for name, found in (("current_device", 0), ("get_device_name", "NVIDIA B200")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(kernels, "_folder", "")
    monkeypatch.setattr(tactics, "_mode", "cache")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_MOE__TACTICS", "heuristic")
    monkeypatch.setenv("MOE_BACKEND_PLUGIN_KERNEL_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["bench", "moe", "--quick"])
    words = "bench moe: found NVIDIA B200, compute capability 10.0; allowed: compute capability 9.0"
    assert result.exit_code == 2 and words in result.stderr
    assert tactics._mode == "heuristic" and kernels._folder == str(tmp_path)
    assert bench._device("bench gdn", kernels.ARCHITECTURES)[1]["device"] == "NVIDIA B200"
    capability = (9, 0)
    stamps = []
    monkeypatch.setattr(bench, "_run", lambda found, stamp, out: stamps.append(stamp) or pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception):
        CliRunner().invoke(app, ["bench", "moe", "--quick", "--out", str(tmp_path / "a.json")], catch_exceptions=False)
    assert stamps[0]["tactics"] == "heuristic"


def test_command_writes_json_and_plot_and_says_what_failed(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from moe_backend_plugin.cli import bench

    result = a_result()
    asked = []
    monkeypatch.setattr(bench, "_device", lambda name, architectures, kernels: (CPU, result["stamp"]))
    rest = {key: value for key, value in result.items() if key != "stamp"}
    monkeypatch.setattr(moe, "run", lambda options, device, say: asked.append(options) or iter([rest]))
    out = tmp_path / "new" / "moe_h200.json"
    done = CliRunner().invoke(app, ["bench", "moe", "--tokens", "4,1", "--seconds", "60", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert asked == [Options(tokens=(1, 4), seconds=60.0)]
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").exists()
    for words in ("2.83 (2 .. 4, 2)", "RuntimeError: no", "no time"):
        assert words in done.output

    # A second run of one model: the rows of the others stay, if they were measured with the same software.
    result["stamp"] |= {"driver": "580", "packages": {"torch": "2.13.0"}}
    out.write_text(json.dumps(result))
    rest |= {"rows": [measured(9, 1)], "errors": [], "dropped": []}
    again = ["bench", "moe", "--models", "qwen3-30b-a3b", "--keep", "--out", str(out)]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert [row["model"] for row in json.loads(out.read_text())["rows"]] == ["qwen3-30b-a3b", "deepseek-v3"]
    result["stamp"] = result["stamp"] | {"driver": "590"}
    refused = CliRunner().invoke(app, again)
    assert refused.exit_code == 2 and "with driver 580; allowed: a file of driver 590" in refused.stderr
    for text in ("[]", "{", "{}"):
        out.write_text(text)
        assert "which cannot be read" in CliRunner().invoke(app, again).stderr

    rest["errors"].append({"model": "minimax-like", "ep": 1, "provider": "plugin", "error": "wrong"})
    assert CliRunner().invoke(app, ["bench", "moe", "--out", str(out)]).exit_code == 1
