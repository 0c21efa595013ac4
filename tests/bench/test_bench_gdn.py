"""``moe-backend bench gdn`` without a GPU: which cases, how many bytes, what the figures say, and the providers' calls."""

from __future__ import annotations

import importlib.util
import json
from unittest.mock import create_autospec

import pytest
import torch
from typer.testing import CliRunner

from moe_backend_plugin.bench import gdn, report, stamp
from moe_backend_plugin.bench.gdn import PROVIDERS, Case, Inputs, Options, Provider, plan, wrong
from moe_backend_plugin.cli.main import app
from moe_backend_plugin.gdn import op
from moe_backend_plugin.gdn.slots import PoolLayout, from_vllm_decode, from_vllm_spec

# --- cases ---------------------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_case():
    row = 32 * 128 * 128 * 4
    assert Case(1, 1, 32, "float32").moved_bytes == 2 * row
    assert Case(8, 4, 32, "float32").moved_bytes == 8 * row * (1 + 4)
    assert Case(8, 4, 32, "float32", intermediates=True).moved_bytes == 8 * row * (1 + 4 + 4)
    assert Case(8, 1, 16, "bfloat16", pool="split").moved_bytes == 8 * 2 * row // 4


def test_default_plan():
    cells = plan(Options())
    cases = [case for case, _ in cells]
    assert len(set(cases)) == len(cases)
    one = {(c.B, c.HV, c.state) for c in cases if c.T == 1 and c.pool == "single"}
    assert len(one) == 10 * 3 * 2 and (512, 64, "float32") in one
    assert {(c.B, c.HV) for c in cases if c.pool == "split"} == {(2**i, 32) for i in range(10)}
    assert {(c.T, c.B, c.HV) for c in cases if c.T > 1} == {(T, B, 32) for T in (2, 3, 4, 5, 6, 8) for B in (1, 4, 16, 64, 256)}
    assert {c.T for c in cases if c.intermediates} == {4}
    for case, names in cells:
        assert names and set(names) <= set(PROVIDERS)
        if case.pool == "split" or case.intermediates:
            assert names == ("plugin",)
        if case.T > 1:
            assert not {"triton", "triton+norm", "flashinfer", "sglang-cutedsl"} & set(names)
        if "sglang-cutedsl" in names:
            assert case.state == "float32" and case.HV == 32
    pools = [(case.HV, case.state) for case in cases]
    assert sum(a != b for a, b in zip(pools, pools[1:], strict=False)) == 5  # one pool after the other


def test_plan_of_options():
    cells = plan(Options(batch=(3,), tokens=(1, 2), heads=(64,), state=("bfloat16",), providers=("triton", "flashinfer")))
    assert cells == [(Case(3, 1, 64, "bfloat16"), ("triton", "flashinfer"))]  # neither has speculative rows
    assert {(c.B, c.T, c.HV) for c, _ in plan(Options(quick=True))} == {(B, T, 32) for B in (1, 64) for T in (1, 4)}
    assert plan(Options(tokens=(2,), providers=("triton",))) == []


@pytest.mark.parametrize(("case", "needed"), [(Case(4, 1, 16, "float32"), (73, 0)), (Case(4, 8, 16, "float32"), (289, 0))])
def test_slots_needed(case, needed):
    """Nine calls of four rows, with room for a copy of as much from one half to the other."""
    assert gdn.slots_needed(case, 8) == needed
    assert gdn.slots_needed(Case(4, 1, 16, "float32", pool="split"), 8) == (73, 37)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA H100 PCIe", "h100-pcie")],
)
def test_slug(device, expected):
    assert stamp.slug(device) == expected


def test_stamp_outside_a_checkout(monkeypatch, tmp_path):
    assert stamp.results_folder().name == "results" and stamp.stamp("x")["device"] == "x"
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    assert stamp.stamp("NVIDIA H200", "580")["commit"] is None and str(stamp.results_folder()) == "."


