"""Blackwell's tactics in the tuner, in its file and in calls, on a CPU: made-up times, and an emulation of FlashInfer's kernels.

No Blackwell GPU has run any of this.
"""

from __future__ import annotations

import importlib.metadata
import logging
import zlib
from dataclasses import replace

import pytest
import torch
from flashinfer_emulation import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from tuner_cases import Clock, FakeCase, FakeGpu, without_a_gpu

from moe_backend_plugin.errors import PluginError, UnsupportedLayerError
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.moe import blackwell, families, kernel_check, tactic_cache, tactics, tuner, workspace
from moe_backend_plugin.moe.blackwell import Tactic
from moe_backend_plugin.moe.buckets import edges
from moe_backend_plugin.moe.families import BLACKWELL, HOPPER
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.tactic_cache import Kind
from moe_backend_plugin.moe.tactics import Bucket, Table
from moe_backend_plugin.moe.tuner import Biases, Conditions, Options

CPU, BF16, MULTIPROCESSORS = torch.device("cpu"), torch.bfloat16, 148
PROBLEM = MoEProblem(256, 32, 7168, 2048, 8, Activation(), "nvfp4")
SMALL = MoEProblem(8, 8, 256, 64, 2, Activation(), "nvfp4")
KIND = Kind("NVIDIA B200", MULTIPROCESSORS, "580.1", (10, 0))
OPTIONS = Options()
SLOW, FAST = Tactic(), Tactic(256, 128, 256, 2)
HOPPER_NAME = "t8.r1x1k2x2b2w.r2x1k1x4b2w"


@pytest.fixture(autouse=True)
def nothing_tuned(tmp_path, monkeypatch):
    """A folder and tables of this test alone."""
    monkeypatch.setattr(kernels, "_folder", str(tmp_path / "kernels"))
    monkeypatch.setattr(tactics, "_tables", {})
    monkeypatch.setattr(tactics, "_mode", "cache")


# --- the family -------------------------------------------------------------------------------------------------------


def test_names_say_which_family_a_tactic_is_of():
    assert families.parse(SLOW.name) == (BLACKWELL, SLOW)
    family, tactic = families.parse(HOPPER_NAME)
    assert family is HOPPER and HOPPER.name(tactic) == HOPPER_NAME
    with pytest.raises(
        PluginError, match=r"found 's128'; allowed: a name such as t8\S+ on Hopper, a name such as s128.128.128x1 on Blackwell"
    ):
        families.parse("s128")
    assert [families.of(found) for found in ((9, 0), (10, 0), (10, 3))] == [HOPPER, BLACKWELL, BLACKWELL]


@given(st.integers(1, 131072), st.sampled_from([64, 192, 2048]))
@settings(max_examples=40, deadline=None)
def test_every_tactic_is_a_candidate_the_heuristics_in_front(tokens, intermediate):
    problem = replace(PROBLEM, intermediate=intermediate)
    found = BLACKWELL.candidates(problem, tokens, MULTIPROCESSORS)
    assert found[0] == blackwell.choose(problem, tokens) and len(found) == len(set(found))
    assert set(found) == set(blackwell.every(problem)) and not BLACKWELL.crossed(dict.fromkeys(found, 1.0))


# --- buckets ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20000), st.lists(st.integers(1, 20000), max_size=4))
@settings(max_examples=20, deadline=None)
def test_buckets_are_powers_of_two_and_where_the_heuristic_changes(max_tokens, sizes):
    sizes = [size for size in sizes if size <= max_tokens]
    found = edges(PROBLEM, max_tokens, MULTIPROCESSORS, sizes, family=BLACKWELL)
    chosen = [blackwell.choose(PROBLEM, tokens) for tokens in range(1, max_tokens + 1)]
    changes = {tokens for tokens in range(1, max_tokens) if chosen[tokens - 1] != chosen[tokens]}
    powers = {1 << i for i in range(max_tokens.bit_length())}
    assert found == sorted(powers | changes | set(sizes) | {max_tokens})
    for first, last in zip([0, *found], found, strict=False):  # every boundary, from both sides
        assert blackwell.choose(PROBLEM, first + 1) == blackwell.choose(PROBLEM, last)


def test_the_heuristic_does_change():
    change = next(tokens for tokens in range(1, 131072) if blackwell.choose(PROBLEM, tokens) != blackwell.choose(PROBLEM, tokens + 1))
    assert change & (change - 1) and change in edges(PROBLEM, 131072, MULTIPROCESSORS, family=BLACKWELL)
    assert change not in edges(PROBLEM, 131072, MULTIPROCESSORS)  # Hopper's changes elsewhere


