"""What surrounds the Hopper kernels of dense layers in vLLM and needs no GPU: which layers they get, the weights, and the calls."""

from __future__ import annotations

import itertools

import pytest
import torch

from moe_backend_plugin.config import load_config
from moe_backend_plugin.device import Choice
from moe_backend_plugin.errors import CheckpointError, UnsupportedLayerError
from moe_backend_plugin.linear import reference
from moe_backend_plugin.nvfp4 import hopper
from moe_backend_plugin.nvfp4.format import quantize

from .test_moe_hopper import COMPRESSED, renamed

SCHEME = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": []}}
HIDDEN, TOKENS = 80, 13
_number = itertools.count()
LAYERS = {  # class, its arguments, its parts: (shard id, rows)
    "qkv": ("QKVParallelLinear", (HIDDEN, 16, 4, 2), [("q", 64), ("k", 32), ("v", 32)]),
    "gate and up": ("MergedColumnParallelLinear", (HIDDEN, [48, 48]), [(0, 48), (1, 48)]),
    "column": ("ColumnParallelLinear", (HIDDEN, 96), [(None, 96)]),
    "row": ("RowParallelLinear", (HIDDEN, 64), [(None, 64)]),
    "replicated": ("ReplicatedLinear", (HIDDEN, 32), [(None, 32)]),
    "output": ("ParallelLMHead", (128, HIDDEN), [(None, 128)]),
}


class Kernels:
    """The GPU kernels' interface (``linear.cuda``) over the reference; what was asked of it."""

    def __init__(self) -> None:
        self.prepared: list[tuple] = []
        self.calls: list[tuple[int, int, int]] = []

    def prepare(self, *arguments) -> int:
        self.prepared.append(arguments)
        return 3

    def nvfp4_linear(self, x, weights, out) -> None:
        rows, columns = out.shape[1], x.shape[1]
        self.calls.append((x.shape[0], rows, columns))
        codes, scales = hopper.unpack(weights.packed, rows, columns, False)
        assert weights.scale_2.shape == (1, 1)
        out.copy_(reference.nvfp4_linear(x, codes[0], scales[0], weights.scale_2.view(())))


