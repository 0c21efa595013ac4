"""The file of tuned tactics: what is read back, what is ignored with a warning, many writers at once, and death at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from tuner_cases import MULTIPROCESSORS, SMALL, FakeGpu, formula

from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.kernels import compile as kernels
from moe_backend_plugin.moe import buckets, tactic_cache, tactics, tiles, tuner
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.moe.tactic_cache import Kind

BF16 = torch.bfloat16
KIND = Kind("NVIDIA H200", MULTIPROCESSORS, "570.1")
OTHER = MoEProblem(32, 8, 256, 64, 4, Activation("swigluoai", 1.702, 1.0, 7.0))
A, B = (tactics.candidates(SMALL, 8, MULTIPROCESSORS)[i] for i in (1, 2))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache of this test alone."""
    monkeypatch.setattr(kernels, "_folder", str(tmp_path / "kernels"))
    monkeypatch.setattr(tactics, "_tables", {})
    monkeypatch.setattr(tactics, "_mode", "cache")
    return tactic_cache.folder()


def bucket(tactic, first: int = 1, **more) -> dict:
    return {"first": first, "tactic": tactics.name(tactic), "struck": {}, **more}


def write(tactic, last: int = 8, problem: MoEProblem = SMALL, kind: Kind = KIND, dtype=BF16, **more) -> Path:
    path = tactic_cache.path_of(kind)
    tactic_cache.write_bucket(path, problem, dtype, kind, last, bucket(tactic, **more))
    return path


def table(problem=SMALL, dtype=BF16, kind=KIND):
    return tactic_cache.table(problem, dtype, kind)


def test_what_is_written_is_read_back():
    path = write(A, 8)
    write(B, 16, first=9)
    write(B, 8, problem=OTHER)
    assert path == tactic_cache.folder() / "nvidia-h200.json" and path.parent.parent == kernels.cache_folder()
    assert [(b.first, b.last, b.tactic) for b in table().buckets] == [(1, 8, A), (9, 16, B)]
    assert table(OTHER).of(3) == B
    write(B, 8)
    assert table().of(3) == B and table().of(9) == B
    assert not [file for file in path.parent.iterdir() if file.name.endswith(".part")]
    stamp = json.loads(path.read_text())["entries"][0]["stamp"]
    assert set(stamp) == {"package", "kernel", "device", "multiprocessors", "driver"}


def test_nothing_was_tuned(caplog):
    assert table() is None and not caplog.records
    write(A, problem=OTHER)
    assert table() is None and table(OTHER, torch.float16) is None and not caplog.records


@pytest.mark.parametrize(
    "other",
    [
        Kind("NVIDIA H200", MULTIPROCESSORS, "580.2"),
        Kind("NVIDIA H200", 114, "570.1"),
        Kind("nvidia h200", MULTIPROCESSORS, "570.1"),  # the same file
    ],
    ids=str,
)
def test_what_another_kind_tuned_is_ignored_with_a_warning_and_kept(other, caplog):
    write(A, kind=other)
    assert table() is None and "run moe-backend tune again" in caplog.text
    write(B)
    assert table().of(8) == B and table(kind=other).of(8) == A


def test_a_bucket_ends_where_the_heuristic_changes(monkeypatch):
    """Where it has learnt to since: of the calls below, it knows more than what was tuned for those above."""
    write(A, 16)
    assert table().of(1) == A
    monkeypatch.setattr(buckets, "changes", buckets.changes.__wrapped__)
    monkeypatch.setattr(tiles, "choose", cache(lambda problem, tokens, multiprocessors: A if tokens <= 5 else B))
    assert (table().of(5), table().of(6), table().of(16)) == (None, A, A)


def test_other_kernels_and_other_releases_are_ignored(monkeypatch, caplog):
    write(A)
    monkeypatch.setattr(tactic_cache, "kernel_hash", lambda: "0" * 16)
    assert table() is None and f"here {'0' * 16}" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_folder", str(tactic_cache.folder()))