# --- the tuner --------------------------------------------------------------------------------------------------------


def made_up(tactic: Tactic, conditions: Conditions) -> float:
    """Microseconds: 100 to 150, the same in every run, apart by more than a tie."""
    return 100 * 1.01 ** (zlib.crc32(f"{tactic.name} {conditions.tokens}".encode()) % 40)


def gpu_of(us, **more) -> FakeGpu:
    return FakeGpu(us, family=BLACKWELL, **more)


def tune(gpu: FakeGpu, max_tokens: int = 8, problem: MoEProblem = PROBLEM, options: Options = OPTIONS, **more) -> dict[int, tuner.Tuned]:
    found = tuner.tune(problem, max_tokens, MULTIPROCESSORS, gpu.make, options, family=BLACKWELL, **more)
    return {tuned.last: tuned for tuned in found}


def test_the_fastest_of_all_wins_every_bucket():
    gpu = gpu_of(made_up)
    found = tune(gpu, 4096)
    assert list(found) == edges(PROBLEM, 4096, MULTIPROCESSORS, family=BLACKWELL)
    first = 1
    for last, tuned in found.items():
        conditions = Conditions(last)
        best = min(made_up(tactic, conditions) for tactic in blackwell.every(PROBLEM))
        assert tuned.first == first and made_up(tuned.tactic, conditions) <= 1.011 * best
        assert tuned.heuristic == blackwell.choose(PROBLEM, last) and tuned.heuristic_us == pytest.approx(
            made_up(tuned.heuristic, conditions)
        )
        stored = tuned.as_dict()
        assert blackwell.parse(stored["tactic"]) == tuned.tactic and stored["tactics"] == 32 and stored["struck"] == {}
        first = last + 1
    assert {replace(conditions, tokens=0) for _, conditions in gpu.timed} == {Conditions(0)}
    assert len({tuned.tactic for tuned in found.values()}) > 1


def test_a_tie_is_the_heuristics_and_then_the_bucket_befores():
    assert {tuned.tactic for tuned in tune(gpu_of(lambda tactic, conditions: 100.0), 4096).values()} <= set(
        blackwell.tactics_met(PROBLEM, 4096)
    )

    def us(tactic, conditions):
        if tactic == FAST:
            return 90.0 if conditions.tokens == 1 else 90.2
        return 110.0 if tactic == SLOW else 90.1 if conditions.tokens > 1 else 95.0

    assert {tuned.tactic for tuned in tune(gpu_of(us)).values()} == {FAST}


