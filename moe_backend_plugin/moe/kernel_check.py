"""Does this machine's expert kernel compute what its formula says? Every tactic against the reference, before it serves anybody.

:func:`rows` is for people (``moe-backend verify --kernels``): all that the machine has. :func:`require` is for servers on
Blackwell. Their kernels come from another package, in any version, and the authors of this one never ran them: a layer of the served
shape with a few experts goes through every tactic that calls can meet, and what is wrong ends the start of the server in one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, wraps
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor

from ..device import FLASHINFER
from ..errors import UnsupportedLayerError
from ..kernels.compile import name_of
from ..nvfp4.blackwell import ActivationScales
from ..nvfp4.format import quantize
from . import balanced, blackwell, cuda, reference, tactics, tiles
from .compare import W4A4, W4A16, Found, compare
from .problem import Activation, MoEProblem

EXPERTS, TOP_K = 8, 2
TOKENS = (1, 5, 300)
"""One token; fewer than experts; full tiles and partial ones."""


class Row(NamedTuple):
    """One comparison. reason: why it is wrong, or None. max_abs, relative: largest error of an element, and of all in the norm.

    device_lost: the device answers nothing since, in this process: the remaining comparisons were not made.
    """

    kernel: str
    case: str
    tactic: str
    tokens: int
    reason: str | None
    max_abs: float
    relative: float
    device_lost: bool = False


def attempt(device: torch.device, kernel: str, case: str, tactic: str, tokens: int, check: Callable[..., Found], *arguments: object) -> Row:
    """The row of what ``check`` finds with ``arguments``; an error that it raises is the row's reason."""
    try:
        return Row(kernel, case, tactic, tokens, *check(*arguments))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError) as error:
        reason = f"fails: {type(error).__name__}: {_first_line(error)}"
        return Row(kernel, case, tactic, tokens, reason, math.nan, math.nan, _is_lost(error, device))


def _is_lost(error: Exception, device: torch.device) -> bool:
    """Whether the device can run nothing more. Compilers of kernels have errors of their own, so torch is asked."""
    if isinstance(error, torch.AcceleratorError):
        return True
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False


_Arguments = ParamSpec("_Arguments")


