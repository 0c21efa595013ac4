"""The tuner on made-up times: it finds the fastest, agrees with itself, strikes out what is wrong, and each known bias would mislead it."""

from __future__ import annotations

import ast
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuner_cases import MULTIPROCESSORS, SMALL, FakeCase, FakeGpu, formula

from moe_backend_plugin.bench.moe import MODELS
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.moe import tactics, tiles, tuner
from moe_backend_plugin.moe.tiles import Choice
from moe_backend_plugin.moe.tuner import Biases, Conditions, Options

QWEN = MODELS["qwen3-30b-a3b"].problem
OPTIONS = Options()


def tune(problem, max_tokens, gpu: FakeGpu, options: Options = OPTIONS, **more) -> dict[int, tuner.Tuned]:
    return {found.last: found for found in tuner.tune(problem, max_tokens, MULTIPROCESSORS, gpu.make, options, **more)}


# --- the race ---------------------------------------------------------------------------------------------------------

A, B, C, D = tactics.candidates(QWEN, 64, MULTIPROCESSORS)[:4]


def race(times: dict[Choice, float], noise: float = 0.0, prefer=(), seed: int = 0, drift: float = 0.0, options: Options = OPTIONS):
    gpu = FakeGpu(lambda tactic, conditions: times[tactic], noise, drift, seed)
    case = FakeCase(gpu, Conditions(1))
    return tuner.race(list(times), lambda tactic: case.time(tactic, Conditions(1)), list(prefer), options, seed), gpu


def test_the_fastest_wins_without_noise_after_the_fewest_rounds():
    found, gpu = race({A: 10.0, B: 9.8, C: 10.2})
    assert found.winner == B and found.rounds == 4 and found.times[B] == pytest.approx(9.8) and found.tied == (B,)
    assert [tactic for tactic, _ in gpu.timed].count(C) == 4


def test_hopeless_tactics_are_timed_once():
    found, gpu = race({A: 10.0, B: 14.0})
    assert found.winner == A and [tactic for tactic, _ in gpu.timed].count(B) == 1


def test_few_stay_for_the_last_rounds_and_who_would_win_a_tie_among_them():
    found = tactics.candidates(QWEN, 64, MULTIPROCESSORS)[:20]
    times = {tactic: 10.0 + 0.015 * i for i, tactic in enumerate(found)}
    first, gpu = race(times, noise=0.02, prefer=(found[-1], found[-2]), options=Options(finalists=3))
    counts = [[tactic for tactic, _ in gpu.timed].count(tactic) for tactic in found]
    late = [tactic for tactic, count in zip(found, counts, strict=True) if count > 4]
    assert first.rounds > 5 and len(late) <= 5 and {found[-1], found[-2]} <= {*late, first.winner}


def test_a_race_ends_once_the_heuristic_is_known_to_win_it():
    """Whether C is a tie too stays in doubt for long, and changes nothing."""
    quick, _ = race({A: 10.0, B: 10.0, C: 10.1}, noise=0.004, prefer=(A,))
    slow, _ = race({A: 10.0, B: 10.0, C: 10.1}, noise=0.004, prefer=(D,))
    assert quick.winner == A and quick.rounds < slow.rounds


def test_the_slower_a_tactic_the_sooner_it_leaves():
    found, gpu = race({A: 10.0, B: 10.7, C: 11.5, D: 12.5})
    assert found.winner == A and [[tactic for tactic, _ in gpu.timed].count(one) for one in (B, C, D)] == [3, 2, 1]


def test_a_tie_goes_to_the_heuristic_then_to_the_bucket_before_then_by_name():
    assert race({A: 10.0, B: 9.97, C: 9.96}, prefer=(A, C))[0].winner == A
    assert race({A: 11.0, B: 9.97, C: 9.96}, prefer=(A, B))[0].winner == B
    assert race({A: 11.0, B: 9.97, C: 9.96}, prefer=(A,))[0].winner == min(B, C, key=tactics.name)
    assert race({A: 10.2, B: 9.97}, prefer=(A, B))[0].winner == B


def test_noise_takes_more_rounds_until_the_interval_separates():
    quiet, _ = race({A: 10.0, B: 9.7}, noise=0.001, prefer=(A,))
    loud, _ = race({A: 10.0, B: 9.7}, noise=0.01, prefer=(A,))
    assert quiet.winner == loud.winner == B and loud.rounds > quiet.rounds


def test_what_stays_in_doubt_stays_with_the_heuristic():
    found, gpu = race({A: 10.0, B: 9.9}, noise=0.2, prefer=(A,), options=Options(hopeless=()))
    assert found.winner == A and found.rounds == 40 and len(gpu.timed) == 80


def test_orders_are_random_but_the_same_with_the_same_seed():
    times = {A: 10.0, B: 10.01, C: 10.02, D: 10.03}
    orders = [[tactic for tactic, _ in race(times, seed=seed)[1].timed] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:4] != orders[0][4:8] and set(orders[0][:4]) == set(orders[0][4:8]) == set(times)


def test_a_clock_that_drifts_misleads_nobody():
    assert race({A: 10.0, B: 9.8, C: 10.1}, drift=0.02)[0].winner == B