FAULTS = {
    "wrong": "wrong: relative error",
    "nan": "not finite: 1 of",
    "raises": "fails: RuntimeError",
    "wrong later": "wrong: relative error",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_struck_out_and_never_timed(fault, caplog):
    gpu = gpu_of(lambda tactic, conditions: 50.0 if tactic == FAST else 100.0, wrong={FAST.name: fault})
    with caplog.at_level(logging.WARNING):
        found = tune(gpu)
    assert all(tuned.tactic == SLOW for tuned in found.values()) and FAST not in {tactic for tactic, _ in gpu.timed}
    assert FAULTS[fault] in found[1].struck[FAST.name] and found[8].struck[FAST.name].startswith("at 1 tokens")
    assert FAST.name in caplog.text


def test_sums_without_an_order_need_not_repeat_but_must_stay_right():
    ordered = FAST._replace(ordered=True)
    case = FakeCase(gpu_of(made_up, wrong={FAST.name: "unsteady", ordered.name: "unsteady"}), Conditions(4))
    found = tuner.vet(case, FAST, 3, family=BLACKWELL)
    assert found.reason is None and found.relative > tuner.vet(case, SLOW, 3, family=BLACKWELL).relative  # of the worst replay
    assert tuner.vet(case, ordered, 3, family=BLACKWELL).reason == "not repeatable: 1 of 16 values differ"


def test_rounded_activations_are_allowed_what_the_check_at_start_allows():
    class Case:
        def replay(self, tactic):
            return torch.full((4, 8), self.value)

        def reference(self):
            return torch.arange(4), torch.ones(4, 8)

    case = Case()
    for value, reason in ((1.04, None), (1.06, "wrong: relative error 6.0e-02, of the worst row 6.0e-02; allowed 5e-02, 2e-01")):
        case.value = value
        assert tuner.vet(case, FAST, 2, family=BLACKWELL).reason == reason
        assert kernel_check.compare(case.replay(FAST), torch.ones(4, 8), kernel_check.W4A4)[0] == reason
    case.value = 1.04
    assert tuner.vet(case, FAST, 2).reason.endswith("allowed 4e-03, 3e-02")


def test_an_error_of_flashinfers_compiler_strikes_out():
    class CompilerError(Exception):
        pass

    class Case(FakeCase):
        def replay(self, tactic):
            if tactic == FAST:
                raise CompilerError("no such shape\nmore")
            return super().replay(tactic)

    gpu = gpu_of(made_up)
    gpu.make = lambda conditions: Case(gpu, conditions)
    assert tune(gpu, 1)[1].struck == {FAST.name: "fails: CompilerError: no such shape"}


def test_nothing_right_and_forced_tactics():
    everything = {tactic.name: "wrong" for tactic in blackwell.every(PROBLEM)}
    with pytest.raises(tuner.Struck, match="1 tokens: all 32 tactics struck out, the heuristic's because: wrong"):
        tune(gpu_of(made_up, wrong=everything))
    with pytest.raises(tuner.Struck, match="1 tokens: tactic s256.128.256x2: not finite"):
        tune(gpu_of(made_up, wrong={FAST.name: "nan"}), forced=FAST)
    assert {tuned.tactic for tuned in tune(gpu_of(lambda tactic, _: 200.0 if tactic == FAST else 1.0), forced=FAST).values()} == {FAST}
    with pytest.raises(PluginError, match="384 rows of the first projection"):
        tune(gpu_of(made_up), problem=replace(PROBLEM, intermediate=192), forced=Tactic(gate_up_columns=256))


def test_the_allocation_bias_is_theirs_too():
    """A tactic that keeps every pair's row needs more than the heuristic's, and is charged for it."""
    gpu = gpu_of(made_up)
    tune(gpu, 8, options=Options(biases=Biases(unequal_allocations=True)))
    charged = {tactic for tactic, conditions in gpu.timed if not conditions.preallocated}
    assert Tactic(ordered=True) in charged and SLOW not in charged and FAST in charged  # a larger tile, more padding


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flashinfer(monkeypatch):
    """The version that is installed."""
    right, found = importlib.metadata.version, {"flashinfer-python": "0.7.2"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or right(name))
    return found


def bucket(name: str, first: int = 1) -> dict:
    return {"first": first, "tactic": name, "struck": {}}


def write(name: str, last: int, kind: Kind = KIND, problem: MoEProblem = SMALL, first: int = 1) -> None:
    tactic_cache.write_bucket(tactic_cache.path_of(kind), problem, BF16, kind, last, bucket(name, first))


def table(kind: Kind = KIND) -> Table | None:
    return tactic_cache.table(SMALL, BF16, kind)


def test_what_the_tuner_finds_is_what_a_server_reads(flashinfer, caplog):
    found = tune(gpu_of(made_up), 64, SMALL)
    for tuned in found.values():
        tactic_cache.write_bucket(tactic_cache.path_of(KIND), SMALL, BF16, KIND, tuned.last, tuned.as_dict())
    held = table()
    assert [(b.first, b.last, b.tactic) for b in held.buckets] == [(t.first, t.last, t.tactic) for t in found.values()]
    assert all(held.of(tuned.first) == held.of(tuned.last) == tuned.tactic for tuned in found.values()) and held.of(65) is None
    assert tactic_cache.path_of(KIND).name == "nvidia-b200.json" and not caplog.records


def test_another_flashinfer_makes_an_entry_stale(flashinfer, caplog):
    write(FAST.name, 8)
    assert table().of(8) == FAST
    flashinfer["flashinfer-python"] = "0.7.3"
    assert table() is None
    assert (
        "kernel flashinfer 0.7.2" in caplog.text and "here flashinfer 0.7.3" in caplog.text and "run moe-backend tune again" in caplog.text
    )
    write(SLOW.name, 8)
    assert table().of(8) == SLOW
    flashinfer["flashinfer-python"] = "0.7.2"
    assert table().of(8) == FAST


def test_other_sources_of_the_call_make_an_entry_stale(flashinfer, monkeypatch, caplog):
    write(FAST.name, 8)
    monkeypatch.setattr(tactic_cache, "_driving_hash", lambda: "0" * 16)
    assert table() is None and f"here flashinfer 0.7.2 {'0' * 16}" in caplog.text


def test_without_flashinfer_nothing_is_raised(flashinfer, monkeypatch):
    write(FAST.name, 8)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert table() is None and KIND.stamp["kernel"].startswith("flashinfer absent ")


def test_names_of_another_family_are_ignored_with_a_warning(flashinfer, caplog):
    write(HOPPER_NAME, 8)
    write(FAST.name, 16, first=9)
    assert [b.tactic for b in table().buckets] == [FAST]
    assert "the bucket of 8 tokens is ignored" in caplog.text and "a name such as s128.128.128x1" in caplog.text
    hopper = Kind("NVIDIA H200", 132, "570.1")
    write(FAST.name, 8, hopper)
    assert table(hopper) is None and "a name such as t8" in caplog.text


def test_tactics_that_the_problem_cannot_have_are_ignored(flashinfer, caplog):
    narrow = replace(SMALL, intermediate=192)  # 384 rows
    write(Tactic(gate_up_columns=256).name, 8, problem=narrow)
    assert tactic_cache.table(narrow, BF16, KIND) is None and "384 rows" in caplog.text


def test_stamps_say_whose_kernels_they_are(flashinfer):
    assert KIND.stamp["kernel"] == f"flashinfer 0.7.2 {tactic_cache._driving_hash()}"
    assert Kind("NVIDIA H200", 132).stamp["kernel"] == tactic_cache.kernel_hash()
    assert set(KIND.stamp) == set(Kind("NVIDIA H200", 132).stamp)


# --- calls ------------------------------------------------------------------------------------------------------------


def call(tokens: int, emulation: Emulation, tactic: Tactic | None = None) -> torch.Tensor:
    made = kernel_check.layer(SMALL, tokens, CPU)
    weights = blackwell.pack(SMALL, *made.weights, *made.input_scales)
    out = torch.full_like(made.x, torch.nan)
    blackwell.fused_moe(made.x, weights, made.topk_weights, made.topk_ids, SMALL, out, tactic=tactic, flashinfer=emulation.library())
    return out


def tactic_of(emulation: Emulation) -> Tactic:
    """What the last call ran, from the arguments of FlashInfer's kernels."""
    first, second = ([kwargs for name, _, kwargs in emulation.calls if name == stage][-1] for stage in ("first", "second"))
    tile, columns = second["mma_tiler_mn"]
    ordered = not second["use_fused_finalize"]
    return Tactic(tile, first["mma_tiler_mn"][1], columns, second["cluster_shape_mn"][1], ordered)


def test_a_call_runs_what_was_tuned_and_else_what_the_heuristic_says():
    other = Tactic(128, 128, 256, 2, ordered=True)
    blackwell.prepare(SMALL, BF16, CPU, 16, "static")
    held = workspace.Arena.get(CPU, 0, workspace.EVERY_STREAM).bytes
    emulation = Emulation()
    assert tactics.set_table(SMALL, BF16, Table([Bucket(1, 4, FAST), Bucket(5, 8, other)]))
    for tokens, wanted in ((1, FAST), (4, FAST), (5, other), (8, other), (9, SLOW)):
        out = call(tokens, emulation)
        assert tactic_of(emulation) == blackwell.chosen(SMALL, tokens) == wanted
        right = call(tokens, emulation, SLOW)  # asked for by name
        assert tactic_of(emulation) == SLOW and float((out.float() - right.float()).norm() / right.float().norm()) < 0.02
    assert blackwell.chosen(SMALL, 4, torch.float16) == SLOW
    assert workspace.Arena.get(CPU, 0, workspace.EVERY_STREAM).bytes == held, "no call made the arena grow"


def test_a_call_reads_no_file(flashinfer, monkeypatch):
    write(FAST.name, 8)
    monkeypatch.setattr(Kind, "of", classmethod(lambda cls, device: KIND))
    assert blackwell.chosen(SMALL, 8) == SLOW
    assert tactics.load(SMALL, BF16, 0)

    def no_file(*_, **__):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", no_file)
    assert blackwell.chosen(SMALL, 8) == FAST and blackwell.chosen(SMALL, 9) == SLOW


ranges = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 2000), st.sampled_from(blackwell.every(PROBLEM))), max_size=5)


