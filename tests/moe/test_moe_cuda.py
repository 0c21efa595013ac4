"""The Hopper kernels of a whole MoE layer against the float32 reference, from one token to prefill, on good and bad routings.

Outputs are full of NaN before a call and lie between guard rows. ``MOE_CUDA_PROBLEMS`` and ``MOE_CUDA_ROUTINGS`` set how many random
problems and adversarial routings are drawn, ``MOE_CUDA_SEED`` which; ``MOE_CUDA_FIGURES`` names a JSON file for the figures that tests
find (see ``integration/gpu/moe_correctness.py``).
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_cases import ACTIVATIONS, Drawn, drawn, sample_rows

from moe_backend_plugin.moe import reference
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.nvfp4 import hopper

if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("MoE kernels: no GPU of compute capability 9.0", allow_module_level=True)
pytest.importorskip("cutlass", reason="CuTe DSL is not installed (extra: kernels)")
from moe_backend_plugin.moe import cuda  # noqa: E402

DEVICE = torch.device("cuda", 0)
BOUND = 4e-3
PROBLEMS = int(os.environ.get("MOE_CUDA_PROBLEMS", "60"))
ROUTINGS = int(os.environ.get("MOE_CUDA_ROUTINGS", "500"))
SEED = os.environ.get("MOE_CUDA_SEED", "1")
GUARD = 7
SHAPES = (  # experts here, experts, hidden, width, top_k
    (8, 8, 256, 64, 2),
    (16, 16, 512, 192, 4),
    (6, 24, 272, 144, 3),
    (64, 64, 1024, 256, 8),
    (3, 3, 2880, 720, 1),
    (128, 128, 2048, 768, 8),
    (32, 256, 1536, 512, 8),
    (5, 5, 400, 1040, 5),
)


_figures: list[dict[str, Any]] = []


def record(check: str, **figures: Any) -> None:
    """Say what a test found, and write it where ``MOE_CUDA_FIGURES`` says."""
    _figures.append({"check": check, **figures})
    print(_figures[-1])
    if path := os.environ.get("MOE_CUDA_FIGURES"):
        Path(path).write_text(json.dumps(_figures, indent=1) + "\n", encoding="utf-8")


class Layer:
    """Random experts of one problem, in both forms."""

    def __init__(self, problem: MoEProblem, seed: int = 0) -> None:
        random_ = torch.Generator(DEVICE).manual_seed(seed)
        p, self.problem = problem, problem
        e = p.num_local_experts

        def projection(rows: int, columns: int):
            codes = torch.randint(0, 256, (e, rows, columns // 2), dtype=torch.uint8, device=DEVICE, generator=random_)
            scales = torch.rand(e, rows, columns // 16, device=DEVICE, generator=random_) * 4 + 2**-9
            return codes, scales.to(torch.float8_e4m3fn)

        def scale_2(*shape: int):
            return (torch.rand(*shape, device=DEVICE, generator=random_) + 0.5) / (6 * p.hidden**0.5)

        self.w13, self.w2 = projection(p.w13_rows, p.hidden), projection(p.hidden, p.intermediate)
        self.w13_scale_2 = scale_2(e, 2 if p.activation.gated else 1)
        self.w2_scale_2 = scale_2(e)
        self.packed = cuda.Weights(
            hopper.pack(*self.w13, gated=p.activation.gated), self.w13_scale_2, hopper.pack(*self.w2, gated=False), self.w2_scale_2
        )

    def reference(self, x, weights, ids, expert_map=None):
        scaled = (*self.w13, self.w13_scale_2, *self.w2, self.w2_scale_2)
        return reference.fused_moe(x, *scaled, weights, ids, self.problem, expert_map)

    def call(self, x, weights, ids, expert_map=None):
        """The kernels' result; fails if a guard row was written."""
        held = torch.full((x.shape[0] + 2 * GUARD, x.shape[1]), float("nan"), dtype=x.dtype, device=DEVICE)
        out = held[GUARD : GUARD + x.shape[0]]
        cuda.fused_moe(x, self.packed, weights, ids, self.problem, out, expert_map)
        assert held[:GUARD].isnan().all() and held[GUARD + x.shape[0] :].isnan().all()
        return out


@cache
def layer(shape: tuple, activation: Activation = ACTIVATIONS[0], on_input: bool = False) -> Layer:
    local, experts, hidden, width, top_k = shape
    return Layer(MoEProblem(experts, local, hidden, width, top_k, activation, apply_router_weight_on_input=on_input))