def test_a_race_needs_entrants():
    with pytest.raises(ValueError, match="found no tactic"):
        race({})


def test_intervals():
    assert tuner.interval([0.5]) == (-math.inf, math.inf)
    assert tuner.interval([0.1] * 5) == pytest.approx((0.1, 0.1))
    low, high = tuner.interval([0.0, 0.1, 0.2])
    assert (low + high) / 2 == pytest.approx(0.1) and high - low == pytest.approx(2 * 9.92 * 0.1 / math.sqrt(3))


# --- the run ----------------------------------------------------------------------------------------------------------


def test_every_bucket_gets_nearly_the_fastest_of_all_tactics():
    us = formula(QWEN)
    found = tune(QWEN, 1024, FakeGpu(us))
    assert {1 << i for i in range(11)} <= set(found)
    first = 1
    for last, tuned in found.items():
        assert tuned.first == first and tuned.heuristic == tiles.choose(QWEN, last, MULTIPROCESSORS)
        near = tactics.candidates(QWEN, last, MULTIPROCESSORS)
        all_pairs = {Choice(a.gate_up, b.down) for a in near for b in near if a.tile_tokens == b.tile_tokens}
        best = min(us(tactic, Conditions(last)) for tactic in all_pairs)
        assert tuned.us <= 1.011 * best and tuned.us == pytest.approx(us(tuned.tactic, Conditions(last)))
        assert tuned.heuristic_us == pytest.approx(us(tuned.heuristic, Conditions(last))) and tuned.gain >= -1e-9
        first = last + 1
    assert any(tuned.tactic != tuned.heuristic for tuned in found.values())


def test_two_runs_agree():
    """Other noise, another order: the same tactic in 95 % of the buckets, and where not, at most 1 % lost."""
    us = formula(QWEN)
    runs = [tune(QWEN, 16384, FakeGpu(us, noise=0.003, drift=1e-5, seed=seed), Options(seed=seed)) for seed in (1, 2)]
    same = [runs[0][last].tactic == runs[1][last].tactic for last in runs[0]]
    assert sum(same) >= 0.95 * len(same)
    for one, two in zip(runs[0].values(), runs[1].values(), strict=True):
        costs = sorted(us(tuned.tactic, Conditions(one.last)) for tuned in (one, two))
        assert costs[1] <= 1.01 * costs[0]


def test_all_tactics_are_timed_under_the_same_conditions():
    gpu = FakeGpu(formula(SMALL))
    tune(SMALL, 40, gpu)
    assert {replace(conditions, tokens=0) for _, conditions in gpu.timed} == {Conditions(0, "even", True, True, 0)}


def test_skipped_and_forced():
    gpu = FakeGpu(formula(SMALL))
    found = tune(SMALL, 40, gpu, skip=lambda last: last < 16)
    assert min(found) == 16 and all(conditions.tokens >= 16 for _, conditions in gpu.timed)
    slow = tactics.candidates(SMALL, 40, MULTIPROCESSORS)[-1]
    found = tune(SMALL, 40, FakeGpu(formula(SMALL)), forced=slow)
    assert all(tuned.tactic == slow and len(tuned.vetted) <= 2 and tuned.heuristic_us > 0 for tuned in found.values())
    with pytest.raises(PluginError, match="tiles of 8 and 16 tokens"):
        tune(SMALL, 4, FakeGpu(formula(SMALL)), forced=Choice(tiles.FEW, tiles.TILES[16]))


# --- vetting ----------------------------------------------------------------------------------------------------------

