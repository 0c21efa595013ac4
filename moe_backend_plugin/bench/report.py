"""Results of ``moe-backend bench``: the JSON file, the figures that the targets are about, and the plot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

STATES = ("float32", "bfloat16")
Row = dict[str, Any]


def write(result: dict[str, Any], file: Path) -> None:
    """Write the JSON, one row a line; the file appears whole or not at all."""
    parts = []
    for key, value in result.items():
        text = json.dumps(value, indent=1).replace("\n", "\n ")
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(item) for item in value) + "\n ]"
        parts.append(f' "{key}": {text}')
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(part, file)


# --- the figures ---------------------------------------------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> list[tuple[str, str, dict[str, str]]]:
    """(target, figure, {state type: value}) for each target; a figure without rows is "-".

    Speed-ups are times of the other provider over ours, so above 1 is faster; "fraction" is a part of a copy's speed.
    """
    rows, ceilings = result["rows"], result["ceilings"]
    large, middle, small = _where(T=1, B=range(64, 1 << 30)), _where(T=1, work=range(128, 1025)), _where(T=1, B=(1, 2))
    spec = _where(T=range(2, 9), B=range(16, 1 << 30))

    def fraction_of_copy(row: Row) -> float:
        return row["copy_fraction"]

    def fraction_of_copy_kernel(row: Row) -> float | None:
        return row["copy_us"] / row["us"] if row["copy_us"] else None

    def over_floor(row: Row) -> float:
        return row["us"] / (ceilings["empty_us"] + row["us"] * row["copy_fraction"])  # us * copy_fraction = bytes / copy's speed

    def speed_up(other: str) -> Callable[[Row], float | None]:
        times = {_key(row): row["us"] for row in rows if row["provider"] == other and row["pool"] == "single"}
        return lambda row: times[_key(row)] / row["us"] if _key(row) in times else None

    lines = [
        ("T=1, B>=64", "fraction of torch's copy", "plugin", large, fraction_of_copy),
        ("T=1, B>=64", "fraction of the copy kernel", "plugin", large, fraction_of_copy_kernel),
        ("T=1, B>=64", "speed-up over triton", "plugin", large, speed_up("triton")),
        ("T=1, 128<=B*HV<=1024", "speed-up over triton", "plugin", middle, speed_up("triton")),
        ("T=1, B=1,2", "speed-up over triton", "plugin", small, speed_up("triton")),
        ("T=1, B=1,2", "time over (empty kernel + bytes / copy)", "plugin", small, over_floor),
        ("T=2..8, B>=16", "speed-up over triton-spec", "plugin", spec, speed_up("triton-spec")),
        ("T=1", "fused norm: speed-up over triton+norm", "plugin-norm", _where(T=1), speed_up("triton+norm")),
        ("T=1..8", "fused norm: speed-up over vllm-cuda", "plugin-norm", _where(), speed_up("vllm-cuda")),
        ("T=1", "split pool: speed-up over single pool", "split", _where(T=1), speed_up("plugin")),
        ("T=2..8", "split pool: speed-up over single pool", "split", _where(T=range(2, 9)), speed_up("plugin")),
    ]
    found = []
    for target, figure, ours, where, value in lines:
        provider, pool = ("plugin", "split") if ours == "split" else (ours, "single")
        picked = [r for r in rows if r["provider"] == provider and r["pool"] == pool and not r["intermediates"] and where(r)]
        found.append((target, figure, {state: _spread(value(r) for r in picked if r["state_dtype"] == state) for state in STATES}))
    return found


def _key(row: Row) -> tuple:
    return row["B"], row["T"], row["HV"], row["state_dtype"], row["intermediates"]


def _where(T: Any = range(1, 9), B: Any = range(1, 1 << 30), work: Any = range(1, 1 << 30)) -> Callable[[Row], bool]:
    """Which rows a target is about; work is B * HV."""
    T = (T,) if isinstance(T, int) else T
    return lambda row: row["T"] in T and row["B"] in B and row["B"] * row["HV"] in work


def _spread(values: Iterable[float | None]) -> str:
    """Geometric mean, range and count: "1.25 (1.10 .. 1.41, 12 cases)"."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{geometric_mean(known):.3f} ({min(known):.3f} .. {max(known):.3f}, {len(known)} cases)"


# --- the plot ------------------------------------------------------------------------------------------------------------------------

COLOURS = {"plugin": "C0", "plugin-norm": "C9", "triton": "C1", "triton-spec": "C3", "vllm-cuda": "C2", "triton+norm": "C4",
           "flashinfer": "C5", "sglang-cutedsl": "C6"}  # fmt: skip
SPEC_BATCH = 64


def plot(result: dict[str, Any], file: Path) -> None:
    """Three panels a state type: time by batch, part of the copy's speed by B * HV, time by tokens. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [r for r in result["rows"] if r["pool"] == "single" and not r["intermediates"]]
    states = [state for state in STATES if any(r["state_dtype"] == state for r in rows)]
    figure = Figure(figsize=(18, 5 * max(len(states), 1)), layout="constrained")
    axes = figure.subplots(max(len(states), 1), 3, squeeze=False)
    for (by_batch, by_work, by_tokens), state in zip(axes, states, strict=False):
        ours = [r for r in rows if r["state_dtype"] == state]
        one = [r for r in ours if r["T"] == 1]
        HV = _common([r["HV"] for r in one], 32)
        B = _common([r["B"] for r in ours if r["T"] > 1], SPEC_BATCH)
        _lines(by_batch, [r for r in one if r["HV"] == HV], "B", "us")
        copies = sorted({(r["B"], r["copy_us"]) for r in one if r["HV"] == HV and r["copy_us"]})
        by_batch.plot(*zip(*copies, strict=True) if copies else ([], []), "k--", label="copy kernel")
        by_batch.set(title=f"T=1, HV={HV}, {state} state", xlabel="rows B", ylabel="us a call", xscale="log", yscale="log")
        _lines(by_work, [{**r, "work": r["B"] * r["HV"]} for r in one], "work", "copy_fraction", marker_only=True)
        by_work.set(title=f"T=1, {state} state", xlabel="B * HV", ylabel="part of torch's copy speed", xscale="log", ylim=(0, None))
        _lines(by_tokens, [r for r in ours if r["B"] == B and r["HV"] == HV], "T", "us")
        by_tokens.set(title=f"B={B}, HV={HV}, {state} state", xlabel="tokens a row T", ylabel="us a call", ylim=(0, None))
        for axis in (by_batch, by_work, by_tokens):
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small")
    stamp = result["stamp"]
    figure.suptitle(f"GDN decode on {stamp['device']}, {stamp['date'][:10]}, kernels {stamp['kernel_hash']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _common(values: list[int], preferred: int) -> int:
    return preferred if preferred in values or not values else max(values)


def _lines(axis, rows: list[Row], x: str, y: str, marker_only: bool = False) -> None:
    for provider, colour in COLOURS.items():
        points = sorted((r[x], r[y]) for r in rows if r["provider"] == provider)
        if points:
            axis.plot(
                *zip(*points, strict=True), linestyle="" if marker_only else "-", marker="o", markersize=4, color=colour, label=provider
            )