@pytest.fixture
def kernels(vllm_config, monkeypatch):
    """vLLM on its CPU build, as if it were a Hopper GPU with stand-ins for the kernels."""
    from moe_backend_plugin.engines.vllm import configs, linear_cuda

    found = Kernels()
    for name in ("prepare", "nvfp4_linear"):
        monkeypatch.setattr(linear_cuda.cuda, name, getattr(found, name))
    monkeypatch.setattr(configs, "provider", lambda kind, where: Choice("cutedsl", "a test"))
    monkeypatch.setattr(configs, "_handed_over", set())
    monkeypatch.setattr(linear_cuda, "current_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(vllm_config, "additional_config", {})
    linear_cuda.prepare.cache_clear()
    yield found
    linear_cuda.prepare.cache_clear()


def build(which: str, scheme: dict = SCHEME, bias: bool = False):
    from vllm.model_executor.layers import linear, vocab_parallel_embedding
    from vllm.utils.torch_utils import set_default_torch_dtype

    from moe_backend_plugin.engines.vllm.quantization import Nvfp4CuteDslConfig

    name, arguments, _ = LAYERS[which]
    cls = getattr(linear, name, None) or getattr(vocab_parallel_embedding, name)
    made = Nvfp4CuteDslConfig.from_config(scheme)
    with set_default_torch_dtype(torch.bfloat16):  # as vLLM's model loader does
        return cls(*arguments, bias=bias, params_dtype=torch.bfloat16, quant_config=made, prefix=f"model.layers.{next(_number)}.dense")


def parts(which: str, seed: int = 0, scale_2: float | None = 0.002) -> list[dict[str, torch.Tensor]]:
    """A checkpoint's tensors of each part; with ``scale_2`` None the parts have global scales of their own."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _, rows in LAYERS[which][2]:
        q = quantize(torch.randn(rows, HIDDEN, generator=random) * (0.5 + torch.rand((), generator=random)))
        own = q.scale_2 if scale_2 is None else torch.tensor(scale_2)
        found.append({".weight": q.packed, ".weight_scale": q.scale, ".weight_scale_2": own, ".input_scale": torch.tensor(0.01)})
    return found


def load(layer, which: str, tensors: list[dict[str, torch.Tensor]]) -> None:
    parameters = dict(layer.named_parameters())
    for (shard, _), part in zip(LAYERS[which][2], tensors, strict=True):
        for name, tensor in part.items():
            parameter = parameters[name.removeprefix(".")]
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))
    layer.quant_method.process_weights_after_loading(layer)


def dense(tensors: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts' codes, block scales and global scales, rows below each other."""
    scale_2 = [part[".weight_scale_2"].expand(part[".weight"].shape[0]) for part in tensors]
    scale = torch.cat([part[".weight_scale"].view(torch.uint8) for part in tensors]).view(torch.float8_e4m3fn)
    return torch.cat([part[".weight"] for part in tensors]), scale, torch.cat(scale_2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("which", LAYERS)
def test_a_layer_is_loaded_packed_and_called(vllm_config, kernels, which, bias):
    from moe_backend_plugin.engines.vllm.linear_cuda import HopperLinearMethod

    layer, tensors = build(which, bias=bias), parts(which)
    rows = sum(rows for _, rows in LAYERS[which][2])
    if bias:
        layer.bias.data.copy_(torch.randn(rows))
    assert isinstance(layer.quant_method, HopperLinearMethod)
    room = layer.weight.untyped_storage()
    assert room.nbytes() == hopper.packed_shape(1, rows, HIDDEN, False)[1] * 2 * hopper.BYTES
    load(layer, which, tensors)

    packed, scale, scale_2 = dense(tensors)
    assert torch.equal(layer.weight, hopper.pack(packed[None], scale[None], gated=False))
    assert layer.weight.untyped_storage().data_ptr() == room.data_ptr(), "packed where the checkpoint's tensors lay"
    assert layer.weight_scale_2.shape == (1, 1) and float(layer.weight_scale_2) == float(scale_2[0])
    # Nothing of the checkpoint's own tensors stays.
    kept = {name for name, _ in layer.named_parameters()}
    assert kept == {"weight", "weight_scale_2", *(["bias"] if bias else [])}

    x = torch.randn(2, TOKENS, HIDDEN).bfloat16()
    out = layer.quant_method.apply(layer, x, layer.bias if bias else None)
    wanted = reference.nvfp4_linear(x, packed, scale, scale_2, layer.bias if bias else None)
    torch.testing.assert_close(out.float(), wanted.float(), atol=float(wanted.abs().max()) * 2**-7, rtol=2**-7)
    assert kernels.calls == [(2 * TOKENS, rows, HIDDEN)]


@pytest.mark.parametrize("which", ["qkv", "row"])
def test_compressed_tensors_are_the_same_layer(vllm_config, kernels, which):
    tensors = parts(which)
    layer, other = build(which), build(which, {**COMPRESSED, "ignore": []})
    load(layer, which, tensors)
    load(other, which, [renamed(part) for part in tensors])
    assert torch.equal(layer.weight, other.weight)
    torch.testing.assert_close(layer.weight_scale_2, other.weight_scale_2)


def test_parts_with_scales_of_their_own_are_refused_by_name(vllm_config, kernels):
    layer = build("qkv")
    with pytest.raises(CheckpointError, match=r"dense\.weight_scale_2: found parts with different global .*linear\.provider: engine"):
        load(layer, "qkv", parts("qkv", scale_2=None))
    load(build("column"), "column", parts("column", scale_2=None))


@pytest.mark.parametrize("missing", [".weight", ".weight_scale", ".weight_scale_2"])
def test_a_tensor_that_is_missing_is_named(vllm_config, kernels, missing):
    """The scales that were never loaded are NaN in memory that the packed weights share."""
    tensors = parts("row")
    del tensors[0][missing]
    with pytest.raises(CheckpointError, match=rf"dense\{missing}\b"):
        load(build("row"), "row", tensors)


def test_layers_alike_are_prepared_once_with_the_largest_batch(vllm_config, kernels, log):
    most = vllm_config.scheduler_config.max_num_batched_tokens
    for which in ("column", "column", "row", "column"):
        build(which)
    common = torch.bfloat16, torch.device("cuda", 0), most
    assert kernels.prepared == [(96, HIDDEN, *common), (64, HIDDEN, *common)]
    assert sum("Compiled 3 dense NVFP4 kernels for layers of 96 by 80" in line for line in log) == 1


def test_graphs_that_were_compiled_for_other_kernels_are_not_loaded(vllm_config, kernels):
    """vLLM keeps compiled graphs under a hash of its configuration, and does not know what a settings file says."""
    from moe_backend_plugin.engines.vllm.arguments import extra_config

    before = vllm_config.compute_hash()
    build("row")
    after = vllm_config.compute_hash()
    build("qkv")
    assert before != after == vllm_config.compute_hash()
    assert extra_config(vllm_config) is None, "no settings, and no misspelling of them"


def test_weights_are_loaded_again_in_place(vllm_config, kernels):
    """vLLM's reload: the same addresses, the other weights' output, and the first ones' bits when these come back."""
    from vllm.model_executor.model_loader import reload

    layer, first, second = build("qkv"), parts("qkv"), parts("qkv", seed=7, scale_2=0.003)
    reload.record_metadata_for_reloading(layer)
    load(layer, "qkv", first)
    places = {name: (parameter.data_ptr(), tuple(parameter.shape)) for name, parameter in layer.named_parameters()}
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    before = layer.quant_method.apply(layer, x)
    for tensors in (second, first):
        reload.initialize_layerwise_reload(layer)
        parameters = dict(layer.named_parameters())
        for (shard, _), part in zip(LAYERS["qkv"][2], tensors, strict=True):
            for name, tensor in part.items():
                parameter = parameters[name.removeprefix(".")]
                parameter.weight_loader(parameter, tensor, shard)
        reload.finalize_layerwise_reload(layer, None)
        assert {name: (parameter.data_ptr(), tuple(parameter.shape)) for name, parameter in layer.named_parameters()} == places
        wanted = reference.nvfp4_linear(x, *dense(tensors))
        torch.testing.assert_close(layer.quant_method.apply(layer, x), wanted)
    assert torch.equal(layer.quant_method.apply(layer, x), before)


# --- layers that stay vLLM's ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch):
    """In place of vLLM's own method."""
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    monkeypatch.setattr(ModelOptNvFp4Config, "get_quant_method", lambda self, layer, prefix: ("vLLM's own", prefix))


def ask(layer, prefix: str):
    return layer.quant_config.get_quant_method(layer, prefix)


def test_a_layer_that_is_not_served_is_vllms_and_the_log_says_so_once(vllm_config, kernels, engine, log):
    layer = build("column")
    layer.output_size_per_partition = 1000
    served = [ask(layer, f"model.layers.{i}.dense") for i in range(3)]
    assert served == [("vLLM's own", f"model.layers.{i}.dense") for i in range(3)]
    said = [line for line in log if "1000 output features" in line]
    assert len(said) == 1 and "model.layers.0.dense" in said[0] and "vLLM's own kernel" in said[0]


def test_strict_stops_instead(vllm_config, kernels, engine, monkeypatch):
    from moe_backend_plugin.engines.vllm import configs

    layer = build("row")
    layer.input_size_per_partition = 1 << 16
    monkeypatch.setattr(configs, "plugin_config", lambda: load_config({"strict": True}))
    with pytest.raises(UnsupportedLayerError, match=r"layers\.7: found 65536 input .*strict: false .*or linear\.provider: engine"):
        ask(layer, "model.layers.7")


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("activations", "activations in nvfp4"),
        ("dtype", "torch.float32; the kernels serve"),
        ("backend", "--linear-backend marlin names one of vLLM's own kernels"),
        ("batch invariant", "VLLM_BATCH_INVARIANT is set"),
    ],
)
def test_what_else_stays_vllms(vllm_config, kernels, engine, log, monkeypatch, cause, words):
    from moe_backend_plugin.engines.vllm import configs, linear_cuda

    layer = build("row")
    if cause == "activations":
        monkeypatch.setattr(configs, "plugin_config", lambda: load_config({"linear": {"activations": "nvfp4"}}))
    elif cause == "dtype":
        layer.params_dtype = torch.float32
    elif cause == "backend":
        monkeypatch.setattr(vllm_config.kernel_config, "linear_backend", "marlin")
    else:
        monkeypatch.setattr(linear_cuda.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    assert ask(layer, "model.layers.7")[0] == "vLLM's own"
    assert any(words in line for line in log)
