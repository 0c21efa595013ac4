"""``moe-backend bench moe``: which cells are timed, on which inputs, by which providers, and the run itself.

A cell is one layer call: a model's expert layer, a number of tokens, a routing. Its router is not timed: every provider gets the same
router weights and expert ids. Each of the launches that are timed has tokens, routing and weights of its own, as layer after layer of
a model has, so that weights come from memory.

Times are stored whatever the numbers say; for some cells the providers' outputs are also compared with ``moe/reference.py`` in float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..moe import reference
from ..moe.problem import Activation, MoEProblem
from .shared import expert_map, first_line, release

KERNELS = ("moe_gemm", "moe_route", "moe_combine")
"""The kernel families that the plugin's times are of."""
TOKENS = tuple(2**i for i in range(15))
ROUTINGS = ("balanced", "zipf", "one-expert")
PROVIDERS = ("plugin", "marlin", "humming", "triton_bf16")
NVFP4_PEERS = ("marlin", "humming")
QUICK_MODELS, QUICK_TOKENS, QUICK_ROUTINGS = ("qwen3-30b-a3b",), (1, 32, 1024), ("balanced",)
SECONDS = 240.0
"""Default of the time a run may take once Python is up: with the imports under five minutes of a GPU."""

DTYPE = torch.bfloat16
NVFP4_BYTES, BF16_BYTES = 0.5625, 2.0
"""Bytes a weight."""
FEW_LAUNCHES_ABOVE = 1024
RESERVE = 12 << 30
"""Bytes left to inputs, outputs and the providers' workspaces."""


@dataclass(frozen=True)
class Model:
    """The expert layer of a model on one rank of ``ep``: the first of them, with experts 0 .. local - 1."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    ep: int = 1
    activation: Activation = Activation()

    @property
    def local(self) -> int:
        """Experts on this rank."""
        return self.experts // self.ep

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def problem(self) -> MoEProblem:
        return MoEProblem(self.experts, self.local, self.hidden, self.intermediate, self.top_k, self.activation)

    def expert_map(self, device: torch.device) -> Tensor | None:
        """As :func:`.shared.expert_map`."""
        return expert_map(self.problem, device)

    def set_bytes(self, provider: str) -> int:
        """Bytes of the layer's weights in a provider's form, but for padding."""
        return int(self.local * self.expert_weights * weight_bytes(provider))


MODELS = {
    "qwen3-30b-a3b": Model("qwen3-30b-a3b", experts=128, hidden=2048, intermediate=768, top_k=8),
    "qwen3-next-80b": Model("qwen3-next-80b", experts=512, hidden=2048, intermediate=512, top_k=10),
    "deepseek-v3-ep8": Model("deepseek-v3", experts=256, hidden=7168, intermediate=2048, top_k=8, ep=8),
    "deepseek-v3-ep16": Model("deepseek-v3", experts=256, hidden=7168, intermediate=2048, top_k=8, ep=16),
    # Last: vLLM has crashed on a clamped swigluoai (its issue 49070), and a crash ends the run.
    "minimax-like": Model(
        "minimax-like", experts=128, hidden=3072, intermediate=1536, top_k=4, activation=Activation("swigluoai", 1.702, 1.0, 7.0)
    ),
}


class Cell(NamedTuple):
    """One call to time; ``model`` is a key of MODELS."""

    model: str
    tokens: int
    routing: str

    @property
    def launches(self) -> int:
        """Calls in the graph that is timed; the inputs have one more."""
        return 2 if self.tokens > FEW_LAUNCHES_ABOVE else 8

    def __str__(self) -> str:
        return f"{self.model} M={self.tokens} {self.routing}"


@dataclass(frozen=True)
class Options:
    """What the user asked for; None is the default."""

    models: tuple[str, ...] | None = None
    tokens: tuple[int, ...] | None = None
    routings: tuple[str, ...] | None = None
    providers: tuple[str, ...] | None = None
    quick: bool = False
    seconds: float = SECONDS

    @property
    def asked_providers(self) -> tuple[str, ...]:
        return self.providers or PROVIDERS

    def providers_of(self, routing: str) -> tuple[str, ...]:
        """By default unquantised Triton is timed on balanced routing only: it is there for the ceiling of bf16, not for the choice."""
        skip = () if self.providers or routing == "balanced" else ("triton_bf16",)
        return tuple(name for name in self.asked_providers if name not in skip)


def plan(options: Options) -> list[Cell]:
    """All cells that were asked for, model by model."""
    models = options.models or (QUICK_MODELS if options.quick else tuple(MODELS))
    tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    routings = options.routings or (QUICK_ROUTINGS if options.quick else ROUTINGS)
    return [Cell(model, count, routing) for model in models for routing in routings for count in tokens]


# --- what goes first when time is short ----------------------------------------------------------------------------------------------


def importance(cell: Cell) -> int:
    """Higher stays longer. The targets are about balanced routing; skewed ones and powers of two in between show less of the curve."""
    power_of_four = cell.tokens.bit_length() % 2 == 1
    if cell.routing != "balanced":
        return (0 if not power_of_four else 1 if cell.routing == "one-expert" else 2) - (cell.model == "deepseek-v3-ep16")
    if cell.model == "deepseek-v3-ep16":
        return 3 + power_of_four
    return 7 if cell.model == "qwen3-30b-a3b" else 5 + power_of_four


def expected_active(model: Model, tokens: int, routing: str) -> float:
    """Local experts that get a token, on average (for zipf as if balanced: an upper bound)."""
    if routing == "one-expert":
        return 1.0
    return model.local * (1 - (1 - model.top_k / model.experts) ** tokens)


SET_UP = {"plugin": 3.0, "marlin": 4.0, "humming": 15.0, "triton_bf16": 10.0}
"""Seconds to make a model's layers, and to compile what a provider compiles at a first call."""
REPEATS = 26
"""How often a cell's launches run: warm-ups, replays, and those outside the graph."""


