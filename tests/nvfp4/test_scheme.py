"""Quantisation descriptions as producers write them, and as they should not be."""

import importlib.util
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from moe_backend_plugin.errors import CheckpointError
from moe_backend_plugin.nvfp4.scheme import COMPRESSED_TENSORS_NAMES, MODELOPT_NAMES, parse_scheme, read_scheme, with_layers

FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
EXPERT = "model.layers.0.mlp.experts.3.gate_proj"


def modelopt(**over):
    """``config.json["quantization_config"]`` of ModelOpt 0.47."""
    return {
        "config_groups": {"group_0": {"input_activations": FP4, "weights": FP4, "targets": ["Linear"]}},
        "ignore": ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "model.layers.1*"],
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    } | over


def legacy(**over):
    """``hf_quant_config.json`` of ModelOpt."""
    body = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head", "*.self_attn*"]}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": body | over}


def compressed(weights=None, inputs="same", **over):
    """What llm-compressor writes."""
    args = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "group_size": 16,
        "strategy": "tensor_group",
        "dynamic": False,
        "actorder": None,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    group = {
        "format": "nvfp4-pack-quantized",
        "weights": args | (weights or {}),
        "input_activations": args | {"dynamic": "local"} if inputs == "same" else inputs,
        "output_activations": None,
        "targets": ["Linear"],
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", "model.layers.0.self_attn.q_proj"],
    } | over


def test_modelopt_config_json():
    scheme = parse_scheme(modelopt())
    assert (scheme.producer, scheme.algo, scheme.activations, scheme.group_size, scheme.kv_cache) == (
        "modelopt",
        "NVFP4",
        "nvfp4",
        16,
        None,
    )
    assert scheme.names is MODELOPT_NAMES and not scheme.names.reciprocal
    assert scheme.layer_kind(EXPERT) == "nvfp4" and scheme.nvfp4_activations(EXPERT) == "nvfp4"
    assert scheme.layer_kind("lm_head") == "unquantized"
    assert scheme.layer_kind("model.layers.0.mlp.gate") == "unquantized"
    assert scheme.layer_kind("model.layers.0.mlp.gate_proj") == "nvfp4"
    assert scheme.layer_kind("model.layers.1.mlp.experts.0.up_proj") == "unquantized"
    assert scheme.layer_kind("model.layers.2.mlp.experts.0.up_proj") == "nvfp4"
    assert scheme.layer_kind("model.norm", "RMSNorm") == "unquantized"


def test_modelopt_legacy_file():
    scheme = parse_scheme(legacy())
    assert scheme.kv_cache == "fp8" and scheme.exclude == ("lm_head", "*.self_attn*")
    assert scheme.layer_kind("model.layers.7.self_attn.q_proj") == "unquantized"
    assert scheme.layer_kind(EXPERT) == "nvfp4"


@pytest.mark.parametrize("config", [modelopt(quant_algo="w4a16_nvfp4"), legacy(quant_algo="W4A16_NVFP4")])
def test_weight_only_and_lower_case(config):
    scheme = parse_scheme(config)
    assert scheme.algo == "W4A16_NVFP4" and scheme.activations == "bf16" and scheme.nvfp4_activations(EXPERT) == "bf16"


@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4", "ModelOpt", None])
def test_modelopt_method_names(method):
    assert parse_scheme(modelopt(quant_method=method)).producer == "modelopt"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("FP8", "fp8"), ("NVFP4", "nvfp4"), (FP8, "fp8"), (FP4, "nvfp4"), ({"num_bits": 8, "type": "int"}, "int8")],
)
def test_kv_cache(value, expected):
    assert parse_scheme(modelopt(kv_cache_scheme=value)).kv_cache == expected
    assert parse_scheme(compressed(kv_cache_scheme=value)).kv_cache == expected


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("model.layers.0.self_attn", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.*.mlp.gate", "model.layers.3.mlp.gate", True),
        ("model.layers.*.mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("*router*", "model.layers.3.block.router.linear", True),
        ("router", "model.layers.3.block.router", True),
        ("lm_head", "language_model.lm_head", True),
        ("language_model.lm_head", "lm_head", True),
        ("model.language_model.layers.3.mlp.gate", "model.layers.3.mlp.gate", True),
        ("model.layers.3*", "model.language_model.layers.3.mlp.gate", True),
        ("visual*", "model.visual.blocks.0.attn", True),
        ("model.*", "lm_head", False),
        ("*", "anything.at.all", True),
        ("LM_HEAD", "lm_head", False),
    ],
)
def test_wildcards(pattern, name, covered):
    scheme = parse_scheme(modelopt(ignore=[pattern]))
    assert scheme.layer_kind(name) == ("unquantized" if covered else "nvfp4")


