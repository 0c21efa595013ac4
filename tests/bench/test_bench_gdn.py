"""``moe-backend bench gdn`` without a GPU: which cases, how many bytes, what the figures say, and the providers' calls."""

from __future__ import annotations

import importlib.util
import json
from itertools import product
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
    assert Case(8, 3, 32, "bfloat16").operations == 8 * 3 * 32 * 128 * 128 * 7


def test_default_plan():
    cells = plan(Options())
    cases = [case for case, _ in cells]
    few, every = (1, 4, 16, 64, 256), [2**i for i in range(10)]
    timed = {(case, name) for case, names in cells for name in names}
    assert len(timed) == sum(len(names) for _, names in cells)
    for state, HV, T in product(("float32", "bfloat16"), (16, 32, 64), range(1, 9)):
        peer = "triton" if T == 1 else "triton-spec"
        assert {(Case(B, T, HV, state), name) for B in every for name in ("plugin", peer)} <= timed
        assert {(Case(B, T, HV, state, pool="split"), "plugin") for B in (every if T == 1 else few)} <= timed
        assert {(Case(B, T, HV, state, intermediates=True), "plugin") for B in few} <= timed
    assert {(c.B, c.HV) for c, name in timed if name in ("vllm-cuda", "plugin-norm") and c.T > 1} == {(B, 32) for B in few}
    assert {(c.B, c.T, c.HV) for c, name in timed if name == "flashinfer"} == {(B, 1, 32) for B in few}
    for case, names in cells:
        assert names and set(names) <= set(PROVIDERS)
        if case.pool == "split" or case.intermediates:
            assert names == ("plugin",)
        if case.T > 1:
            assert not {"triton", "triton+norm", "flashinfer", "sglang-cutedsl"} & set(names)
        if "sglang-cutedsl" in names:
            assert case.state == "float32" and case.HV == 32
    pools = [(case.HV, case.state) for case in cases]
    assert sum(a != b for a, b in zip(pools, pools[1:], strict=False)) == 6 * 6 - 1  # one pool after the other in each part


def test_what_the_targets_are_about_comes_first():
    cells = plan(Options())
    assert all(case.T == 1 and names == ("plugin", "triton") for case, names in cells[:60])
    rest = cells[60:]
    assert all(c.T > 1 and c.B >= 16 and names == ("plugin", "triton-spec") for c, names in rest[: 7 * 6 * 6])
    assert all("plugin" not in names for _, names in cells[-130:])


def test_long_calls_are_timed_with_fewer_launches_and_fit():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert Case(512, 1, 64, "float32").launches == 8  # beside the copy, which has eight too
    assert Case(64, 2, 32, "bfloat16").launches == 8 and Case(512, 8, 64, "float32").launches == 2
    most = max(sum(gdn.slots_needed(case)) * case.row_bytes for case, _ in plan(Options()))
    assert most < 60 << 30


