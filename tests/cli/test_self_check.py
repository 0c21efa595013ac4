"""The check of the kernels beside the experts': right ones pass, and each kind of mistake is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_backend_plugin import self_check
from moe_backend_plugin.linear import op as linear

CPU = torch.device("cpu")


def test_the_operators_of_a_cpu_pass():
    found = [*self_check.gdn_rows(CPU, (1, 40)), *self_check.linear_rows()]
    assert len(found) == 12 and not [row for row in found if row.reason]


def test_rows_with_drafts_are_of_every_length_and_count():
    """A decode that ignored a row's accepted tokens, or kept only its last state, would be seen."""
    step = self_check._Step(torch.float32, 128, self_check.DRAFTS, torch.Generator().manual_seed(0))
    owned, accepted, starts = step.tables
    assert set(accepted.tolist()) == set(starts.diff().tolist()) == {1, 2, 3} and starts[-1] == len(step.mixed)
    assert torch.equal(step.slots.read[2:], owned[2:].gather(1, accepted[2:, None].long() - 1)[:, 0])
    assert {table.dtype for table in step.tables} == {torch.int32} and step.slots.write.shape == owned.shape


def test_the_rows_reach_every_kernel_of_a_gpu():
    cuda = pytest.importorskip("moe_backend_plugin.gdn.cuda")
    for size in (4, 2):
        for ragged in (False, True):
            met = {cuda.tile_for(size, count * self_check.HEADS[1], ragged) for count in self_check.COUNTS}
            assert met == set(cuda.tiles(size, ragged))


def test_a_gpu_decodes_drafts_as_an_engine_asks_for_it(monkeypatch):
    """The kernel gets the tables, not what this package's slots make of them."""
    cuda = pytest.importorskip("moe_backend_plugin.gdn.cuda")
    called = []
    monkeypatch.setattr(cuda, "decode", lambda *arguments, **more: called.append((arguments[6], more)))
    for drafts in (0, self_check.DRAFTS):
        step = self_check._Step(torch.float32, 3, drafts, torch.Generator().manual_seed(0))
        mixed = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=step.mixed.shape, dtype=step.mixed.dtype)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "full", lambda *_, **__: None)
            self_check._decode(mixed, step.a, step.b, step.a_log, step.bias, step.pool, step.slots, step.tables)
    (single, nothing), (owned, tables) = called
    assert single.dim() == 1 and nothing == {}
    assert owned is tables["write"] is step.tables[0] and tables["max_tokens"] == 3
    assert (tables["num_accepted"], tables["cu_seqlens"]) == step.tables[1:]


def test_mistakes_of_decode_are_named(monkeypatch):
    right = self_check._decode

    def wrong_output(*args):
        return right(*args) * 1.1

    def wrong_state(*args):
        out = right(*args)
        args[5][args[6].write[args[6].write > 0]] *= 1.1
        return out

    def foreign_slot(*args):
        out = right(*args)
        args[5][-1, 0, 0, 0] += 1
        args[5][0, 0, 0, 0] += 1
        return out

    def refuses(*args):
        raise RuntimeError("no such kernel\nmore")

    for mistake, words in (
        (wrong_output, "wrong: relative"),
        (wrong_state, "states wrong"),
        (foreign_slot, "a slot that no row writes has changed"),
        (refuses, "fails: RuntimeError: no such kernel"),
    ):
        monkeypatch.setattr(self_check, "_decode", mistake)
        found = list(self_check.gdn_rows(CPU, (6,)))
        assert len(found) == 4 and all(row.reason and row.reason.startswith(words) for row in found), mistake


def test_a_wrong_accepted_count_is_named(monkeypatch):
    """One row that resumes from another of its slots is enough; without drafts there is no count."""
    right = self_check._decode

    def from_another_slot(*args):
        if args[7] is not None:
            args[6].read[2] = args[7][0][2, args[7][1][2] % 3]
        return right(*args)

    monkeypatch.setattr(self_check, "_decode", from_another_slot)
    for row in self_check.gdn_rows(CPU, (6,)):
        assert bool(row.reason and row.reason.startswith("wrong")) == ("drafts" in row.tactic)


def test_a_lost_device_ends_the_checks(monkeypatch):
    calls = []

    def lost(*args):
        calls.append(args)
        raise torch.AcceleratorError("illegal memory access\nmore")

    monkeypatch.setattr(self_check, "_decode", lost)
    monkeypatch.setattr(self_check.kernel_check, "rows", lambda device: iter(()))
    (row,) = self_check.rows(CPU)
    assert len(calls) == 1 and row.device_lost and row.reason == "fails: AcceleratorError: illegal memory access"


def test_a_mistake_of_the_dense_layer_is_named(monkeypatch):
    right = linear.nvfp4_linear
    monkeypatch.setattr(linear, "nvfp4_linear", lambda *args: right(*args).roll(1, 1))
    assert all(row.reason and row.reason.startswith("wrong") for row in self_check.linear_rows())


@pytest.mark.parametrize("off", [1.0, 1.1])
def test_dense_layers_of_a_hopper_gpu(monkeypatch, off):
    """With the reference in the kernel's place, which sees the packed weights only."""
    from moe_backend_plugin.linear import cuda
    from moe_backend_plugin.nvfp4 import hopper

    def instead(x, weights, out):
        dense = hopper.dequantise(weights.packed, out.shape[1], x.shape[1], False)[0]
        out.copy_(off * weights.scale_2 * (x.float() @ dense.T))

    monkeypatch.setattr(cuda, "prepare", lambda *_: 0)
    monkeypatch.setattr(cuda, "nvfp4_linear", instead)
    found = list(self_check.hopper_linear_rows(CPU))
    assert {row.tokens for row in found} == {1, 12, 70, 300} and len(found) == 8
    assert all((row.reason is None) == (off == 1.0) for row in found)


def test_a_machine_without_a_gpu_checks_all_its_operators(monkeypatch):
    monkeypatch.setattr(self_check.kernel_check, "rows", lambda device: iter(()))
    assert {row.kernel for row in self_check.rows(CPU)} == {"gdn_decode", "nvfp4_linear"}
