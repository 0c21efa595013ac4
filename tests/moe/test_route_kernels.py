"""The routing and combine kernels as machine code, for both architectures; compiling needs no GPU. They run in test_route_cuda.py."""

import sys
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import resources  # noqa: E402  compiles each kernel once, also for the table of tests/kernels

from moe_backend_plugin.kernels import moe_combine, moe_route  # noqa: E402  must not be imported where CuTe DSL is missing
from moe_backend_plugin.moe import route as r  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.timeout(900)
ROUTES, COMBINES = resources.jobs(r.ROUTE), resources.jobs(r.COMBINE)


@pytest.fixture(scope="module")
def machine_code():
    if reason := resources.missing():
        pytest.skip(reason)
    return resources.codes(ROUTES + COMBINES)


def name(job):
    _, v, architecture = job
    if job in ROUTES:
        return f"{v.method}-{v.threads}-{v.index}{'-mapped' * v.mapped}-{architecture}"
    return f"{v.rows}-{v.tokens}-{v.top_k}-{v.threads}-{architecture}"


def assert_safe_behind_another_kernel(code):
    """Nothing of global memory is read or written before the wait, and nothing goes through the cache that may be stale."""
    wait = code.instructions.index("ACQBULK")
    before = code._replace(instructions=code.instructions[:wait])
    assert "PREEXIT" in before.instructions
    assert before.count("LDG", "STG", "ATOMG", "RED", "LD", "ST") == 0
    assert not [op for op in code.instructions if "CONSTANT" in op]


@pytest.mark.parametrize("job", ROUTES, ids=name)
def test_route(job, machine_code):
    code, variant = machine_code[job], job[1]
    assert code.spills == 0
    assert_safe_behind_another_kernel(code)
    loads = variant.threads // 32 if variant.method == "ballot" else variant.pairs
    ids, maps = code.count("LDG.E.64"), code.count("LDG.E") - code.count("LDG.E.64")
    if variant.index == "int32":
        assert ids == 0 and (maps >= 2 * loads if variant.mapped else maps >= loads)
    else:
        assert ids == loads and (maps >= loads) >= variant.mapped
    barriers = {"ballot": int(variant.threads > 32), "block": 5, "count": 2, "scatter": 5}[variant.method]
    assert code.count("BAR") == barriers
    if variant.method != "count":
        assert code.count("STG.E.128") == (variant.pairs if variant.method == "block" else 1) + 1  # tiles, counts


@pytest.mark.parametrize("job", COMBINES, ids=name)
def test_combine(job, machine_code):
    code, (_, variant, architecture) = machine_code[job], job
    assert code.spills == 0
    assert_safe_behind_another_kernel(code)
    positions = variant.top_k // 4 if variant.top_k % 4 == 0 else 0
    assert code.count("LDG.E.128") == variant.top_k + positions
    assert code.count("STG.E.64" if variant.rows == "float32" else "STG.E.128") == code.count("STG") == 1
    if architecture == "sm_90a":
        assert code.count("BRA") == 1  # the trap behind the end: loads are predicated, so a thread's are on their way together


def test_every_call_finds_its_kernel_compiled_ahead():
    compiled = {(v.method, v.threads, v.pairs) for _, v, _ in ROUTES}
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
        (moe_combine, {"threads": 48}, ["threads", "48"]),
    ],
)
def test_a_variant_that_cannot_be_is_refused(module, fields, words):
    with pytest.raises(ValueError) as error:
        module.Variant(**fields)
    assert all(word in str(error.value) for word in words)
