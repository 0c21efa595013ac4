"""A damaged or unsuitable checkpoint stops the start with one message, while vLLM reads its arguments.

The message names the tensor, file or field, what was found and what is allowed.  What reads the arguments is the first
thing an API server does: no process has been started and no weight loaded then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .checkpoints import FILE, Checkpoint, edited, layers_beside, rotate_inputs
from .engines import EngineHost, Refusal
from .process import tail
from .server import Server

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

EXPERT = "model.layers.1.mlp.experts.3.down_proj"
DENSE = "model.layers.2.self_attn.o_proj"
GATE = "model.layers.0.mlp.experts.0.gate_proj"


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Checkpoint], None]:
    def edit(parts: Checkpoint) -> None:
        parts.tensors[name] = change(parts.tensors[name])

    return edit


def with_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A copy of a scale tensor whose first element is ``value``."""

    def change(scale: torch.Tensor) -> torch.Tensor:
        flat = scale.float().flatten()
        flat[0] = value
        return flat.reshape(scale.shape).to(scale.dtype)

    return change


def narrower_experts(parts: Checkpoint) -> None:
    """Down projections of 120 columns: the number of values is no multiple of 16."""
    for name in [n for n in parts.tensors if ".experts." in n and ".down_proj.weight" in n]:
        if name.endswith("down_proj.weight"):
            parts.tensors[name] = parts.tensors[name][:, :60]


def drop(name: str) -> Callable[[Checkpoint], None]:
    return lambda parts: parts.tensors.pop(name)


def excluded(name: str) -> Callable[[Checkpoint], None]:
    def edit(parts: Checkpoint) -> None:
        parts.quantization["ignore"].append(name)
        parts.legacy["exclude_modules"].append(name)

    return edit


def group_size_32(parts: Checkpoint) -> None:
    parts.legacy["group_size"] = 32
    for group in parts.quantization["config_groups"].values():
        group["weights"]["group_size"] = group["input_activations"]["group_size"] = 32


def scales_of_group_32(parts: Checkpoint) -> None:
    for name in [n for n in parts.tensors if n.endswith(".weight_scale")]:
        parts.tensors[name] = parts.tensors[name][:, ::2]


CASES = {
    # what is wrong: (change, what the message must hold)
    "weight of another dtype": (
        tensor(f"{EXPERT}.weight", lambda t: t.to(torch.int8)),
        [f"{EXPERT}.weight", "I8", "U8"],
    ),
    "block scales of another dtype": (
        tensor(f"{EXPERT}.weight_scale", lambda t: t.float()),
        [f"{EXPERT}.weight_scale", "F32", "F8_E4M3"],
    ),
    "unquantised weight in a quantised model": (
        lambda parts: (
            [parts.tensors.pop(f"{DENSE}.{s}") for s in ("weight_scale", "weight_scale_2", "input_scale")]
            and parts.tensors.update({f"{DENSE}.weight": torch.zeros(256, 256, dtype=torch.bfloat16)})
        ),
        [f"{DENSE}.weight", "unquantised", "U8"],
    ),
    "block scales of another shape": (
        tensor(f"{EXPERT}.weight_scale", lambda t: t[:, :-1]),
        [f"{EXPERT}.weight_scale", "[256, 7]", "[256, 8]"],
    ),
    "global scale of another shape": (
        tensor(f"{EXPERT}.weight_scale_2", lambda t: t.repeat(2)),
        [f"{EXPERT}.weight_scale_2", "[2]", "[1]"],
    ),
    "NaN block scale": (tensor(f"{DENSE}.weight_scale", with_first(float("nan"))), [f"{DENSE}.weight_scale", "NaN", "positive"]),
    "negative block scale": (tensor(f"{GATE}.weight_scale", with_first(-1.0)), [f"{GATE}.weight_scale", "negative", "positive"]),
    "zero block scale over weights": (tensor(f"{GATE}.weight_scale", with_first(0.0)), [f"{GATE}.weight_scale", "zero", "positive"]),
    "NaN global scale": (tensor(f"{EXPERT}.weight_scale_2", with_first(float("nan"))), [f"{EXPERT}.weight_scale_2", "nan", "positive"]),
    "zero global scale": (tensor(f"{DENSE}.weight_scale_2", with_first(0.0)), [f"{DENSE}.weight_scale_2", "value 0", "positive"]),
    "negative global scale": (tensor(f"{DENSE}.weight_scale_2", with_first(-2.0)), [f"{DENSE}.weight_scale_2", "-2", "positive"]),
    "infinite input scale": (tensor(f"{EXPERT}.input_scale", with_first(float("inf"))), [f"{EXPERT}.input_scale", "inf", "finite"]),
    "missing block scales": (drop(f"{EXPERT}.weight_scale"), ["model.layers.1.mlp.experts.3", "weight_scale"]),
    "missing expert": (
        lambda parts: [parts.tensors.pop(n) for n in list(parts.tensors) if n.startswith("model.layers.1.mlp.experts.15.")],
        ["model.layers.1.mlp.experts", "15 missing", "experts 0 to 15"],
    ),
    "group size 32 in the description": (group_size_32, ["group_size", "32", "16"]),
    "group size 32 in the files": (scales_of_group_32, ["weight_scale", "group size of 32", "[256, 8]"]),
    "columns that are no multiple of 16": (narrower_experts, ["down_proj.weight", "120", "multiple of 16"]),
    "unknown quant_algo": (lambda parts: parts.set_both("quant_algo", "NVFP5"), ["quant_algo", "NVFP5", "NVFP4"]),
    "another number format": (lambda parts: parts.set_both("quant_algo", "FP8"), ["quant_algo", "FP8", "NVFP4"]),
    "exclude entry that names nothing": (
        excluded("model.layers.0.self_attn.qkv_typo"),
        ["model.layers.0.self_attn.qkv_typo", "names no module"],
    ),
    "exclude entry that names a quantised module": (excluded(DENSE), [DENSE, "unquantised"]),
}


