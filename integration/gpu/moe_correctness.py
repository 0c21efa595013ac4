"""On a Hopper GPU: what must hold of the MoE kernels' results, at full length, and what the compute sanitizer says of all kernels.

    python integration/gpu/moe_correctness.py [--only problems,routings,repeat,rows,memcheck,...] [--seconds 1500] [--tool-seconds 300]
        [--problems 2000] [--routings 100000] [--out FILE]

Runs tests/moe/test_moe_cuda.py in a child for each check, and reads the figures that its tests write. The sanitizer's tools (memcheck,
racecheck, synccheck, initcheck) each run a few of these tests and of tests/gdn/test_gdn_cuda.py; without the sanitizer they are left out,
unless ``--only`` names them. Writes one JSON file; rows of other checks of the same kernels stay in it, so that the checks can be done in
several runs. A check that fails is stored as failed, with its last lines. Exits 1 if one failed, 3 if time ran out before the last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_backend_plugin.bench.stamp import as_run, gpu_stamp, held, results_folder, slug

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("moe_gemm", "moe_route", "moe_combine", "gdn_decode")
MOE, GDN = "tests/moe/test_moe_cuda.py", "tests/gdn/test_gdn_cuda.py"
EXIT_WRONG, EXIT_TIME, EXIT_FOUND = 1, 3, 9
LINES = 25
"""Of a check that failed, its last are kept."""
FEW = {"MOE_CUDA_PROBLEMS": "8", "MOE_CUDA_ROUTINGS": "90"}
"""Under the sanitizer a launch takes up to a hundred times as long."""
PATHS = ("/usr/local/cuda/bin/compute-sanitizer",)


@dataclass(frozen=True)
class Check:
    """Tests of one file, chosen by ``-k``; ``figures``: what these call themselves in what they write; ``tool``: the sanitizer's."""

    name: str
    file: str
    tests: str
    figures: str = ""
    tool: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def checks(problems: int, routings: int) -> list[Check]:
    many = {"MOE_CUDA_PROBLEMS": str(problems), "MOE_CUDA_ROUTINGS": str(routings)}
    moe_short = "test_nan_stays_in_its_row or (test_results_repeat and 16) or test_a_row_does_not_depend and skewed and 64"
    moe_long = f"{moe_short} or test_adversarial or test_random_problems"
    found = [
        Check("problems", MOE, "test_random_problems", "random problems", environment=many),
        Check("routings", MOE, "test_adversarial", "adversarial routings", environment=many),
        Check("repeat", MOE, "test_results_repeat", "repeat and replay"),
        Check("rows", MOE, "test_a_row_does_not_depend", "row independence"),
    ]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        shared = tool in ("racecheck", "synccheck")
        found.append(Check(tool, MOE, moe_short if shared else moe_long, tool=tool, environment=FEW))
        # What shares memory between threads: the norm, by a cluster, and rows of several tokens.
        found.append(Check(tool, GDN, "norm or accepted" if shared else "test_call", tool=tool))
    return found


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next((path for path in PATHS if os.access(path, os.X_OK)), None)


def command(check: Check, tool: str | None = None) -> list[str]:
    """``tool``: the sanitizer's path; without it the same tests run by themselves."""
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--timeout=0", check.file, "-k", check.tests]
    # Children only compile, or ask git.
    options = ["--tool", check.tool, "--error-exitcode", str(EXIT_FOUND), "--target-processes", "application-only"]
    return [tool, *options, *tests] if tool else tests


def passed(text: str) -> int:
    """Tests that pytest says have passed."""
    found = re.findall(r"(\d+) passed", text)
    return int(found[-1]) if found else 0


def run(check: Check, seconds: float, tool: str | None = None) -> list[dict[str, Any]]:
    """Rows of one check, those that its tests wrote or one for all of them; the last row says what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        environment = {**os.environ, **check.environment, "MOE_CUDA_FIGURES": str(file)}
        start = time.monotonic()
        if tool:  # Compiled beforehand, by processes that nobody watches.
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command(check), cwd=ROOT, env=environment, capture_output=True, timeout=seconds)
            start = time.monotonic()
        try:
            done = subprocess.run(
                command(check, tool),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
            status, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            status, said = None, (late.stdout or b"").decode(errors="replace")
        figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    took = round(time.monotonic() - start, 1)
    # Nothing that ran is no success: without a GPU the file is skipped, and a name may have changed.
    good = status == 0 and passed(said) > 0
    row: dict[str, Any] = {"check": check.name, "file": check.file, "tests": check.tests, "count": passed(said), "seconds": took}
    row["result"] = "passed" if good else "failed"
    if not good:
        row["status"] = f"no end within {seconds:.0f} s" if status is None else f"exit status {status}"
        row["last_lines"] = [line.replace(f"{ROOT}/", "") for line in said.splitlines()[-LINES:]]
    own = [] if check.tool else [entry for entry in figures if entry["check"] == check.figures]
    return [{**entry, "of": check.name, "result": row["result"]} for entry in own] + [row]


def kept(rows: list[dict[str, Any]], check: Check) -> list[dict[str, Any]]:
    """The rows that ``check`` does not renew."""
    if check.tool:
        return [row for row in rows if (row["check"], row.get("file")) != (check.name, check.file)]
    return [row for row in rows if check.name not in (row["check"], row.get("of"))]


def main() -> None:
    names = list(dict.fromkeys(check.name for check in checks(1, 1)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {', '.join(names)}")
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--routings", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1500, help="begin no check after so many seconds, and let none run on for longer")
    parser.add_argument("--tool-seconds", type=float, default=300, help="the most that a sanitizer's tool may take for one file of tests")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    if unknown := sorted(set(only) - set(names)):
        parser.error(f"--only: found {', '.join(unknown)}; allowed: {', '.join(names)}")
    tool = sanitizer()
    wanted = [check for check in checks(options.problems, options.routings) if not only or check.name in only]
    if tool is None:
        if any(check.tool for check in wanted if only):
            raise SystemExit("compute-sanitizer: found on no path; allowed: a CUDA toolkit on PATH or in /usr/local/cuda")
        print("no compute-sanitizer: its checks are left out", file=sys.stderr)
        wanted = [check for check in wanted if not check.tool]

    from moe_backend_plugin.device import find_device

    device = find_device("cuda").name
    path = options.out or results_folder() / f"moe_correctness_{slug(device)}.json"
    stamp = gpu_stamp(device, as_run("python integration/gpu/moe_correctness.py"), list(KERNELS))
    rows, begin, failed, late = held(path, stamp), time.monotonic(), False, False
    for check in wanted:
        left = options.seconds - (time.monotonic() - begin)
        if late := left <= 0:
            print("time is up; run again with --only and the checks that are missing", file=sys.stderr)
            break
        fresh = run(check, min(left, options.tool_seconds) if check.tool else left, tool if check.tool else None)
        rows = kept(rows, check) + fresh
        path.write_text(json.dumps({"stamp": stamp, "ceilings": {}, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        last = fresh[-1]
        failed |= last["result"] == "failed"
        print(f"{check.name:<10} {Path(check.file).stem:<14} {last['result']}, {last['count']} tests, {last['seconds']:.0f} s", flush=True)
        for line in last.get("last_lines", []):
            print(f"    {line}", flush=True)
    print(f"{path}: {len(rows)} rows")
    if failed:
        raise SystemExit(EXIT_WRONG)
    if late:
        raise SystemExit(EXIT_TIME)


if __name__ == "__main__":
    main()