def estimate(cell: Cell, providers: Iterable[str]) -> float:
    """Seconds that a cell takes, roughly: Marlin's speed for all."""
    model = MODELS[cell.model]
    pairs = cell.tokens * model.top_k * (1 if cell.routing == "one-expert" else model.local / model.experts)
    from_bytes = expected_active(model, cell.tokens, cell.routing) * model.expert_weights * NVFP4_BYTES / 2.0e12
    from_flops = pairs * 2 * model.expert_weights / 250e12
    return sum(0.08 + REPEATS * cell.launches * max(20e-6, from_bytes, from_flops) for _ in providers)


def fit(cells: list[Cell], seconds: float, options: Options, pace: float = 1.0) -> tuple[list[Cell], list[Cell]]:
    """(kept, dropped): the least important cells go, the longest of them first, until the rest is estimated to take ``seconds``.

    ``pace``: how many times as long as estimated the cells before took.
    """
    kept = set(cells)
    for cell in sorted(cells, key=lambda cell: (importance(cell), -estimate(cell, options.providers_of(cell.routing)))):
        if pace * total(kept, options) <= seconds:
            break
        kept.discard(cell)
    return [cell for cell in cells if cell in kept], [cell for cell in cells if cell not in kept]


def total(cells: Iterable[Cell], options: Options) -> float:
    """Estimated seconds of ``cells``, with what their models' layers take to make."""
    cells = list(cells)
    models = {cell.model for cell in cells}
    return sum(estimate(cell, options.providers_of(cell.routing)) for cell in cells) + len(models) * sum(
        SET_UP[name] for name in options.asked_providers
    )


# --- bytes and operations ------------------------------------------------------------------------------------------------------------


def weight_bytes(provider: str) -> float:
    """Bytes a weight in a provider's form."""
    return BF16_BYTES if provider == "triton_bf16" else NVFP4_BYTES