def test_kernels_compiled_ahead_are_those_that_are_launched(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
    from moe_backend_plugin.gdn import cuda

    loaded = []
    monkeypatch.setattr(cuda.kernels, "load", lambda family, variant, architecture: loaded.append(variant) or (lambda *_: None))
    monkeypatch.setattr(cuda.kernels, "device_architecture", lambda index: "sm_90a")
    cuda._kernel.cache_clear()
    try:
        kinds = [("single", False), ("split", False), ("single", True)]
        cases = [Case(2, T, 32, "bfloat16", pool, more) for T in (1, 3) for pool, more in kinds]
        for case in (*cases, Case(1, 2, 16, "float32"), Case(8, 2, 16, "float32")):
            for norm in (False, True):
                PROVIDERS["plugin-norm" if norm else "plugin"].prepare(cpu_inputs(case))(1)
                assert loaded[-1] == gdn.variant(case, norm)
    finally:
        cuda._kernel.cache_clear()


def test_plan_of_options():
    cells = plan(Options(batch=(3,), tokens=(1, 2), heads=(64,), state=("bfloat16",), providers=("triton", "flashinfer")))
    case = Case(3, 1, 64, "bfloat16")
    assert cells == [(case, ("triton",)), (case, ("flashinfer",))]  # neither has speculative rows
    asked = {case for case, _ in plan(Options(batch=(3,), tokens=(7,), heads=(16,), state=("bfloat16",), providers=("plugin",)))}
    assert asked == {Case(3, 7, 16, "bfloat16", pool, more) for pool, more in (("single", False), ("split", False), ("single", True))}
    assert {(c.B, c.T, c.HV) for c, _ in plan(Options(quick=True))} == {(B, T, 32) for B in (1, 64) for T in (1, 4)}
    assert plan(Options(tokens=(2,), providers=("triton",))) == []


def test_slots_needed():
    """Nine calls of four rows, with room for a copy of as much from one half to the other."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert gdn.slots_needed(Case(4, 1, 16, "float32")) == (73, 0)
    assert gdn.slots_needed(Case(4, 8, 16, "float32")) == (289, 0)
    assert gdn.slots_needed(Case(4, 1, 16, "float32", pool="split")) == (73, 37)
    assert gdn.slots_needed(Case(4, 3, 16, "float32", pool="split")) == (109, 109)


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
        "us": 100.0, "TB_s": 2.6844, "TFLOP_s": 2.3488, "copy_fraction": 0.6711, "copy_us": 70.0,
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
    return {"stamp": stamp_, "ceilings": ceilings, "rows": rows, "missing": {}, "skipped": [], "dropped": [], "seconds": 1.0}


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
    split = x.case.pool == "split"

    def launch(i: int) -> torch.Tensor:
        if x.case.T == 1:
            slots = from_vllm_decode(x.table[i][:, 0], x.case.B, layout)
        else:
            slots = from_vllm_spec(x.table[i], x.accepted[i], x.cu, layout, check=True)
        kept = x.pool.clone() if split else None
        out = op.gdn_decode(x.qkv[i], x.a[i], x.b[i], x.A_log, x.dt_bias, x.pool, slots, intermediate=x.intermediate[i])
        if split:  # the ops know one pool: its new states are moved to the other
            x.write_pool[x.write[i].long()] = x.pool[x.table[i].long()]
            x.pool.copy_(kept)
        return out

    return launch


@pytest.mark.parametrize("T", [1, 3])
def test_comparison_of_a_split_pool(T):
    x = cpu_inputs(Case(3, T, 16, "float32", pool="split"))
    provider, launch = Provider(torch_ops, max_tokens=8), torch_ops(x)
    assert wrong(x, launch, provider) is None
    assert "states" in wrong(x, lambda i: [launch(i), x.write_pool.mul_(1.05)][0], provider)


@pytest.mark.parametrize("state", gdn.STATES)
@pytest.mark.parametrize(("T", "intermediates"), [(1, False), (1, True), (3, False), (3, True)])
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
    assert all(torch.equal(wide, table) and wide.stride(0) == 8 for wide, table in zip(x.wide_table, x.table, strict=True))
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

        def time(self, launch, warm=(), launches=1) -> float:
            launch(launches)
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

    rows = {(r["provider"], r["T"], r["B"], r["pool"]): r for r in result["rows"] if not r["intermediates"]}
    fits = [(T, B, "single") for T in (1, 2) for B in (1, 2)] + [(1, 3, "single")]
    assert set(rows) >= {(name, *case) for name in ("plugin", "triton-spec") for case in fits}
    assert {name for name, *_ in rows} == {"plugin", "triton-spec"}
    assert rows["plugin", 1, 2, "single"] | {"TB_s": 0, "TFLOP_s": 0, "copy_fraction": 0} == {
        "B": 2, "T": 1, "HV": 16, "HQ": 16, "state_dtype": "float32", "pool": "single", "intermediates": False, "provider": "plugin",
        "us": 10.0, "TB_s": 0, "TFLOP_s": 0, "copy_fraction": 0, "copy_us": 9.0,
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
    assert {r["T"] for r in result["rows"] if r["intermediates"]} == {1, 2} and result["dropped"] == []
    report.summary({"stamp": {}, **result})


def test_a_run_ends_when_its_time_is_up(no_gpu_needed, monkeypatch):
    """What was timed by then is whole, and what was not is named; results are handed out to be written on the way."""
    now = [0.0]
    monkeypatch.setattr(gdn.time, "monotonic", lambda: now[0])

    def slow(x):
        now[0] += 6.0
        return torch_ops(x)

    for name in ("plugin", "triton-spec"):
        monkeypatch.setitem(PROVIDERS, name, Provider(slow, max_tokens=8))
    options = Options(batch=(1,), tokens=(1, 2), heads=(16, 32), state=("float32",), providers=("plugin", "triton-spec"), seconds=15)
    seen = []
    for part in gdn.run(options, torch.device("cpu"), say=lambda line: None):
        seen.append(len(part["rows"]))
        result = part
    found = [(r["T"], r["HV"], r["provider"]) for r in result["rows"]]
    assert found == [(1, 16, "plugin"), (1, 32, "plugin"), (2, 16, "plugin"), (2, 16, "triton-spec")]
    assert seen == [2, 4, 4] and result["seconds"] == 24.0
    cells = plan(options)
    assert len(result["dropped"]) == len(cells) - 3
    left = {"B": 1, "T": 2, "HV": 32, "HQ": 16, "state_dtype": "float32", "pool": "split", "intermediates": False, "providers": ["plugin"]}
    assert left in result["dropped"]
    assert result["missing"] == {}


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
        (("--seconds", "0"), "--seconds: found 0.0; allowed: more than 0"),
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
