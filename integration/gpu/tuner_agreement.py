"""On a Hopper GPU: do two tuning runs on one machine find the same, and what does it cost where they do not?

    moe-backend tune qwen3-30b-a3b --out a.json; moe-backend tune qwen3-30b-a3b --seed 1 --out b.json
    python integration/gpu/tuner_agreement.py a.json b.json [--rounds 20] [--out FILE]

Where a bucket's tactics differ, both are timed in turn under the tuner's own conditions, and "loss" is by how much the slower one takes
longer. Writes one row a bucket; exits 1 where fewer than 95 % of the buckets agree, or a loss is above 1 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_backend_plugin.bench.stamp import as_run, gpu_stamp, results_folder, slug
from moe_backend_plugin.bench.tactics import Layer
from moe_backend_plugin.moe import tactics
from moe_backend_plugin.moe.tactic_cache import FAMILIES, problem_of
from moe_backend_plugin.moe.tuner import Conditions

ENOUGH, MOST = 0.95, 0.01


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the problem, a row a bucket that both have) of two cache files with one entry each. Raises SystemExit if they are about different
    things."""
    entries = [found["entries"] for found in (first, second)]
    if [len(found) for found in entries] != [1, 1]:
        counts = " and ".join(str(len(found)) for found in entries)
        raise SystemExit(f"files: found {counts} entries; allowed: one each, of a run into a file of its own")
    (a,), (b,) = entries
    for name in ("problem", "stamp"):
        if a[name] != b[name]:
            raise SystemExit(f"{name}: found {a[name]} and {b[name]}; allowed: two runs of one layer on one machine")
    if not (common := [last for last in a["buckets"] if last in b["buckets"]]):
        raise SystemExit(f"buckets: found {', '.join(a['buckets'])} and {', '.join(b['buckets'])}; allowed: some in common")
    buckets = ((int(last), a["buckets"][last]["tactic"], b["buckets"][last]["tactic"]) for last in common)
    return a["problem"], [{"tokens": last, "first": one, "second": two, "agree": one == two, "loss": 0.0} for last, one, two in buckets]


def within(rows: list[dict[str, Any]]) -> bool:
    """The bounds."""
    return sum(row["agree"] for row in rows) >= ENOUGH * len(rows) and all(row["loss"] <= MOST for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    described, rows = paired(*(json.loads(file.read_text(encoding="utf-8")) for file in (options.first, options.second)))
    problem, dtype = problem_of(described), getattr(torch, described["tokens"])
    torch.cuda.set_device(0)
    name = torch.cuda.get_device_name()
    differ = [row for row in rows if not row["agree"]]
    found = {row[which]: tactics.parse(row[which]) for row in differ for which in ("first", "second")}
    layer = Layer(problem, dtype, 0, torch.device("cuda", 0), max(row["tokens"] for row in rows), [*found.values()]) if differ else None
    for row in differ:
        conditions = Conditions(row["tokens"])
        case = layer.case(conditions)
        times: dict[str, list[float]] = {row["first"]: [], row["second"]: []}
        for _ in range(options.rounds):
            for which, us in times.items():
                us.append(case.time(found[which], conditions))
        us = {which: statistics.fmean(values) for which, values in times.items()}
        row |= {"first_us": round(us[row["first"]], 3), "second_us": round(us[row["second"]], 3)}
        row["loss"] = round(max(us.values()) / min(us.values()) - 1, 5)
        print(json.dumps(row), flush=True)
    agree, worst = sum(row["agree"] for row in rows), max(row["loss"] for row in rows)
    print(f"{agree} of {len(rows)} buckets agree; where they do not, the slower choice loses {100 * worst:.2f} % at most")
    path = options.out or results_folder() / f"tuner_agreement_{slug(name)}.json"
    stamp = gpu_stamp(name, as_run("python integration/gpu/tuner_agreement.py"), list(FAMILIES))
    path.write_text(json.dumps({"stamp": stamp, "ceilings": {}, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not within(rows))


if __name__ == "__main__":
    main()
