"""On a Hopper GPU: every tactic of the expert kernels against the float32 reference, token counts 1 .. 16384 by EP 1, 8 and 16.

    python integration/gpu/tactic_parity.py [--ep 1,8,16] [--tokens 1,16384] [--model deepseek-v3 | --small] [--seconds 540] [--out FILE]

The layer is DeepSeek-V3's with random weights. A cell's tactics are all shapes that either projection can be cut into (each with itself,
and the heuristic's pair), on balanced inputs, by a captured graph that is replayed twice into memory full of NaN; the reference
dequantises one expert at a time, multiplies in float32 without TF32, and sees every row. Writes one JSON file with a row a cell, and
prints the table; rows of other cells of the same kernels stay in the file, so that a grid can be done in several runs. Exits 1 if a
tactic is wrong, 3 if time ran out before the last cell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_backend_plugin.bench import tactics as bench
from moe_backend_plugin.bench.shared import release
from moe_backend_plugin.bench.stamp import as_run, gpu_stamp, held, results_folder, slug
from moe_backend_plugin.moe import balanced, tactics, tiles, tuner
from moe_backend_plugin.moe.problem import MoEProblem
from moe_backend_plugin.moe.tactic_cache import FAMILIES

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
EP = (1, 8, 16)
MODELS = {"deepseek-v3": MoEProblem(256, 256, 7168, 2048, 8), "small": MoEProblem(32, 32, 512, 256, 4)}
EXIT_WRONG, EXIT_TIME = 1, 3


def every(problem: MoEProblem, tokens: int, multiprocessors: int) -> list[tiles.Choice]:
    """Each shape of either projection at least once, the heuristic's pair in front."""
    return list(dict.fromkeys([tiles.choose(problem, tokens, multiprocessors), *tactics.alike(problem)]))


def cell(layer: bench.Layer, found: list[tiles.Choice], tokens: int) -> dict[str, Any]:
    """One cell of the table: the largest errors of its tactics, by tile size and in all, and what was struck out."""
    case = layer.case(tuner.Conditions(tokens))
    expected = case.reference()
    by_tile: dict[int, dict[str, Any]] = {}
    struck, worst = {}, ("", 0.0)
    for tactic in found:
        vetted = tuner.vet(case, tactic, 2, expected)
        if vetted.reason:
            struck[tactics.name(tactic)] = vetted.reason
            continue
        line = by_tile.setdefault(tactic.tile_tokens, {"tactics": 0, "max_abs": 0.0, "relative": 0.0})
        line["tactics"] += 1
        line["max_abs"], line["relative"] = max(line["max_abs"], vetted.max_abs), max(line["relative"], vetted.relative)
        if vetted.relative > worst[1]:
            worst = tactics.name(tactic), vetted.relative
    rows = expected[1]
    return {
        "tactics": len(found),
        "max_abs": max((line["max_abs"] for line in by_tile.values()), default=None),
        "relative": max((line["relative"] for line in by_tile.values()), default=None),
        "output_rms": float(rows.square().mean().sqrt()),
        "worst": worst[0],
        "struck": struck,
        "by_tile": {str(tile): line for tile, line in sorted(by_tile.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", default=",".join(map(str, EP)))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3")
    parser.add_argument("--small", action="store_true", help="a tiny shape, EP 1 and 8, 1 to 256 tokens: a minute")
    parser.add_argument("--seconds", type=float, default=540, help="begin no cell after so many seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.small:
        options.model, options.ep, options.tokens = "small", "1,8", "1,7,64,256"
    torch.cuda.set_device(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device, name = torch.device("cuda", 0), torch.cuda.get_device_name()
    counts, ranks = [[int(n) for n in text.split(",")] for text in (options.tokens, options.ep)]
    path = options.out or results_folder() / f"tactic_parity_{options.model}_{slug(name)}.json"
    stamp = gpu_stamp(name, as_run("python integration/gpu/tactic_parity.py"), list(FAMILIES))
    rows = {(row["ep"], row["tokens"]): row for row in held(path, stamp)}
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    whole, begin, late = MODELS[options.model], time.monotonic(), False
    # All rows, not the tuner's sample of them.
    bench.ROWS_COMPARED = max(counts)
    for ep in ranks:
        problem = replace(whole, num_local_experts=whole.num_experts // ep)
        first = problem.num_local_experts * (ep // 2)  # a rank whose experts are not the model's first
        found = {tokens: every(problem, tokens, multiprocessors) for tokens in counts}
        union = list(dict.fromkeys(tactic for of in found.values() for tactic in of))
        print(f"EP {ep}: compiling {len(union)} tactics", file=sys.stderr, flush=True)
        layer = bench.Layer(problem, torch.bfloat16, first, device, max(counts), union)
        for tokens in counts:
            if late := time.monotonic() - begin > options.seconds:
                break
            start = time.monotonic()
            row = {"ep": ep, "tokens": tokens, "pairs": balanced.local_pairs(problem, tokens), **cell(layer, found[tokens], tokens)}
            rows[ep, tokens] = row
            ordered = [rows[key] for key in sorted(rows)]
            path.write_text(json.dumps({"stamp": stamp, "model": options.model, "rows": ordered}, indent=1) + "\n", encoding="utf-8")
            figures = f"max abs {row['max_abs']:.3g}, relative {row['relative']:.2e}" if row["relative"] is not None else "none right"
            print(
                f"EP {ep:2d}  {tokens:6d} tokens  {row['tactics']:4d} tactics  {figures}  struck {len(row['struck'])}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )
            for tactic, reason in row["struck"].items():
                print(f"    {tactic}: {reason}", flush=True)
        del layer
        release()
        if late:
            break
    print(f"{path}: {len(rows)} cells")
    if any(rows[ep, tokens]["struck"] for ep, tokens in rows if ep in ranks and tokens in counts):
        raise SystemExit(EXIT_WRONG)
    if late:
        print("time is up; run again with the cells that are missing", file=sys.stderr)
        raise SystemExit(EXIT_TIME)


if __name__ == "__main__":
    main()
