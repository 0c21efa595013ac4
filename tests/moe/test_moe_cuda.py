"""The Hopper kernels of a whole MoE layer against the float32 reference, from one token to prefill, on good and bad routings.

Outputs are full of NaN before a call and lie between guard rows. ``MOE_CUDA_PROBLEMS`` and ``MOE_CUDA_ROUTINGS`` set how many random
problems and adversarial routings are drawn.
"""

from __future__ import annotations

import os
import random
from functools import cache

import pytest
import torch

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
GUARD = 7
ACTIVATIONS = (
    Activation("silu"),
    Activation("silu", limit=1.5),
    Activation("swigluoai", alpha=1.702, beta=1.0, limit=7.0),
    Activation("relu2"),
)
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


def routed(problem: MoEProblem, ids: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    chance = random.Random(seed)
    if kind == "one expert":
        return torch.full_like(ids, chance.randrange(problem.num_experts))
    if kind == "duplicates":
        return ids[:, :1].expand_as(ids).contiguous()
    if kind == "out of range":
        wild = torch.tensor([-1, -(2**31), problem.num_experts, 2**31 - 1], dtype=ids.dtype, device=DEVICE)
        hit = torch.rand(ids.shape, device=DEVICE) < 0.4
        return torch.where(hit, wild[torch.randint(0, 4, ids.shape, device=DEVICE)], ids)
    if kind == "none here":
        return torch.full_like(ids, -1)
    if kind == "skewed":
        return (torch.rand(ids.shape, device=DEVICE).pow(4) * problem.num_experts).to(ids.dtype)
    return ids


KINDS = ("even", "one expert", "duplicates", "out of range", "none here", "skewed")


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


def test_random_problems():
    chance = random.Random(os.environ.get("MOE_CUDA_SEED", "1"))
    largest = 0.0
    for number in range(PROBLEMS):
        case = layer(chance.choice(SHAPES), chance.choice(ACTIVATIONS))
        # Experts cost the reference most of its time; where there are many, calls are small.
        tokens = max(1, round(2 ** chance.uniform(0, 5 if case.problem.num_local_experts > 32 else 10)))
        kind = chance.choice(KINDS)
        x, weights, ids = inputs(case.problem, tokens, seed=number)
        ids, mapping = routed(case.problem, ids, kind, number), map_of(case.problem, number)
        if chance.random() < 0.5:
            ids = ids.long()
        found, wanted = case.call(x, weights, ids, mapping), case.reference(x, weights, ids, mapping)
        assert found.isfinite().all(), (number, case.problem, tokens, kind)
        error = relative(found, wanted)
        largest = max(largest, error)
        assert error < BOUND, (number, case.problem, tokens, kind)
    print(f"{PROBLEMS} problems, largest relative error {largest:.2e}")


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 300])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_adversarial_routings_neither_crash_nor_write_outside(shape, tokens):
    case = layer(shape)
    random_ = torch.Generator(DEVICE).manual_seed(tokens)
    x, weights, even = inputs(case.problem, tokens)
    weights[tokens // 2] = float("nan")
    wild = torch.tensor([-1, -(2**31), case.problem.num_experts, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    held = torch.full((tokens + 2 * GUARD, x.shape[1]), float("nan"), dtype=x.dtype, device=DEVICE)
    out = held[GUARD : GUARD + tokens]
    for number in range(max(1, ROUTINGS // 15)):
        hot = int(number * 7919 % case.problem.num_experts)
        ids = torch.randint(0, case.problem.num_experts, even.shape, dtype=torch.int32, device=DEVICE, generator=random_)
        hit = torch.rand(even.shape, device=DEVICE, generator=random_)
        ids = torch.where(hit < (number % 4) * 0.3, wild[(ids + number) % 4], ids)
        ids = torch.where(hit > 1 - (number % 5) * 0.25, hot, ids)
        cuda.fused_moe(x, case.packed, weights, ids, case.problem, out, map_of(case.problem, number % 8) if number % 2 else None)
    torch.cuda.synchronize()
    assert held[:GUARD].isnan().all() and held[GUARD + tokens :].isnan().all()


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


@pytest.mark.parametrize("tokens", [4, 64, 256])
def test_a_row_does_not_depend_on_the_others(tokens):
    case = layer(SHAPES[3])
    x, weights, ids = inputs(case.problem, tokens)
    first = case.call(x, weights, ids)[:2].clone()
    for seed in range(4):
        other_x, other_weights, other_ids = inputs(case.problem, tokens, seed=100 + seed)
        other_x[:2], other_weights[:2], other_ids[:2] = x[:2], weights[:2], ids[:2]
        assert torch.equal(case.call(other_x, other_weights, routed(case.problem, other_ids, "even", 0))[:2], first)


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
