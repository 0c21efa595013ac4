"""The routing and combine kernels as machine code, for both architectures; compiling needs no GPU. They run in test_route_cuda.py."""

import importlib.util
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

from moe_backend_plugin.kernels import compile as kernels  # noqa: E402  must not be imported where CuTe DSL is missing
from moe_backend_plugin.kernels import moe_combine, moe_route  # noqa: E402
from moe_backend_plugin.moe import route as r  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUTES = list(dict.fromkeys(v for index, mapped in product(r.INDEX_TYPES, (False, True)) for v in r.route_variants(index, mapped)))
COMBINES = list(
    dict.fromkeys(
        variant
        for arguments in [
            *((BF16, BF16, k) for k in (1, 5, 6, 8, 10, 32)),
            (FP16, FP16, 8),
            (FP32, BF16, 8),
            *((FP32, BF16, 8, splits) for splits in (2, 4, 16)),
            (FP32, FP16, 10, 3),
            (FP32, BF16, 32, 2),
        ]
        for variant in r.combine_variants(*arguments)
    )
)


def tool(name):
    triton = importlib.util.find_spec("triton")
    copy = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return str(copy) if copy and copy.exists() else shutil.which(name)


def machine_code(family, variant, architecture, folder):
    """(instructions in their order, bytes of stack and local memory)"""
    absent = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    if absent:
        pytest.skip(f"no {', '.join(absent)}: neither Triton nor the CUDA toolkit is installed")
    kernels.compile_for(family, variant, architecture, options=f"--keep-cubin --dump-dir {folder}")
    (cubin,) = folder.glob("*.cubin")
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    code = subprocess.run([tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
    spilled = sum(int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code), spilled


def count(code, *names):
    return sum(any(op == name or op.startswith(name + ".") for name in names) for op in code)


def assert_safe_behind_another_kernel(code):
    """Nothing of global memory is read or written before the wait, and nothing goes through the cache that may be stale."""
    wait = code.index("ACQBULK")
    assert "PREEXIT" in code[:wait]
    assert count(code[:wait], "LDG", "STG", "ATOMG", "RED", "LD", "ST") == 0
    assert not [op for op in code if "CONSTANT" in op]


@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES)
@pytest.mark.parametrize("variant", ROUTES, ids=lambda v: f"{v.method}-{v.threads}-{v.index}{'-mapped' * v.mapped}")
def test_route(variant, architecture, tmp_path):
    code, spilled = machine_code(r.ROUTE, variant, architecture, tmp_path)
    assert spilled == 0
    assert_safe_behind_another_kernel(code)
    loads = variant.threads // 32 if variant.method == "ballot" else variant.pairs
    ids, maps = count(code, "LDG.E.64"), count(code, "LDG.E") - count(code, "LDG.E.64")
    if variant.index == "int32":
        assert ids == 0 and (maps >= 2 * loads if variant.mapped else maps >= loads)
    else:
        assert ids == loads and (maps >= loads) >= variant.mapped
    barriers = {"ballot": int(variant.threads > 32), "block": 5, "count": 2, "scatter": 5}[variant.method]
    assert count(code, "BAR") == barriers
    if variant.method != "count":
        assert count(code, "STG.E.128") == (variant.pairs if variant.method == "block" else 1) + 1  # tiles, counts


@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES)
@pytest.mark.parametrize("variant", COMBINES, ids=lambda v: f"{v.rows}-{v.tokens}-{v.top_k}-{v.splits}-{v.threads}")
def test_combine(variant, architecture, tmp_path):
    code, spilled = machine_code(r.COMBINE, variant, architecture, tmp_path)
    assert spilled == 0
    assert_safe_behind_another_kernel(code)
    positions = variant.top_k // 4 if variant.top_k % 4 == 0 else 0
    assert count(code, "LDG.E.128") == variant.top_k * variant.splits + positions
    assert count(code, "STG.E.64" if variant.rows == "float32" else "STG.E.128") == count(code, "STG") == 1
    if architecture == "sm_90a" and variant.splits == 1:
        assert count(code, "BRA") == 1  # the trap behind the end: loads are predicated, so a thread's are on their way together


def test_every_call_finds_its_kernel_compiled_ahead():
    compiled = {(v.method, v.threads, v.pairs) for v in ROUTES}
    assert {r.route_shape(pairs) for pairs in (*range(1, 6000), 1 << 19)} <= compiled
    for rows, hidden in product((BF16, FP32), (256, 2048, 7168)):
        shapes = {r.combine_shape(tokens, hidden, rows.itemsize) for tokens in range(1, 3000)}
        assert shapes == {(v.threads, v.loads) for v in r.combine_variants(rows, BF16, 8)}


@pytest.mark.parametrize(
    ("module", "fields", "words"),
    [
        (moe_route, {"method": "sort"}, ["method", "'sort'", "ballot, block, count, scatter"]),
        (moe_route, {"threads": 96}, ["threads", "96", "32, 64"]),
        (moe_route, {"method": "count", "threads": 256}, ["threads", "1024"]),
        (moe_route, {"pairs": 2}, ["pairs"]),
        (moe_route, {"method": "block", "threads": 1024, "pairs": 16}, ["pairs", "8192"]),
        (moe_combine, {"top_k": 33}, ["top_k", "33", "1..32"]),
        (moe_combine, {"splits": 2}, ["bfloat16 in 2 splits", "float32"]),
        (moe_combine, {"splits": 17, "rows": "float32"}, ["splits", "1..16"]),
        (moe_combine, {"threads": 48}, ["threads", "48"]),
    ],
)
def test_a_variant_that_cannot_be_is_refused(module, fields, words):
    with pytest.raises(ValueError) as error:
        module.Variant(**fields)
    assert all(word in str(error.value) for word in words)
