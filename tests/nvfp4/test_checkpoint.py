"""The check before loading: good checkpoints of both producers pass, and every kind of damage is named."""

from pathlib import Path

import pytest
import torch

from moe_backend_plugin.nvfp4.checkpoint import check_checkpoint
from moe_backend_plugin.nvfp4.format import quantize

from .tiny_checkpoint import EXPERTS, HIDDEN, LAYERS, WIDTH, build, refused, write

LAYER = "model.layers.1.mlp.experts"
DOWN = f"{LAYER}.2.down_proj"
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("producer", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("depth", ["full", "headers"])
def test_good_checkpoints(tmp_path, producer, shards, depth):
    tensors, config = build(producer)
    report = check_checkpoint(write(tmp_path, tensors, config, shards), depth=depth)
    assert report.tensors == len(tensors) and report.files == shards
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    assert sum(report.nbytes.values()) == sum(sizes.values())
    assert report.nbytes["expert"] == sum(s for n, s in sizes.items() if ".experts." in n)
    assert report.nbytes["dense"] == sum(s for n, s in sizes.items() if "q_proj" in n)
    assert report.nbytes["other"] == 0
    by_name = {m.name: m for m in report.modules}
    assert by_name[DOWN].shape == (HIDDEN, WIDTH) and by_name[DOWN].kind == "nvfp4" and by_name[DOWN].expert
    assert by_name["lm_head"].kind == "unquantized"
    assert set(report.layers) == {"", "model.layers.0", "model.layers.1"}
    assert sum(row["expert"] for row in report.layers.values()) == report.nbytes["expert"]
    # Every gate was quantised with its own global scale.
    leaf = "weight_scale_2" if producer == "modelopt" else "weight_global_scale"
    assert f"{LAYER}.0.gate_proj.{leaf}" in report.mismatched_gate_up and len(report.mismatched_gate_up) == LAYERS * EXPERTS


def test_equal_gate_and_up_are_not_reported(tmp_path):
    tensors, config = build()
    for name in list(tensors):
        if name.endswith("up_proj.weight_scale_2"):
            tensors[name] = tensors[name.replace("up_proj", "gate_proj")].clone()
    assert check_checkpoint(write(tmp_path, tensors, config)).mismatched_gate_up == ()


def test_weight_only_needs_no_input_scales(tmp_path):
    tensors, config = build()
    config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
    for name in [n for n in tensors if n.endswith("input_scale")]:
        del tensors[name]
    assert check_checkpoint(write(tmp_path, tensors, config)).scheme.activations == "bf16"


def test_fused_experts(tmp_path):
    tensors, config = build()
    for name in [n for n in tensors if ".experts." in n]:
        del tensors[name]
    for i in range(LAYERS):
        at = f"model.layers.{i}.mlp.experts.gate_up_proj"
        q = quantize(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN))
        tensors |= {at: q.packed, f"{at}_weight_scale": q.scale, f"{at}_weight_scale_2": q.scale_2, f"{at}_input_scale": torch.tensor(0.1)}
        tensors[f"{at}_bias"] = torch.zeros(EXPERTS, 2 * WIDTH)
    report = check_checkpoint(write(tmp_path / "good", tensors, config))
    module = next(m for m in report.modules if m.name.endswith("gate_up_proj"))
    assert module.shape == (EXPERTS, 2 * WIDTH, HIDDEN) and module.expert and module.kind == "nvfp4"
    tensors[f"{at}_weight_scale_2"] = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    refused(write(tmp_path / "nan", tensors, config), f"{at}_weight_scale_2", "nan", "positive")
    tensors = {n: t for n, t in tensors.items() if not n.startswith(at)} | {at: torch.zeros(EXPERTS, 2, 16, dtype=torch.bfloat16)}
    refused(write(tmp_path / "bf16", tensors, config), at, "unquantised BF16", "U8")


def f8(values):
    return torch.tensor(values, dtype=torch.uint8).view(torch.float8_e4m3fn)


def put(name, value):
    def damage(tensors, config):
        tensors[name] = value(tensors.get(name)) if callable(value) else value

    return damage