FAULTS = {
    "wrong": "wrong: relative error",
    "nan": "not finite: 1 of",
    "unsteady": "not repeatable: 1 of",
    "raises": "fails: RuntimeError: too many",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_struck_out_and_never_timed(fault, caplog):
    us = formula(SMALL)
    best = tune(SMALL, 8, FakeGpu(us))[8].tactic
    gpu = FakeGpu(us, wrong={tactics.name(best): fault})
    with caplog.at_level(logging.WARNING):
        found = tune(SMALL, 16, gpu)
    name = tactics.name(best)
    assert all(tuned.tactic != best for tuned in found.values()) and best not in {tactic for tactic, _ in gpu.timed}
    assert FAULTS[fault] in found[8].struck[name] and found[8].as_dict()["struck"] == found[8].struck
    assert name in caplog.text and FAULTS[fault] in caplog.text


def test_what_was_wrong_once_is_not_tried_again():
    us = formula(SMALL)
    best = tune(SMALL, 8, FakeGpu(us))[8].tactic
    gpu = FakeGpu(us, wrong={tactics.name(best): "wrong"})
    found = tune(SMALL, 8, gpu)
    assert gpu.replayed.count(tactics.name(best)) == 1
    assert found[2].struck[tactics.name(best)].startswith("at 1 tokens wrong")


def test_even_the_heuristic_is_struck_out():
    heuristic = tiles.choose(SMALL, 1, MULTIPROCESSORS)
    found = tune(SMALL, 1, FakeGpu(formula(SMALL), wrong={tactics.name(heuristic): "nan"}))[1]
    assert found.tactic != heuristic and math.isnan(found.gain) and found.as_dict()["heuristic_us"] is None


def test_nothing_right():
    everything = {tactics.name(tactic): "wrong" for tactic in tactics.every(SMALL)}
    with pytest.raises(tuner.Struck, match=r"1 tokens: all \d+ tactics struck out, the heuristic's because: wrong"):
        tune(SMALL, 1, FakeGpu(formula(SMALL), wrong=everything))
    forced = tactics.candidates(SMALL, 1, MULTIPROCESSORS)[3]
    with pytest.raises(tuner.Struck, match="1 tokens: tactic t8.*: not finite"):
        tune(SMALL, 1, FakeGpu(formula(SMALL), wrong={tactics.name(forced): "nan"}), forced=forced)


def test_one_wrong_row_among_many_is_seen():
    case = FakeCase(FakeGpu(formula(SMALL), wrong={tactics.name(A): "wrong"}), Conditions(100_000))
    assert tuner.vet(case, A, 2).reason.startswith("wrong") and tuner.vet(case, B, 2).reason is None


def test_rows_that_no_expert_answers_must_be_zero():
    class Case:
        def __init__(self, out):
            self.out = out

        def replay(self, tactic):
            return self.out

        def reference(self):
            right = torch.ones(4, 8)
            right[2] = 0
            return torch.arange(4), right

    out = torch.ones(4, 8)
    assert tuner.vet(Case(out), A, 2).reason is not None
    out[2] = 0
    assert tuner.vet(Case(out), A, 2).reason is None


# --- the four biases, each shown to change the choice ---------------------------------------------------------------------


def recorded(times: dict[tuple, float]):
    """Times by (tile, a condition's value); any other shape of a tile is 20 % slower, any other tile twice as slow."""

    def us(tactic: Choice, conditions: Conditions) -> float:
        tile = tactic.tile_tokens
        centre = Choice(tiles.TILES[tile], tiles.TILES[tile]) if tile in tiles.TILES else None
        for key in ((tile, "cold" if conditions.cold_l2 else "warm"), (tile, conditions.loads), (tile, conditions.tokens)):
            if key in times:
                return times[key] * (1.0 if tactic == centre else 1.2)
        return 2 * max(times.values())

    return us


def winner(problem, tokens, us, biases=OPTIONS.biases) -> int:
    """Tokens a tile of the tactic that calls of so many tokens would run."""
    found = tune(problem, tokens, FakeGpu(us, noise=0.001), Options(biases=biases), skip=lambda last: last < min(tokens, 8192))
    last = min((edge for edge in found if edge >= tokens), default=max(found))  # above a cap: as at the cap
    return found[last].tactic.tile_tokens


def test_the_biases_are_off():
    assert Options().biases == Biases() == Biases(False, None, False, False)
    assert Conditions(1) == Conditions(1, "even", cold_l2=True, preallocated=True)


def test_unequal_allocations_keep_the_tile_that_was_allocated_for():
    """A smaller tile has a longer list of tiles: with its allocation in the time it seems slower than the heuristic's."""
    tile = tiles.choose(QWEN, 8192, MULTIPROCESSORS).tile_tokens
    assert tile == 128

    def us(tactic, conditions):
        base = {128: 1000.0, 96: 930.0}.get(tactic.tile_tokens, 2000.0)
        slower = 1.0 if tactic.gate_up == tactic.down == tiles.TILES.get(tactic.tile_tokens) else 1.2
        return base * slower + (0 if conditions.preallocated else 90)

    assert winner(QWEN, 8192, us) == 96
    assert winner(QWEN, 8192, us, Biases(unequal_allocations=True)) == 128


def test_capped_buckets_run_large_calls_as_tuned_at_half_their_load():
    us = recorded({(96, 8192): 900.0, (128, 8192): 1000.0, (96, 16384): 2000.0, (128, 16384): 1890.0})
    assert winner(QWEN, 8192, us) == 96
    assert winner(QWEN, 16384, us) == 128
    assert winner(QWEN, 16384, us, Biases(capped_at=8192)) == 96


def test_random_inputs_tune_for_loads_that_do_not_come():
    us = recorded({(64, "even"): 300.0, (128, "even"): 330.0, (64, "random"): 420.0, (128, "random"): 380.0})
    assert winner(QWEN, 700, us) == 64
    assert winner(QWEN, 700, us, Biases(random_inputs=True)) == 128


def test_a_warm_cache_favours_what_streams_the_weights_again():
    us = recorded({(16, "cold"): 110.0, (32, "cold"): 100.0, (16, "warm"): 60.0, (32, "warm"): 70.0})
    assert winner(QWEN, 200, us) == 32
    assert winner(QWEN, 200, us, Biases(warm_l2=True)) == 16


def test_no_engine_tunes():
    """A server uses what was tuned ahead of it; nothing in its process times a tactic."""
    engines = Path(tuner.__file__).parents[1] / "engines"
    files = sorted(engines.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("tuner" in name.split(".") for name in names), f"{file}: line {node.lineno}"