@given(ranges, st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_what_calls_can_meet_is_exactly_what_is_checked(found, max_tokens):
    buckets = [Bucket(first, first + more, tactic) for first, more, tactic in found]
    problem = replace(PROBLEM, num_experts=32, num_local_experts=32)  # the heuristic changes at 768 tokens
    tactics.set_table(problem, BF16, Table(buckets))
    met = list(blackwell.tactics_met(problem, max_tokens))
    assert len(met) == len(set(met)) and set(met) == {blackwell.chosen(problem, tokens) for tokens in range(1, max_tokens + 1)}
    tactics.set_table(problem, BF16, None)


def test_tuned_tactics_are_checked_before_a_server_starts():
    emulation = Emulation()
    small = replace(PROBLEM, hidden=256, intermediate=64)
    tactics.set_table(small, BF16, Table([Bucket(1, 32, FAST), Bucket(33, 40, Tactic(ordered=True))]))
    assert kernel_check.require(small, CPU, 32, "static", flashinfer=emulation.library()) == 1
    assert kernel_check.require(small, CPU, 64, "static", flashinfer=emulation.library()) == 3
    used = {(kwargs["mma_tiler_mn"], kwargs["use_fused_finalize"]) for name, _, kwargs in emulation.calls if name == "second"}
    assert used == {((256, 256), True), ((128, 128), False), ((128, 128), True)}

    def wrong(**arguments):
        arguments["output"].zero_()

    library = Emulation().library()._replace(combine=wrong)
    with pytest.raises(UnsupportedLayerError, match="FlashInfer's kernel s128.128.128x1o at 1 tokens"):
        kernel_check.require(small, CPU, 64, "static", flashinfer=library)
    assert kernel_check.require(small, CPU, 32, "static", flashinfer=library) == 1


# --- the GPU's part ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """``bench.tactics`` on the CPU: the kernels are emulated, graphs are calls."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from moe_backend_plugin.bench import tactics as found

    emulation = Emulation()
    library = emulation.library()
    monkeypatch.setattr(blackwell, "library", lambda: library)
    without_a_gpu(monkeypatch, found)
    found.emulation = emulation
    yield found
    del found.emulation


OAI = Activation("swigluoai", 1.702, 1.0, 7.0)
PROBLEMS = {
    "all": (SMALL, 0),
    "rank 2 of 4": (MoEProblem(8, 2, 256, 64, 3, OAI, "nvfp4"), 4),
    "no gate": (MoEProblem(8, 4, 256, 64, 2, Activation("relu2"), "nvfp4"), 4),
}


def layer(bench, problem, first, max_tokens=16):
    return bench.BlackwellLayer(problem, BF16, first, CPU, max_tokens, blackwell.every(problem))


@pytest.mark.parametrize(("problem", "first"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_outputs_are_those_of_the_reference(bench, problem, first, tokens):
    case = layer(bench, problem, first).case(Conditions(tokens))
    expected = case.reference()
    assert expected[1].dtype is torch.float32 and 0.01 < expected[1].norm(dim=1).max() / problem.hidden**0.5 < 100
    for tactic in (SLOW, FAST, Tactic(ordered=True)):
        vetted = tuner.vet(case, tactic, 2, expected, BLACKWELL)
        assert vetted.reason is None and tactic_of(bench.emulation) == tactic
    bench.emulation.wrong = "last row left out"
    assert tuner.vet(case, SLOW, 2, expected, BLACKWELL).reason.startswith("wrong")
    case = layer(bench, problem, first).case(Conditions(tokens))  # keeps no graphs yet
    case._launch = lambda *_: None
    assert "not finite" in tuner.vet(case, FAST, 2, expected, BLACKWELL).reason  # memory was full of NaN


def test_each_launch_has_weights_of_its_own_in_one_arena(bench):
    one = layer(bench, SMALL, 0)
    assert len({weights.w13.data_ptr() for weights in one.sets}) == len(one.sets) == 9
    held = workspace.Arena.get(CPU, 0, workspace.EVERY_STREAM).bytes
    for tactic in blackwell.every(SMALL):
        assert one.workspace_bytes(16, tactic) == BLACKWELL.workspace_bytes(SMALL, 16, tactic, BF16) <= held
    assert one.case(Conditions(4)).time(FAST, Conditions(4)) == 5.0 and one.clock.asked == [(8, 5, 1, True)]


def test_a_layer_that_the_kernels_do_not_serve(bench):
    with pytest.raises(RuntimeError, match="activations in bf16"):
        layer(bench, replace(SMALL, activation_precision="bf16"), 0)


def test_a_whole_run(bench, monkeypatch):
    monkeypatch.setattr(Clock, "replayed", lambda *_, **__: 5.0)
    found = list(tuner.tune(SMALL, 4, MULTIPROCESSORS, layer(bench, SMALL, 0, 4).case, Options(replays=2), family=BLACKWELL))
    assert [tuned.last for tuned in found] == [1, 2, 4]
    # All take 5 us here: a tie, which is the heuristic's.
    assert all(tuned.tactic == tuned.heuristic and not tuned.struck and len(tuned.vetted) == 16 for tuned in found)
