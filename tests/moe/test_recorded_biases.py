"""The four known biases of tuners stay off: the tuner on times that a GPU gave, without and with each of them.

``integration/gpu/tuner_biases.py`` records the times. The same checks run on made-up ones in that form, so that they are checked
themselves where nothing was recorded yet.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from tuner_cases import MULTIPROCESSORS, FakeGpu, formula

from moe_backend_plugin.bench.moe import MODELS
from moe_backend_plugin.moe import tactics, tiles, tuner
from moe_backend_plugin.moe.tactic_cache import problem_of
from moe_backend_plugin.moe.tiles import Choice
from moe_backend_plugin.moe.tuner import Biases, Conditions, Options

FILES = sorted((Path(__file__).parents[2] / "integration" / "bench" / "results").glob("tuner_biases_*.json"))
CAP = 8192
BIASES = {
    "unequal_allocations": Biases(unequal_allocations=True),
    "capped_at": Biases(capped_at=CAP),
    "random_inputs": Biases(random_inputs=True),
    "warm_l2": Biases(warm_l2=True),
}
UNKNOWN = 1e9
"""Microseconds of a tactic that was not recorded."""


class Recording:
    """A recorded file: the times of tactics by number of tokens and condition, given back one after another."""

    def __init__(self, content: dict) -> None:
        self.problem = problem_of(content["problem"])
        self.multiprocessors = content["multiprocessors"]
        self.times: dict[tuple[int, str], dict[str, list[float]]] = {}
        for row in content["rows"]:
            self.times.setdefault((row["tokens"], row["condition"]), {})[row["tactic"]] = row["us"]
        self.tokens = sorted({tokens for tokens, _ in self.times})
        self.asked: set[str] = set()
        self.recorded = {condition for _, condition in self.times}

    def shows(self, bias: str) -> bool:
        """Whether times were recorded under the conditions of a bias; the cap has no conditions of its own."""
        return bias == "capped_at" or bias in self.recorded

    @staticmethod
    def condition(conditions: Conditions) -> str:
        if not conditions.cold_l2:
            return "warm_l2"
        if conditions.loads != "even":
            return "random_inputs"
        return "unbiased" if conditions.preallocated else "unequal_allocations"

    def source(self) -> Callable[[Choice, Conditions], float]:
        turns: dict[tuple, itertools.cycle] = {}

        def us(tactic: Choice, conditions: Conditions) -> float:
            condition, name = self.condition(conditions), tactics.name(tactic)
            self.asked.add(condition)
            found = self.times[conditions.tokens, condition].get(name, [UNKNOWN])
            return next(turns.setdefault((conditions.tokens, condition, name), itertools.cycle(found)))

        return us

    def mean(self, tokens: int, tactic: Choice) -> float:
        """Under the tuner's own conditions, whatever it was chosen under."""
        found = self.times[tokens, "unbiased"].get(tactics.name(tactic), [UNKNOWN])
        return sum(found) / len(found)

    def best(self, tokens: int) -> float:
        return min(sum(us) / len(us) for us in self.times[tokens, "unbiased"].values())

    @cache  # noqa: B019  a few, for as long as the tests run
    def choices(self, biases: Biases) -> dict[int, Choice]:
        """What calls of each recorded number of tokens would run, as tuned so."""
        self.asked.clear()
        gpu, options = FakeGpu(self.source()), Options(biases=biases)
        found = tuner.tune(
            *(self.problem, max(self.tokens), self.multiprocessors, gpu.make, options),
            sizes=[tokens for tokens in self.tokens if tokens <= (biases.capped_at or tokens)],
            skip=lambda last: last not in self.tokens,
        )
        tuned = {one.last: one.tactic for one in found}
        return {tokens: tuned[min(tokens, biases.capped_at or tokens)] for tokens in self.tokens}


def made_up() -> dict:
    """Times in the recordings' form, in which each bias favours other tiles."""
    problem, rows = MODELS["qwen3-30b-a3b"].problem, []
    us = formula(problem)
    for tokens in (512, CAP, 2 * CAP):
        found = tactics.candidates(problem, tokens, MULTIPROCESSORS)
        if tokens > CAP:
            found = list(dict.fromkeys([*found, *tactics.candidates(problem, CAP, MULTIPROCESSORS)]))
        heuristic = tiles.choose(problem, tokens, MULTIPROCESSORS).tile_tokens
        for tactic in found:
            tile, cold = tactic.tile_tokens, us(tactic, Conditions(tokens))
            cold *= 1.3 if tokens > CAP and tile < heuristic else 0.7 if tokens == CAP and tile < heuristic else 1.0
            by = {
                "unbiased": cold,
                "warm_l2": cold * (0.4 if tile <= 32 else 1.0),
                "random_inputs": cold * (0.4 if tile >= 96 else 1.0),
                "unequal_allocations": cold + (0.7 * cold if tile < 128 else 0),
            }
            noise = (1.0, 1.001, 0.999, 1.0005, 0.9995)
            rows += [
                {"tokens": tokens, "condition": name, "tactic": tactics.name(tactic), "us": [value * n for n in noise]}
                for name, value in by.items()
            ]
    return {"problem": asdict(problem), "multiprocessors": MULTIPROCESSORS, "rows": rows}


@cache
def recording_of(file: Path | None) -> Recording:
    """Of a stored file, or the made-up one."""
    return Recording(json.loads(file.read_text(encoding="utf-8") if file else json.dumps(made_up())))


@pytest.fixture(params=[None, *FILES], ids=lambda file: file.stem if file else "made up")
def recording(request) -> Recording:
    return recording_of(request.param)


def test_there_are_recorded_times():
    if not FILES:
        pytest.skip("no times of a GPU are stored yet: run integration/gpu/tuner_biases.py on one")
    assert all({"stamp", "rows", "problem"} <= set(json.loads(file.read_text(encoding="utf-8"))) for file in FILES)


def test_by_default_every_time_is_taken_without_bias_and_the_choice_is_the_fastest(recording):
    recording.choices.cache_clear()
    found = recording.choices(Options().biases)
    assert recording.asked == {"unbiased"}
    for tokens, tactic in found.items():
        assert recording.mean(tokens, tactic) <= 1.01 * recording.best(tokens), (tokens, tactics.name(tactic))


def losses(recording: Recording, bias: str) -> dict[int, float]:
    """Of the calls that a bias lets run otherwise, by number of tokens: how much longer they take for it, as a part."""
    if not recording.shows(bias):
        return {}
    right, biased = recording.choices(Options().biases), recording.choices(BIASES[bias])
    changed = [tokens for tokens in right if biased[tokens] != right[tokens]]
    return {tokens: recording.mean(tokens, biased[tokens]) / recording.mean(tokens, right[tokens]) - 1 for tokens in changed}


@pytest.mark.parametrize("bias", BIASES)
def test_no_bias_chooses_better(recording, bias):
    assert min(losses(recording, bias).values(), default=0.0) >= -0.011


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("recordings", [[None], FILES], ids=["made up", "recorded"])
def test_each_bias_changes_a_choice_for_the_worse(recordings, bias):
    found = {file and file.stem: losses(recording_of(file), bias) for file in recordings}
    print({name: {tokens: f"{loss:+.1%}" for tokens, loss in of.items()} for name, of in found.items()})
    assert any(loss > 0 for of in found.values() for loss in of.values())


def test_the_biases_are_off_by_default():
    assert asdict(Options().biases) == {"unequal_allocations": False, "capped_at": None, "random_inputs": False, "warm_l2": False}
    assert Conditions(1).cold_l2 and Conditions(1).preallocated and Conditions(1).loads == "even"
