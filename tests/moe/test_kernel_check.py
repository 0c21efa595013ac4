"""The self-check: right kernels pass, wrong ones are named, and a server with wrong ones does not start."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flashinfer_emulation import Emulation

from moe_backend_plugin.errors import UnsupportedLayerError
from moe_backend_plugin.moe import blackwell, kernel_check
from moe_backend_plugin.moe.problem import Activation, MoEProblem

CPU = torch.device("cpu")
PROBLEM = MoEProblem(256, 32, 256, 64, 8, Activation(), "nvfp4")
SMALL = replace(PROBLEM, num_experts=8, num_local_experts=8, top_k=2)
WRONG = ("gate and up swapped", "output not zeroed", "last row left out")


def rows(wrong: str = "", **more):
    return list(kernel_check.blackwell_rows(SMALL, CPU, flashinfer=Emulation(wrong=wrong).library(), **more))


def test_right_kernels_pass_with_every_tactic():
    found = rows(tokens=(5,))
    assert [row.reason for row in found] == [None] * len(found) and len(found) == 2 * len(blackwell.every(SMALL))
    assert {row.tactic for row in found} == {tactic.name for tactic in blackwell.every(SMALL)}
    assert all(0 < row.relative < kernel_check.W4A4[0] for row in found)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_seen_in_every_call(wrong):
    found = rows(wrong, tokens=(1, 40), tactics=(blackwell.Tactic(),))
    assert len(found) == 4 and all(row.reason and row.reason.startswith(("wrong", "not finite")) for row in found)


def test_an_error_of_the_library_is_a_reason():
    def refuse(**_):
        raise NotImplementedError("not on this device\nmore")

    library = Emulation().library()._replace(second=refuse)
    found = list(kernel_check.blackwell_rows(SMALL, CPU, (blackwell.Tactic(),), ("static",), (1,), library))
    assert [row.reason for row in found] == ["fails: NotImplementedError: not on this device"]


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError], ids=["torch's error", "a library's error"])
def test_an_error_of_the_device_is_the_last_row(monkeypatch, error):
    """A library may raise an error of its own, but torch can no longer wait for the device then."""
    calls = []

    def fail(**_):
        calls.append(1)
        raise error("illegal memory access\nmore")

    def synchronize(device):
        raise torch.AcceleratorError("CUDA error")

    device = SimpleNamespace(type="cuda")
    library = Emulation().library()._replace(second=fail)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    make = kernel_check.layer
    monkeypatch.setattr(kernel_check, "layer", lambda problem, count, device, dtype: make(problem, count, CPU, dtype))
    monkeypatch.setattr(blackwell, "prepare", lambda *_: 0)
    (row,) = kernel_check.blackwell_rows(SMALL, device, flashinfer=library)
    assert len(calls) == 1 and row.device_lost and row.reason == f"fails: {error.__name__}: illegal memory access"


def test_the_checks_of_all_layers_end_with_the_device(monkeypatch):
    lost = kernel_check.Row("flashinfer", "a layer", "a tactic", 1, "fails", 0.0, 0.0, device_lost=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(kernel_check, "blackwell_rows", lambda *_: iter([lost._replace(device_lost=False), lost]))
    assert len(list(kernel_check.rows(torch.device("cuda")))) == 2


def test_sums_with_an_order_must_repeat():
    emulation = Emulation()
    library, calls = emulation.library(), []

    def unsteady(**arguments):
        emulation.combine(**arguments)
        calls.append(1)
        arguments["output"][0, 0] *= 1 + 2**-7 * (len(calls) % 2)

    found = list(
        kernel_check.blackwell_rows(SMALL, CPU, (blackwell.Tactic(ordered=True),), ("static",), (5,), library._replace(combine=unsteady))
    )
    assert [row.reason for row in found] == ["not repeatable"]


def test_a_server_starts_with_right_kernels_after_one_check_a_shape():
    emulation = Emulation()
    library = emulation.library()
    assert kernel_check.require(PROBLEM, CPU, 64, "static", flashinfer=library, where="model.layers.0") == 1
    made = len(emulation.calls)
    assert made and kernel_check.require(PROBLEM, CPU, 64, "static", flashinfer=library, where="model.layers.1") == 1
    assert len(emulation.calls) == made


@pytest.mark.parametrize("wrong", WRONG)
def test_a_server_with_wrong_kernels_does_not_start(wrong):
    library = Emulation(wrong=wrong).library()
    message = r"^model.layers.3: found FlashInfer's kernel s128.*; allowed: kernels that agree with the reference .*moe.provider: engine\)$"
    with pytest.raises(UnsupportedLayerError, match=message) as error:
        kernel_check.require(PROBLEM, CPU, 64, "static", where="model.layers.3", flashinfer=library)
    assert "\n" not in str(error.value)


def test_an_engines_defaults_do_not_matter():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert kernel_check.require(PROBLEM, CPU, 32, "token", flashinfer=Emulation().library()) == 1
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(before)


def test_the_cpus_operator_passes():
    found = list(kernel_check.cpu_rows(tokens=(5,)))
    assert len(found) == 16 and not [row for row in found if row.reason]
    assert {row.case.partition("activations ")[2] for row in found} == {"bf16", "nvfp4"}


@pytest.fixture
def hopper(monkeypatch):
    """``moe.cuda`` over the reference, and the tactics it was called with; nothing is compiled."""
    from moe_backend_plugin.moe import cuda, reference
    from moe_backend_plugin.nvfp4 import hopper

    called = []

    def fused_moe(x, weights, topk_weights, topk_ids, problem, out, expert_map=None, choice=None):
        assert (expert_map is None) == (problem.num_local_experts == problem.num_experts)
        called.append(choice)
        w13 = hopper.unpack(weights.w13, problem.w13_rows, problem.hidden, problem.activation.gated)
        w2 = hopper.unpack(weights.w2, problem.hidden, problem.intermediate, False)
        out.copy_(reference.fused_moe(x, *w13, weights.w13_scale_2, *w2, weights.w2_scale_2, topk_weights, topk_ids, problem, expert_map))

    monkeypatch.setattr(cuda, "fused_moe", fused_moe)
    monkeypatch.setattr(cuda, "prepare_tactics", lambda *_: 0)
    monkeypatch.setattr(kernel_check, "ACTIVATIONS", (Activation(), Activation("relu2")))
    monkeypatch.setattr(cuda, "multiprocessors_of", lambda device: 132)
    return called


def test_hoppers_tactics_are_all_run_twice(hopper, monkeypatch):
    from moe_backend_plugin.moe import tactics

    monkeypatch.setattr(tactics, "TILE_TOKENS", (8, 64))
    found = list(kernel_check.hopper_rows(CPU, (2,)))
    assert found and not [row for row in found if row.reason] and len(hopper) == 2 * len(found)
    shapes = {shape for tile in (8, 64) for shape in tactics.shapes(tile)}
    valid = {shape for shape in shapes if shape.rows < 2 * 512 or shape in tactics.SHIPPED}
    assert {choice.gate_up for choice in hopper} == {choice.down for choice in hopper} >= valid


def test_a_hopper_tactic_that_is_wrong_or_fails_is_named(hopper, monkeypatch):
    from moe_backend_plugin.moe import cuda, tactics

    monkeypatch.setattr(tactics, "TILE_TOKENS", ())
    right = cuda.fused_moe

    def wrong(x, *rest, choice):
        if x.shape[0] == 5:
            raise RuntimeError("too many resources\nmore")
        right(x, *rest, choice=choice)
        rest[4][0] *= 1 + 2**-6 * (len(hopper) % 2)

    monkeypatch.setattr(cuda, "fused_moe", wrong)
    found = list(kernel_check.hopper_rows(CPU, (1, 5)))
    assert {row.reason for row in found if row.tokens == 5} == {"fails: RuntimeError: too many resources"}
    assert all(row.reason for row in found if row.tokens == 1)


CASES = {"512x256 silu", "512x256 relu2", "512x256 silu, float16 tokens", "512x256 silu, 4 of 8 experts"}


def test_hoppers_rows_have_every_type_of_tokens_and_a_map(hopper, monkeypatch):
    """Kernels for float16 and for maps are prepared, and their rows see a mistake of theirs alone."""
    from moe_backend_plugin.moe import cuda, tactics

    prepared = []
    monkeypatch.setattr(cuda, "prepare_tactics", lambda *arguments: prepared.append((arguments[1], arguments[5].mapped)))
    monkeypatch.setattr(tactics, "TILE_TOKENS", ())
    right, mistakes = cuda.fused_moe, {}

    def wrong(x, weights, topk_weights, topk_ids, problem, out, expert_map, choice):
        if "map" in mistakes and expert_map is not None:
            expert_map = torch.where(expert_map < 0, expert_map, 3 - expert_map)
        right(x, weights, topk_weights, topk_ids, problem, out, expert_map, choice)
        if "float16" in mistakes and x.dtype is torch.float16:
            out.view(torch.int16).bitwise_and_(-64)

    monkeypatch.setattr(cuda, "fused_moe", wrong)
    for mistake, bad in (("", set()), ("map", {"512x256 silu, 4 of 8 experts"}), ("float16", {"512x256 silu, float16 tokens"})):
        mistakes = {mistake}
        found = list(kernel_check.hopper_rows(CPU, (5,)))
        assert {row.case for row in found} == CASES and {row.case for row in found if row.reason} == bad
    assert prepared[:4] == [(torch.bfloat16, False)] * 2 + [(torch.float16, False), (torch.bfloat16, True)]


def test_a_layer_with_a_map_has_tokens_for_its_experts_and_for_others():
    problem = MoEProblem(8, 4, 256, 64, 2)
    for tokens in kernel_check.TOKENS:
        made = kernel_check.layer(problem, tokens, CPU)
        local = made.expert_map[made.topk_ids[(made.topk_ids >= 0) & (made.topk_ids < 8)].long()]
        assert made.expert_map.dtype is torch.int32 and (local < 0).any() and (local >= 0).any() and made.right().any()
    assert sorted(made.expert_map.tolist()) == [-1, -1, -1, -1, 0, 1, 2, 3]


def test_hoppers_rows_end_with_the_device(hopper, monkeypatch):
    from moe_backend_plugin.moe import cuda

    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(cuda, "fused_moe", fail)
    (row,) = kernel_check.hopper_rows(CPU)
    assert row.device_lost