# --- the figures ---------------------------------------------------------------------------------------------------------------------


def stored(us: float, case: Case, provider: str = "plugin", copy_us: float | None = None) -> dict:
    return gdn.row(case, provider, us, copy_us, copy_tb=4.0)


def test_row():
    case = Case(64, 1, 32, "float32")  # 256 MiB, so 67.1 us at 4 TB/s
    assert stored(100.0, case, copy_us=70.0) == {
        "B": 64, "T": 1, "HV": 32, "HQ": 16, "state_dtype": "float32", "pool": "single", "intermediates": False, "provider": "plugin",
        "us": 100.0, "TB_s": 2.6844, "copy_fraction": 0.6711, "copy_us": 70.0,
    }  # fmt: skip


def a_result() -> dict:
    large, wide, one = (Case(B, 1, 32, "float32") for B in (64, 128, 1))
    spec = Case(16, 4, 32, "float32")
    rows = [
        stored(80.0, large, copy_us=72.0), stored(100.0, large, "triton"), stored(88.0, Case(64, 1, 32, "float32", pool="split")),
        stored(160.0, wide, copy_us=144.0), stored(240.0, wide, "triton"), stored(999.0, Case(64, 1, 32, "bfloat16"), "triton"),
        stored(4.0, one), stored(6.0, one, "triton"), stored(50.0, spec), stored(75.0, spec, "triton-spec"),
        stored(90.0, Case(16, 4, 32, "float32", intermediates=True)),
    ]  # fmt: skip
    ceilings = {"copy_TB_s": 4.0, "empty_us": 2.0}
    stamp_ = {"device": "NVIDIA H200", "date": "2026-01-01T00:00:00+00:00", "kernel_hash": "0" * 16}
    return {"stamp": stamp_, "ceilings": ceilings, "rows": rows, "missing": {}, "skipped": []}


def test_summary():
    found = {(target, figure): values for target, figure, values in report.summary(a_result())}
    fp32 = {key: values["float32"] for key, values in found.items()}
    assert fp32["T=1, B>=64", "speed-up over triton"] == "1.369 (1.250 .. 1.500, 2 cases)"
    assert fp32["T=1, B>=64", "fraction of the copy kernel"] == "0.900 (0.900 .. 0.900, 2 cases)"
    assert fp32["T=1, B>=64", "fraction of torch's copy"] == "0.839 (0.839 .. 0.839, 2 cases)"
    assert fp32["T=1, 128<=B*HV<=1024", "speed-up over triton"] == "-"
    assert fp32["T=1, B=1,2", "speed-up over triton"] == "1.500 (1.500 .. 1.500, 1 cases)"
    # 4 MiB at 4 TB/s is 1.05 us, and 2 us for a launch.
    assert fp32["T=1, B=1,2", "time over (empty kernel + bytes / copy)"].startswith("1.312 ")
    assert fp32["T=2..8, B>=16", "speed-up over triton-spec"] == "1.500 (1.500 .. 1.500, 1 cases)"
    assert fp32["T=1", "split pool: speed-up over single pool"] == "0.909 (0.909 .. 0.909, 1 cases)"
    assert all(values["bfloat16"] == "-" for values in found.values())


def test_json_is_whole_and_one_row_a_line(tmp_path):
    file = tmp_path / "new" / "gdn_h200.json"
    report.write(a_result(), file)
    assert json.loads(file.read_text()) == a_result()
    assert sum('"us"' in line for line in file.read_text().splitlines()) == len(a_result()["rows"])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    result = a_result()
    report.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000 and result == a_result()
    report.plot({**result, "rows": []}, tmp_path / "b.png")


# --- the comparison with the reference -----------------------------------------------------------------------------------------------