MIXED_LAYERS = {
    "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
    "model.layers.0.mlp.experts.0.gate_proj": {"quant_algo": "NVFP4", "group_size": 16},
    "model.layers.0.mlp.experts.0.up_proj": {"quant_algo": "nvfp4", "group_size": 16},
    "model.layers.1.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "model.layers.1.mlp.shared_expert.up_proj": {"quant_algo": "MXFP8", "group_size": 32},
}


@pytest.mark.parametrize("make", [modelopt, legacy])
def test_mixed_precision(make):
    scheme = parse_scheme(make(quant_algo="MIXED_PRECISION", quantized_layers=MIXED_LAYERS, group_size=None, ignore=[], exclude_modules=[]))
    assert scheme.algo == "MIXED_PRECISION" and scheme.activations == "nvfp4"
    assert scheme.layer_kind("model.layers.0.mlp.experts.0.gate_proj") == "nvfp4"
    assert scheme.layer_kind("model.layers.0.mlp.experts.0.up_proj") == "nvfp4"
    assert scheme.layer_kind("model.layers.0.mlp.experts") == "nvfp4"  # what all beneath it share
    assert scheme.layer_kind("model.layers.1.mlp.experts.5.down_proj") == "nvfp4"
    assert scheme.nvfp4_activations("model.layers.0.mlp.experts.0.up_proj") == "nvfp4"
    assert scheme.nvfp4_activations("model.layers.1.mlp.experts.5.down_proj") == "bf16"
    assert scheme.layer_kind("model.layers.1.mlp.shared_expert.up_proj") == "other"
    assert scheme.layer_kind("model.layers.2.mlp.gate") == "unquantized"


GROUP = {"input_activations": FP4, "weights": FP4, "targets": ["Linear"]}


@pytest.mark.parametrize(
    ("groups", "activations"),
    [
        ({"a": GROUP | {"input_activations": None}}, "bf16"),
        ({"a": {"weights": FP4, "targets": ["Linear"]}, "b": GROUP | {"input_activations": None}}, "bf16"),
        ({"a": GROUP, "b": GROUP | {"input_activations": None}}, "nvfp4"),
        ({}, "nvfp4"),
    ],
)
def test_weights_alone_under_the_name_of_nvfp4(groups, activations):
    """vLLM's rule; integration/layers compares with vLLM's own answer."""
    scheme = parse_scheme(modelopt(config_groups=groups))
    assert scheme.activations == scheme.nvfp4_activations("model.layers.2.mlp.down_proj") == activations and scheme.algo == "NVFP4"