@pytest.fixture(scope="module")
def refuse(engines: EngineHost) -> Callable[..., str]:
    """Start on a checkpoint that must be refused; the message."""

    def start(model: Path, **args) -> str:
        found = engines.config(model, **args)
        assert isinstance(found, Refusal), f"accepted: {found}\n{tail(engines.log)}"
        return found.message

    return start


def assert_clear(message: str, pieces: list[str]) -> None:
    """One sentence in one line that holds every piece, in the form ``where: found what; allowed: what``."""
    lines = [line for line in message.splitlines() if ": found " in line and "; allowed: " in line]
    assert len(lines) == 1, f"not one line that says where, what was found and what is allowed:\n{message}"
    missing = [piece for piece in pieces if piece not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


@pytest.mark.parametrize("case", CASES, ids=[name.replace(" ", "-") for name in CASES])
def test_refused_with_a_clear_message(case: str, refuse, moe_model: Path, tmp_path: Path) -> None:
    edit, pieces = CASES[case]
    assert_clear(refuse(edited(moe_model, tmp_path / "model", edit)), pieces)


def test_truncated_shard(refuse, moe_model: Path, tmp_path: Path) -> None:
    model = edited(moe_model, tmp_path / "model", lambda parts: None, shards=3)
    shard = model / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    assert_clear(refuse(model), [shard.name, "truncated", "whole"])


def test_missing_shard(refuse, moe_model: Path, tmp_path: Path) -> None:
    model = edited(moe_model, tmp_path / "model", lambda parts: None, shards=3)
    (model / "model-00003-of-00003.safetensors").unlink()
    assert_clear(refuse(model), ["model-00003-of-00003.safetensors", "missing", "every shard"])


def test_unquantised_checkpoint(refuse, moe_model: Path, tmp_path: Path) -> None:
    from moe_backend_plugin.verify import dequantize_checkpoint

    dequantize_checkpoint(moe_model, tmp_path / "model")
    assert_clear(refuse(tmp_path / "model"), ["--quantization nvfp4_cutedsl", "NVFP4 checkpoint", "moe-backend quantize"])


def test_expert_width_that_is_odd(engines: EngineHost, moe_model: Path, tmp_path: Path) -> None:
    """No file can hold an odd number of packed values: the width in config.json is wrong, and no layer is built with it."""

    def edit(parts: Checkpoint) -> None:
        parts.config["moe_intermediate_size"] = 127

    found = engines.start(edited(moe_model, tmp_path / "model", edit))
    assert found is not None, "an engine with experts of 127 columns started"
    assert_clear(found.message, ["127", "multiple of 16"])


def test_inputs_that_are_to_be_rotated(engines: EngineHost, moe_model: Path, tmp_path: Path) -> None:
    """vLLM's layers would rotate them, but it has none of NVFP4 for CPUs; the rotation's own weight is no reason to refuse."""
    found = engines.start(edited(moe_model, tmp_path / "model", rotate_inputs))
    assert found is not None, "an engine that does not rotate its inputs started"
    assert_clear(found.message, ["self_attn.qkv_proj", "transform_config with random-hadamard rotation", "no NVFP4 kernel"])


def test_mixed_layers_that_are_listed_nowhere(refuse, moe_model: Path, tmp_path: Path) -> None:
    def edit(parts: Checkpoint) -> None:
        layers_beside(parts)
        parts.hf_quant_config.clear()

    message = refuse(edited(moe_model, tmp_path / "model", edit))
    assert_clear(message, ["quantized_layers", "None", "a mapping of layer names to algorithms, here or in hf_quant_config.json"])


def test_unchanged_copy_is_accepted(engines: EngineHost, moe_model: Path, tmp_path: Path) -> None:
    """The control of this file: what is refused above is refused for its change alone."""
    model = edited(moe_model, tmp_path / "model", lambda parts: None, shards=3)
    found = engines.config(model)
    assert not isinstance(found, Refusal), found
    assert found["quant_config"].startswith("moe_backend_plugin."), found


def test_server_ends_with_the_message_and_a_status(logs: Path, moe_model: Path, tmp_path: Path) -> None:
    model = edited(moe_model, tmp_path / "model", tensor(f"{EXPERT}.weight_scale_2", with_first(float("nan"))))
    server = Server([str(model), "--quantization", "nvfp4_cutedsl", "--enforce-eager"], logs / "server-refuses.log")
    try:
        assert server.wait(180) != 0
    finally:
        server.kill()
    assert f"{FILE}: {EXPERT}.weight_scale_2: found the value nan; allowed: positive finite numbers" in server.text(), tail(server.log)
    assert "Loading safetensors" not in server.text(), "weights were loaded before the check"
