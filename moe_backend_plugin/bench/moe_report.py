"""The figures that the targets of ``moe-backend bench moe`` are about, and its plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .moe import MODELS, NVFP4_PEERS, PROVIDERS, ROUTINGS

Row = dict[str, Any]
TARGETS = ((1, 4), (8, 256), (512, 2048), (4096, 16384))
"""Ranges of tokens, each with a target of its own."""
LISTS = ("rows", "errors", "dropped")
"""What a result says of cells."""
COLOURS = dict(zip(PROVIDERS, ("C0", "C1", "C3", "C7"), strict=True))


def label(row: Row) -> str:
    return row["model"] if row["ep"] == 1 else f"{row['model']} EP {row['ep']}"


def with_others(result: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """``result`` with the rows of a stored one of models that are not in it; "kept" in the stamp says which those are, and from when."""
    timed = {label(entry) for name in LISTS for entry in result[name]}
    order = [label({"model": model.name, "ep": model.ep}) for model in MODELS.values()]
    lists = {name: [*(entry for entry in stored[name] if label(entry) not in timed), *result[name]] for name in LISTS}
    for entries in lists.values():
        entries.sort(key=lambda entry: order.index(label(entry)))
    models = list(dict.fromkeys(label(row) for row in lists["rows"] if label(row) not in timed))
    kept = []
    for stamp in [*stored["stamp"].get("kept", []), {**stored["stamp"], "ceilings": stored["ceilings"], "models": models}]:
        here = [model for model in stamp["models"] if model in models]
        models = [model for model in models if model not in here]
        if here:
            kept.append({**{name: stamp.get(name) for name in ("commit", "date", "ceilings")}, "models": here})
    return {**result, "stamp": {**result["stamp"], "kept": kept}, **lists}


def summary(result: dict[str, Any]) -> list[tuple[str, str, dict[str, str]]]:
    """(tokens, figure, {model: value}) for each target; a figure without rows is "-".

    Speed-ups are times of the best NVFP4 peer of each cell (or of Triton) over ours: above 1 is faster.
    """
    rows, ceilings = result["rows"], result["ceilings"]
    best, triton = _times(rows, NVFP4_PEERS), _times(rows, ("triton_bf16",))
    experts = {(model.name, model.ep): model.local for model in MODELS.values()}
    models = list(dict.fromkeys(map(label, rows)))

    def over(times: dict[tuple, float]) -> Callable[[Row], float | None]:
        return lambda row: times[_key(row)] / row["us"] if _key(row) in times else None

    def all_active(row: Row) -> float | None:
        full = row["active_experts"] >= 0.98 * experts[row["model"], row["ep"]]
        return row["TB_s"] / ceilings["copy_TB_s"] if full else None

    lines = [(span, "balanced", "speed-up over the best NVFP4 peer", over(best)) for span in TARGETS]
    lines += [
        (TARGETS[1], "balanced", "fraction of the copy, all experts active", all_active),
        (TARGETS[3], "balanced", "TFLOP/s", lambda row: row["TFLOP_s"]),
        (TARGETS[3], "balanced", "speed-up over Triton on bf16", over(triton)),
        *(((1, 16384), routing, "speed-up over the best NVFP4 peer", over(best)) for routing in ROUTINGS[1:]),
        ((1, 16384), None, "largest relative error", lambda row: row["relative_error"]),
    ]
    found = []
    for (low, high), routing, figure, value in lines:
        picked = [r for r in rows if r["provider"] == "plugin" and low <= r["tokens"] <= high and routing in (None, r["routing"])]
        show = _largest if figure.startswith("largest") else _spread
        values = {model: show(value(r) for r in picked if label(r) == model) for model in models}
        found.append((f"{low}..{high}{f' {routing}' if routing else ''}", figure, values))
    return found


def _times(rows: Iterable[Row], providers: Iterable[str]) -> dict[tuple, float]:
    """The shortest time of any of ``providers`` for each cell."""
    found: dict[tuple, float] = {}
    for row in rows:
        if row["provider"] in providers:
            found[_key(row)] = min(row["us"], found.get(_key(row), row["us"]))
    return found


def _key(row: Row) -> tuple:
    return row["model"], row["ep"], row["tokens"], row["routing"]


def _spread(values: Iterable[float | None]) -> str:
    """Geometric mean, range and count: "1.25 (1.10 .. 1.41, 12)"."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{geometric_mean(known):.3g} ({min(known):.3g} .. {max(known):.3g}, {len(known)})"


def _largest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else "-"


def plot(result: dict[str, Any], file: Path) -> None:
    """For each model the times by tokens, and our speed-up over the best NVFP4 peer by tokens for each routing. Needs matplotlib."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    models = list(dict.fromkeys(map(label, rows)))
    figure = Figure(figsize=(5 * max(len(models), 1), 8), layout="constrained")
    axes = figure.subplots(2, max(len(models), 1), squeeze=False)
    best = _times(rows, NVFP4_PEERS)
    for times, faster, model in zip(axes[0], axes[1], models, strict=False):
        own = [r for r in rows if label(r) == model]
        for provider, colour in COLOURS.items():
            theirs = [r for r in own if r["provider"] == provider and r["routing"] == "balanced"]
            _line(times, [(r["tokens"], r["us"]) for r in theirs], provider, colour)
        times.set(title=model, xlabel="tokens", ylabel="us a call, balanced routing", xscale="log", yscale="log")
        for routing, colour in zip(ROUTINGS, ("C0", "C2", "C4"), strict=True):
            ours = [r for r in own if r["provider"] == "plugin" and r["routing"] == routing and _key(r) in best]
            _line(faster, [(r["tokens"], best[_key(r)] / r["us"]) for r in ours], routing, colour)
        faster.axhline(1, color="black", linewidth=0.8)
        faster.set(xlabel="tokens", ylabel="speed-up over the best NVFP4 peer", xscale="log", ylim=(0, None))
        for axis in (times, faster):
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small")
    stamp = result["stamp"]
    figure.suptitle(f"NVFP4 MoE layer on {stamp['device']}\n{stamp['date'][:10]}, kernels {stamp['kernel_hash']}", fontsize="medium")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _line(axis, points: list[tuple[float, float]], name: str, colour: str) -> None:
    if points:
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, color=colour, label=name)