def moved_bytes(model: Model, tokens: int, active: float, provider: str) -> float:
    """Bytes that a call must move: the weights of the active experts once, the tokens in and out once."""
    return active * model.expert_weights * weight_bytes(provider) + 2 * tokens * model.hidden * DTYPE.itemsize


def operations(model: Model, pairs: float) -> float:
    """Floating-point operations of ``pairs`` (token, local expert) pairs."""
    return 2.0 * pairs * model.expert_weights


def row(cell: Cell, provider: str, us: float, active: float, pairs: float, relative_error: float | None) -> dict[str, Any]:
    """One measured time as it is stored; ``active`` experts and ``pairs`` are means over the launches."""
    model = MODELS[cell.model]
    return {
        **_fields(cell),
        "provider": provider,
        "us": round(us, 3),
        "TB_s": round(moved_bytes(model, cell.tokens, active, provider) / us / 1e6, 4),
        "TFLOP_s": round(operations(model, pairs) / us / 1e6, 3),
        "active_experts": round(active, 2),
        "relative_error": None if relative_error is None else float(f"{relative_error:.3g}"),
    }


def _fields(cell: Cell) -> dict[str, Any]:
    model = MODELS[cell.model]
    return {"model": model.name, "tokens": cell.tokens, "routing": cell.routing, "ep": model.ep}


# --- inputs --------------------------------------------------------------------------------------------------------------------------