def cpu_inputs(case: Case) -> Inputs:
    torch.manual_seed(0)
    dtype = gdn.STATES[case.state]
    pool = torch.randn(1 + 2 * case.B * case.T, case.HV, 128, 128).to(dtype)
    return Inputs(case, 2, pool, torch.randn_like(pool) if case.pool == "split" else None, cache_bytes=1)


def torch_ops(x: Inputs):
    layout = PoolLayout.of(x.pool)

    def launch(i: int) -> torch.Tensor:
        if x.case.T == 1:
            slots = from_vllm_decode(x.table[i][:, 0], x.case.B, layout)
        else:
            slots = from_vllm_spec(x.table[i], x.accepted[i], x.cu, layout, check=True)
        return op.gdn_decode(x.qkv[i], x.a[i], x.b[i], x.A_log, x.dt_bias, x.pool, slots, intermediate=x.intermediate[i])

    return launch


@pytest.mark.parametrize("state", gdn.STATES)
@pytest.mark.parametrize(("T", "intermediates"), [(1, False), (3, False), (3, True)])
def test_comparison_takes_what_is_right_and_nothing_else(state, T, intermediates):
    x = cpu_inputs(Case(3, T, 16, state, intermediates=intermediates))
    provider, launch = Provider(torch_ops, max_tokens=8), torch_ops(x)
    assert wrong(x, launch, provider) is None
    assert "output" in wrong(x, lambda i: launch(i) * 1.05, provider)
    assert "output nan" in wrong(x, lambda i: x.out[i], provider)  # nothing written at all
    assert "states" in wrong(x, lambda i: [launch(i), x.pool.mul_(1.05)][0], provider)
    if T == 1:  # a kernel that keeps its states transposed is wrong

        def transposed(i):
            pool = x.pool.transpose(-1, -2).contiguous()
            kept, x.pool = x.pool, pool
            out = torch_ops(x)(i)
            x.pool = kept
            x.pool.copy_(pool.transpose(-1, -2))
            return out

        assert wrong(x, transposed, provider)


def test_each_call_has_slots_of_its_own_and_aligned_inputs():
    x = cpu_inputs(Case(3, 4, 16, "bfloat16"))
    slots = torch.cat([table.flatten() for table in x.table]).tolist()
    assert len(set(slots)) == len(slots) == 24 and 0 not in slots
    assert all(1 <= int(n) <= 4 for accepted in x.accepted for n in accepted)
    base = x._arenas["tables"].data_ptr()
    assert all((table.data_ptr() - base) % 512 == 0 for table in (*x.table, *x.accepted))
    q, k, v = x.qkv_apart[1]
    assert torch.equal(torch.cat([part.view(12, -1) for part in (q, k, v)], dim=1), x.qkv[1])
    assert len({x.gate[0].data_ptr(), x.gate[1].data_ptr()}) == 2
    assert [tensor.dtype for tensor in x.warm(PROVIDERS["vllm-cuda"])] == [torch.int64] * 4


# --- the providers' calls ------------------------------------------------------------------------------------------------------------

FLA = "vllm.third_party.flash_linear_attention.ops"


