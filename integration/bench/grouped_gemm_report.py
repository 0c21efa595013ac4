"""What ``grouped_gemm.py`` prints: the table of both providers, and from how many tokens on the alternative wins."""

from __future__ import annotations

from collections.abc import Iterable

PROVIDERS = ("plugin", "dequantised")
GEMMS = ("gate_up", "down")
NAMED = {
    "us": "Dequantising before a grouped GEMM",
    "bound_us": "Its bound (dequantising and the two products alone)",
    "gemms_us": "Its two products alone (weights that cost nothing to dequantise)",
}
"""Times that are held against the plugin's, and what they are called."""
TABLE = ("tokens", "plugin", "dequantised", "bound (speed-up)", "GEMMs (speed-up)", "dequantise (TB/s)", "gather", "gate-up (TFLOP/s, by)",
         "down (TFLOP/s, by)", "activation", "combine")  # fmt: skip


def by_tokens(rows: Iterable[dict]) -> list[tuple[dict, dict]]:
    """(the plugin's row, the alternative's) for each number of tokens, ascending."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    return list(zip(*([row for row in rows if row["provider"] == name] for name in PROVIDERS), strict=True))


def crossing(rows: Iterable[dict], column: str, named: str) -> str:
    """One sentence: from how many tokens on the alternative's ``column`` is below the plugin's time."""
    cells = by_tokens(rows)
    if not cells:
        return "Nothing was measured."
    faster = {ours["tokens"]: ours["us"] / theirs[column] for ours, theirs in cells}
    wins = [tokens for tokens, times in faster.items() if times > 1]
    if not wins:
        best = max(faster, key=faster.__getitem__)
        return f"{named} does not win up to {max(faster)} tokens: at best, at {best}, its speed is {faster[best]:.2f} of the plugin's."
    later = [tokens for tokens in faster if tokens > wins[0] and tokens not in wins]
    but = f", though not at {', '.join(map(str, later))}" if later else ""
    return f"{named} wins from {wins[0]} tokens on, where its speed is {faster[wins[0]]:.2f} of the plugin's{but}."


def table(rows: Iterable[dict]) -> list[tuple]:
    """Rows of the printed table, under :data:`TABLE`."""
    return [
        (
            *(theirs["tokens"], f"{ours['us']:.0f}", f"{theirs['us']:.0f}"),
            *(f"{theirs[column]:.0f} ({ours['us'] / theirs[column]:.2f})" for column in ("bound_us", "gemms_us")),
            *(f"{theirs['dequantise_us']:.0f} ({theirs['dequantise_TB_s']:.2f})", f"{theirs['gather_us']:.0f}"),
            *(f"{theirs[f'{part}_us']:.0f} ({theirs[f'{part}_TFLOP_s']:.0f}, {theirs[f'{part}_by']})" for part in GEMMS),
            *(f"{theirs['activation_us']:.0f}", f"{theirs['combine_us']:.0f}"),
        )
        for ours, theirs in by_tokens(rows)
    ]
