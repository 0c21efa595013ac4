"""On a Hopper GPU: record what each known bias of tuners does to the times of tactics, for tests without a GPU to hold the biases off.

    python integration/gpu/tuner_biases.py [--model qwen3-30b-a3b] [--ep 1] [--tokens 8,64,512,8192,16384] [--rounds 5] [--seconds 540]
        [--conditions unbiased,warm_l2] [--out FILE]

For each number of tokens every candidate is timed ``--rounds`` times under the tuner's own conditions and under those of each bias (warm
L2, random inputs, own allocations; the cap needs no times of its own: 16,384 tokens run what was tuned at 8,192). ``--ep``: the layer of
one of so many ranks, whose weights may fit in the L2 cache. Writes JSON in the form that ``tests/moe/test_recorded_biases.py`` reads: rows
of {tokens, condition, tactic, us: [...]}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from moe_backend_plugin.bench.moe import MODELS
from moe_backend_plugin.bench.stamp import as_run, gpu_stamp, results_folder, slug
from moe_backend_plugin.bench.tactics import Layer
from moe_backend_plugin.moe import tactics
from moe_backend_plugin.moe.tactic_cache import FAMILIES
from moe_backend_plugin.moe.tuner import Conditions

CAP = 8192
CONDITIONS = {
    "unbiased": {},
    "warm_l2": {"cold_l2": False},
    "random_inputs": {"loads": "random"},
    "unequal_allocations": {"preallocated": False},
}
"""Name of a condition -> what differs from the tuner's own, as fields of ``Conditions``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--tokens", default="8,64,512,8192,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=540, help="begin no number of tokens after so many seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.cuda.set_device(0)
    device, name = torch.device("cuda", 0), torch.cuda.get_device_name()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    problem = MODELS[options.model].problem
    problem = replace(problem, num_local_experts=problem.num_local_experts // options.ep)
    conditions_of = {condition: CONDITIONS[condition] for condition in options.conditions.split(",")}
    counts = [int(n) for n in options.tokens.split(",")]
    found = {tokens: tactics.candidates(problem, tokens, multiprocessors) for tokens in counts}
    # With a cap, a larger call runs what was tuned there, so that has to be timed as well.
    union = list(dict.fromkeys(tactic for of in found.values() for tactic in of))
    path = options.out or results_folder() / f"tuner_biases_{slug(name)}.json"
    stamp = gpu_stamp(name, as_run("python integration/gpu/tuner_biases.py"), list(FAMILIES))
    print(f"compiling {len(union)} tactics", file=sys.stderr, flush=True)
    layer = Layer(problem, torch.bfloat16, 0, device, max(counts), union)
    rows, begin = [], time.monotonic()
    for tokens in counts:
        if time.monotonic() - begin > options.seconds:
            print(f"time is up: {tokens} tokens and more are missing", file=sys.stderr)
            break
        entrants = dict.fromkeys([*found[tokens], *(found.get(CAP, []) if tokens > CAP else [])])
        for condition, fields in conditions_of.items():
            conditions = Conditions(tokens, **fields)
            case, times = layer.case(conditions), {tactic: [] for tactic in entrants}
            for _ in range(options.rounds):
                for tactic in entrants:
                    times[tactic].append(round(case.time(tactic, conditions), 3))
            rows += [{"tokens": tokens, "condition": condition, "tactic": tactics.name(t), "us": us} for t, us in times.items()]
            best = min(times, key=lambda tactic: sum(times[tactic]))
            print(f"{tokens:6d} tokens  {condition:20s} {len(times):3d} tactics, fastest {tactics.name(best)}", flush=True)
            del case
        content = {"stamp": stamp, "model": options.model, "multiprocessors": multiprocessors, "problem": asdict(problem), "rows": rows}
        path.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