def test_layers_of_older_modelopts_are_listed_beside(tmp_path):
    """``config.json`` names the mixture, ``hf_quant_config.json`` alone its layers."""
    inside = modelopt(quant_algo="MIXED_PRECISION")
    beside = legacy(quant_algo="MIXED_PRECISION", quantized_layers=MIXED_LAYERS, exclude_modules=["lm_head"])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": inside}))
    with pytest.raises(CheckpointError, match=r"quantized_layers: found .*None.*; allowed: .* here or in hf_quant_config\.json"):
        read_scheme(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    scheme = read_scheme(tmp_path)
    assert dict(scheme.layers) == {name: entry["quant_algo"].upper() for name, entry in MIXED_LAYERS.items()}
    assert scheme.exclude == tuple(inside["ignore"]), "what config.json says stays"
    del inside["ignore"]
    assert parse_scheme(with_layers(inside, beside)).exclude == ("lm_head",)
    assert with_layers(modelopt(), beside) == modelopt() and with_layers(inside, {"quantization": None}) == inside
    listed = inside | {"quantized_layers": {"a": {"quant_algo": "NVFP4"}}}
    assert with_layers(listed, beside) == listed


def test_compressed_tensors():
    scheme = parse_scheme(compressed())
    assert (scheme.producer, scheme.algo, scheme.activations) == ("compressed-tensors", "nvfp4-pack-quantized", "nvfp4")
    assert scheme.names is COMPRESSED_TENSORS_NAMES and scheme.names.reciprocal
    assert scheme.layer_kind(EXPERT) == "nvfp4"
    assert scheme.layer_kind(EXPERT, "Embedding") == "unquantized"
    assert scheme.layer_kind("lm_head") == "unquantized"
    assert scheme.layer_kind("model.layers.4.mlp.gate") == "unquantized"
    assert scheme.layer_kind("model.layers.4.mlp.gate_proj") == "nvfp4"
    assert scheme.layer_kind("model.layers.0.self_attn.q_proj") == "unquantized"
    assert scheme.layer_kind("model.layers.0.self_attn.k_proj") == "nvfp4"


def test_compressed_tensors_weight_only():
    scheme = parse_scheme(compressed(inputs=None))
    assert scheme.activations == "bf16" and scheme.nvfp4_activations(EXPERT) == "bf16"


def test_compressed_tensors_mixed_groups():
    config = compressed(format="mixed-precision")
    nvfp4 = config["config_groups"]["group_0"] | {"targets": ["re:.*experts.*"]}
    fp8 = {"format": "float-quantized", "weights": FP8, "input_activations": FP8, "targets": ["Linear"]}
    cache = {"weights": None, "input_activations": FP8, "targets": ["re:.*self_attn$"]}
    scheme = parse_scheme(config | {"config_groups": {"a": fp8, "b": nvfp4, "c": cache}})
    assert scheme.layer_kind(EXPERT) == "nvfp4"  # a name wins over a class, whatever the order
    assert scheme.layer_kind("model.layers.1.self_attn.o_proj") == "other"
    assert len(scheme.groups) == 2


def test_compressed_tensors_class_in_ignore():
    scheme = parse_scheme(compressed(ignore=["Linear"]))
    assert scheme.layer_kind(EXPERT) == "unquantized"


@pytest.mark.filterwarnings("ignore:Unsupported quantization algorithm 'nvfp4'")  # it does not fold case; we do
@pytest.mark.parametrize("algo", ["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"])
def test_modelopts_own_conversion_reads_the_same(algo):
    """ModelOpt derives ``config.json``'s description from ``hf_quant_config.json`` with this module; both must read alike."""
    package = importlib.util.find_spec("modelopt")
    if package is None:
        pytest.skip("needs nvidia-modelopt")
    # By its path: importing the package takes half a minute.
    file = Path(package.origin).parent / "torch" / "export" / "convert_hf_config.py"
    spec = importlib.util.spec_from_file_location("convert_hf_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers = {"quantized_layers": MIXED_LAYERS} if algo == "MIXED_PRECISION" else {}
    ours = legacy(quant_algo=algo, **layers)
    first, second = parse_scheme(ours), parse_scheme(json.loads(json.dumps(module.convert_hf_quant_config_format(ours))))
    assert replace(first, source="") == replace(second, source="")


def test_compressed_tensors_own_description_is_read():
    """The library's own object, not this file's idea of it."""
    quant_config = pytest.importorskip("compressed_tensors.quantization.quant_config")
    from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16, QuantizationScheme

    for preset, activations in ((NVFP4, "nvfp4"), (NVFP4A16, "bf16")):
        own = quant_config.QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], **preset)},
            format="nvfp4-pack-quantized",
            ignore=["lm_head"],
        )
        scheme = parse_scheme(json.loads(own.model_dump_json()) | {"quant_method": "compressed-tensors"})
        assert scheme.activations == activations and scheme.layer_kind(EXPERT) == "nvfp4"


