"""On a GPU with Nsight Compute: what bounds this package's kernels, from the hardware's counters.

    python integration/gpu/profile_kernels.py [--cells gdn moe] [--seconds 420] [--ncu FILE] [--out FILE]

Runs itself under ``ncu``, a process for all GDN cells and one for each MoE model, with the inputs of ``moe-backend bench gdn`` and ``bench
moe``. In each cell one call is profiled, behind warm-up calls with states or weights of other memory; of a MoE layer each kernel is a row.
``ncu`` empties the caches before a kernel, so tokens and what the kernel before left come from memory too: ``us`` is no speed to quote.
Writes {"stamp", "ceilings", "rows", "errors", "dropped", "metrics_missing"} after each process. What ``ncu`` does not know is null.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

SM, PEAK = "sm__{}.avg.pct_of_peak_sustained_active", "{}.avg.pct_of_peak_sustained_elapsed"
METRICS: dict[str, tuple[str, ...]] = {
    "us": ("gpu__time_duration.sum",), "dram_read_bytes": ("dram__bytes_read.sum",), "dram_write_bytes": ("dram__bytes_write.sum",),
    **{f"{name}_pct": (PEAK.format(f"{unit}__throughput"),) for name, unit in (("dram", "dram"), ("l2", "lts"), ("sm", "sm"))},
    "sm_issue_pct": ("smsp__issue_active.avg.pct_of_peak_sustained_active", SM.format("inst_issued")),
    **{f"{pipe}_pipe_pct": (SM.format(f"inst_executed_pipe_{pipe}"),) for pipe in ("alu", "fma")},
    "tensor_pipe_pct": (SM.format("pipe_tensor_cycles_active"), SM.format("inst_executed_pipe_tensor")),
    "occupancy_achieved_pct": (SM.format("warps_active"),), "occupancy_theoretical_pct": ("sm__maximum_warps_per_active_cycle_pct",),
    "registers": ("launch__registers_per_thread",), "waves": ("launch__waves_per_multiprocessor",),
    **{f"blocks_by_{limit}": (f"launch__occupancy_limit_{limit}",) for limit in ("registers", "shared_mem", "warps", "blocks")},
}  # fmt: skip
"""A row's column -> the metric; where there are several, the first that is known."""
STALLS = (
    "barrier branch_resolve dispatch_stall drain gmma imc_miss lg_throttle long_scoreboard math_pipe_throttle membar mio_throttle misc "
    "no_instruction not_selected short_scoreboard sleeping tex_throttle wait warpgroup_arrive"
).split()
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
UNITS = dict.fromkeys(("ns", "nsecond"), 1e-3) | dict.fromkeys(("ms", "msecond"), 1e3) | dict.fromkeys(("s", "second"), 1e6)
UNITS |= {"kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9, "tbyte": 1e12}
"""Units to bytes and microseconds; all others stay as they are."""
MARKER = "spin_kernel"
"""torch.cuda._sleep, launched behind each cell: how the rows of one are told from those of the next."""

GDN = [(64, 1, 16, "bfloat16"), (512, 1, 32, "bfloat16"), (2, 1, 64, "bfloat16"), (8, 1, 32, "bfloat16"), (8, 1, 32, "float32"),
       (64, 1, 32, "float32"), (512, 1, 32, "float32"), (64, 4, 32, "float32"), (64, 4, 32, "bfloat16"),
       (4, 1, 32, "float32"), (4, 1, 32, "float32", "split")]  # fmt: skip
MOE = {"qwen3-30b-a3b": (4, 64, 128, 256, 4096, 8192), "deepseek-v3-ep8": (256, 8192), "minimax-like": (4, 2048, 16384),
       "qwen3-next-80b": (8192,)}  # fmt: skip


def groups(families: Iterable[str]) -> list[list[dict]]:
    """The cells, those of one process together."""
    names = ("B", "T", "HV", "state_dtype", "pool")
    found = [[{"family": "gdn", **dict(zip(names, (*cell, "single")[:5], strict=True))} for cell in GDN]]
    found += [[{"family": "moe", "model": model, "tokens": count} for count in counts] for model, counts in MOE.items()]
    return [cells for cells in found if cells[0]["family"] in families]


def every_metric() -> list[str]:
    return [*(name for names in METRICS.values() for name in names), *map(STALL.format, STALLS)]


def parse(text: str) -> list[tuple[str, dict[str, float | None]]]:
    """(kernel, {metric: value in bytes, microseconds or ncu's unit}) of each kernel of ``ncu --csv --page raw``, with its log around it."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    start = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), len(lines))
    header, *rows = csv.reader(lines[start:] or ['"Kernel Name"'])
    at = header.index("Kernel Name")
    units = rows.pop(0) if rows and not rows[0][0] else [""] * len(header)
    rows = [row for row in rows if len(row) == len(header)]  # a process that is killed leaves half a line
    metrics = [i for i, name in enumerate(header) if "__" in name]
    return [(row[at], {header[i]: _number(row[i], units[i]) for i in metrics}) for row in rows]


def _number(text: str, unit: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value * UNITS.get(unit.strip().lower(), 1) if abs(value) < float("inf") else None  # not for nan either


def unknown_metrics(text: str, asked: Iterable[str]) -> list[str]:
    """Those of ``asked`` that an error line of ncu names, with or without what follows their first dot."""
    named = re.findall(r"\w+__[\w.]*\w", " ".join(line for line in text.splitlines() if line.startswith("==ERROR==")))
    return [name for name in asked if any(name == found or name.startswith(f"{found}.") for found in named)]


def columns(values: dict[str, float | None]) -> dict[str, float | str | None]:
    """A row's columns from the metrics of one kernel."""
    found = {column: next((v for name in names if (v := values.get(name)) is not None), None) for column, names in METRICS.items()}
    read, write = found["dram_read_bytes"], found["dram_write_bytes"]
    stalls = {stall: v for stall in STALLS if (v := values.get(STALL.format(stall))) is not None}
    order = sorted(stalls, key=stalls.__getitem__, reverse=True)
    return {
        **{column: None if v is None else round(v, 3) for column, v in found.items()},
        "dram_bytes": None if read is None or write is None else read + write,
        "main_stall": order[0] if order else None,
        "stalls": {stall: round(stalls[stall], 2) for stall in order[:4]},  # warps that wait, per instruction issued
    }


def rows_of(cells: list[dict], kernels: list[tuple[str, dict]]) -> list[dict]:
    """A row for each kernel of each cell; a marker ends a cell."""
    rows, cell, gemms = [], 0, 0
    for name, values in kernels:
        if MARKER in name:
            cell, gemms = cell + 1, 0
        elif cell < len(cells):
            known = re.search(r"kernels_?(gdn_decode|moe_route|moe_combine|moe_gemm)", name)
            role = known[1].removeprefix("moe_") if known else name[:120]
            if role == "gemm":
                role, gemms = ("gate_up", "down")[min(gemms, 1)], gemms + 1
            rows.append({**cells[cell], "kernel": role, **columns(values)})
    return rows


# --- the process that is profiled ----------------------------------------------------------------------------------------------------


def child(cells: list[dict], report: Path, until: float) -> None:
    """Run the cells; a line of JSON each, {"error": null or what}, in their order. ``until``: of the wall clock."""
    import torch

    torch.cuda.set_device(0)
    torch.cuda._sleep(1)
    ready: Ready | None = None
    with report.open("w") as lines:
        for cell in cells:
            error = None
            try:
                if time.time() > until:
                    raise TimeoutError("no time")
                ready = ready or READY[cell["family"]](cells)
                launch = ready(cell)
                for _ in range(2):
                    launch(1)
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
                launch(0)
            except Exception as problem:  # noqa: BLE001  stored, and the next cell is tried
                torch.cuda.cudart().cudaProfilerStart()
                error = f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"
            torch.cuda._sleep(1)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
            lines.write(json.dumps({"error": error}) + "\n")
            lines.flush()


Ready = Callable[[dict], Callable[[int], object]]
"""A cell -> launch(i): call 0 is the one that is profiled, call 1 has memory of its own."""


def _gdn(cells: list[dict]) -> Ready:
    import torch

    from moe_backend_plugin.bench import gdn

    def prepare(cell: dict) -> Callable[[int], object]:
        case = gdn.Case(cell["B"], cell["T"], cell["HV"], cell["state_dtype"], cell["pool"])
        shape = (1 + 2 * case.B * case.T, case.HV, gdn.HEAD, gdn.HEAD)
        pools = [torch.randn(shape, device="cuda").to(gdn.STATES[case.state]) for _ in range(1 + (case.pool == "split"))]
        return gdn.PROVIDERS["plugin"].prepare(gdn.Inputs(case, 2, pools[0], pools[1] if len(pools) > 1 else None, cache_bytes=1))

    return prepare


def _moe(cells: list[dict]) -> Ready:
    import torch

    from moe_backend_plugin.bench import moe
    from moe_backend_plugin.config import load_config
    from moe_backend_plugin.engines import experts

    experts.use(load_config())
    device, model = torch.device("cuda", 0), moe.MODELS[cells[0]["model"]]
    checkpoint = moe.random_checkpoint(model.problem, device)
    layers = moe.plugin_layers(model, checkpoint, 2, max(cell["tokens"] for cell in cells), device)

    def prepare(cell: dict) -> Callable[[int], object]:
        x = moe.Inputs(moe.Cell(cell["model"], cell["tokens"], "balanced"), device)
        return lambda i: layers[i](x.x[i], x.weights[i], x.ids[i], x.out[i])

    return prepare


def _probe(cells: list[dict]) -> Ready:
    import torch

    return lambda cell: lambda i: torch.ones(1 << 20, device="cuda")


READY = {"gdn": _gdn, "moe": _moe, "probe": _probe}


# --- the process that runs it --------------------------------------------------------------------------------------------------------


def profiled(ncu: str, metrics: list[str], cells: list[dict], until: float) -> tuple[str, list[str | None]]:
    """What ncu said, and of each cell an error or None."""
    with tempfile.TemporaryDirectory() as folder:
        log, report, said = (Path(folder) / name for name in ("log", "report", "said"))
        work = json.dumps({"cells": cells, "report": str(report), "until": until})
        command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
        command += ["--target-processes", "application-only", "--log-file", str(log), "--metrics", ",".join(metrics)]
        command += [sys.executable, str(Path(__file__).resolve()), "--child", work]
        with said.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                ended = f"status {process.wait(max(until - time.time(), 0) + 90)}"
            except subprocess.TimeoutExpired:
                ended = "it took too long"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = said.read_text(errors="replace").splitlines()
        log_text = log.read_text(errors="replace") if log.exists() else ""
        text = "\n".join([log_text, *(line for line in found if line.startswith("=="))])
        errors = [json.loads(line)["error"] for line in (report.read_text().splitlines() if report.exists() else [])]
        last = next((line for line in reversed([*found, *re.findall("(?m)^==ERROR==.*", text)]) if line.strip()), "")
        errors += [f"the process ended ({ended}): {last}"] * (len(cells) - len(errors))
    return text, errors


def known_metrics(ncu: str, until: float) -> list[str]:
    """Those that ncu knows here. Asking it for all that it knows takes minutes: the few it does not know are left out one after another."""
    metrics = every_metric()
    while metrics:
        text, errors = profiled(ncu, metrics, [{"family": "probe"}], until)
        unknown = unknown_metrics(text, metrics)
        if not unknown:
            if parse(text):
                return metrics
            raise SystemExit(f"ncu profiles nothing here: {errors[0] or ''} {' '.join(text.splitlines()[-3:])}")
        print(f"unknown to ncu: {', '.join(unknown)}", flush=True)
        metrics = [name for name in metrics if name not in unknown]
    raise SystemExit("ncu knows none of the metrics")


def find_ncu() -> str | None:
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu")) + sorted(Path("/usr/local").glob("cuda*/bin/ncu"))
    return shutil.which("ncu") or (str(installed[-1]) if installed else None)


SHOWN = ("kernel", "us", "dram_pct", "sm_issue_pct", "alu_pipe_pct", "tensor_pipe_pct", "l2_pct", "occupancy_achieved_pct",
         "occupancy_theoretical_pct", "registers", "main_stall")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=("gdn", "moe"), default=("gdn", "moe"))
    parser.add_argument("--seconds", type=float, default=420, help="begin no cell after so many seconds")
    parser.add_argument("--ncu", default=find_ncu(), help="the program, where it is not found")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work = json.loads(options.child)
        return child(work["cells"], Path(work["report"]), work["until"])
    if not options.ncu:
        raise SystemExit("no program ncu (Nsight Compute); allowed: its place with --ncu")

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
    from stamp import gpu_stamp

    from moe_backend_plugin.bench.moe import KERNELS
    from moe_backend_plugin.bench.stamp import results_folder, slug

    stamp, until = gpu_stamp(__file__, ["gdn_decode", *KERNELS]), time.time() + options.seconds
    out = options.out or results_folder() / f"profile_{slug(stamp['device'])}.json"
    metrics = known_metrics(options.ncu, until)
    missing = [name for name in every_metric() if name not in metrics]
    content = {"stamp": stamp, "ceilings": {}, "rows": [], "errors": [], "dropped": [], "metrics_missing": missing}
    for cells in groups(options.cells):
        text, errors = profiled(options.ncu, metrics, cells, until) if time.time() < until else ("", ["TimeoutError: no time"] * len(cells))
        found = rows_of(cells, parse(text))
        content["rows"] += found
        for cell, error in zip(cells, errors, strict=True):
            if not error and not any(cell.items() <= row.items() for row in found):
                error = " ".join(["nothing was profiled", *re.findall("(?m)^==ERROR==.*", text)[-1:]])
            if error:
                content["dropped" if error == "TimeoutError: no time" else "errors"].append({**cell, "error": error})
                print(*cell.values(), error)
        for row in found:
            cell = " ".join(str(value) for name, value in row.items() if name in cells[0])
            print(f"{cell:40s}", *(f"{name} {row[name]}" for name in SHOWN), sep="  ", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(content['rows'])} rows, {len(content['errors'])} errors, {len(content['dropped'])} dropped")


if __name__ == "__main__":
    main()
