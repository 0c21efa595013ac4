"""What the compiled kernels use: registers, spills, shared memory, how wide they load and store, and how they use the tensor cores.

Every row of ``resources.json`` is one kernel for one architecture, read from its machine code. No GPU is needed.
``python tests/kernels/resources.py --renew`` writes the table again; the tests compare with it.

All kernels are compiled in a few processes and disassembled together (the disassembler takes longer to start than to read a
kernel); within one process no kernel is compiled twice, whichever tests ask for it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("resources.json")
LIMITS = ("registers", "spills", "local_accesses", "shared_bytes")
"""More of these is worse; less of any other column is worse."""
Job = tuple[str, Any, str]
"""(family, variant, architecture)"""


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


# --- which kernels --------------------------------------------------------------------------------------------------------


def gdn_variants() -> list:
    """Every variant that a server can launch at one head ratio, in vLLM (drafts), in SGLang (verify), and one of each of the others, at
    the other ratios."""
    import torch

    from moe_backend_plugin.gdn.cuda import Layer, tiles
    from moe_backend_plugin.kernels.gdn_decode import Variant

    bf16, fp16 = torch.bfloat16, torch.float16
    layers = [
        Layer(torch.float32, bf16, bf16, heads_per_group=2, norm="silu"),
        Layer(bf16, bf16, bf16, heads_per_group=2, norm="silu"),
        Layer(torch.float32, fp16, fp16, heads_per_group=2),
        Layer(fp16, fp16, fp16, heads_per_group=2),
    ]
    others = [
        Variant(heads_per_group=1, split=True, write="last"),
        Variant(heads_per_group=3, ragged=True, write="last"),
        Variant(heads_per_group=4, ragged=True, write="none", intermediate=True),
        Variant(heads_per_group=8, ragged=True, write="none", intermediate=True, state="bfloat16", index="int64"),
        Variant(norm="sigmoid", norm_weight="float32", state="bfloat16"),
    ]
    found = [v for layer in layers for v in layer.variants(speculative=True, verify=True)]
    # Rows with drafts get their norm from another kernel in servers; the op gives it to whoever asks.
    drafts = {"write": "each", "accepted": True}, {"write": "none", "intermediate": True}
    for layer, mode in product((layer for layer in layers if layer.norm), drafts):
        found += [layer.variant(tile, ragged=True, **mode) for tile in tiles(layer.state.itemsize, True)]
    return list(dict.fromkeys(found + others))


MAX_TOKENS, MULTIPROCESSORS = 16384, 132


def tuned() -> Iterator[tuple[Any, Any, list]]:
    """(problem, type of its tokens, tactics) of what the package brings for Hopper."""
    import torch

    from moe_backend_plugin.moe import tactic_cache, tactics

    for file in sorted(tactic_cache.SHIPPED.glob("*.json")):
        for entry in tactic_cache.read(file):
            if entry["stamp"]["kernel"].startswith("flashinfer"):  # a Blackwell device's
                continue
            found = list(dict.fromkeys(tactics.parse(bucket["tactic"]) for bucket in entry["buckets"].values()))
            yield tactic_cache.problem_of(entry["problem"]), getattr(torch, entry["problem"]["tokens"]), found


def gemm_variants() -> list:
    """Every variant that the benchmark's models and a dense layer can launch with bf16 tokens, by the heuristic or as tuned, and on a rank
    of several; those of one model with fp16 tokens, and with relu2; and the smallest and largest tiles of what they leave out."""
    import torch

    from moe_backend_plugin.bench.moe import MODELS
    from moe_backend_plugin.linear import cuda as linear
    from moe_backend_plugin.moe.cuda import Ids, variants, variants_of
    from moe_backend_plugin.moe.problem import Activation, MoEProblem

    bf16, fp16 = torch.bfloat16, torch.float16
    silu, relu2 = Activation(), Activation("relu2")
    qwen = MODELS["qwen3-30b-a3b"].problem
    here, mapped = Ids(), Ids(mapped=True)
    found = [
        v for model in MODELS.values() for ids in (here, mapped) for v in variants(model.problem, bf16, MAX_TOKENS, MULTIPROCESSORS, ids)
    ]
    found += [
        v for problem, tokens, own in tuned() for tactic in own for ids in (here, mapped) for v in variants_of(problem, tokens, tactic, ids)
    ]
    # The engines' ids are int32; others may call the op with int64.
    for ids in (Ids(torch.int64), Ids(torch.int64, mapped=True)):
        found += [v for v in variants(qwen, bf16, MAX_TOKENS, MULTIPROCESSORS, ids) if v.pairs == 32 or v.mapped]
    found += variants(qwen, fp16, MAX_TOKENS, MULTIPROCESSORS)
    found += variants(MoEProblem(128, 128, 2048, 768, 8, relu2), bf16, MAX_TOKENS, MULTIPROCESSORS)
    found += variants(
        dataclasses.replace(qwen, num_local_experts=8), bf16, MAX_TOKENS, MULTIPROCESSORS, mapped
    )  # few experts: tiles of few rows
    for problem, tokens in (
        (MoEProblem(128, 128, 2048, 768, 8, relu2), fp16),
        (MODELS["minimax-like"].problem, fp16),
        (MoEProblem(128, 128, 2048, 768, 8, silu, apply_router_weight_on_input=True), bf16),
        (MoEProblem(128, 128, 2112, 704, 8, silu), bf16),  # ragged
    ):
        samples = variants(problem, tokens, MAX_TOKENS, MULTIPROCESSORS)
        found += [v for v in samples if (v.tile_tokens, v.row_groups) in ((8, 1), (128, 2), (144, 2)) and v.pairs in (0, 32)]
    for rows in (5120, 151936):
        found += linear.variants(rows, 2048, bf16, MAX_TOKENS, MULTIPROCESSORS)
    samples = linear.variants(5120, 2112, bf16, MAX_TOKENS, MULTIPROCESSORS)  # ragged
    found += [v for v in samples if (v.tile_tokens, v.row_groups) in ((8, 1), (128, 2))]
    return list(dict.fromkeys(found))


def route_variants() -> list:
    """Every variant that can be launched."""
    from moe_backend_plugin.moe import route

    both = product(route.INDEX_TYPES, (False, True))
    return list(dict.fromkeys(v for index, mapped in both for v in route.route_variants(index, mapped)))


def combine_variants() -> list:
    """Numbers of experts a token that divide a 16-byte load and others, all types."""
    import torch

    from moe_backend_plugin.moe import route

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    arguments = [
        *((bf16, bf16, k) for k in (1, 5, 6, 8, 10, 32)),
        (fp16, fp16, 8),
        (fp32, bf16, 8),
        (fp32, fp16, 10),
        (fp32, bf16, 32),
    ]
    return list(dict.fromkeys(v for a in arguments for v in route.combine_variants(*a)))


# --- machine code ---------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A kernel as compiled: instructions in their order (without operands), and what a block takes; sizes in bytes."""

    instructions: list[str]
    registers: int
    spills: int
    shared_bytes: int

    def count(self, *names: str) -> int:
        """Instructions that are one of ``names``, with further modifiers or without."""
        return sum(any(op == name or op.startswith(name + ".") for name in names) for op in self.instructions)

    def bits(self, name: str) -> list[int]:
        """How wide each of these accesses is."""
        found = (re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", op) for op in self.instructions if op.split(".")[0] == name)
        return [int(bits[1]) if bits else 32 for bits in found]


class _Compiled(NamedTuple):
    text: bytes  # of the machine code
    used: dict[str, int]
    dynamic_shared: int


_codes: dict[Job, Code] = {}


def codes(jobs: Iterable[Job]) -> dict[Job, Code]:
    """The machine code of these kernels; those that this process has not met before are compiled."""
    jobs = list(dict.fromkeys(jobs))
    new = [job for job in jobs if job not in _codes]
    if new:
        compiled = _compile_all(new)
        for architecture in dict.fromkeys(job[2] for job in new):
            same = [job for job in new if job[2] == architecture]
            for job, instructions in zip(same, _disassemble([compiled[job].text for job in same], architecture), strict=True):
                used = compiled[job].used
                shared = used["SHARED"] + compiled[job].dynamic_shared
                _codes[job] = Code(instructions, used["REG"], used["STACK"] + used["LOCAL"], shared)
    return {job: _codes[job] for job in jobs}


_begun: tuple[ProcessPoolExecutor, dict[Job, Future]] | None = None


def begin() -> None:
    """Have the kernels of the table compiled in other processes, while this one does something else."""
    global _begun
    _begun = _submit(jobs())


def end() -> None:
    """Give up what :func:`begin` began."""
    if _begun is not None:
        _begun[0].shutdown(cancel_futures=True)


def _submit(jobs: Iterable[Job]) -> tuple[ProcessPoolExecutor, dict[Job, Future]]:
    pool = ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), mp_context=multiprocessing.get_context("spawn"))
    return pool, {job: pool.submit(_compile, job) for job in jobs}


