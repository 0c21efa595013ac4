"""What SGLang's adapter decides and moves without SGLang: arguments, activations, slot tables, weights."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Module

from moe_backend_plugin.engines import packing
from moe_backend_plugin.engines.sglang import MOE_BACKEND, arguments, slots
from moe_backend_plugin.engines.sglang.activation import activation_of
from moe_backend_plugin.engines.sglang.settings import most_tokens
from moe_backend_plugin.engines.sglang.weights import ExpertWeights
from moe_backend_plugin.errors import CheckpointError, ConfigError, PluginError
from moe_backend_plugin.moe.problem import Activation, MoEProblem
from moe_backend_plugin.nvfp4 import hopper
from moe_backend_plugin.nvfp4.scheme import COMPRESSED_TENSORS_NAMES, MODELOPT_NAMES
from moe_backend_plugin.nvfp4.unscaled import to_planes

# --- arguments ---------------------------------------------------------------------------------------------------------------------------


def test_the_alias_becomes_the_name_that_sglang_has():
    assert arguments.with_alias({"moe_backend": "cutedsl", "tp_size": 2}) == {"moe_runner_backend": "cutedsl", "tp_size": 2}
    assert arguments.with_alias({"moe_backend": "marlin", "moe_runner_backend": "marlin"}) == {"moe_runner_backend": "marlin"}
    assert arguments.with_alias({"model_path": "m"}) == {"model_path": "m"}


def test_the_alias_and_the_name_must_not_differ():
    with pytest.raises(ConfigError, match="'cutedsl' and 'marlin'"):
        arguments.with_alias({"moe_backend": "cutedsl", "moe_runner_backend": "marlin"})


def test_an_unknown_backend_lists_the_choices():
    arguments.known("marlin", ["auto", "marlin"])
    with pytest.raises(ConfigError) as error:
        arguments.known("cutedls", ["auto", "marlin", MOE_BACKEND])
    assert str(error.value) == ("--moe-runner-backend: found 'cutedls'; allowed: auto, marlin, cutedsl (did you mean cutedsl?)")


def test_settings_of_dense_layers_are_not_ignored_in_silence():
    assert arguments.dense_by_file("auto", "auto", False) is None and arguments.dense_by_file("engine", "auto", True) is None
    said = arguments.dense_by_file("cutedsl", "nvfp4", False)
    assert said == "Dense NVFP4 layers stay on SGLang's kernels; not used: linear.provider 'cutedsl', linear.activations 'nvfp4'"
    with pytest.raises(ConfigError, match="^strict: found true with linear.provider 'torch'; allowed: auto"):
        arguments.dense_by_file("torch", "auto", True)


@pytest.mark.parametrize("quantization", arguments.QUANTIZATIONS)
def test_nvfp4_checkpoints_are_taken(quantization):
    arguments.refuse(quantization, "none")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quantization": None}, "without quantisation"),
        ({"quantization": "fp8"}, "'fp8'"),
        ({"a2a": "deepep"}, "--moe-a2a-backend deepep"),
        ({"eplb": True}, "--enable-eplb"),
        ({"redundant": 4}, "redundant"),
        ({"lora": True}, "--enable-lora"),
        ({"tbo": True}, "two-batch"),
        ({"pdmux": True}, "--enable-pdmux"),
        ({"ray": True}, "--use-ray"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(given, words):
    with pytest.raises(ConfigError) as error:
        arguments.refuse(**{"quantization": "modelopt_fp4", "a2a": "none", **given})
    text = str(error.value)
    assert text.startswith(f"--moe-runner-backend {MOE_BACKEND}: found ") and words in text and "\n" not in text


@pytest.mark.parametrize(
    ("asked", "resolved", "hybrid", "quantization"),
    [
        (None, "modelopt_fp4", False, "modelopt_fp4"),
        (None, None, False, None),
        ("modelopt", "modelopt_mixed", False, "modelopt_mixed"),
        ("modelopt_fp4", "modelopt", False, "modelopt_fp4"),  # a model's own resolution knows more than its configuration
        ("fp8", "fp8", True, "modelopt_fp4"),
        (None, "fp8", False, "fp8"),
    ],
)
def test_what_describes_the_experts(asked, resolved, hybrid, quantization):
    config = SimpleNamespace(quantization=resolved, nvfp4_moe_meta={"group_size": 16} if hybrid else None)
    assert arguments.quantization_of(asked, config) == quantization


@pytest.mark.parametrize(
    ("provider", "decode", "base", "chosen"),
    [
        ("cutedsl", None, "triton", "cutedsl_plugin"),
        ("auto", None, "triton", None),
        ("engine", None, "triton", None),
        ("cutedsl", "triton", "triton", None),
        ("cutedsl", None, "flashinfer", None),
    ],
)
def test_the_file_chooses_the_gdn_backend_where_no_flag_does(provider, decode, base, chosen):
    assert arguments.gdn_by_file(provider, decode, base) == chosen


@pytest.mark.parametrize(
    ("take", "provider", "runner", "chosen"),
    [
        (True, "auto", "auto", True),
        (True, "cutedsl", "auto", True),
        (True, "engine", "auto", False),
        (True, "auto", "marlin", False),
        (False, "auto", "auto", False),
    ],
)
def test_the_file_chooses_the_runner_where_no_flag_does(take, provider, runner, chosen):
    assert arguments.moe_by_file(take, provider, runner) is chosen


CT_WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_WEIGHTS}}}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}


@pytest.mark.parametrize(
    ("quantization", "described", "experts", "expected"),
    [
        ("compressed-tensors", COMPRESSED | {"format": "nvfp4-pack-quantized"}, 8, True),
        ("compressed-tensors", COMPRESSED | {"format": "nvfp4-pack-quantized", "ignore": ["re:.*experts.*"]}, 8, False),
        ("compressed-tensors", COMPRESSED | {"format": "float-quantized"}, 8, False),
        ("modelopt_fp4", MODELOPT, 8, True),
        ("modelopt_fp4", MODELOPT, None, False),
        ("modelopt_fp4", MODELOPT | {"ignore": ["model.layers.1.mlp.experts*"]}, 8, True),
        ("modelopt_fp4", None, 8, True),  # described in hf_quant_config.json alone
        ("modelopt_mixed", {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, 8, True),
        ("compressed-tensors", None, 8, False),
        ("fp8", {"quant_method": "fp8"}, 8, False),
        (None, None, 8, False),
    ],
)
def test_nvfp4_experts_of_a_checkpoint_that_is_not_here(quantization, described, experts, expected):
    text = SimpleNamespace(num_experts=experts, num_hidden_layers=2)
    config = SimpleNamespace(
        nvfp4_moe_meta=None, quantization=quantization, hf_text_config=text, hf_config=SimpleNamespace(quantization_config=described)
    )
    view = SimpleNamespace(quantization=quantization, model_path="somebody/a-model")
    assert arguments.nvfp4_experts(view, config) is expected


def test_fp8_checkpoints_with_nvfp4_experts_have_them():
    view = SimpleNamespace(quantization="fp8", model_path="somebody/a-model")
    assert arguments.nvfp4_experts(view, SimpleNamespace(nvfp4_moe_meta={"group_size": 16}))


@pytest.mark.parametrize("of_a_program", [True, False])
def test_a_refusal_ends_a_program_and_is_raised_to_a_caller(of_a_program):
    class ServerArgs:
        @classmethod
        def from_cli_args(cls, args):
            return cls()

    module = SimpleNamespace(ServerArgs=ServerArgs)
    arguments.mark_command_lines(module)

    @arguments.ends_programs
    def refuse(server_args, previous):
        raise ConfigError("--flag", "this", "that")

    class Derived(module.ServerArgs):
        pass

    made = Derived.from_cli_args(SimpleNamespace()) if of_a_program else Derived()
    assert type(made) is Derived
    with pytest.raises(SystemExit if of_a_program else ConfigError) as error:
        refuse(made, None)
    if of_a_program:
        assert error.value.code == "moe-backend-plugin: error: --flag: found this; allowed: that"


def test_without_sglang_one_line_says_so(monkeypatch):
    from moe_backend_plugin.engines import sglang

    monkeypatch.setattr(sglang, "_registered", False)
    monkeypatch.setitem(sys.modules, "sglang", None)
    for name in [name for name in sys.modules if name.startswith("sglang.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="no SGLang; allowed: SGLang 0.5.22 or 0.5.23"):
        sglang.register()
    assert not sglang._registered


@pytest.mark.parametrize(
    ("chunk", "prefill", "gathered", "tokens"),
    [(8192, 16384, 1, 8192), (-1, 16384, 1, 16384), (None, 4096, 2, 8192), (2048, None, 8, 16384)],
)
def test_the_largest_call(chunk, prefill, gathered, tokens):
    assert most_tokens(chunk, prefill, gathered) == tokens


# --- activations -------------------------------------------------------------------------------------------------------------------------

PLAIN = dict(activation="silu", is_gated=True, gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None, swiglu_limit=None)


@pytest.mark.parametrize(
    ("given", "activation"),
    [
        ({}, Activation("silu")),
        ({"swiglu_limit": 10.0}, Activation("silu", limit=10.0)),
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, Activation("swigluoai", 1.702, 1.0, 7.0)),
        ({"gemm1_alpha": 1.702, "gemm1_beta": 0.0, "gemm1_clamp_limit": 7.0}, Activation("swigluoai", 1.702, 0.0, 7.0)),
        ({"activation": "relu2", "is_gated": False}, Activation("relu2")),
    ],
)
def test_activations(given, activation):
    assert activation_of(SimpleNamespace(**{**PLAIN, **given})) == activation


@pytest.mark.parametrize(
    "given", [{"activation": "gelu"}, {"activation": "situ"}, {"is_gated": False}, {"activation": "relu2"}, {"gemm1_clamp_limit": 7.0}]
)
def test_activations_that_are_not_served(given):
    with pytest.raises(PluginError):
        activation_of(SimpleNamespace(**{**PLAIN, **given}))


# --- slots -------------------------------------------------------------------------------------------------------------------------------


def cut(mixed: torch.Tensor, hq: int, hv: int, k: int, v: int) -> tuple[torch.Tensor, ...]:
    """As SGLang cuts the convolution's result."""
    parts = torch.split(mixed, [hq * k, hq * k, hv * v], dim=-1)
    return tuple(p.view(1, -1, h, d) for p, h, d in zip(parts, (hq, hq, hv), (k, k, v), strict=True))


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_was_cut_from_one_tensor_is_not_copied(tokens):
    whole = torch.randn(tokens, 60)
    mixed = whole[:, :48]  # rows further apart than they are long
    packed = slots.packed(*cut(mixed, 1, 2, 12, 12))
    assert torch.equal(packed, mixed) and packed.data_ptr() == whole.data_ptr()