BROKEN = {
    "cut off": '{"format": 1, "entries": [{"stamp"',
    "binary": "\x00\x01",
    "empty": "",
    "a list": "[]",
    "another format": '{"format": 99, "entries": []}',
    "no entries": '{"format": 1}',
    "deep": '{"format": 1, "entries": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read(text, caplog):
    path = tactic_cache.path_of(KIND)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert table() is None and "is ignored" in caplog.text
    write(A)
    assert table().of(1) == A and path.with_name(path.name + ".damaged").read_text() == text


@pytest.mark.parametrize("entry", [None, 3, {}, {"stamp": {}, "problem": {}}, {"stamp": [], "problem": {}, "buckets": {}}], ids=str)
def test_damaged_entries_beside_good_ones(entry, caplog):
    path = write(A)
    found = json.loads(path.read_text())
    found["entries"].insert(0, entry)
    path.write_text(json.dumps(found))
    assert table().of(1) == A and "1 entries are ignored" in caplog.text


INVALID = tiles.Choice(tiles.Shape(128, 4, row_blocks=2), tiles.TILES[128])
BAD_BUCKETS = {
    "no bucket": 7,
    "no tactic": {"first": 1},
    "no name": {"first": 1, "tactic": "t8"},
    "invalid": bucket(INVALID),
    "backwards": bucket(A, first=9),
    "from nothing": bucket(A, first=0),
    "no number": bucket(A, first="x"),
    "endless": bucket(A, first=float("inf")),
    "struck nothing": {"first": 9, "tactic": [], "struck": 3},
    "struck out": bucket(A) | {"struck": {tactics.name(A): "wrong"}},
}


@pytest.mark.parametrize("bad", BAD_BUCKETS.values(), ids=BAD_BUCKETS)
def test_bad_buckets_are_ignored_and_the_others_serve(bad, caplog):
    path = write(B, 16, first=9)
    found = json.loads(path.read_text())
    found["entries"][0]["buckets"]["8"] = bad
    path.write_text(json.dumps(found))
    assert [b.last for b in table().buckets] == [16] and "the bucket of 8 tokens is ignored" in caplog.text


def test_a_tactic_struck_out_in_one_bucket_serves_none():
    write(A, 8)
    path = tactic_cache.path_of(KIND)
    tactic_cache.write_bucket(path, SMALL, BF16, KIND, 16, bucket(B, 9) | {"struck": {tactics.name(A): "not finite"}})
    assert [b.last for b in table().buckets] == [16]


def test_files_of_the_package_serve_where_the_user_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tactic_cache, "SHIPPED", tmp_path / "shipped")
    shipped = tmp_path / "shipped" / KIND.file_name
    tactic_cache.write_bucket(shipped, SMALL, BF16, Kind(KIND.name, MULTIPROCESSORS, "999.9"), 8, bucket(A))
    assert table().of(1) == A  # whatever the driver
    write(B)
    assert table().of(1) == B


def shipped_entries() -> list[dict]:
    found = [entry for file in sorted(tactic_cache.SHIPPED.glob("*.json")) for entry in tactic_cache.read(file)]
    assert found, "the package ships no tuned tactics"
    return found


def test_what_the_package_ships_was_tuned_with_these_kernels_and_is_served():
    for entry in shipped_entries():
        stamp, problem = entry["stamp"], tactic_cache.problem_of(entry["problem"])
        assert stamp["kernel"] == tactic_cache.kernel_hash(), "tune again, or take the file out: no server would use it"
        assert tactic_cache.describe(problem, BF16) == entry["problem"]
        served = table(problem, kind=Kind(stamp["device"], stamp["multiprocessors"], "another driver"))
        assert {str(b.last): tactics.name(b.tactic) for b in served.buckets} == {k: b["tactic"] for k, b in entry["buckets"].items()}


def test_what_was_tuned_is_not_slower_than_the_heuristic():
    for entry in shipped_entries():
        for last, bucket in entry["buckets"].items():
            assert bucket["us"] <= 1.01 * bucket["heuristic_us"], (last, bucket)


