"""Random MoE layers, routings, and a float64 loop that shares no code with the package's arithmetic; random problems for the Hopper
kernels."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_backend_plugin.moe import cuda, tactics, tiles
from moe_backend_plugin.moe.op import nvfp4_moe, prepare
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.reference import fused_moe

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Layer:
    """One layer's tensors, its problem, and the three ways to call it."""

    problem: MoEProblem
    weights: tuple[Tensor, ...]
    expert_map: Tensor | None = None
    input_scales: tuple[Tensor, Tensor] | None = None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        w13, w2 = self.input_scales or (None, None)
        return {"expert_map": self.expert_map, "w13_input_scale": w13, "w2_input_scale": w2}

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = self.weights
        w13, w13_scale, w2, w2_scale = prepare(w13, w13_scale, w2, w2_scale)
        return w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2

    def reference(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return fused_moe(x, *self.weights, weights, ids, self.problem, **self.scales)

    def op(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        on_input = self.problem.apply_router_weight_on_input
        return nvfp4_moe(x, *self.prepared, weights, ids, self.problem.activation, apply_router_weight_on_input=on_input, **self.scales)


def make_layer(
    experts: int = 6,
    hidden: int = 64,
    intermediate: int = 48,
    top_k: int = 2,
    activation: Activation | None = None,
    expert_range: tuple[int, int] | None = None,
    w4a4: bool = False,
    on_input: bool = False,
    seed: int = 0,
) -> Layer:
    """A layer whose outputs are of order one; gate and up have different global scales, and so has each expert."""
    rng = torch.Generator().manual_seed(seed)
    activation = activation or Activation()
    first, last = expert_range or (0, experts)
    local = last - first
    problem = MoEProblem(experts, local, hidden, intermediate, top_k, activation, "nvfp4" if w4a4 else "bf16", on_input)
    rows = problem.w13_rows

    def tensors(n: int, k: int) -> tuple[Tensor, Tensor]:
        packed = torch.randint(0, 256, (local, n, k // 2), dtype=torch.uint8, generator=rng)
        scale = (torch.rand(local, n, k // 16, generator=rng) * 400).to(torch.float8_e4m3fn)
        return packed, scale

    def global_scale(*shape: int, k: int) -> Tensor:
        return (0.5 + torch.rand(shape, generator=rng)) / (600 * math.sqrt(k))

    w13_scale_2 = global_scale(local, rows // intermediate, k=hidden)
    weights = (*tensors(rows, hidden), w13_scale_2, *tensors(hidden, intermediate), global_scale(local, k=intermediate))
    expert_map = None
    if expert_range is not None:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[first:last] = torch.arange(local, dtype=torch.int32)
    # Amax of the inputs over 6 * 448, as calibration would find.
    input_scales = (torch.full((local, rows // intermediate), 4 / 2688.0), torch.linspace(3, 9, local) / 2688.0) if w4a4 else None
    return Layer(problem, weights, expert_map, input_scales)


def make_tokens(layer: Layer, tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, normalised router weights and distinct ids."""
    rng = torch.Generator().manual_seed(seed)
    p = layer.problem
    x = torch.randn(tokens, p.hidden, generator=rng).to(dtype)
    weights, ids = torch.randn(tokens, p.num_experts, generator=rng).softmax(-1).topk(p.top_k)
    return x, weights, ids.int()


def dequantize64(packed: Tensor, scale: Tensor) -> Tensor:
    """float64 ``[N, K]`` of one matrix, by table and by hand."""
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64)
    codes = torch.empty(packed.shape[0], packed.shape[1] * 2, dtype=torch.long)
    codes[:, 0::2], codes[:, 1::2] = packed.long() % 16, packed.long() // 16
    return values[codes] * scale.double().repeat_interleave(16, dim=1)


def act64(h: Tensor, a: Activation) -> Tensor:
    """The activation function in float64, element by element in Python."""

    def one(gate: float, up: float) -> float:
        if a.limit is not None:
            gate, up = min(gate, a.limit), max(-a.limit, min(up, a.limit))
        alpha, beta = (a.alpha, a.beta) if a.kind == "swigluoai" else (1.0, 0.0)
        return gate / (1 + math.exp(-alpha * gate)) * (up + beta)

    if not a.gated:
        return torch.tensor([max(v, 0.0) ** 2 for v in h.tolist()], dtype=torch.float64)
    half = h.numel() // 2
    return torch.tensor([one(g, u) for g, u in zip(h[:half].tolist(), h[half:].tolist(), strict=True)], dtype=torch.float64)


def naive(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Token by token and slot by slot in float64 (W4A16), nothing rounded but the intermediate: float64 ``[M, H]``."""
    p = layer.problem
    w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = layer.weights
    out = torch.zeros(x.shape[0], p.hidden, dtype=torch.float64)
    for m in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[m, j])
            if not 0 <= e < p.num_experts:
                continue
            if layer.expert_map is not None:
                e = int(layer.expert_map[e])
            if e < 0:
                continue
            weight = weights[m, j].double()
            token = x[m].double()
            if p.apply_router_weight_on_input:
                token, weight = (x[m].float() * weights[m, j]).to(x.dtype).double(), 1.0
            h = dequantize64(w13[e], w13_scale[e]) @ token
            h = (h.view(-1, p.intermediate) * w13_scale_2[e].double().view(-1, 1)).flatten()
            h = act64(h, p.activation).to(x.dtype).double()
            out[m] += weight * (dequantize64(w2[e], w2_scale[e]) @ h) * w2_scale_2[e].double()
    return out


# float32: a few roundings of a sum of hundreds of terms. The others: an element of the intermediate that such noise pushes
# over a rounding boundary moves by an ulp of its type.
_ULP = {torch.float32: 2.0**-19, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> None:
    """Within a bound relative to the row's largest value; NaN only where NaN is wanted."""
    dtype = dtype or got.dtype
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(), want.nan_to_num()
    if got.numel():
        bound = _ULP[dtype] * want.abs().amax(-1, keepdim=True) + 1e-30
        assert ((got - want).abs() <= bound).all(), f"off by {((got - want).abs() / bound).max():.2f} bounds"


# --- random problems for the Hopper kernels -------------------------------------------------------------------------------

ACTIVATIONS = (
    Activation("silu"),
    Activation("silu", limit=1.5),
    Activation("swigluoai", alpha=1.702, beta=1.0, limit=7.0),
    Activation("relu2"),
)
ROUTINGS = ("even", "one expert", "duplicates", "out of range", "none here", "none local", "skewed")
TOP_KS = (1, 2, 4, 6, 8, 10, 22, 32)
"""Not all: the kernel that sums a token's experts is compiled for each."""
KERNELS = 60
"""Expert kernels that all problems of a run may need together: each takes seconds to compile, and there are hundreds."""
WEIGHT_BYTES, MULTIPLY_ADDS, WORKSPACE_BYTES = 400e6, 5e11, 5e8
"""Of one problem. More take a GPU longer than a few milliseconds."""
_BF16, _FP16 = torch.bfloat16, torch.float16
_KINDS = (  # activation, tokens, router weight on the input
    (ACTIVATIONS[0], _BF16, False),
    (ACTIVATIONS[0], _FP16, False),
    (ACTIVATIONS[0], _BF16, True),
    (ACTIVATIONS[1], _BF16, False),
    (ACTIVATIONS[2], _BF16, False),
    (ACTIVATIONS[2], _FP16, True),
    (ACTIVATIONS[3], _BF16, False),
    (ACTIVATIONS[3], _FP16, True),
)
_TURNS = ((8, 32), (8, 128), (8, 0), *((tile, 0) for tile in tiles.TILES))
"""Tokens of a tile, and the most pairs that the kernels sort for themselves: which kernels calls are drawn for, one after the other."""
_CORNERS = (  # experts here, experts, hidden, width, top_k, tokens
    (1, 1, 16384, 8192, 1, 3),
    (2, 64, 16384, 64, 22, 600),
    (24, 24, 256, 8192, 6, 40),
    (1024, 1024, 272, 64, 32, 50),
    (64, 1024, 256, 80, 32, 2000),
    (1, 2, 256, 64, 1, 1),
)


@dataclass(frozen=True)
class Drawn:
    """A problem, and a call of it. ``index``: type of the ids; ``mapped``: whether an expert map comes with them."""

    problem: MoEProblem
    dtype: torch.dtype
    tokens: int
    routing: str
    index: torch.dtype
    seed: int

    @property
    def mapped(self) -> bool:
        return self.problem.num_local_experts < self.problem.num_experts

    def kernels(self, multiprocessors: int) -> list[dict]:
        """Fields of the variants of both expert kernels that the call launches."""
        choice = tactics.chosen(self.problem, self.tokens, multiprocessors, self.dtype)
        pairs = cuda.sorted_pairs(choice, self.tokens * self.problem.top_k)
        ids = cuda.Ids(self.index, self.mapped)
        both = ("gate_up", choice.gate_up), ("down", choice.down)
        return [cuda.variant_fields(self.problem, use, shape, self.dtype, pairs, ids) for use, shape in both]


def weight_bytes(problem: MoEProblem) -> float:
    """Of the experts here, with their scales."""
    return problem.num_local_experts * problem.hidden * (problem.w13_rows + problem.intermediate) * 0.5625


def drawn(number: int, seed: int | str, multiprocessors: int, kernels: int = KERNELS) -> tuple[list[Drawn], list[dict]]:
    """So many problems, corners of what is served in front, and the expert kernels that they need: ``kernels`` at most. Once there are so
    many, calls that need another are drawn anew. Every size of tile has its turn."""
    chance = random.Random(seed)
    found: list[Drawn] = []
    needed: dict[tuple, dict] = {}
    met: dict[tuple[int, int], set] = {turn: set() for turn in _TURNS}
    while len(found) < number:
        corner = _CORNERS[len(found)] if len(found) < len(_CORNERS) else None
        turn = _TURNS[len(found) % len(_TURNS)]
        full = len(needed) > kernels - 2 and met[turn]
        kind = chance.choice(sorted(met[turn]) if full else range(len(_KINDS)))
        call = _draw(chance, _KINDS[kind], turn, corner)
        both = call.kernels(multiprocessors)
        own = {tuple(sorted(map(repr, fields.items()))): fields for fields in both}
        served = both[0]["tile_tokens"], both[0].get("pairs", 0)
        if (corner or served == turn) and len(needed | own) <= kernels:
            needed |= own
            met[served].add(kind)
            found.append(call)
    return found, list(needed.values())


def _draw(chance: random.Random, kind: tuple, turn: tuple[int, int], corner: tuple[int, ...] | None) -> Drawn:
    """With as many pairs, or as many tokens an expert, as suit the turn."""
    activation, dtype, on_input = kind
    tile, most = turn

    def between(low: float, high: float) -> float:
        return low * (high / low) ** chance.random()

    def size(low: int, high: int) -> int:
        step = chance.choice((16, 256))  # stages that are full, and columns that are not
        return min(high, max(low, round(between(low, high) / step) * step))

    while True:
        if corner is None:
            experts = round(between(4, 1024))
            local = max(1, experts // chance.choice((1, 1, 2, 8, 16)))
            hidden, width = size(256, 16384), size(64, 8192)
            top_k = chance.choice([k for k in TOP_KS if k <= experts])
            pairs = between(1, most) if most else between(tile / 8, 4 * tile) * experts
            tokens = min(4096, max(1, round(pairs / top_k)))
        else:
            local, experts, hidden, width, top_k, tokens = corner
        problem = MoEProblem(experts, local, hidden, width, top_k, activation, apply_router_weight_on_input=on_input)
        pairs = tokens * top_k
        work = pairs * hidden * (problem.w13_rows + width)
        if weight_bytes(problem) > WEIGHT_BYTES or work > MULTIPLY_ADDS or pairs * (hidden + width) * 2 > WORKSPACE_BYTES:
            continue
        index = torch.int64 if chance.random() < 0.1 else torch.int32
        return Drawn(problem, dtype, tokens, chance.choice(ROUTINGS), index, chance.randrange(1 << 30))


def sample_rows(ids: list[list[int]], chance: random.Random, experts: int = 40, rows: int = 64) -> list[int]:
    """Rows to hold to the reference, in order: one at least, and as many more as have few experts together, since the reference takes its
    time for each."""
    found: list[int] = []
    met: set[int] = set()
    for row in chance.sample(range(len(ids)), min(len(ids), rows)):
        if found and len(met.union(ids[row])) > experts:
            continue
        found.append(row)
        met.update(ids[row])
    return sorted(found)