@pytest.mark.parametrize(
    ("provider", "T", "module", "function"),
    [
        ("plugin", 1, "moe_backend_plugin.gdn.cuda", "decode"),
        ("plugin", 3, "moe_backend_plugin.gdn.cuda", "decode"),
        ("plugin-norm", 3, "moe_backend_plugin.gdn.cuda", "decode"),
        ("triton", 1, FLA, "fused_recurrent_gated_delta_rule_packed_decode"),
        ("triton-spec", 1, FLA, "fused_sigmoid_gating_delta_rule_update"),
        ("triton-spec", 3, FLA, "fused_sigmoid_gating_delta_rule_update"),
        ("triton+norm", 1, FLA + ".layernorm_guard", "layer_norm_fwd"),
        ("vllm-cuda", 3, "vllm._custom_ops", "fused_gdn_decode_post_conv_mtp"),
    ],
)
def test_calls_fit_the_functions(provider, T, module, function, monkeypatch):
    """Every argument that a provider passes exists; the functions themselves need a GPU."""
    for name in {module.split(".")[0], "cutlass"}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no module {name}")
    found = importlib.import_module(module)
    x = cpu_inputs(Case(2, T, 16, "float32"))
    called = create_autospec(getattr(found, function), return_value=(torch.zeros(1, 2 * T, 16, 128), None))
    monkeypatch.setattr(found, function, called)
    if provider == "triton+norm":
        monkeypatch.setattr(gdn, "_triton", lambda x: lambda i: x.out[i])
    if provider == "vllm-cuda":
        if hasattr(torch.ops._C, function):
            pytest.skip("the function is built")
        with pytest.raises(RuntimeError, match="is not built"):
            PROVIDERS[provider].prepare(x)
        monkeypatch.setattr(torch.ops._C, function, None, raising=False)
    out = PROVIDERS[provider].prepare(x)(1)
    assert called.call_count == 1 and out.shape == x.out[1].shape


# --- the run -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """The run on a CPU: a clock that only launches, and room for ten slots of 16 heads in fp32."""
    timing = pytest.importorskip("moe_backend_plugin.bench.timing")

    class Clock:
        l2_bytes = 1

        def __init__(self, device) -> None:
            pass

        def time(self, launch, warm=()) -> float:
            launch(1)
            return 10.0 + 0 * sum(int(tensor.sum()) for tensor in warm)

        def empty_us(self) -> float:
            return 2.0

        def copy_us(self, pool, count) -> float:
            return 9.0

    monkeypatch.setattr(timing, "Clock", Clock)
    monkeypatch.setattr(timing, "LAUNCHES", 1)
    monkeypatch.setattr(timing, "copy_tb_s", lambda device: 4.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gdn.RESERVE + (10 << 20), 0))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


def test_run(no_gpu_needed, monkeypatch):
    def broken(x):
        raise RuntimeError("no kernel\nfor this device")

    def absent(x):
        raise ModuleNotFoundError("No module named 'flashinfer'")

    def off(x):
        launch = torch_ops(x)
        return lambda i: launch(i) * 2

    mine = {"plugin": torch_ops, "triton": off, "triton-spec": torch_ops, "vllm-cuda": broken, "flashinfer": absent}
    for name, prepare in mine.items():
        monkeypatch.setitem(PROVIDERS, name, Provider(prepare, max_tokens=PROVIDERS[name].max_tokens))
    lines = []
    options = Options(batch=(1, 2, 3), tokens=(1, 2), heads=(16,), state=("float32",), providers=(*mine, "sglang-cutedsl"))
    *_, result = gdn.run(options, torch.device("cpu"), say=lines.append)

    rows = {(r["provider"], r["T"], r["B"], r["pool"]): r for r in result["rows"]}
    fits = [(T, B, "single") for T in (1, 2) for B in (1, 2)] + [(1, 3, "single")]
    assert set(rows) >= {(name, *case) for name in ("plugin", "triton-spec") for case in fits}
    assert {name for name, *_ in rows} == {"plugin", "triton-spec"}
    assert rows["plugin", 1, 2, "single"] | {"TB_s": 0, "copy_fraction": 0} == {
        "B": 2, "T": 1, "HV": 16, "HQ": 16, "state_dtype": "float32", "pool": "single", "intermediates": False, "provider": "plugin",
        "us": 10.0, "TB_s": 0, "copy_fraction": 0, "copy_us": 9.0,
    }  # fmt: skip
    assert rows["plugin", 2, 2, "single"]["copy_us"] is None
    missing = result["missing"]
    assert set(missing) == {"triton", "vllm-cuda", "flashinfer", "sglang-cutedsl"}
    assert "differs from the reference: relative error of output 1.0" in missing["triton"]
    assert missing["vllm-cuda"] == "RuntimeError: no kernel" and "No module named 'flashinfer'" in missing["flashinfer"]
    left_out = [e for e in result["skipped"] if e["provider"] == "plugin"]
    assert {(e["T"], e["B"], e["pool"]) for e in left_out} >= {(2, 3, "single")}
    assert "the pool needs 13 slots of 1.00 MiB, 10 fit" in [e["reason"] for e in left_out]
    timed_or_named = {(r["T"], r["B"], r["pool"]) for r in (*result["rows"], *result["skipped"]) if r["provider"] == "plugin"}
    assert timed_or_named == {(c.T, c.B, c.pool) for c, _ in plan(options)}
    assert any(line.startswith("T=1 B=2 HV=16 float32 single: plugin 10.00") for line in lines)
    report.summary({"stamp": {}, **result})


