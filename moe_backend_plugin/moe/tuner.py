"""Finds the fastest tactic of a layer for each number of tokens, without the mistakes that make tuners pick slow or wrong ones.

For each bucket (:mod:`.buckets`): deterministic even inputs (:mod:`.balanced`); every tactic's output is compared with the reference
before it may be timed; then rounds, in each of which all tactics still in the race are timed once, in an order of its own; a tactic
leaves once it is slower than the best beyond doubt, and what cannot be told apart from the best is a tie, which goes to the
heuristic's choice, or else to the one that won the bucket before.

Nothing here touches a device: what runs and times a tactic comes from outside (:class:`Case`), so recorded times tune as well.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import PluginError
from . import buckets
from .balanced import Loads
from .compare import compare
from .families import HOPPER, Family, Tactic
from .problem import MoEProblem

logger = logging.getLogger("moe_backend_plugin.tactics")


ALLOCATED_TILE = 128
"""Tokens of the tile that a tuner with unequal allocations has a buffer for."""


@dataclass(frozen=True)
class Biases:
    """Known mistakes of other tuners, to show what each does; all off.

    unequal_allocations: workspace is allocated for one tile size beforehand, and a tactic that needs more allocates its own within the
    time taken. capped_at: no bucket above so many tokens; larger calls use the largest one's tactic. random_inputs: an
    expert's load is left to chance. warm_l2: the weights are in the cache when a call begins.
    """

    unequal_allocations: bool = False
    capped_at: int | None = None
    random_inputs: bool = False
    warm_l2: bool = False


@dataclass(frozen=True)
class Conditions:
    """How one bucket's inputs are made and one call is timed."""

    tokens: int
    loads: Loads = "even"
    cold_l2: bool = True
    preallocated: bool = True
    seed: int = 0


class Case(Protocol):
    """The inputs of one bucket, and the ways to run them."""

    def time(self, tactic: Tactic, conditions: Conditions) -> float:
        """Microseconds of one call, the median of some replays."""

    def replay(self, tactic: Tactic) -> Tensor:
        """The output [M, H] of the tactic's graph, replayed once into memory full of NaN."""

    def reference(self) -> tuple[Tensor, Tensor]:
        """(int64 numbers of some rows, those rows of the right output in float32)."""


@dataclass(frozen=True)
class Options:
    """margin: the most that a tie may cost; one bound for both, so that two runs seldom see it otherwise. rounds: the fewest and the
    most. hopeless: a tactic slower by these factors leaves after one round, two, three. finalists: how many stay once the fewest rounds
    are over, besides those that a tie would go to; what noise keeps from them is hardly faster than they are. replays: of each tactic
    when it is vetted."""

    margin: float = 0.0075
    rounds: tuple[int, int] = (4, 40)
    hopeless: tuple[float, ...] = (1.2, 1.1, 1.05)
    finalists: int = 16
    replays: int = 3
    loads: Loads = "even"
    seed: int = 0
    biases: Biases = Biases()


# --- vetting ----------------------------------------------------------------------------------------------------------


class Vetted(NamedTuple):
    """reason: why the tactic is struck out, or None. max_abs, relative: largest error of an element, and of all in the norm."""

    reason: str | None
    max_abs: float = math.nan
    relative: float = math.nan


def vet(case: Case, tactic: Tactic, replays: int, expected: tuple[Tensor, Tensor] | None = None, family: Family = HOPPER) -> Vetted:
    """Compare ``replays`` replays of a tactic with the reference (``expected``: what ``case.reference()`` gave) and with each other.

    One that is repeatable must give the same bits in every replay. One that adds up in the order in which things finish cannot: there
    every replay must be as near the reference as the first has to be, and the errors are the largest of all.
    An error that the tactic raises strikes it out too, except one of the device, which ends the run.
    """
    rows, right = case.reference() if expected is None else expected
    try:
        first = case.replay(tactic).clone()
    except family.failures as error:
        if type(error).__name__ in ("AcceleratorError", "DeviceLost"):
            raise
        return Vetted(f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    found = Vetted(*compare(first, right, family.bounds, rows))
    for _ in range(1, replays):
        if found.reason:
            break
        again = case.replay(tactic)
        if not family.repeatable(tactic):
            more = Vetted(*compare(again, right, family.bounds, rows))
            found = more if more.reason else Vetted(None, max(found.max_abs, more.max_abs), max(found.relative, more.relative))
        elif not torch.equal(again, first):
            found = found._replace(reason=f"not repeatable: {int((again != first).sum())} of {first.numel()} values differ")
    return found


# --- the race ---------------------------------------------------------------------------------------------------------

_T99 = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95, 2.92, 2.90, 2.88, 2.86)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 99 % confidence interval of the mean of logarithms of ratios, by Student's t; all of the line for a single one."""
    if len(ratios) < 2:
        return -math.inf, math.inf
    mean = statistics.fmean(ratios)
    half = _T99[min(len(ratios) - 2, len(_T99) - 1)] * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return mean - half, mean + half