def drop(name):
    def damage(tensors, config):
        del tensors[name]

    return damage


def byte(name, index, value):
    def damage(tensors, config):
        tensors[name].view(torch.uint8).view(-1)[index] = value

    return damage


def many(*damages):
    def damage(tensors, config):
        for d in damages:
            d(tensors, config)

    return damage


def conf(**over):
    return lambda tensors, config: config.update(over)


def ignore(*patterns, only=False):
    def damage(tensors, config):
        listed = config["quantization_config"]["ignore"]
        config["quantization_config"]["ignore"] = [*([] if only else listed), *patterns]

    return damage


def drop_expert(number):
    def damage(tensors, config):
        for name in [n for n in tensors if n.startswith(f"{LAYER}.{number}.")]:
            del tensors[name]

    return damage


G32 = torch.zeros(HIDDEN, WIDTH // 32, dtype=torch.uint8).view(torch.float8_e4m3fn)
BF16 = torch.randn(HIDDEN, HIDDEN).bfloat16()

DAMAGE = {
    "weight dtype": (put(f"{DOWN}.weight", lambda t: t.to(torch.int32)), f"{DOWN}.weight", "I32", "U8"),
    "weight rank": (put(f"{DOWN}.weight", lambda t: t.flatten()), f"{DOWN}.weight", "shape [1024]", "[N, K/2]"),
    "K not in blocks": (put(f"{DOWN}.weight", lambda t: t[:, :12]), f"{DOWN}.weight", "K = 24", "multiple of 16"),
    "scale dtype": (put(f"{DOWN}.weight_scale", lambda t: t.float()), f"{DOWN}.weight_scale", "F32", "F8_E4M3"),
    "scale rows": (put(f"{DOWN}.weight_scale", lambda t: t[:8]), f"{DOWN}.weight_scale", "[8, 2]", "[64, 2]"),
    "group size 32": (put(f"{DOWN}.weight_scale", G32), f"{DOWN}.weight_scale", "group size of 32", "[64, 2]"),
    "global scale dtype": (put(f"{DOWN}.weight_scale_2", lambda t: t.bfloat16()), f"{DOWN}.weight_scale_2", "BF16", "F32"),
    "global scale shape": (put(f"{DOWN}.weight_scale_2", torch.ones(2)), f"{DOWN}.weight_scale_2", "[2]", "[] or [1]"),
    "global scale NaN": (put(f"{DOWN}.weight_scale_2", torch.tensor(torch.nan)), f"{DOWN}.weight_scale_2", "nan", "positive finite"),
    "global scale inf": (put(f"{DOWN}.weight_scale_2", torch.tensor(torch.inf)), f"{DOWN}.weight_scale_2", "inf", "positive finite"),
    "global scale negative": (put(f"{DOWN}.weight_scale_2", torch.tensor(-0.5)), f"{DOWN}.weight_scale_2", "-0.5", "positive finite"),
    "global scale zero": (put(f"{DOWN}.weight_scale_2", torch.tensor(0.0)), f"{DOWN}.weight_scale_2", "value 0", "positive finite"),
    "input scale zero": (put(f"{DOWN}.input_scale", torch.tensor(0.0)), f"{DOWN}.input_scale", "value 0", "positive finite"),
    "input scale NaN": (put(f"{Q}.input_scale", torch.tensor([torch.nan])), f"{Q}.input_scale", "nan", "positive finite"),
    "no scale": (drop(f"{Q}.weight_scale"), Q, "without weight_scale", "together"),
    "no global scale": (drop(f"{Q}.weight_scale_2"), Q, "without weight_scale_2", "together"),
    "no input scale": (drop(f"{Q}.input_scale"), Q, "without input_scale", "together"),
    "no weight": (drop(f"{Q}.weight"), Q, "without weight", "together"),
    "bf16 weight with scales": (put(f"{Q}.weight", BF16), f"{Q}.weight", "dtype BF16", "U8"),
    "bf16 module": (
        many(put(f"{Q}.weight", BF16), *(drop(f"{Q}.{leaf}") for leaf in ("weight_scale", "weight_scale_2", "input_scale"))),
        f"{Q}.weight",
        "unquantised BF16 weight [64, 64]",
        "U8",
    ),
    "excluded but quantised": (ignore(f"{Q}*"), f"{Q}.weight", "a quantised module (U8)", f"excluded by '{Q}*'"),
    "exclude names nothing": (ignore("model.layers.9.mlp.gate"), "exclude list", "'model.layers.9.mlp.gate'", "that are there"),
    "hole in experts": (drop_expert(2), LAYER, "experts 0, 1, 3; 2 missing", "experts 0 to 3 (num_experts = 4"),
    "last expert gone": (drop_expert(3), LAYER, "3 missing", "experts 0 to 3 (num_experts = 4"),
    "hole without a count": (many(drop_expert(1), conf(num_experts=None)), LAYER, "1 missing", "without holes"),
    "too many experts": (conf(num_experts=2), "model.layers.0.mlp.experts", "up to 3", "experts 0 to 1 (num_experts = 2"),
    "ragged expert": (many(*(drop(f"{DOWN}.{leaf}") for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"))),)
    + (f"{LAYER}.2", "no down_proj", "same tensors in every expert"),
}

FULL_DEPTH = {
    "NaN": (byte(f"{DOWN}.weight_scale", 5, 0x7F), "NaN (byte 0x7f)", "positive E4M3"),
    "negative NaN": (byte(f"{DOWN}.weight_scale", 5, 0xFF), "NaN (byte 0xff)", "positive E4M3"),
    "negative": (byte(f"{DOWN}.weight_scale", 5, 0xB0), "negative scale (byte 0xb0)", "positive E4M3"),
    "minus zero": (byte(f"{DOWN}.weight_scale", 5, 0x80), "negative scale (byte 0x80)", "positive E4M3"),
    "zero": (byte(f"{DOWN}.weight_scale", 5, 0), "a zero scale over nonzero weights, in 1 blocks", "where all 16 weights are zero"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    damage, where, found, allowed = DAMAGE[case]
    tensors, config = build()
    damage(tensors, config)
    error = refused(write(tmp_path, tensors, config), where, found, allowed, depth="headers")
    assert str(error) == f"{error.where}: found {error.found}; allowed: {error.allowed}"


@pytest.mark.parametrize("case", FULL_DEPTH)
def test_block_scales_are_read_at_full_depth_only(tmp_path, case):
    damage, found, allowed = FULL_DEPTH[case]
    tensors, config = build()
    damage(tensors, config)
    write(tmp_path, tensors, config)
    check_checkpoint(tmp_path, depth="headers")
    refused(tmp_path, f"{DOWN}.weight_scale (block 5 of 128)", found, allowed)


def test_zero_scales_over_zero_weights_lose_nothing(tmp_path):
    tensors, config = build()
    tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[3, 1] = 0
    tensors[f"{DOWN}.weight"][3, 8:] = 0x80  # 0 and -0
    assert check_checkpoint(write(tmp_path, tensors, config)).zero_blocks == 1
    tensors[f"{DOWN}.weight"][3, 15] = 0x01
    write(tmp_path, tensors, config)
    refused(tmp_path, f"{DOWN}.weight_scale (block 7", "zero scale", "zero where all 16")
    assert check_checkpoint(tmp_path, tolerate={"zero_scales"}).zero_blocks == 1


def test_compressed_tensors_names_are_used(tmp_path):
    tensors, config = build("compressed-tensors")
    global_scale = tensors.pop(f"{Q}.weight_global_scale")
    refused(write(tmp_path, tensors, config), Q, "without weight_global_scale", "weight_packed, weight_scale, weight_global_scale")
    tensors[f"{Q}.weight_global_scale"] = global_scale * 0
    refused(write(tmp_path, tensors, config), f"{Q}.weight_global_scale", "value 0", "positive")
    tensors[f"{Q}.weight_global_scale"] = global_scale
    tensors[f"{Q}.weight"] = BF16
    refused(write(tmp_path, tensors, config), f"{Q}.weight", "a second weight", "one")


def test_a_compressed_module_stored_in_bf16(tmp_path):
    tensors, config = build("compressed-tensors")
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
        del tensors[f"{Q}.{leaf}"]
    tensors[f"{Q}.weight"] = BF16
    refused(write(tmp_path, tensors, config), f"{Q}.weight", "unquantised BF16", "does not exclude")


@pytest.mark.parametrize(
    ("pattern", "tied"),
    [("*router*", False), ("*lm_head*", False), ("model.layers.*.mlp.gate", False), ("language_model.lm_head", False), ("lm_head", True)],
)
def test_exclude_patterns_that_need_not_match(tmp_path, pattern, tied):
    tensors, config = build()
    config["tie_word_embeddings"] = tied
    if tied:
        del tensors["lm_head.weight"]
    ignore(pattern)(tensors, config)
    check_checkpoint(write(tmp_path, tensors, config))


def test_an_untied_lm_head_must_be_there_and_unmatched_patterns_can_be_tolerated(tmp_path):
    tensors, config = build()
    del tensors["lm_head.weight"]
    write(tmp_path, tensors, config)
    refused(tmp_path, "config.json: quantization_config: exclude list", "'lm_head'", "modules that are there")
    assert check_checkpoint(tmp_path, tolerate={"unmatched_excludes"}).unmatched_excludes == ("lm_head",)


def test_mixed_precision_leaves_other_formats_alone(tmp_path):
    tensors, config = build()
    layers = {
        n.removesuffix(".weight"): {"quant_algo": "NVFP4", "group_size": 16} for n in tensors if n.endswith(".weight") and "proj" in n
    }
    layers[Q] = {"quant_algo": "FP8"}
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    del tensors[f"{Q}.weight_scale_2"]
    tensors |= {f"{Q}.weight": BF16.to(torch.float8_e4m3fn), f"{Q}.weight_scale": torch.tensor(0.1)}
    report = check_checkpoint(write(tmp_path, tensors, config))
    assert report.nbytes["other"] == HIDDEN * HIDDEN + 8


def test_weights_alone_need_no_input_scales(tmp_path):
    """NVFP4 in name, and no group that quantises inputs."""
    tensors, config = build()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("input_scale")}
    refused(write(tmp_path / "W4A4", tensors, config), "", "without input_scale", "together")
    config["quantization_config"]["config_groups"]["g"]["input_activations"] = None
    assert check_checkpoint(write(tmp_path / "W4A16", tensors, config)).scheme.activations == "bf16"


def test_a_rotation_of_a_layer_is_no_layer(tmp_path):
    """compressed-tensors' transform_config: a matrix inside the module whose input it is for."""
    tensors, config = build("compressed-tensors")
    tensors[f"{Q}.rotation_input.weight"] = torch.eye(HIDDEN, dtype=torch.bfloat16)
    check_checkpoint(write(tmp_path / "of a layer", tensors, config))
    tensors["model.layers.0.self_attn.rotation_input.weight"] = torch.eye(HIDDEN, dtype=torch.bfloat16)
    refused(write(tmp_path / "of none", tensors, config), "self_attn.rotation_input", "unquantised", "U8")


def test_packed_weights_are_not_read(tmp_path, monkeypatch):
    """At any depth only scales are looked at (unless a zero scale asks for its block's codes)."""
    from moe_backend_plugin.nvfp4.files import Reader

    looked, original = [], Reader.bytes_of
    monkeypatch.setattr(Reader, "bytes_of", lambda self, tensor: (looked.append(tensor), original(self, tensor))[1])
    check_checkpoint(write(tmp_path, *build()))
    assert looked and {t.dtype for t in looked} == {"F32", "F8_E4M3"}
    looked.clear()
    check_checkpoint(tmp_path, depth="headers")
    assert {t.dtype for t in looked} == {"F32"}


@pytest.mark.parametrize("folder", sorted((Path(__file__).parents[2] / "integration" / "models").glob("*nvfp4*/")), ids=lambda p: p.name)
def test_real_exports_in_this_repository(folder):
    report = check_checkpoint(folder)
    assert report.nbytes["expert"] > 0 and report.zero_blocks == 0 and report.unmatched_excludes == ()
