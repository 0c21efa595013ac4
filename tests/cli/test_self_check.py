"""The check of the kernels beside the experts': right ones pass, and each kind of mistake is named."""

from __future__ import annotations

import torch

from moe_backend_plugin import self_check
from moe_backend_plugin.linear import op as linear

CPU = torch.device("cpu")


def test_the_operators_of_a_cpu_pass():
    found = [*self_check.gdn_rows(CPU), *self_check.linear_rows()]
    assert len(found) == 10 and not [row for row in found if row.reason]


def test_mistakes_of_decode_are_named(monkeypatch):
    right = self_check._decode

    def wrong_output(*args):
        return right(*args) * 1.1

    def wrong_state(*args):
        out = right(*args)
        args[5][args[6].read] *= 1.1
        return out

    def foreign_slot(*args):
        out = right(*args)
        args[5][-1, 0, 0, 0] += 1
        args[5][0, 0, 0, 0] += 1
        return out

    for mistake, words in (
        (wrong_output, "wrong: relative"),
        (wrong_state, "states wrong"),
        (foreign_slot, "a slot of no row has changed"),
    ):
        monkeypatch.setattr(self_check, "_decode", mistake)
        found = list(self_check.gdn_rows(CPU, (6,)))
        assert len(found) == 2 and all(row.reason and row.reason.startswith(words) for row in found), mistake


def test_a_mistake_of_the_dense_layer_is_named(monkeypatch):
    right = linear.nvfp4_linear
    monkeypatch.setattr(linear, "nvfp4_linear", lambda *args: right(*args).roll(1, 1))
    assert all(row.reason and row.reason.startswith("wrong") for row in self_check.linear_rows())


def test_a_machine_without_a_gpu_checks_all_its_operators(monkeypatch):
    monkeypatch.setattr(self_check.kernel_check, "rows", lambda device: iter(()))
    assert {row.kernel for row in self_check.rows(CPU)} == {"gdn_decode", "nvfp4_linear"}