def _compile_all(jobs: list[Job]) -> dict[Job, _Compiled]:
    """On all cores: other processes begin at the front, this one at the back, because it has the compiler imported already."""
    begun = _begun is not None and set(jobs) <= _begun[1].keys()
    pool, futures = _begun if begun else _submit(jobs)
    try:
        return {job: _compile(job) if futures[job].cancel() else futures[job].result() for job in reversed(jobs)}
    finally:
        if not begun:  # others may still be asked for
            pool.shutdown(cancel_futures=True)


def _compile(job: Job) -> _Compiled:
    from moe_backend_plugin.kernels.compile import compile_for

    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = compile_for(*job, options=f"--keep-cubin --dump-dir {folder}")
        except Exception as error:
            raise RuntimeError(f"{key(row_of(job))}: {error}") from error
        (cubin,) = Path(folder).glob("*.cubin")
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        return _Compiled(_text_section(cubin.read_bytes()), used, dynamic_shared(str(compiled.ir_module)))


def _text_section(elf: bytes) -> bytes:
    """The instructions of the one kernel in a cubin."""
    (sections,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, sections + i * size) for i in range(number)]  # name, type, flags, address, offset, size
    (found,) = (header for header in headers if elf.startswith(b".text.", headers[names][4] + header[0]))
    return elf[found[4] : found[4] + found[5]]