def route(model: Model, tokens: int, routing: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Router weights float32 [M, k] that sum to 1 in a row, and expert ids int32 [M, k], on the generator's device.

    balanced: k different experts, each set of k as likely as any other. zipf: k different experts drawn one after the other with
    probability proportional to 1 / rank, ranks shuffled. one-expert: one local expert, the same in every row and slot.
    """
    device, shape = generator.device, (tokens, model.top_k)
    weights = torch.rand(shape, generator=generator, device=device) + 0.1
    weights /= weights.sum(1, keepdim=True)
    if routing == "one-expert":
        expert = torch.randint(model.local, (1, 1), generator=generator, device=device, dtype=torch.int32)
        return weights, expert.expand(shape).contiguous()
    # Sorting by an exponential variable over its expert's probability draws without replacement.
    keys = torch.empty(tokens, model.experts, device=device).exponential_(generator=generator)
    if routing == "zipf":
        keys *= torch.randperm(model.experts, generator=generator, device=device) + 1
    elif routing != "balanced":
        raise ValueError(f"routing: found {routing!r}; allowed: {', '.join(ROUTINGS)}")
    return weights, keys.topk(model.top_k, dim=1, largest=False).indices.int()


class Inputs:
    """Random inputs of ``launches + 1`` calls of a cell: lists ``x`` bf16 [M, H], ``weights`` float32 [M, k], ``ids`` int32 [M, k], and
    ``out`` like x; ``active`` and ``pairs``: local experts that get a token, and (token, local expert) pairs, means over the calls timed.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        model, count = MODELS[cell.model], cell.launches + 1
        generator = torch.Generator(device).manual_seed(hash_of(cell))
        self.device = device
        self._arenas: list[Tensor] = []
        self.x = self._carve(count, (cell.tokens, model.hidden), DTYPE)
        self.weights = self._carve(count, (cell.tokens, model.top_k), torch.float32)
        self.ids = self._carve(count, (cell.tokens, model.top_k), torch.int32)
        for x, weights, ids in zip(self.x, self.weights, self.ids, strict=True):
            x.normal_(generator=generator)
            for target, found in zip((weights, ids), route(model, cell.tokens, cell.routing, generator), strict=True):
                target.copy_(found)
        self.out = [torch.empty_like(x) for x in self.x]
        local = [ids[ids < model.local] for ids in self.ids[: cell.launches]]
        self.active = sum(len(ids.unique()) for ids in local) / cell.launches
        self.pairs = sum(ids.numel() for ids in local) / cell.launches

    @property
    def warm(self) -> list[Tensor]:
        """What the layers before this one leave in the cache, as int64."""
        return self._arenas

    def _carve(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        """``count`` tensors, each aligned as torch aligns one, out of one piece that a single read brings into the cache."""
        size = math.prod(shape) * dtype.itemsize
        step = -(-size // 512) * 512
        arena = torch.zeros(count * step, dtype=torch.uint8, device=self.device)
        self._arenas.append(arena.view(torch.int64))
        return [arena[at : at + size].view(dtype).view(shape) for at in range(0, count * step, step)]


def hash_of(cell: Cell) -> int:
    """A seed that is the same in every run."""
    return list(MODELS).index(cell.model) * 1_000_003 + ROUTINGS.index(cell.routing) * 100_003 + cell.tokens


class Checkpoint(NamedTuple):
    """A layer's NVFP4 weights as a checkpoint has them, arguments of ``reference.fused_moe`` in its order."""

    w13: Tensor
    w13_scale: Tensor
    w13_scale_2: Tensor
    w2: Tensor
    w2_scale: Tensor
    w2_scale_2: Tensor


def global_scale(columns: int) -> float:
    """The power of two that gives a matrix of random codes, with random scales of 32 to 448, a product of about its input's size."""
    return 2.0 ** round(math.log2(1 / (2.9 * 190 * math.sqrt(columns))))  # root mean squares of codes and of scales


def random_checkpoint(problem: MoEProblem, device: torch.device, seed: int = 0) -> Checkpoint:
    """Random bytes: every code, block scales of 32 to 448, and one power of two a projection that keeps outputs near 1.

    A power of two leaves the weights exact in bf16, so unquantised layers compute the same. Gate and up share it, as vLLM's kernels
    need.
    """
    generator = torch.Generator(device).manual_seed(seed)
    E = problem.num_local_experts

    def projection(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(256, (E, rows, columns // 2), dtype=torch.uint8, device=device, generator=generator)
        scales = torch.randint(0x60, 0x7F, (E, rows, columns // 16), dtype=torch.uint8, device=device, generator=generator)
        return codes, scales.view(torch.float8_e4m3fn)

    first = torch.full((E, 2 if problem.activation.gated else 1), global_scale(problem.hidden), device=device)
    second = torch.full((E,), global_scale(problem.intermediate), device=device)
    return Checkpoint(*projection(problem.w13_rows, problem.hidden), first, *projection(problem.hidden, problem.intermediate), second)


# --- providers -----------------------------------------------------------------------------------------------------------------------

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x, router weights, ids, out) -> output [M, H], which may be ``out``: one layer with weights of its own."""


def plugin_layers(model: Model, checkpoint: Checkpoint, copies: int, max_tokens: int, device: torch.device) -> list[Layer]:
    """This package's layer, ``copies`` times, each with weights of its own."""
    from ..moe import cuda
    from ..nvfp4 import hopper

    problem, mapping = model.problem, model.expert_map(device)
    reason = cuda.unsupported_reason(problem, DTYPE)
    if reason:
        raise RuntimeError(reason)
    cuda.prepare(problem, DTYPE, torch.int32, device, max_tokens, mapping is not None)
    first = cuda.Weights(
        hopper.pack(checkpoint.w13, checkpoint.w13_scale, gated=True),
        checkpoint.w13_scale_2,
        hopper.pack(checkpoint.w2, checkpoint.w2_scale, gated=False),
        checkpoint.w2_scale_2,
    )

    def layer(weights) -> Layer:
        def run(x: Tensor, router: Tensor, ids: Tensor, out: Tensor) -> Tensor:
            cuda.fused_moe(x, weights, router, ids, problem, out, mapping)
            return out

        return run

    return [layer(first), *(layer(type(first)(*(part.clone() for part in first))) for _ in range(copies - 1))]


def copies_that_fit(model: Model, providers: Iterable[str], free: int, wanted: int) -> int:
    """How many sets of weights each provider may have: ``wanted``, or what ``free`` bytes of memory hold; at least one."""
    each = sum(model.set_bytes(name) for name in providers)
    return max(1, min(wanted, (free - RESERVE - model.set_bytes("plugin")) // each))


# --- comparison with the reference ---------------------------------------------------------------------------------------------------

CHECKED_TOKENS = (1, 64, 4096)
ROWS_COMPARED = 16
BOUNDS = dict.fromkeys(PROVIDERS, 2e-2) | {"plugin": 4e-3}
"""Relative errors (norm) above which a row is also an error."""


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Of the first rows of ``output``, in the norm."""
    found = output[: expected.shape[0]].float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def expected_rows(model: Model, checkpoint: Checkpoint, inputs: Inputs) -> Tensor:
    """The first rows of call 0, float32 throughout; a row does not depend on the others."""
    rows = slice(0, min(ROWS_COMPARED, inputs.x[0].shape[0]))
    x, weights, ids = (part[0][rows] for part in (inputs.x, inputs.weights, inputs.ids))
    return reference.fused_moe(x, *checkpoint, weights, ids, model.problem, model.expert_map(x.device)).float()


# --- the run -------------------------------------------------------------------------------------------------------------------------


def run(options: Options, device: torch.device, say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """Time the plan; yields the growing result {"ceilings", "rows", "errors", "dropped", "seconds"} after each cell.

    "errors": cells (or models) that a provider could not run, each with "error". "dropped": cells that did not fit in
    ``options.seconds``, or that were left when the device was lost.
    """
    from .timing import Clock, copy_tb_s, matmul_tflop_s

    begin = time.monotonic()
    result: dict[str, Any] = {"ceilings": {}, "rows": [], "errors": [], "dropped": [], "seconds": 0.0}
    ceilings = result["ceilings"]
    ceilings |= {"copy_TB_s": round(copy_tb_s(device), 4), "matmul_TFLOP_s": round(matmul_tflop_s(device), 1)}
    release()
    clock = Clock(device)
    ceilings |= {"empty_us": round(clock.empty_us(), 3), "l2_bytes": clock.l2_bytes}
    say(f"copy {ceilings['copy_TB_s']:.3f} TB/s, bf16 product {ceilings['matmul_TFLOP_s']:.0f} TFLOP/s")
    session = Session(options, result, clock, device, say, begin + options.seconds)
    rest = plan(options)
    try:
        while rest:
            name = rest[0].model
            kept, _ = fit(rest, session.left(), options, session.pace())
            here, later = ([cell for cell in kept if (cell.model == name) is now] for now in (True, False))
            session.drop([cell for cell in rest if cell.model == name and cell not in here], "no time")
            # Those of later models are judged again when their turn comes, by what this one took.
            rest = [cell for cell in rest if cell.model != name]
            for _ in session.model(name, here, later) if here else ():
                yield result  # what a kernel that hangs leaves behind
            result["seconds"] = round(time.monotonic() - begin, 1)
            yield result
    except DeviceLost as lost:
        session.drop([c for c in plan(options) if c not in session.seen], f"the device was lost: {lost}")
        yield result
    finally:
        session.close()


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context: nothing after this would be true."""


class Session:
    def __init__(self, options: Options, result: dict[str, Any], clock, device: torch.device, say: Callable, deadline: float) -> None:
        self.options, self.result, self.clock, self.device, self.say, self.deadline = options, result, clock, device, say, deadline
        self.seen: set[Cell] = set()
        # One stream for warm-ups and captures: an engine's workspace may belong to the stream of the calls that use it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._engine = None
        self._spent = self._estimated = 0.0

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def pace(self) -> float:
        """How many times as long as estimated everything took so far."""
        return min(max(self._spent / self._estimated, 0.3), 4.0) if self._estimated else 1.0

    def drop(self, cells: list[Cell], why: str) -> None:
        for cell in cells:
            self.seen.add(cell)
            self.result["dropped"].append({**_fields(cell), "why": why})
        if cells:
            self.say(f"dropped ({why}): {', '.join(map(str, cells))}")

    def model(self, name: str, cells: list[Cell], later: list[Cell]) -> Iterator[None]:
        """All cells of one model, the most important first, as long as there is time for those of ``later`` that are as important; yields
        after each."""
        began = time.monotonic()
        with torch.cuda.stream(self._stream):
            done = yield from self._model(name, cells, later)
        release()
        self._spent += time.monotonic() - began
        self._estimated += total(done, self.options)

    def _model(self, name: str, cells: list[Cell], later: list[Cell]) -> Generator[None, None, list[Cell]]:
        """Returns the cells that were timed."""
        model = MODELS[name]
        checkpoint = random_checkpoint(model.problem, self.device)
        layers = self._layers(model, name, checkpoint, max(cell.tokens for cell in cells))
        done = []
        for cell in sorted(cells, key=importance, reverse=True):
            if self.left() < self.pace() * total([c for c in later if importance(c) >= importance(cell)], self.options):
                self.drop([c for c in cells if c not in done], "no time")
                break
            self._cell(cell, model, checkpoint, layers)
            done.append(cell)
            yield
        if self._engine is not None:
            self._engine.forget()
        return done

    def _layers(self, model: Model, name: str, checkpoint: Checkpoint, max_tokens: int) -> dict[str, list[Layer]]:
        from .timing import LAUNCHES

        asked = self.options.asked_providers
        copies = copies_that_fit(model, asked, torch.cuda.mem_get_info(self.device)[0], LAUNCHES + 1)
        found = {}
        for provider in asked:
            began = time.monotonic()
            try:
                if provider == "plugin":
                    found[provider] = plugin_layers(model, checkpoint, copies, max_tokens, self.device)
                else:
                    found[provider] = self._vllm().layers(provider, model, checkpoint, copies)
            except Exception as error:  # noqa: BLE001  another project's layer may raise anything; the reason is stored
                self._failed({"model": model.name, "ep": model.ep, "provider": provider}, error)
            else:
                self.say(f"{name}: {provider}, {copies} sets of weights, made in {time.monotonic() - began:.1f} s")
        return found

    def _vllm(self):
        if self._engine is None:
            from .moe_peers import Engine

            self._engine = Engine(self.device)
        return self._engine

    def _cell(self, cell: Cell, model: Model, checkpoint: Checkpoint, layers: dict[str, list[Layer]]) -> None:
        self.seen.add(cell)
        inputs = Inputs(cell, self.device)
        expected = expected_rows(model, checkpoint, inputs) if cell.tokens in CHECKED_TOKENS else None
        said = []
        for provider in self.options.providers_of(cell.routing):
            if provider not in layers:
                continue
            sets = layers[provider]

            def launch(i: int, sets: list[Layer] = sets) -> Tensor:
                # The launch before the timed ones takes the first set, those take the next.
                layer = sets[(i + 1) % (cell.launches + 1) % len(sets)]
                return layer(inputs.x[i], inputs.weights[i], inputs.ids[i], inputs.out[i])

            try:
                us = self.clock.time(launch, inputs.warm, cell.launches)
                error = None if expected is None else relative_error(launch(0), expected)
            except Exception as exception:  # noqa: BLE001  as above
                self._failed({**_fields(cell), "provider": provider}, exception)
                continue
            self.result["rows"].append(row(cell, provider, us, inputs.active, inputs.pairs, error))
            said.append(f"{provider} {us:.1f}")
            if error is not None and not error <= BOUNDS[provider]:
                self._failed({**_fields(cell), "provider": provider}, f"relative error {error:.1e}, bound {BOUNDS[provider]}")
        self.say(f"{cell}: {', '.join(said)} us ({inputs.active:.1f} experts)")

    def _failed(self, where: dict[str, Any], error: BaseException | str) -> None:
        text = error if isinstance(error, str) else first_line(error)
        self.result["errors"].append({**where, "error": text})
        self.say(f"  {' '.join(map(str, where.values()))}: {text}")
        try:
            torch.cuda.synchronize()
        except Exception as lost:  # noqa: BLE001
            raise DeviceLost(first_line(lost)) from None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