def inputs(problem: MoEProblem, tokens: int, dtype=torch.bfloat16, seed: int = 0):
    random_ = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(tokens, problem.hidden, device=DEVICE, generator=random_).to(dtype)
    weights = torch.rand(tokens, problem.top_k, device=DEVICE, generator=random_)
    ids = torch.rand(tokens, problem.num_experts, device=DEVICE, generator=random_).topk(problem.top_k, dim=1).indices.int()
    return x, weights, ids


@cache
def map_of(problem: MoEProblem, seed: int = 0) -> torch.Tensor | None:
    """Which experts are here: some of all, in any order."""
    if problem.num_local_experts == problem.num_experts:
        return None
    chosen = random.Random(seed).sample(range(problem.num_experts), problem.num_local_experts)
    mapping = torch.full((problem.num_experts,), -1, dtype=torch.int32)
    mapping[chosen] = torch.arange(problem.num_local_experts, dtype=torch.int32)
    return mapping.to(DEVICE)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-20))


def elsewhere(problem: MoEProblem, ids: torch.Tensor, mapping: torch.Tensor | None) -> torch.Tensor:
    """Ids none of which is here: experts that the map leaves out, or ids behind the last; most of these are no experts at all."""
    first = problem.num_local_experts
    absent = torch.arange(first, first + problem.num_experts, device=DEVICE) if mapping is None else (mapping < 0).nonzero()[:, 0]
    if not absent.numel():
        return torch.full_like(ids, problem.num_experts)
    return absent[ids.long() % absent.numel()].to(ids.dtype)


def routed(problem: MoEProblem, ids: torch.Tensor, kind: str, seed: int, mapping: torch.Tensor | None = None) -> torch.Tensor:
    chance, random_ = random.Random(seed), torch.Generator(DEVICE).manual_seed(seed)
    if kind == "one expert":
        return torch.full_like(ids, chance.randrange(problem.num_experts))
    if kind == "duplicates":
        return ids[:, :1].expand_as(ids).contiguous()
    if kind == "out of range":
        wild = torch.tensor([-1, -(2**31), problem.num_experts, 2**31 - 1], dtype=ids.dtype, device=DEVICE)
        hit = torch.rand(ids.shape, device=DEVICE, generator=random_) < 0.4
        return torch.where(hit, wild[torch.randint(0, 4, ids.shape, device=DEVICE, generator=random_)], ids)
    if kind == "none here":
        return torch.full_like(ids, -1)
    if kind == "none local":
        return elsewhere(problem, ids, mapping)
    if kind == "skewed":
        return (torch.rand(ids.shape, device=DEVICE, generator=random_).pow(4) * problem.num_experts).to(ids.dtype)
    return ids


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 33, 130, 700])
def test_equals_the_reference(shape, tokens):
    case = layer(shape)
    x, weights, ids = inputs(case.problem, tokens, seed=tokens)
    mapping = map_of(case.problem)
    assert relative(case.call(x, weights, ids, mapping), case.reference(x, weights, ids, mapping)) < BOUND


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on_input", [False, True])
def test_activations_types_and_router_weights_on_the_input(activation, dtype, on_input):
    case = layer(SHAPES[1], activation, on_input)
    for tokens in (3, 40, 200):
        x, weights, ids = inputs(case.problem, tokens, dtype, seed=tokens)
        # The reference rounds a weighted input to the tokens' type, the kernels multiply sums: a reference in float32 is nearer to both.
        assert relative(case.call(x, weights, ids), case.reference(x.float(), weights, ids)) < BOUND


def prepare_drawn(calls: list[Drawn], fields: list[dict]) -> int:
    """Compile what all calls launch, on all cores, and make the arena large enough once: growing keeps what calls have used. Returns the
    number of kernels."""
    from moe_backend_plugin.kernels import compile as kernels
    from moe_backend_plugin.kernels.moe_gemm import Variant
    from moe_backend_plugin.moe import route, tactics, workspace

    ids = dict.fromkeys((call.index, call.mapped) for call in calls)
    sums = dict.fromkeys((call.dtype, call.problem.top_k) for call in calls)
    families = {
        cuda.GEMM: [Variant(**one) for one in fields],
        route.ROUTE: list(dict.fromkeys(variant for one in ids for variant in route.route_variants(*one))),
        route.COMBINE: list(dict.fromkeys(v for dtype, top_k in sums for v in route.combine_variants(dtype, dtype, top_k))),
    }
    architecture = kernels.device_architecture(0, cuda.ARCHITECTURES)
    for family, variants in families.items():
        kernels.prepare(family, variants, architecture, jobs=len(os.sched_getaffinity(0)))
    multiprocessors = cuda.multiprocessors_of(0)
    chosen = [tactics.chosen(call.problem, call.tokens, multiprocessors, call.dtype) for call in calls]
    plans = [
        workspace.plan(call.problem, call.tokens, workspace.Call(choice.tile_tokens, y=call.dtype), call.dtype, route.scratch_ints)
        for call, choice in zip(calls, chosen, strict=True)
    ]
    workspace.Arena.get(DEVICE, max(plan.bytes for plan in plans), workspace.EVERY_STREAM)
    return sum(map(len, families.values()))


