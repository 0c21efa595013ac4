"""The table and the plot of ``moe-backend tune``, from the buckets of a cache entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

COLUMNS = ("tokens", "heuristic", "us", "tuned", "us", "gain", "rounds", "struck out")


def gain(bucket: Mapping[str, Any]) -> float | None:
    """By how much the heuristic's tactic takes longer: 0.05 is 5 %. None where it was not timed."""
    return bucket["heuristic_us"] / bucket["us"] - 1 if bucket.get("heuristic_us") else None


def lines(buckets: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """A row of the table for each bucket, ascending."""
    found = []
    for last, b in sorted(buckets.items(), key=lambda item: int(item[0])):
        span = last if b["first"] == int(last) else f"{b['first']}..{last}"
        tuned = "the same" if b["tactic"] == b["heuristic"] else b["tactic"]
        by = gain(b)
        percent = None if by is None else f"{100 * by:+.1f} %"
        found.append((span, b["heuristic"], _us(b["heuristic_us"]), tuned, _us(b["us"]), percent, b["rounds"], len(b["struck"]) or ""))
    return found


def summary(buckets: Mapping[str, Mapping[str, Any]]) -> str:
    """One line over all buckets."""
    gains = [found for bucket in buckets.values() if (found := gain(bucket)) is not None]
    if not gains:
        return "nothing was timed"
    other = sum(b["tactic"] != b["heuristic"] for b in buckets.values())
    mean = geometric_mean(1 + by for by in gains) - 1
    return f"{other} of {len(buckets)} buckets left the heuristic's tactic; gain {100 * mean:.2f} %, {100 * max(gains):.1f} % at most"


def _us(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def plot(buckets: Mapping[str, Mapping[str, Any]], title: str, file: Path) -> None:
    """Times by tokens, and the gain by tokens. Needs matplotlib."""
    from matplotlib.figure import Figure

    known = sorted((int(last), b) for last, b in buckets.items() if b.get("heuristic_us"))
    tokens = [last for last, _ in known]
    figure = Figure(figsize=(8, 8), layout="constrained")
    times, gains = figure.subplots(2, 1)
    times.plot(tokens, [b["heuristic_us"] for _, b in known], marker="o", markersize=4, color="C7", label="heuristic")
    times.plot(tokens, [b["us"] for _, b in known], marker="o", markersize=4, color="C0", label="tuned")
    times.set(xlabel="tokens", ylabel="us a call", xscale="log", yscale="log")
    times.legend(fontsize="small")
    gains.plot(tokens, [100 * gain(b) for _, b in known], marker="o", markersize=4, color="C0")
    gains.axhline(0, color="black", linewidth=0.8)
    gains.set(xlabel="tokens", ylabel="gain over the heuristic, %", xscale="log")
    for axis in (times, gains):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