def test_what_was_split_into_tensors_is_joined():
    mixed = torch.randn(3, 48)
    q, k, v = (part.clone() for part in cut(mixed, 1, 2, 12, 12))
    assert torch.equal(slots.packed(q, k, v), mixed)
    order = cut(mixed, 1, 1, 16, 16)
    assert torch.equal(slots.packed(order[1], order[0], order[2]), torch.cat([mixed[:, 16:32], mixed[:, :16], mixed[:, 32:]], -1))
    # Three rows of one tensor that lie as far apart as parts of a row would.
    assert torch.equal(slots.packed(q, k, v)[1:2], slots.packed(q[:, 1:2], k[:, 1:2], v[:, 1:2]))


def test_tables_are_of_one_type_and_as_long_as_the_batch():
    starts, cache = torch.tensor([0, 4, 8], dtype=torch.int64), torch.tensor([7, -1, 9, 9], dtype=torch.int32)
    read, cu = slots.rows_of_verify(starts, cache)
    assert read.tolist() == [7, -1] and cu.tolist() == [0, 4, 8] and read.dtype == cu.dtype == torch.int32


def test_drafts_that_sglang_has_to_verify():
    buffer = torch.empty(1)
    assert slots.engine_reason(8, 4, False, buffer) is None
    assert "9 tokens" in slots.engine_reason(8, 9, False, buffer)
    assert "PP_SPEC" in slots.engine_reason(8, 4, True, buffer)
    assert "no buffer" in slots.engine_reason(8, 4, False, None)
    assert "trees" in slots.engine_reason(8, 4, False, buffer, tree=True)