def until_lost(rows: Callable[_Arguments, Iterator[Row]]) -> Callable[_Arguments, Iterator[Row]]:
    """``rows``, but none after one that lost the device: they would fail whatever their kernels are."""

    @wraps(rows)
    def until(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Iterator[Row]:
        for found in rows(*args, **kwargs):
            yield found
            if found.device_lost:
                return

    return until


class Layer(NamedTuple):
    """A layer's checkpoint, and a call of it: arguments as :func:`.reference.fused_moe`'s."""

    problem: MoEProblem
    weights: tuple[Tensor, ...]
    input_scales: tuple[Tensor, Tensor] | None
    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None = None

    def right(self, by_token: bool = False, exact: bool = False) -> Tensor:
        """The output in float32. ``by_token``: with a scale a token instead of the static ones. ``exact``: nothing is rounded to x's dtype,
        the second projection's input neither."""
        w13, w2 = (None, None) if by_token else self.input_scales or (None, None)
        x = self.x.float() if exact else self.x
        arguments = (x, *self.weights, self.topk_weights, self.topk_ids, self.problem, self.expert_map)
        return reference.fused_moe(*arguments, w13_input_scale=w13, w2_input_scale=w2, by_token=by_token).float()


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Engines build their models with defaults of their own: another dtype, another device, inference mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def input_scales(problem: MoEProblem, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [E, 2 or 1] and [E] of a layer whose inputs are normal and whose weights keep them so: of order of the values' largest.

    One for all: the Blackwell kernels have no other.
    """
    experts, halves = problem.num_local_experts, 2 if problem.activation.gated else 1
    return torch.full((experts, halves), 5.0 / 2688, device=device), torch.full((experts,), 8.0 / 2688, device=device)


def layer(problem: MoEProblem, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Layer:
    """A random layer, the same on every machine of a kind; ids outside the experts among its choices.

    A problem with fewer local experts than experts gets a map to them, in an order of its own, from all over the model's.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def projection(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        found = [
            quantize(torch.randn(rows, columns, device=device, generator=generator) / math.sqrt(columns) * (1 + 0.1 * expert))
            for expert in range(problem.num_local_experts)
        ]
        return tuple(torch.stack([getattr(one, part) for one in found]) for part in ("packed", "scale", "scale_2"))  # type: ignore[return-value]

    w13, w13_scale, first = projection(problem.w13_rows, problem.hidden)
    w2, w2_scale, second = projection(problem.hidden, problem.intermediate)
    experts, halves = problem.num_local_experts, 2 if problem.activation.gated else 1
    weights = (w13, w13_scale, first.view(-1, 1).expand(-1, halves).contiguous(), w2, w2_scale, second)
    x = torch.randn(tokens, problem.hidden, device=device, generator=generator).to(dtype)
    scales = input_scales(problem, device) if problem.activation_precision == "nvfp4" else None
    everywhere = replace(problem, num_local_experts=problem.num_experts)
    chosen, ids = (part.to(device) for part in balanced.routing(everywhere, tokens, seed=seed))
    if tokens > 2:
        ids[1, 0], ids[2, -1] = -1, problem.num_experts + 7
    expert_map = None
    if experts < problem.num_experts:
        expert_map = torch.full((problem.num_experts,), -1, dtype=torch.int32)
        here = torch.randperm(problem.num_experts, generator=torch.Generator().manual_seed(seed))[:experts]
        expert_map[here] = torch.arange(experts, dtype=torch.int32)
        expert_map = expert_map.to(device)
    return Layer(problem, weights, scales, x, chosen, ids, expert_map)


# --- Blackwell --------------------------------------------------------------------------------------------------------


@until_lost
def blackwell_rows(
    problem: MoEProblem,
    device: torch.device,
    tactics: Sequence[blackwell.Tactic] | None = None,
    scales: Sequence[ActivationScales] = ("static", "token"),
    tokens: Sequence[int] = TOKENS,
    flashinfer: blackwell.Library | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """Every tactic (default: all that are valid) of a small layer with all experts local, with static scales and with a scale a token.

    A tactic whose sums have an order must give the same bits again. An error that FlashInfer raises is a row's reason,
    and its row the last if the device is lost.
    """
    for count in tokens:
        made = layer(problem, count, device, dtype)
        for kind in scales:
            # With static scales the kernels round the first projection's float32 sums, with a scale a token those in x's dtype.
            right = made.right(by_token=kind == "token", exact=kind == "static")
            weights = blackwell.pack(problem, *made.weights, *(made.input_scales if kind == "static" else ()))
            blackwell.prepare(problem, made.x.dtype, device, count, kind)
            case = f"{_case(problem)}, {'one scale' if kind == 'static' else 'a scale a token'}"
            for tactic in tactics or blackwell.every(problem):
                yield attempt(device, "flashinfer", case, tactic.name, count, _blackwell, tactic, weights, made, right, flashinfer)


def _blackwell(
    tactic: blackwell.Tactic, weights: blackwell.Weights, made: Layer, right: Tensor, flashinfer: blackwell.Library | None
) -> Found:
    def call() -> Tensor:
        out = torch.full_like(made.x, math.nan)
        arguments = (made.x, weights, made.topk_weights, made.topk_ids, made.problem, out)
        blackwell.fused_moe(*arguments, tactic=tactic, flashinfer=flashinfer)
        return out

    first = call()
    found = compare(first, right, W4A4)
    return _steady(found, first, call()) if tactic.ordered else found


def _steady(found: Found, first: Tensor, again: Tensor) -> Found:
    """``found`` of ``first``, wrong at least if the same call gave other bits ``again``."""
    return found if found[0] or torch.equal(first, again) else ("not repeatable", *found[1:])


def _case(problem: MoEProblem) -> str:
    a = problem.activation
    limit = "" if a.limit is None else f" limit {a.limit:g}"
    return f"{problem.hidden}x{problem.intermediate} {a.kind}{limit}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


@cache
def _wrong(
    problem: MoEProblem,
    device: torch.device,
    met: tuple[blackwell.Tactic, ...],
    scales: ActivationScales,
    flashinfer: blackwell.Library | None,
    dtype: torch.dtype,
) -> Row | None:
    """The first row that is wrong."""
    with _plain_torch():
        rows = blackwell_rows(problem, device, met, (scales,), flashinfer=flashinfer, dtype=dtype)
        return next((row for row in rows if row.reason), None)


def require(
    problem: MoEProblem,
    device: torch.device,
    max_tokens: int,
    scales: ActivationScales,
    where: str = "NVFP4 MoE layers",
    flashinfer: blackwell.Library | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Run what calls of up to ``max_tokens`` tokens can meet on a few experts of the problem's shape, once a process; returns how many
    tactics that are.

    Raises UnsupportedLayerError (a ValueError), one line, if any gives a wrong output: such a server must not start.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("kernel check: found a graph under capture; allowed: before the first request")
    met = tuple(blackwell.tactics_met(problem, max_tokens, dtype))
    small = replace(problem, num_experts=EXPERTS, num_local_experts=EXPERTS, top_k=1 if problem.apply_router_weight_on_input else TOP_K)
    if row := _wrong(small, device, met, scales, flashinfer, dtype):
        found = f"FlashInfer's kernel {row.tactic} at {row.tokens} tokens ({row.case}) {row.reason}"
        tuned = row.tactic not in {blackwell.choose(problem, tokens).name for tokens in (1, max_tokens)}
        others = f"another FlashInfer, {'moe.tactics: heuristic, ' if tuned else ''}or moe.provider: engine"
        raise UnsupportedLayerError(where, found, f"kernels that agree with the reference ({others})")
    return len(met)


# --- whatever this machine has ----------------------------------------------------------------------------------------

ACTIVATIONS = (Activation(), Activation(limit=0.7), Activation("swigluoai", 1.702, 1.0, 7.0), Activation("relu2"))


@until_lost
def rows(device: torch.device) -> Iterator[Row]:
    """The expert kernels of ``device``, in every way that they can be cut up."""
    if device.type != "cuda":
        yield from cpu_rows()
        return
    if torch.cuda.get_device_capability(device) in FLASHINFER:
        for activation in ACTIVATIONS:
            problem = MoEProblem(EXPERTS, EXPERTS, 512, 256, TOP_K, activation, "nvfp4")
            yield from blackwell_rows(problem, device)
        return
    yield from hopper_rows(device)


@until_lost
def hopper_rows(device: torch.device, tokens: Sequence[int] = TOKENS) -> Iterator[Row]:
    """Every shape that a tactic can cut either projection into, on one small layer; and the heuristic's tactics with every activation,
    with float16 tokens, and with a map to half of the experts."""
    multiprocessors = cuda.multiprocessors_of(device.index or 0)
    small = MoEProblem(EXPERTS, EXPERTS, 512, 256, TOP_K)
    cases = [(_case(problem), problem, torch.bfloat16) for problem in (replace(small, activation=one) for one in ACTIVATIONS)]
    cases.append((f"{_case(small)}, float16 tokens", small, torch.float16))
    mapped = replace(small, num_local_experts=EXPERTS // 2)
    cases.append((f"{_case(mapped)}, {mapped.num_local_experts} of {EXPERTS} experts", mapped, torch.bfloat16))
    for number, (case, problem, dtype) in enumerate(cases):
        found = [tiles.choose(problem, count, multiprocessors) for count in tokens]
        if number == 0:
            found += tactics.alike(problem)
        found = list(dict.fromkeys(found))
        ids = cuda.Ids(mapped=problem is mapped)
        cuda.prepare_tactics(problem, dtype, found, device, max(tokens), ids)
        for count in tokens:
            made = layer(problem, count, device, dtype)
            right, packed = made.right(), cuda.pack(problem, *made.weights)
            for tactic in found:
                yield attempt(device, "moe_gemm", case, tactics.name(tactic), count, _hopper, tactic, packed, made, right)


def _hopper(tactic: tiles.Choice, packed: cuda.Weights, made: Layer, right: Tensor) -> Found:
    first, again = (torch.full_like(made.x, math.nan) for _ in range(2))
    for out in (first, again):
        cuda.fused_moe(made.x, packed, made.topk_weights, made.topk_ids, made.problem, out, made.expert_map, choice=tactic)
    return _steady(compare(first, right, W4A16), first, again)


def cpu_rows(tokens: Sequence[int] = (1, 5, 70)) -> Iterator[Row]:
    """This package's torch operator: W4A16 and W4A4, every activation, float32 and bfloat16."""
    from .op import nvfp4_moe, prepare

    for precision in ("bf16", "nvfp4"):
        for activation in ACTIVATIONS:
            problem = MoEProblem(EXPERTS, EXPERTS, 128, 64, TOP_K, activation, precision)
            for dtype in (torch.float32, torch.bfloat16):
                for count in tokens:
                    made = layer(problem, count, torch.device("cpu"), dtype)
                    w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2 = made.weights
                    w13, w13_scale, w2, w2_scale = prepare(w13, w13_scale, w2, w2_scale)
                    scales = dict(zip(("w13_input_scale", "w2_input_scale"), made.input_scales or (None, None), strict=True))
                    weights = (w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2)
                    out = nvfp4_moe(made.x, *weights, made.topk_weights, made.topk_ids, activation, **scales)
                    found = compare(out, made.right(), W4A4 if precision == "nvfp4" else W4A16)
                    name = name_of(dtype)
                    yield Row("nvfp4_moe", f"{_case(problem)}, activations {precision}", name, count, *found)