def _disassemble(texts: list[bytes], architecture: str) -> list[list[str]]:
    """The instructions of each text, from one run of the disassembler over all."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(texts))
        file.flush()
        command = [tool("nvdisasm"), "--binary", architecture.replace("sm_", "SM"), "--no-dataflow", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    lengths = [len(text) // 16 for text in texts]
    assert len(instructions) == sum(lengths), f"{len(instructions)} instructions read, of {sum(lengths)}"
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [[sys.intern(op) for op in instructions[end - length : end]] for end, length in zip(ends, lengths, strict=True)]


def dynamic_shared(ir: str) -> int:
    """Bytes of shared memory that the launch asks for, which the cubin does not say: the third field of its configuration."""
    field = re.search(r"(%\d+) = llvm\.getelementptr %\d+\[0, 2\].*array<3 x i32>, array<3 x i32>, i64, ptr", ir)
    value = re.compile(rf"llvm\.store (%\d+), {field[1]} : i64").search(ir, field.end())
    return int(re.findall(rf"{value[1]} = llvm\.mlir\.constant\((\d+) : i64\)", ir[: value.start()])[-1])


# --- columns of the table -------------------------------------------------------------------------------------------------


def width(accesses: list[int], needed: int) -> int:
    """Bits of the narrowest of the ``needed`` widest accesses, 0 if there are too few."""
    return sorted(accesses)[-needed] if 0 < needed <= len(accesses) else 0


def gdn_columns(variant, code: Code) -> dict[str, int]:
    from moe_backend_plugin.kernels.gdn_decode import HEAD, LANES, TYPES

    # A thread's part of the state is that many accesses of 128 bits, for each place that loads or stores it.
    vec = 128 // TYPES[variant.state].width
    pieces = HEAD // (LANES * vec) * (variant.tile_v // (variant.warps * (32 // LANES)))
    return {
        "load_bits": width(code.bits("LDG"), pieces),
        "store_bits": width(code.bits("STG"), pieces * (variant.intermediate + (variant.write != "none"))),
    }


def gemm_columns(variant, code: Code) -> dict[str, int]:
    """Weights: bulk copies, then 16 bytes of codes a thread and unit (``lds_128``). Tokens: asynchronous copies of 16 bytes.

    ``hgmma_per_arrive``: four to a unit of weights. 1 if the assembler has made them wait for each other.
    """
    hgmma, arrive = code.count("HGMMA"), code.count("WARPGROUP.ARRIVE")
    return {
        "local_accesses": code.count("LDL", "STL"),
        "bulk_copies": code.count("UBLKCP"),
        "token_copies_128": sum(bits == 128 for bits in code.bits("LDGSTS")),
        "lds_128": code.count("LDS.128"),
        "hmma": code.count("HMMA"),
        "hgmma": hgmma,
        "hgmma_per_arrive": hgmma // arrive if arrive else 0,
    }


def route_columns(variant, code: Code) -> dict[str, int]:
    ids = {"ballot": variant.threads // 32, "block": variant.pairs}.get(variant.method, 1)
    return {
        "local_accesses": code.count("LDL", "STL"),
        "load_bits": width(code.bits("LDG"), ids),
        "store_bits": width(code.bits("STG"), 1),
    }


def combine_columns(variant, code: Code) -> dict[str, int]:
    return {
        "local_accesses": code.count("LDL", "STL"),
        "load_bits": width(code.bits("LDG"), variant.top_k),
        "store_bits": width(code.bits("STG"), 1),
    }


class Family(NamedTuple):
    """``on_blackwell``: which variants are compiled for sm_100a too; a sample of those around moe_gemm, which is not made for it, and of
    gdn_decode those with bf16 tokens, as all its models have."""

    variants: Callable[[], list]
    columns: Callable[[Any, Code], dict[str, int]]
    on_blackwell: Callable[[Any], bool]


FAMILIES = {
    "gdn_decode": Family(gdn_variants, gdn_columns, lambda v: v.tokens == "bfloat16"),
    "moe_gemm": Family(gemm_variants, gemm_columns, lambda v: False),
    "moe_route": Family(route_variants, route_columns, lambda v: v.mapped == (v.index == "int64")),
    "moe_combine": Family(combine_variants, combine_columns, lambda v: v.top_k in (5, 8, 10)),
}


def text(variant) -> str:
    """The fields that differ from the defaults, so that a new field with a default leaves the table valid."""
    changed = (f.name for f in dataclasses.fields(variant) if getattr(variant, f.name) != f.default)
    return ", ".join(f"{name}={getattr(variant, name)}" for name in changed) or "default"


def key(row: dict) -> str:
    return f"{row['family']} [{row['variant']}] {row['architecture']}"


def row_of(job: Job) -> dict:
    family, variant, architecture = job
    return {"family": family, "variant": text(variant), "architecture": architecture}


@cache
def jobs(*families: str) -> tuple[Job, ...]:
    """The kernels of these families; of all, if none is named."""
    found = []
    for name in families or FAMILIES:
        for variant in FAMILIES[name].variants():
            found.append((name, variant, "sm_90a"))
            if FAMILIES[name].on_blackwell(variant):
                found.append((name, variant, "sm_100a"))
    return tuple(found)


def measure(job: Job, code: Code) -> dict:
    """A row of the table."""
    family, variant, _ = job
    use = {"registers": code.registers, "spills": code.spills, "shared_bytes": code.shared_bytes}
    return row_of(job) | use | FAMILIES[family].columns(variant, code)


def measure_all() -> list[dict]:
    """All rows."""
    return [measure(job, code) for job, code in codes(jobs()).items()]


def read_table() -> dict[str, dict]:
    return {key(row): row for row in json.loads(TABLE.read_text())}


def differences(found: dict, kept: dict) -> tuple[list[str], list[str]]:
    """(what is worse than the table, what is better), as text."""
    worse, better = [], []
    for name in dict.fromkeys([*found, *kept]):
        where = f"{key(found)}: {name}:"
        if name not in kept:
            worse.append(f"{where} found {found[name]}, not in the table")
        elif name not in found:
            worse.append(f"{where} in the table, but measured no more")
        elif found[name] != kept[name]:
            more = found[name] > kept[name]
            (worse if more == (name in LIMITS) else better).append(f"{where} found {found[name]}, table {kept[name]}")
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
