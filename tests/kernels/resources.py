"""What the compiled kernels use: registers, spills, shared memory, and how wide they load and store the state.

Every row of ``resources.json`` is one kernel for one architecture, read from its machine code. No GPU is needed.
``python tests/kernels/resources.py --renew`` writes the table again; the tests compare with it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TABLE = Path(__file__).with_name("resources.json")
FAMILY = "gdn_decode"
LIMITS = ("registers", "spills", "shared_bytes")
"""More of these is worse; less of ``WIDTHS`` is worse."""
WIDTHS = ("load_bits", "store_bits")


def tool(name: str) -> str | None:
    """CUDA's ``cuobjdump`` or ``nvdisasm``: Triton's copy, else what is on the path."""
    triton = importlib.util.find_spec("triton")
    copy = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return str(copy) if copy and copy.exists() else shutil.which(name)


def missing() -> str | None:
    """Why nothing can be compiled and read here, or None."""
    if importlib.util.find_spec("cutlass") is None:
        return "CuTe DSL is not installed (extra: kernels)"
    absent = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"no {', '.join(absent)}: neither Triton nor the CUDA toolkit is installed" if absent else None


def variants() -> list:
    """Every variant that a server can launch at one head ratio, and one of each of the others, at the other ratios."""
    import torch

    from moe_backend_plugin.gdn.cuda import Layer
    from moe_backend_plugin.kernels.gdn_decode import Variant

    bf16 = torch.bfloat16
    layers = [
        Layer(torch.float32, bf16, bf16, heads_per_group=2),
        Layer(bf16, bf16, bf16, heads_per_group=2),
        Layer(torch.float32, bf16, bf16, heads_per_group=2, norm="silu"),
    ]
    others = [
        Variant(heads_per_group=1, split=True, write="last"),
        Variant(heads_per_group=3, ragged=True, write="last"),
        Variant(heads_per_group=4, ragged=True, write="none", intermediate=True),
        Variant(heads_per_group=8, ragged=True, write="none", intermediate=True, state="bfloat16", index="int64"),
        Variant(norm="sigmoid", norm_weight="float32", state="bfloat16"),
    ]
    return list(dict.fromkeys([v for layer in layers for v in layer.variants(speculative=True)] + others))


def text(variant) -> str:
    """The fields that differ from the defaults, so that a new field with a default leaves the table valid."""
    changed = (f.name for f in dataclasses.fields(variant) if getattr(variant, f.name) != f.default)
    return ", ".join(f"{name}={getattr(variant, name)}" for name in changed) or "default"


def key(row: dict) -> str:
    return f"{row['family']} [{row['variant']}] {row['architecture']}"


def row_of(variant, architecture: str) -> dict:
    return {"family": FAMILY, "variant": text(variant), "architecture": architecture}


def jobs() -> list[tuple]:
    from moe_backend_plugin.kernels.compile import ARCHITECTURES

    return [(variant, architecture) for variant in variants() for architecture in ARCHITECTURES]


def width(accesses: list[int], needed: int) -> int:
    """Bits of the narrowest of the ``needed`` widest accesses, 0 if there are too few."""
    return sorted(accesses)[-needed] if 0 < needed <= len(accesses) else 0


def dynamic_shared(ir: str) -> int:
    """Bytes of shared memory that the launch asks for, which the cubin does not say: the third field of its configuration."""
    field = re.search(r"(%\d+) = llvm\.getelementptr %\d+\[0, 2\].*array<3 x i32>, array<3 x i32>, i64, ptr", ir)
    value = re.compile(rf"llvm\.store (%\d+), {field[1]} : i64").search(ir, field.end())
    return int(re.findall(rf"{value[1]} = llvm\.mlir\.constant\((\d+) : i64\)", ir[: value.start()])[-1])


def measure(job: tuple) -> dict:
    """Compile one variant for one architecture and read its machine code."""
    from moe_backend_plugin.kernels.compile import compile_for
    from moe_backend_plugin.kernels.gdn_decode import HEAD, LANES, TYPES

    variant, architecture = job
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_for(FAMILY, variant, architecture, options=f"--keep-cubin --dump-dir {folder}")
        (cubin,) = Path(folder).glob("*.cubin")
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
        code = subprocess.run([tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    accesses = {"LDG": [], "STG": []}
    for name, options in re.findall(r"\b(LDG|STG)((?:\.\w+)*) ", code):
        bits = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", options)
        accesses[name].append(int(bits[1]) if bits else 32)
    # A thread's part of the state is that many accesses of 128 bits, for each place that loads or stores it.
    vec = 128 // TYPES[variant.state].width
    pieces = HEAD // (LANES * vec) * (variant.tile_v // (variant.warps * (32 // LANES)))
    return row_of(variant, architecture) | {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared_bytes": used["SHARED"] + dynamic_shared(str(compiled.ir_module)),
        "load_bits": width(accesses["LDG"], pieces),
        "store_bits": width(accesses["STG"], pieces * (variant.intermediate + (variant.write != "none"))),
    }


def measure_all(workers: int | None = None) -> list[dict]:
    """All rows, compiled ``workers`` at a time (default: one a core)."""
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, jobs()))


def read_table() -> dict[str, dict]:
    return {key(row): row for row in json.loads(TABLE.read_text())}


def differences(found: dict, kept: dict) -> tuple[list[str], list[str]]:
    """(what is worse than the table, what is better), as text."""
    worse, better = [], []
    for name in LIMITS + WIDTHS:
        if found[name] != kept[name]:
            more = found[name] > kept[name]
            (worse if more == (name in LIMITS) else better).append(f"{key(found)}: {name}: found {found[name]}, table {kept[name]}")
    return worse, better


def main() -> None:
    if sys.argv[1:] != ["--renew"]:
        sys.exit("usage: resources.py --renew")
    if reason := missing():
        sys.exit(reason)
    rows = measure_all()
    TABLE.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} rows in {TABLE.name}")


if __name__ == "__main__":
    main()