def test_the_heuristic_is_within_five_percent_of_what_was_tuned():
    """At the token counts of the benchmark grid, by the times of the tuning run."""
    for entry in shipped_entries():
        problem = tactic_cache.problem_of(entry["problem"])
        grid = {int(last): bucket for last, bucket in entry["buckets"].items() if int(last).bit_count() == 1}
        assert {1 << i for i in range(15)} <= set(grid)
        for last, bucket in grid.items():
            times = {bucket["tactic"]: bucket["us"], bucket["heuristic"]: bucket["heuristic_us"]}
            chosen = tactics.name(tiles.choose(problem, last, entry["stamp"]["multiprocessors"]))
            assert chosen in times and times[chosen] <= 1.05 * bucket["us"] <= 1.05 * bucket["heuristic_us"], (last, chosen, bucket)


def test_load_reads_once_and_only_if_told_to(monkeypatch):
    monkeypatch.setattr(Kind, "of", classmethod(lambda cls, device: KIND))
    assert not tactics.load(SMALL, BF16, 0)
    write(A)
    assert tactics.chosen(SMALL, 1, MULTIPROCESSORS) == tiles.choose(SMALL, 1, MULTIPROCESSORS)
    assert tactics.load(SMALL, BF16, 0) and tactics.chosen(SMALL, 1, MULTIPROCESSORS) == A
    assert not tactics.load(SMALL, BF16, 0)
    tactics.use("heuristic")
    assert tactics.load(SMALL, BF16, 0) and tactics.chosen(SMALL, 1, MULTIPROCESSORS) == tiles.choose(SMALL, 1, MULTIPROCESSORS)


def test_what_the_tuner_finds_is_what_a_server_runs():
    path = tactic_cache.path_of(KIND)
    found = list(tuner.tune(SMALL, 100, MULTIPROCESSORS, FakeGpu(formula(SMALL)).make))
    for tuned in found:
        tactic_cache.write_bucket(path, SMALL, BF16, KIND, tuned.last, tuned.as_dict())
    for tuned in found:
        assert table().of(tuned.first) == table().of(tuned.last) == tuned.tactic
    assert table().of(101) is None


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginError, match="cannot be written"):
        tactic_cache.refuse_unwritable(tmp_path / "file" / "h200.json")
    tactic_cache.refuse_unwritable(tmp_path / "new" / "h200.json")


def test_entries_name_kinds_by_their_file():
    assert Kind("NVIDIA H100 80GB HBM3", 132).file_name == "nvidia-h100-80gb-hbm3.json"
    assert Kind("../../NVIDIA H200 MIG 1g.18gb", 16).file_name == "nvidia-h200-mig-1g-18gb.json"


# --- processes --------------------------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def problem_of(number: int) -> MoEProblem:
    return MoEProblem(16, 16, 256, 64 + 16 * number, 4)


def write_many(number: int, count: int, told: int) -> None:
    """Buckets 1, 2, .. of a problem of its own; each is told (as a byte) once it is written."""
    for last in range(1, count + 1):
        write(A, last, problem=problem_of(number), first=last)
        os.write(told, b".")


def start(number: int, count: int) -> tuple[multiprocessing.Process, int]:
    reader, told = os.pipe()
    process = FORK.Process(target=write_many, args=(number, count, told))
    process.start()
    os.close(told)
    return process, reader


def test_many_ranks_and_servers_write_one_file_at_once():
    writers = [start(number, 12) for number in range(4)]
    for process, reader in writers:
        process.join(120)
        os.close(reader)
        assert process.exitcode == 0
    for number in range(4):
        assert [b.last for b in table(problem_of(number)).buckets] == list(range(1, 13))


def test_death_at_any_moment_loses_no_earlier_entry(caplog):
    """Killed without warning at ten moments; readers meanwhile never see half a file."""
    write(A)
    for attempt in range(10):
        process, reader = start(attempt, 100_000)
        assert os.read(reader, 1) == b"."
        end = time.monotonic() + 0.003 * attempt
        while time.monotonic() < end:
            assert table().of(1) == A
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        told = 1 + len(os.read(reader, 1 << 20))
        os.close(reader)
        assert set(range(1, told + 1)) <= {b.last for b in table(problem_of(attempt)).buckets}
        assert table().of(1) == A
        write(B, 16, first=9)  # a dead writer's lock holds nobody up
    assert not caplog.records and table().of(9) == B
    assert not list(tactic_cache.folder().glob(".*.part"))
    assert all(table(problem_of(attempt)).of(1) == A for attempt in range(10))