class Race(NamedTuple):
    """winner; times: the mean of each tactic's times in microseconds (geometric); tied: those that were not told apart from the fastest;
    rounds: how many it took."""

    winner: Tactic
    times: dict[Tactic, float]
    tied: tuple[Tactic, ...]
    rounds: int


def race(
    entrants: Sequence[Tactic],
    time: Callable[[Tactic], float],
    prefer: Sequence[Tactic],
    options: Options,
    seed: int,
    family: Family = HOPPER,
) -> Race:
    """Time ``entrants`` until the fastest is known; ``prefer``: who wins a tie, the first of them that is in it, else the first by name: of
    what cannot be told apart, noise must not choose.

    Times are compared within a round, so that a clock that drifts slows all of them. Raises ValueError without entrants.
    """
    if not entrants:
        raise ValueError("race: found no tactic; allowed: 1 or more")
    shuffle = random.Random(seed)
    logs: dict[Tactic, list[float]] = {tactic: [] for tactic in entrants}
    alive, margin = list(entrants), options.margin
    fewest, most = options.rounds
    watched = [tactic for tactic in prefer[:1] if tactic in logs]  # timed to the end, so that the gain over it is known
    number = 0
    tied = alive

    def slower(tactic: Tactic, other: Tactic) -> tuple[float, float]:
        """By how much, in logarithms: the interval."""
        return interval([a - b for a, b in zip(logs[tactic], logs[other], strict=True)])

    while number < most:
        number += 1
        timed = list(dict.fromkeys([*alive, *watched]))
        for tactic in shuffle.sample(timed, len(timed)):
            logs[tactic].append(math.log(time(tactic)))
        means = {tactic: statistics.fmean(logs[tactic]) for tactic in alive}
        best = min(alive, key=means.__getitem__)
        if number <= len(options.hopeless):
            alive = [tactic for tactic in alive if means[tactic] <= means[best] + math.log(options.hopeless[number - 1])]
            tied = alive
        if len(alive) > 1 and number < fewest:
            continue
        if number == fewest:
            first = sorted(alive, key=means.__getitem__)[: options.finalists]
            alive = [tactic for tactic in alive if tactic in first or tactic in prefer]
        spans = {tactic: slower(tactic, best) for tactic in alive if tactic != best}
        alive = [tactic for tactic in alive if tactic == best or spans[tactic][0] <= margin]
        # What is within the margin for sure is a tie; the others may be either, and run on.
        tied = [tactic for tactic in alive if tactic == best or spans[tactic][1] <= margin]
        # Where nobody can be faster than the one that ties go to, by more than a tie may cost, the others' places change nothing.
        leader = next((tactic for tactic in prefer if tactic in alive), None)
        if len(tied) == len(alive) or (leader and all(slower(leader, tactic)[1] <= margin for tactic in alive if tactic != leader)):
            break
    else:
        # Still in doubt: the heuristic keeps its place, nobody else gains one.
        tied += [tactic for tactic in alive if tactic not in tied and tactic == prefer[0]] if prefer else []
    times = {tactic: math.exp(statistics.fmean(found)) for tactic, found in logs.items()}
    winner = next(tactic for tactic in (*prefer, *sorted(tied, key=family.name)) if tactic in tied)
    return Race(winner, times, tuple(tied), number)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What was found for calls of ``first`` .. ``last`` tokens; times in microseconds; ``vetted`` by tactic."""

    first: int
    last: int
    tactic: Tactic
    heuristic: Tactic
    us: float
    heuristic_us: float
    rounds: int
    vetted: dict[Tactic, Vetted] = field(default_factory=dict)
    times: dict[Tactic, float] = field(default_factory=dict)
    family: Family = HOPPER

    @property
    def gain(self) -> float:
        """By how much the heuristic's choice takes longer: 0.05 is 5 %. NaN if it was struck out."""
        return self.heuristic_us / self.us - 1

    @property
    def struck(self) -> dict[str, str]:
        return {self.family.name(tactic): found.reason for tactic, found in self.vetted.items() if found.reason}

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the cache."""
        worst = max((found.relative for found in self.vetted.values() if found.reason is None), default=math.nan)
        return {
            "first": self.first,
            "tactic": self.family.name(self.tactic),
            "us": round(self.us, 3),
            "heuristic": self.family.name(self.heuristic),
            "heuristic_us": None if math.isnan(self.heuristic_us) else round(self.heuristic_us, 3),
            "rounds": self.rounds,
            "tactics": len(self.vetted),
            "largest_relative_error": None if math.isnan(worst) else float(f"{worst:.3g}"),
            "struck": self.struck,
        }


class Struck(RuntimeError):
    """No tactic that could win gave the right output: all of them, or the only one that was asked for."""


def tune(
    problem: MoEProblem,
    max_tokens: int,
    multiprocessors: int,
    make: Callable[[Conditions], Case],
    options: Options = Options(),
    *,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sequence[int] = (),
    forced: Tactic | None = None,
    skip: Callable[[int], bool] = lambda last: False,
    struck: Mapping[Tactic, str] | None = None,
    progress: Callable[[str], None] = lambda what: None,
    family: Family = HOPPER,
) -> Iterator[Tuned]:
    """Tune every bucket, ascending; each comes as soon as it is done, so that it can be stored.

    ``make`` makes the inputs of a bucket. ``forced``: vet and time only this tactic (beside the heuristic's) and let it win. ``skip``: of
    buckets that need no tuning. ``struck``: what was struck out before, and why. ``progress`` is told what is under way. ``family``: whose
    tactics are tuned.
    Raises Struck if no tactic of a bucket, or not the forced one, is right; PluginError (a ValueError) if that is not valid.
    """
    biases = options.biases
    if forced is not None and (reason := family.validity(problem, forced)):
        raise PluginError(f"tactic {family.name(forced)}", reason, "a tactic that the kernels can have")
    before, first = None, 1
    struck = dict(struck or {})
    for last in buckets.edges(problem, max_tokens, multiprocessors, sizes, biases.capped_at, family):
        if not skip(last):
            heuristic = family.heuristic(problem, last, multiprocessors)
            entrants = family.candidates(problem, last, multiprocessors) if forced is None else list(dict.fromkeys([heuristic, forced]))
            loads = "random" if biases.random_inputs else options.loads
            conditions = Conditions(last, loads, not biases.warm_l2, seed=options.seed)
            found = _bucket(
                *(problem, first, make(conditions), conditions, entrants, heuristic, struck),
                *(before, forced, options, dtype, progress, family),
            )
            before = found.tactic
            # What was wrong once is not trusted with any other number of tokens.
            struck |= {tactic: f"at {last} tokens {v.reason}" for tactic, v in found.vetted.items() if v.reason and tactic not in struck}
            yield found
        first = last + 1


def _bucket(
    problem: MoEProblem,
    first: int,
    case: Case,
    conditions: Conditions,
    entrants: list[Tactic],
    heuristic: Tactic,
    struck: dict[Tactic, str],
    before: Tactic | None,
    forced: Tactic | None,
    options: Options,
    dtype: torch.dtype,
    progress: Callable[[str], None],
    family: Family,
) -> Tuned:
    tokens, seed = conditions.tokens, options.seed * 1_000_003 + conditions.tokens
    expected = case.reference()
    vetted: dict[Tactic, Vetted] = {}
    count = 0

    def right(found: list[Tactic]) -> list[Tactic]:
        for number, tactic in enumerate(found, 1):
            if tactic in struck:
                vetted[tactic] = Vetted(struck[tactic])
                continue
            progress(f"{tokens} tokens: checking tactic {number} of {len(found)}")
            vetted[tactic] = vet(case, tactic, options.replays, expected, family)
            if vetted[tactic].reason:
                logger.warning("%d tokens: tactic %s is struck out: %s", tokens, family.name(tactic), vetted[tactic].reason)
        return [tactic for tactic in found if vetted[tactic].reason is None]

    def time(tactic: Tactic) -> float:
        nonlocal count
        count += 1
        progress(f"{tokens} tokens: timing {count}, {len(vetted)} tactics")
        allocates = _allocates(problem, tokens, tactic, entrants, dtype, options.biases, family)
        return case.time(tactic, replace(conditions, preallocated=not allocates))

    alive = right(entrants)
    if forced is not None and forced not in alive:
        raise Struck(f"{tokens} tokens: tactic {family.name(forced)}: {vetted[forced].reason}")
    if not alive:
        found = f"all {len(entrants)} tactics struck out, the heuristic's because: {vetted[heuristic].reason}"
        raise Struck(f"{tokens} tokens: {found}")
    if forced is not None:
        result = race(alive, time, [forced], replace(options, hopeless=()), seed, family)
        result = result._replace(winner=forced)
    else:
        prefer = [tactic for tactic in (heuristic, before) if tactic is not None]
        times: dict[Tactic, float] = {}
        if len(alive) > 1:
            once = race(alive, time, prefer, replace(options, rounds=(1, 1)), seed, family)
            times |= once.times
            alive = [t for t in alive if t == heuristic or times[t] <= options.hopeless[0] * min(times.values())]
            alive += right(family.crossed(times))
        result = race(alive, time, prefer, options, seed + 1, family)
        result = result._replace(times=times | result.times)
    us = result.times
    return Tuned(first, tokens, result.winner, heuristic, us[result.winner], us.get(heuristic, math.nan), result.rounds, vetted, us, family)


def _allocates(
    problem: MoEProblem, tokens: int, tactic: Tactic, entrants: list[Tactic], dtype: torch.dtype, biases: Biases, family: Family
) -> bool:
    """Whether a tactic is timed with an allocation: only under that bias, where it needs more than tiles of 128, or the next to that."""
    if not biases.unequal_allocations:
        return False
    allocated = min(entrants, key=lambda entrant: abs(entrant.tile_tokens - ALLOCATED_TILE))
    own, held = (family.workspace_bytes(problem, tokens, found, dtype) for found in (tactic, allocated))
    return own > held
