"""integration/gpu/profile_kernels.py without a GPU: what is made of ncu's tables and errors, and a run with a stand-in for ncu."""

from __future__ import annotations

import json
import stat
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIME, READ, WRITE = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
LONG, WAIT = (f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in ("long_scoreboard", "wait"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "integration/gpu"))
    import profile_kernels

    return profile_kernels


def table(*kernels: tuple, units=("ns", "Mbyte", "byte", "", "inst", "%")) -> str:
    def line(values) -> str:
        return ",".join(f'"{value}"' for value in values)

    names = (TIME, READ, WRITE, "launch__registers_per_thread", LONG, WAIT)
    rows = [("ID", "Process ID", "Kernel Name", *names), ("", "", "", *units)]
    rows += [(i, 7, *kernel) for i, kernel in enumerate(kernels)]
    return "\n".join(["==PROF== Connected to process 7", "", *map(line, rows), "==PROF== Disconnected"])


def test_the_table_is_read_in_bytes_and_microseconds(script):
    text = table(("kernel_a", "1,250.5", "2", "1024", "40", "3.5", "n/a"), ("b, c", "2000", "nan", "", "40", "inf", "1"))
    assert script.parse(text) == [
        ("kernel_a", {TIME: 1.2505, READ: 2e6, WRITE: 1024, "launch__registers_per_thread": 40, LONG: 3.5, WAIT: None}),
        ("b, c", {TIME: 2.0, READ: None, WRITE: None, "launch__registers_per_thread": 40, LONG: None, WAIT: 1}),
    ]
    assert script.parse(text + '\n"2","7","kern') == script.parse(text)  # ncu was killed while it wrote
    assert script.parse("==ERROR== No kernels were profiled") == []


def test_rows_and_their_cells(script):
    """A marker ends a cell, also one in which nothing ran; what a table does not have is null."""
    cells = [{"family": "moe", "model": "m", "tokens": count} for count in (4, 5, 6)]
    values = {TIME: 10.0, READ: 100.0, WRITE: 20.0, LONG: 3.0, WAIT: 4.0}
    prefix = "kernel_cutlass_kernel_moe_backend_pluginkernels"
    kernels = [
        (f"{prefix}{name}_0", values) for name in ("moe_routeMoERoute", "moe_gemmMoeGemm", "moe_gemmMoeGemm", "moe_combineMoECombine")
    ]
    rows = script.rows_of(cells, [*kernels, ("spin_kernel", {}), ("spin_kernel(long)", {}), ("memset", {}), ("spin_kernel", {})])
    assert [(row["tokens"], row["kernel"]) for row in rows] == [(4, "route"), (4, "gate_up"), (4, "down"), (4, "combine"), (6, "memset")]
    assert rows[0]["us"] == 10 and rows[0]["dram_bytes"] == 120
    assert rows[0]["main_stall"] == "wait" and rows[0]["stalls"] == {"wait": 4.0, "long_scoreboard": 3.0}
    assert rows[0]["registers"] is None and rows[4]["dram_bytes"] is None and rows[4]["main_stall"] is None


def test_unknown_metrics_are_found_in_the_errors(script):
    asked = [TIME, "sm__inst_issued.avg.pct_of_peak_sustained_active", READ]
    assert script.unknown_metrics(f"==ERROR== Failed to find metric {READ}.\n==PROF== {TIME}", asked) == [READ]
    assert script.unknown_metrics("==ERROR== Failed to find metric sm__inst_issued", asked) == [asked[1]]
    assert script.unknown_metrics("==ERROR== no permission", asked) == []


def test_cells_are_those_of_the_benchmarks(script):
    from moe_backend_plugin.bench.gdn import STATES
    from moe_backend_plugin.bench.moe import MODELS

    gdn, *moe = script.groups(("gdn", "moe"))
    assert all(cell["state_dtype"] in STATES and cell["pool"] in ("single", "split") for cell in gdn)
    assert all(cells[0]["model"] in MODELS for cells in moe) and script.groups(("moe",)) == moe
    assert len({json.dumps(cell) for cells in (gdn, *moe) for cell in cells}) == 11 + 12