BAD = [
    (modelopt(quant_algo="NVFP4_AWQ"), "quant_algo", "NVFP4_AWQ", "NVFP4, W4A16_NVFP4, MIXED_PRECISION"),
    (legacy(quant_algo="FP8"), "quantization.quant_algo", "FP8", "W4A16_NVFP4"),
    (modelopt(quant_algo=None), "quant_algo", "no value", "NVFP4"),
    (modelopt(quant_algo=4), "quant_algo", "int 4", "NVFP4"),
    (legacy(group_size=32), "group_size", "32", "16"),
    (legacy(group_size="many"), "group_size", "many", "16"),
    (modelopt(config_groups={"g": {"weights": FP4 | {"group_size": 32}}}), "config_groups.g.weights.group_size", "32", "16"),
    (modelopt(config_groups=[1]), "config_groups", "list", "mapping"),
    (modelopt(ignore="lm_head"), "ignore", "str 'lm_head'", "list"),
    (legacy(exclude_modules=["a", 3]), "exclude_modules", "int 3", "strings"),
    (modelopt(kv_cache_scheme=8), "kv_cache_scheme", "int 8", "string or a mapping"),
    (modelopt(kv_cache_scheme={"num_bits": 3, "type": "float"}), "kv_cache_scheme", "num_bits 3", "8-bit float"),
    (modelopt(quant_algo="MIXED_PRECISION"), "quantized_layers", "None", "mapping"),
    (
        modelopt(quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8"}}),
        "quantized_layers",
        "FP8",
        "at least one layer",
    ),
    (
        modelopt(quant_algo="MIXED_PRECISION", quantized_layers={"a.b": {"quant_algo": "NVFP4", "group_size": 32}}),
        "quantized_layers['a.b'].group_size",
        "32",
        "16",
    ),
    (compressed(format="pack-quantized"), "format", "'pack-quantized'", "'nvfp4-pack-quantized'"),
    (compressed(format="mxfp4-pack-quantized"), "format", "mxfp4", "'nvfp4-pack-quantized'"),
    (compressed(format=None), "format", "None", "'nvfp4-pack-quantized'"),
    (compressed(weights={"group_size": 32}), "config_groups.group_0.weights.group_size", "32", "16"),
    (compressed(weights={"num_bits": 8}), "config_groups.group_0.weights", "num_bits 8", "num_bits 4"),
    (compressed(weights={"strategy": "channel"}), "weights.strategy", "'channel'", "'tensor_group'"),
    (compressed(weights={"symmetric": False}), "weights.symmetric", "False", "True"),
    (compressed(inputs=FP8), "input_activations", "num_bits 8", "num_bits 4"),
    (compressed(config_groups={}), "config_groups", "none of them NVFP4", "num_bits 4"),
    (compressed(ignore=["re:(["]), "re:([", "does not compile", "regex"),
    ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "quant_method", "'fp8'", "'modelopt'"),
    ({"bits": 4}, "quant_method", "no value", "'compressed-tensors'"),
    ({"quant_method": 7}, "quant_method", "int 7", "'modelopt'"),
    ([], "quantization_config", "list", "mapping"),
]


@pytest.mark.parametrize(("config", "where", "found", "allowed"), BAD)
def test_bad_descriptions(config, where, found, allowed):
    with pytest.raises(CheckpointError) as caught:
        parse_scheme(config)
    error = caught.value
    assert where in error.where and found in error.found and allowed in error.allowed


def write(folder, config=None, beside=None):
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return folder


def test_read_scheme_finds_either_file(tmp_path):
    write(tmp_path, {"dtype": "bfloat16"}, legacy())
    assert read_scheme(tmp_path).source == "hf_quant_config.json"
    write(tmp_path, {"quantization_config": modelopt()})
    assert read_scheme(tmp_path).source == "config.json: quantization_config"
    write(tmp_path, {"text_config": {"quantization_config": compressed()}})
    assert read_scheme(str(tmp_path)).producer == "compressed-tensors"


def test_read_scheme_says_how_to_make_a_checkpoint(tmp_path):
    write(tmp_path, {"dtype": "bfloat16"})
    with pytest.raises(CheckpointError, match=r"bfloat16.*moe-backend quantize MODEL OUT"):
        read_scheme(tmp_path)


def test_read_scheme_refuses_files_that_disagree(tmp_path):
    write(tmp_path, {"quantization_config": modelopt()}, legacy(quant_algo="W4A16_NVFP4"))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json.*W4A16_NVFP4.*NVFP4, as in config.json"):
        read_scheme(tmp_path)


def test_read_scheme_names_the_file_that_is_bad(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such folder"):
        read_scheme(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config.json: found no such file"):
        read_scheme(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: found unreadable JSON"):
        read_scheme(tmp_path)


@pytest.mark.parametrize("config", [modelopt(), compressed(), modelopt(quant_algo="MIXED_PRECISION", quantized_layers=MIXED_LAYERS)])
def test_schemes_pickle_and_hash(config):
    scheme = parse_scheme(config)
    scheme.layer_kind(EXPERT)
    again = pickle.loads(pickle.dumps(scheme))
    assert again == scheme and hash(again) == hash(scheme)