def error_of(call: Drawn) -> float:
    """Relative error of a drawn call, over rows that the reference is quick with; guards and all other rows are looked at too."""
    problem, chance = call.problem, random.Random(call.seed)
    case, mapping = Layer(problem, call.seed), map_of.__wrapped__(problem, call.seed)
    x, weights, ids = inputs(problem, call.tokens, call.dtype, call.seed)
    if problem.apply_router_weight_on_input:
        # Squared by relu2, what small weights leave is below the normal numbers of float16.
        weights.mul_(0.75).add_(0.25)
    ids = routed(problem, ids, call.routing, call.seed, mapping).to(call.index)
    found = case.call(x, weights, ids, mapping)
    assert found.isfinite().all(), call
    rows = sample_rows(ids.tolist(), chance)
    # As above: the reference rounds a weighted input.
    tokens = x[rows].float() if problem.apply_router_weight_on_input else x[rows]
    return relative(found[rows], case.reference(tokens, weights[rows], ids[rows], mapping))


def test_random_problems():
    calls, fields = drawn(PROBLEMS, SEED, cuda.multiprocessors_of(0))
    kernels = prepare_drawn(calls, fields)
    done, largest, wrong = 0, 0.0, []
    try:
        for number, call in enumerate(calls):
            error = error_of(call)
            done, largest = done + 1, max(largest, error)
            if not error < BOUND:
                wrong.append((number, error, call))
    finally:
        record(
            "random problems",
            count=done,
            largest_relative_error=largest,
            bound=BOUND,
            beyond_bound=len(wrong),
            seed=SEED,
            expert_kernels=len(fields),
            kernels=kernels,
            routings=dict(Counter(call.routing for call in calls)),
            **{
                name: [min(getattr(call.problem, name) for call in calls), max(getattr(call.problem, name) for call in calls)]
                for name in ("hidden", "intermediate", "num_experts", "num_local_experts", "top_k")
            },
            tokens=[min(call.tokens for call in calls), max(call.tokens for call in calls)],
        )
    assert not wrong, wrong[:5]