def stand_in(folder: Path, body: str) -> str:
    """A program that takes ncu's place: ``log`` and ``metrics`` are what it was told, ``cells`` and ``report`` the child's."""
    file = folder / "ncu"
    file.write_text(
        f"#!{sys.executable}\nimport json, sys\nfrom pathlib import Path\narguments = sys.argv\n"
        "log = Path(arguments[arguments.index('--log-file') + 1])\nmetrics = arguments[arguments.index('--metrics') + 1].split(',')\n"
        "work = json.loads(arguments[-1])\ncells, report = work['cells'], Path(work['report'])\n" + body
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_metrics_that_ncu_does_not_know_are_left_out(script, tmp_path):
    ncu = stand_in(
        tmp_path,
        f"if {WAIT!r} in metrics:\n    print('==ERROR== Failed to find metric {WAIT}')\n    sys.exit(1)\n"
        f"log.write_text({table(('k', '1', '1', '1', '1', '1', '1'))!r})\n",
    )
    assert script.known_metrics(ncu, time.time() + 60) == [name for name in script.every_metric() if name != WAIT]


def test_a_machine_where_nothing_is_profiled_says_why(script, tmp_path):
    with pytest.raises(SystemExit, match="ERR_NVGPUCTRPERM"):
        script.known_metrics(stand_in(tmp_path, "log.write_text('==ERROR== ERR_NVGPUCTRPERM')\n"), time.time() + 60)


def test_a_process_that_ends_early_leaves_errors_and_what_it_did(script, tmp_path):
    text = table(("k", "1", "1", "1", "1", "1", "1"), ("spin_kernel", "1", "1", "1", "1", "1", "1"))
    body = f"log.write_text({text!r})\nreport.write_text('{{\"error\": null}}\\n')\nsys.exit('device lost')\n"
    cells = script.groups(("gdn",))[0]
    said, errors = script.profiled(stand_in(tmp_path, body), [TIME], cells, time.time() + 60)
    assert [row["kernel"] for row in script.rows_of(cells, script.parse(said))] == ["k"]
    assert errors == [None, *["the process ended (status 1): device lost"] * (len(cells) - 1)]


def test_a_run_stores_rows_and_errors(script, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "integration/bench"))
    import stamp

    monkeypatch.setattr(stamp, "gpu_stamp", lambda file, kernels: {"device": "NVIDIA H200", "kernel": kernels})
    one, marker = ("kernelsgdn_decode", *["1"] * 6), ("spin_kernel", *["1"] * 6)
    body = (
        f"log.write_text({table(one, marker, marker, *[one, marker] * 9)!r})\n"
        "errors = [None, 'RuntimeError: no kernel', *[None] * 8, 'TimeoutError: no time'][: len(cells)]\n"
        "report.write_text(''.join(json.dumps({'error': error}) + '\\n' for error in errors))\n"
    )
    out = tmp_path / "found" / "profile.json"
    arguments = ["profile_kernels.py", "--cells", "gdn", "--out", str(out), "--ncu", stand_in(tmp_path, body)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 10 and all(row["kernel"] == "gdn_decode" and row["us"] == 0.001 for row in found["rows"])
    assert [(entry["B"], entry["error"]) for entry in found["errors"]] == [(512, "RuntimeError: no kernel")]
    assert len(found["dropped"]) == 1 and found["metrics_missing"] == [] and found["stamp"]["kernel"][0] == "gdn_decode"
    assert "10 rows, 1 errors, 1 dropped" in capsys.readouterr().out


def test_without_ncu(script, monkeypatch):
    monkeypatch.setattr(script, "find_ncu", lambda: None)
    monkeypatch.setattr(sys, "argv", ["profile_kernels.py"])
    with pytest.raises(SystemExit, match="no program ncu"):
        script.main()