# --- weights -----------------------------------------------------------------------------------------------------------------------------


class Layer(Module):
    """The two things that a layer of SGLang is asked for; experts ``first`` .. are this rank's."""

    layer_name = "model.layers.3.mlp.experts"

    def __init__(self, first: int = 0, experts: int = 3) -> None:
        super().__init__()
        self.first, self.experts = first, experts

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert - self.first if self.first <= expert < self.first + self.experts else -1

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id):
        """What SGLang's loader does with one rank's part of one expert."""
        if (local := self._map_global_expert_id_to_local_expert_id(expert_id)) == -1:
            return
        target = param.data[local]
        if loaded_weight.ndim == 0 and shard_id != "w2" and target.numel() == 2:
            target[0 if shard_id == "w1" else 1] = loaded_weight
        elif shard_id == "w2" or loaded_weight.ndim == 0 or target.shape == loaded_weight.shape:
            target.copy_(loaded_weight)
        else:
            half = target.shape[0] // 2
            (target[:half] if shard_id == "w1" else target[half:]).copy_(loaded_weight)


H, WIDTH, EXPERTS = 256, 48, 3


SILU = Activation()


def problem(activation: Activation = SILU) -> MoEProblem:
    return MoEProblem(EXPERTS, EXPERTS, H, WIDTH, 2, activation)