ADVERSARIAL = ("duplicates", "out of range", "NaN weights", "one expert", "none local", "mixed")
_routings = Counter()


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 300])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_adversarial_routings_neither_crash_nor_write_outside(shape, tokens):
    case = layer(shape)
    problem = case.problem
    random_ = torch.Generator(DEVICE).manual_seed(tokens)
    x, weights, even = inputs(problem, tokens)
    weights[tokens // 2] = float("nan")
    bad = torch.where(torch.rand(weights.shape, device=DEVICE, generator=random_) < 0.3, float("nan"), weights)
    wild = torch.tensor([-1, -(2**31), problem.num_experts, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    held = torch.full((tokens + 2 * GUARD, x.shape[1]), float("nan"), dtype=x.dtype, device=DEVICE)
    out = held[GUARD : GUARD + tokens]
    nonzero = torch.zeros((), dtype=torch.int64, device=DEVICE)  # read once, since reading waits for the GPU
    done = Counter()
    for number in range(max(len(ADVERSARIAL), -(-ROUTINGS // 15))):
        kind = ADVERSARIAL[number % len(ADVERSARIAL)]
        mapping = map_of(problem, number % 8) if number // len(ADVERSARIAL) % 2 else None
        hot = int(number * 7919 % problem.num_experts)
        ids = torch.randint(0, problem.num_experts, even.shape, dtype=torch.int32, device=DEVICE, generator=random_)
        hit = torch.rand(even.shape, device=DEVICE, generator=random_)
        if kind == "duplicates":
            ids = ids[:, :1].expand_as(ids).contiguous()
        elif kind == "one expert":
            ids = torch.full_like(ids, hot)
        elif kind == "none local":
            ids = elsewhere(problem, ids, mapping)
        elif kind == "out of range":
            ids = torch.where(hit < (1 + number % 3) * 0.3, wild[(ids + number) % 4], ids)
        elif kind == "mixed":
            ids = torch.where(hit < (number % 4) * 0.3, wild[(ids + number) % 4], ids)
            ids = torch.where(hit > 1 - (number % 5) * 0.25, hot, ids)
        cuda.fused_moe(x, case.packed, bad if kind == "NaN weights" else weights, ids, problem, out, mapping)
        if kind == "none local":
            nonzero += out.count_nonzero()
        done[kind] += 1
    torch.cuda.synchronize()
    assert held[:GUARD].isnan().all() and held[GUARD + tokens :].isnan().all()
    assert not nonzero, "rows of experts that are not here are not zero"
    _routings.update(done)


def test_adversarial_routings_are_counted():
    """Of those above that ran in this process."""
    for kind, count in _routings.items():
        record("adversarial routings", kind=kind, count=count)


@pytest.mark.parametrize("tokens", [1, 12, 300])
def test_nan_stays_in_its_row(tokens):
    case = layer(SHAPES[1])
    x, weights, ids = inputs(case.problem, tokens)
    clean = case.call(x, weights, ids).clone()
    x[tokens // 2] = float("nan")
    weights[0, 0] = float("nan")
    found = case.call(x, weights, ids)
    dirty = sorted({0, tokens // 2})
    assert found[dirty].isnan().all()
    kept = [row for row in range(tokens) if row not in dirty]
    assert torch.equal(found[kept], clean[kept])


@pytest.mark.parametrize("kind", ["even", "skewed", "one expert"])
@pytest.mark.parametrize("tokens", [4, 64, 256, 700, 2048])
def test_a_row_does_not_depend_on_the_others(tokens, kind):
    """From 700 tokens on tiles have a path for half as many tokens, and how the others are routed says which path a row takes."""
    case = layer(SHAPES[3])
    x, weights, ids = inputs(case.problem, tokens)
    kept = [0, 1, tokens - 1]
    first = case.call(x, weights, ids)[kept].clone()
    for seed in range(4):
        other_x, other_weights, other_ids = inputs(case.problem, tokens, seed=100 + seed)
        other_ids = routed(case.problem, other_ids, kind, seed)
        for other, own in ((other_x, x), (other_weights, weights), (other_ids, ids)):
            other[kept] = own[kept]
        assert torch.equal(case.call(other_x, other_weights, other_ids)[kept], first)
    record("row independence", tokens=tokens, routing=kind, count=4)


@pytest.mark.parametrize("tokens", [1, 16, 700])
def test_results_repeat_and_replay_bit_for_bit(tokens):
    case = layer(SHAPES[3])
    x, weights, ids = inputs(case.problem, tokens)
    out = torch.empty_like(x)
    arguments = (x, case.packed, weights, ids, case.problem, out)
    cuda.fused_moe(*arguments)
    once = out.clone()
    for _ in range(20):
        cuda.fused_moe(*arguments)
        assert torch.equal(out, once)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.fused_moe(*arguments)
    for seed in range(5):
        for held, new in zip((x, weights, ids), inputs(case.problem, tokens, seed=seed), strict=True):
            held.copy_(new)
        cuda.fused_moe(*arguments)
        eager = out.clone()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
    record("repeat and replay", tokens=tokens, count=25)


def test_no_tokens():
    case = layer(SHAPES[0])
    x, weights, ids = inputs(case.problem, 0)
    assert case.call(x, weights, ids).shape == (0, case.problem.hidden)


def test_prepare_compiles_what_calls_launch_and_sizes_the_arena():
    from moe_backend_plugin.kernels import compile as kernels
    from moe_backend_plugin.moe import workspace

    case = layer(SHAPES[1])
    cuda.prepare(case.problem, torch.bfloat16, torch.int32, DEVICE, 512, False)
    known = set(kernels._loaded)
    size = workspace.Arena.get(DEVICE, 0, workspace.EVERY_STREAM).bytes
    assert size >= cuda.arena_bytes(case.problem, 512)
    for tokens in range(1, 513, 3):
        case.call(*inputs(case.problem, tokens))
    assert set(kernels._loaded) == known
    assert workspace.Arena.get(DEVICE, 0, workspace.EVERY_STREAM).bytes == size