# --- the command ---------------------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", "gdn", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "1,x"), "--batch: found 'x'; allowed: 1 to 4096"),
        (("--batch", ""), "--batch: found ''; allowed: 1 to 4096"),
        (("--tokens", "9"), "--tokens: found '9'; allowed: 1 to 8"),
        (("--heads", "24"), "--heads: found '24'; allowed: 16, 32, 48, 64, 128"),
        (("--state", "fp32"), "--state: found 'fp32'; allowed: float32, bfloat16"),
        (("--providers", "plugin,cutlass"), "--providers: found 'cutlass'; allowed: plugin, plugin-norm, triton"),
        (("--plot", "a.txt"), "--plot: found 'a.txt'; allowed: a file's name that ends in .png"),
        (("--out", "."), "--out: found '.', which is a folder"),
        (("--tokens", "2", "--providers", "triton"), "no case that the chosen providers serve"),
    ],
)
def test_bad_options(arguments, words):
    assert words in refused(*arguments)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "bench gdn: found no CUDA device that torch can use; allowed: a machine with an NVIDIA GPU" in refused("--quick")


@pytest.fixture
def measured(monkeypatch):
    """A machine with a GPU that was measured already."""
    from moe_backend_plugin.cli import bench

    result = a_result()
    monkeypatch.setattr(bench, "_device", lambda name, architectures: (torch.device("cpu"), result.pop("stamp")))
    monkeypatch.setattr(gdn, "run", lambda options, device, say: iter([{**result, "rows": result["rows"][:2]}, result]))
    return bench


def test_json_is_written_without_matplotlib(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(measured.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "new" / "a.json"
    assert 'pip install "moe-backend-plugin[bench]"' in refused("--out", out)
    assert json.loads(out.read_text()) == a_result() and [path.name for path in out.parent.iterdir()] == ["a.json"]


def test_json_plot_and_figures(measured, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.json"
    result = CliRunner().invoke(app, ["bench", "gdn", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.exists() and out.with_suffix(".png").exists()
    assert "speed-up over triton-spec" in result.output and "1.500 (1.500 .. 1.500, 1 cases)" in result.output


def test_a_kernel_of_this_package_that_fails_ends_the_command_with_1(measured, monkeypatch, tmp_path):
    """One of another project, or one for which a pool is too small, does not."""
    pytest.importorskip("matplotlib")
    rest = {key: value for key, value in a_result().items() if key != "stamp"}
    codes = []
    for provider, more in (("plugin-norm", {"failed": True}), ("triton", {"failed": True}), ("plugin", {})):
        skipped = [{"provider": provider, "B": 1, "reason": "differs from the reference", **more}]
        monkeypatch.setattr(measured, "_device", lambda *_: (torch.device("cpu"), a_result()["stamp"]))
        monkeypatch.setattr(gdn, "run", lambda *_, skipped=skipped, **__: iter([{**rest, "skipped": skipped}]))
        codes.append(CliRunner().invoke(app, ["bench", "gdn", "--out", str(tmp_path / "a.json")]).exit_code)
    assert codes == [1, 0, 0]