def checkpoint(names, gated: bool = True, seed: int = 0) -> dict:
    """{(expert, shard, suffix): tensor} of a model with two experts more than this rank has."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for expert in range(EXPERTS + 2):
        for shard in ("w1", "w2", "w3") if gated else ("w1", "w2"):
            rows, columns = (H, WIDTH) if shard == "w2" else (WIDTH, H)
            found[expert, shard, names.weight] = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g)
            scale = torch.randint(1, 120, (rows, columns // 16), dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)
            found[expert, shard, names.scale] = scale
            found[expert, shard, names.global_scale] = torch.rand((), generator=g) + 0.5
            found[expert, shard, names.input_scale] = torch.rand((), generator=g)
    return found


def load(layer: Layer, tensors: dict, names) -> None:
    for (expert, shard, suffix), tensor in tensors.items():
        name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
        if suffix != names.input_scale:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=expert)


def expected(tensors: dict, names, first: int, gated: bool) -> dict[str, torch.Tensor]:
    shards = ("w1", "w3") if gated else ("w1",)
    mine = range(first, first + EXPERTS)

    def cat(suffix):
        return torch.stack([torch.cat([tensors[e, s, suffix].view(torch.uint8) for s in shards]) for e in mine])

    def scalars(shards):
        values = torch.stack([torch.stack([tensors[e, s, names.global_scale] for s in shards]) for e in mine])
        return values.reciprocal() if names.reciprocal else values

    down = {suffix: torch.stack([tensors[e, "w2", suffix].view(torch.uint8) for e in mine]) for suffix in (names.weight, names.scale)}
    return {
        "w13": (cat(names.weight), cat(names.scale).view(torch.float8_e4m3fn), scalars(shards)),
        "w2": (down[names.weight], down[names.scale].view(torch.float8_e4m3fn), scalars(("w2",))[:, 0]),
    }


def check(layer: Layer, tensors: dict, names, provider: str, gated: bool = True) -> None:
    for gemm, (codes, scales, scale_2) in expected(tensors, names, layer.first, gated).items():
        assert torch.equal(getattr(layer, f"{gemm}_scale_2").data, scale_2)
        if provider == "cutedsl":
            assert torch.equal(getattr(layer, f"{gemm}_weight").data, hopper.pack(codes, scales, gated=gated and gemm == "w13"))
        else:
            planes, planes_scale = to_planes(codes, scales)
            assert torch.equal(getattr(layer, f"{gemm}_weight").data, planes)
            assert torch.equal(getattr(layer, f"{gemm}_planes_scale").data, planes_scale)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("provider", ["cutedsl", "torch"])
@pytest.mark.parametrize("names", [MODELOPT_NAMES, COMPRESSED_TENSORS_NAMES], ids=["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("gated", [True, False])
def test_weights_of_this_rank_arrive_in_the_provider_s_form(names, provider, gated, first):
    layer, weights = Layer(first), ExpertWeights(names, provider, problem(Activation() if gated else Activation("relu2")))
    weights.create(layer, layer.weight_loader, EXPERTS + 2, everyone=True)
    tensors = checkpoint(names, gated)
    load(layer, tensors, names)
    weights.finish(layer)
    check(layer, tensors, names, provider, gated)


@pytest.mark.parametrize("names", [MODELOPT_NAMES, COMPRESSED_TENSORS_NAMES], ids=["modelopt", "compressed-tensors"])
def test_weights_that_are_loaded_again_stay_where_they_are(names):
    layer, weights = Layer(), ExpertWeights(names, "cutedsl", problem())
    weights.create(layer, layer.weight_loader, None)
    old, new = checkpoint(names), checkpoint(names, seed=1)
    load(layer, old, names)
    weights.finish(layer)
    places = [getattr(layer, f"{gemm}_{part}").data_ptr() for gemm in ("w13", "w2") for part in ("weight", "scale_2")]
    weights.restore(layer)
    load(layer, new, names)
    weights.finish(layer)
    check(layer, new, names, "cutedsl")
    assert places == [getattr(layer, f"{gemm}_{part}").data_ptr() for gemm in ("w13", "w2") for part in ("weight", "scale_2")]
    # Of some tensors only: the others stay what they were.
    weights.restore(layer)
    some = {key: tensor for key, tensor in old.items() if key[0] == 1}
    load(layer, some, names)
    weights.finish(layer)
    check(layer, {**new, **some}, names, "cutedsl")


@pytest.mark.parametrize("part_bytes", [1, 10_000, 1 << 28])
@pytest.mark.parametrize("gated", [True, False])
def test_restore_is_the_inverse_of_rearrange(monkeypatch, gated, part_bytes):
    monkeypatch.setattr(packing, "_PART_BYTES", part_bytes)
    codes, scales = packing.allocate(5, 96, 80, gated)
    codes.random_(0, 256)
    scales.view(torch.uint8).random_(1, 120)
    copies = codes.clone(), scales.clone()
    packed = packing.rearrange(codes, scales, gated=gated)
    back = packing.restore(packed, 96, 80, gated=gated)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(back, copies, strict=True))
    assert packing.rearrange(*back, gated=gated).data_ptr() == packed.data_ptr()


def test_a_tensor_that_is_missing_or_wrong_is_named():
    names = MODELOPT_NAMES
    tensors = checkpoint(names)

    def loaded(changes: dict, drop: tuple = ()) -> None:
        layer, weights = Layer(), ExpertWeights(names, "cutedsl", problem())
        weights.create(layer, layer.weight_loader, None)
        load(layer, {k: t for k, t in {**tensors, **changes}.items() if k not in drop}, names)
        weights.finish(layer)

    place = "model.layers.3.mlp.experts, local expert 1, up projection: "
    with pytest.raises(CheckpointError, match=place + "weight: found no such tensor"):
        loaded({}, drop=[(1, "w3", "weight")])
    with pytest.raises(CheckpointError, match=place + "weight_scale: found NaN, or the tensor is missing"):
        loaded({}, drop=[(1, "w3", "weight_scale")])
    with pytest.raises(CheckpointError, match=place + "weight_scale_2: found 0"):
        loaded({(1, "w3", "weight_scale_2"): torch.tensor(0.0)})
    with pytest.raises(CheckpointError, match="experts, expert 1, up projection: weight: found dtype bfloat16; allowed: uint8"):
        loaded({(1, "w3", "weight"): torch.zeros(WIDTH, H // 2, dtype=torch.bfloat16)})


@pytest.mark.parametrize("names", [MODELOPT_NAMES, COMPRESSED_TENSORS_NAMES], ids=["modelopt", "compressed-tensors"])
def test_dummy_weights_are_made_valid(names):
    layer, weights = Layer(), ExpertWeights(names, "cutedsl", problem())
    weights.create(layer, layer.weight_loader, None)
    for parameter in layer.parameters():
        parameter.data.view(torch.uint8).random_(0, 256)
    weights.finish(layer, dummy=True)
    for gemm, columns, rows in (("w13", H, 2 * WIDTH), ("w2", WIDTH, H)):
        _, scales = hopper.unpack(getattr(layer, f"{gemm}_weight").data, rows, columns, gemm == "w13")
        assert torch.isfinite(scales.float()).all() and (scales.float() >= 0).all()
        assert torch.isfinite(getattr(layer, f"{gemm}_scale_2")).all()


@pytest.mark.parametrize("provider", ["cutedsl", "torch"])
@pytest.mark.parametrize("names", [MODELOPT_NAMES, COMPRESSED_TENSORS_NAMES], ids=["modelopt", "compressed-tensors"])
def test_real_weights_after_dummy_ones_are_taken_as_they_are(names, provider):
    """A server that was started with random weights still says "dummy" when the first update ends."""
    layer, weights = Layer(), ExpertWeights(names, provider, problem())
    weights.create(layer, layer.weight_loader, None)
    weights.finish(layer, dummy=True)
    weights.restore(layer)
    tensors = checkpoint(names)
    load(layer, tensors, names)
    weights.finish(layer, dummy=True)
    check(layer, tensors, names, provider)


def test_an_update_of_some_dummy_weights_leaves_the_others_valid():
    names = MODELOPT_NAMES
    layer, weights = Layer(), ExpertWeights(names, "cutedsl", problem())
    weights.create(layer, layer.weight_loader, None)
    weights.finish(layer, dummy=True)
    before = [getattr(layer, f"{gemm}_weight").data.clone() for gemm in ("w13", "w2")]
    tensors = checkpoint(names)
    for some in ({}, {key: tensor for key, tensor in tensors.items() if key[0] == 1}):
        weights.restore(layer)
        load(layer, some, names)
        weights.finish(layer, dummy=True)
        for gemm, old in zip(("w13", "w2"), before, strict=True):
            now = getattr(layer, f"{gemm}_weight").data
            assert torch.equal(now[[0, 2]], old[[0, 2]]) and torch.equal(now[1], old[1]) is not bool(some)
    assert layer.w2_scale_2[1] == tensors[1, "w2", names.global_scale]
