"""This package in the real SGLang, on CPU tensors: arguments, the MoE runner and its layers, the GDN dispatcher.

The Hopper kernels do not run here: on a CPU the same classes call this package's torch ops.
"""

from __future__ import annotations

import argparse
import importlib.util
import json

import pytest
import torch

from moe_backend_plugin.errors import PluginError

from .conftest import MODELS

MOE_MODEL = MODELS / "pycoder-moe-nvfp4"


def parse(sglang, *argv: str):
    parser = argparse.ArgumentParser(prog="sglang serve")
    sglang.ServerArgs.add_cli_args(parser)
    return sglang.ServerArgs.from_cli_args(parser.parse_args(["--model-path", "m", *argv]))


@pytest.mark.parametrize("flag", ["--moe-backend", "--moe-runner-backend"])
def test_both_flags_name_the_runner(sglang, flag):
    assert parse(sglang, flag, "cutedsl").moe_runner_backend == "cutedsl"
    assert parse(sglang).moe_runner_backend == "auto"


def test_a_configuration_file_names_the_backends(sglang, tmp_path):
    file = tmp_path / "server.yaml"
    file.write_text("model-path: m\nmoe-backend: cutedsl\nlinear-attn-decode-backend: cutedsl_plugin\n")
    args = sglang.prepare_server_args(["--config", str(file)])
    assert (args.moe_runner_backend, args.linear_attn_decode_backend) == ("cutedsl", "cutedsl_plugin")


@pytest.mark.parametrize("flag", ["--moe-backend", "--moe-runner-backend", "--linear-attn-decode-backend"])
def test_an_unknown_name_lists_the_choices(sglang, flag, capsys):
    with pytest.raises(SystemExit):
        parse(sglang, flag, "cutedls")
    said = capsys.readouterr().err.splitlines()[-1]
    assert "invalid choice: 'cutedls'" in said and "'cutedsl'" in said


def test_engine_keywords(sglang):
    from sglang.srt.entrypoints.engine import Engine as engine

    assert engine.server_args_class(model_path="m", moe_backend="cutedsl").moe_runner_backend == "cutedsl"
    assert engine.server_args_class(model_path="m", moe_runner_backend="cutedsl").moe_runner_backend == "cutedsl"


def test_an_nvfp4_model_is_accepted(arguments):
    assert arguments(MOE_MODEL, moe_runner_backend="cutedsl").moe_runner_backend == "cutedsl"


def test_an_unknown_runner_of_engine_lists_the_choices(arguments):
    with pytest.raises(PluginError, match="found 'cutedls'; allowed: auto, .*cutedsl"):
        arguments(MOE_MODEL, moe_runner_backend="cutedls")


def test_a_model_without_nvfp4_is_refused(arguments, tmp_path):
    config = json.loads((MOE_MODEL / "config.json").read_text())
    config.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PluginError, match="without quantisation"):
        arguments(tmp_path, moe_runner_backend="cutedsl")


def other_dispatchers() -> list[str]:
    """SGLang's own choices, which are known only where it is installed."""
    if importlib.util.find_spec("sglang") is None:
        return []
    from typing import get_args, get_type_hints

    from sglang.srt.arg_groups.fields.exec_ import ExecMoe

    return [name for name in get_args(get_type_hints(ExecMoe)["moe_a2a_backend"]) if name != "none"]


@pytest.mark.parametrize("name", other_dispatchers())
def test_other_dispatchers_are_refused(arguments, monkeypatch, name):
    from sglang.srt.arg_groups import mega_moe_hook

    def handle_mega_moe(_) -> None:
        """Where there is no GPU, SGLang's own refuses one of them before its turn comes."""

    monkeypatch.setattr(mega_moe_hook, "handle_mega_moe", handle_mega_moe)
    with pytest.raises(PluginError) as error:
        arguments(MOE_MODEL, moe_runner_backend="cutedsl", moe_a2a_backend=name)
    assert str(error.value).startswith(f"--moe-runner-backend cutedsl: found --moe-a2a-backend {name}, which hands over tokens in a layout")


# --- MoE ---------------------------------------------------------------------------------------------------------------------------------

HIDDEN, WIDTH, EXPERTS, TOP_K = 128, 64, 8, 2


def projection(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=g)
    scales = (torch.rand(rows, columns // 16, generator=g) + 0.1).to(torch.float8_e4m3fn)
    return codes, scales, torch.rand((), generator=g) * 0.02 + 0.02


def new_layer(quant_config, hidden: int = HIDDEN, width: int = WIDTH, top_k: int | None = TOP_K, **options):
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.utils import initialize_moe_config

    initialize_moe_config()
    sizes = dict(num_experts=EXPERTS, hidden_size=hidden, intermediate_size=width, layer_id=options.pop("layer_id", 0), top_k=top_k)
    return FusedMoE(**sizes, params_dtype=torch.float32, quant_config=quant_config, prefix="model.layers.0.mlp.experts", **options)


def load(layer, names, seed: int = 0) -> dict:
    """Give the layer a checkpoint through SGLang's own loader; returns its tensors."""
    tensors = {}
    for expert, shard in ((e, s) for e in range(EXPERTS) for s in ("w1", "w2", "w3")):
        rows, columns = (HIDDEN, WIDTH) if shard == "w2" else (WIDTH, HIDDEN)
        codes, scales, scale_2 = tensors[expert, shard] = projection(rows, columns, seed * 1000 + expert * 3 + int(shard[1]))
        stored = scale_2.reciprocal() if names.reciprocal else scale_2
        given = {names.weight: codes, names.scale: scales, names.global_scale: stored, names.input_scale: torch.tensor(0.5)}
        for suffix, tensor in given.items():
            name = f"{'w2' if shard == 'w2' else 'w13'}_{suffix}"
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, f"model.layers.0.mlp.experts.{name}", shard_id=shard, expert_id=expert)
    return tensors


def reference(tensors: dict, x, topk_weights, topk_ids):
    from moe_backend_plugin.moe.problem import MoEProblem
    from moe_backend_plugin.moe.reference import fused_moe

    def stack(part: int, *shards: str) -> torch.Tensor:
        return torch.stack([torch.cat([tensors[e, s][part].view(torch.uint8) for s in shards]) for e in range(EXPERTS)])

    scale_2 = torch.stack([torch.stack([tensors[e, s][2] for s in ("w1", "w3")]) for e in range(EXPERTS)])
    down = torch.stack([tensors[e, "w2"][2] for e in range(EXPERTS)])
    f8 = torch.float8_e4m3fn
    return fused_moe(
        *(x, stack(0, "w1", "w3"), stack(1, "w1", "w3").view(f8), scale_2, stack(0, "w2"), stack(1, "w2").view(f8), down),
        *(topk_weights, topk_ids, MoEProblem(EXPERTS, EXPERTS, HIDDEN, WIDTH, TOP_K)),
    )


def modelopt():
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

    return ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, exclude_modules=[])


def compressed_tensors():
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**arguments, "dynamic": False}, "input_activations": {**arguments, "dynamic": "local"}}
    return CompressedTensorsConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}, "ignore": []}
    )


@pytest.mark.parametrize("producer", [modelopt, compressed_tensors])
def test_a_layer_of_sglang(published, producer, monkeypatch):
    """Built, loaded, called and loaded again by SGLang's own layer, dispatcher and runner."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from moe_backend_plugin.engines.sglang.moe import PluginRunnerCore
    from moe_backend_plugin.nvfp4.scheme import COMPRESSED_TENSORS_NAMES, MODELOPT_NAMES

    if producer is compressed_tensors:
        from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

        # What a Hopper GPU answers to the question for capability 10.0; without a GPU SGLang cannot ask it.
        monkeypatch.setattr(CompressedTensorsConfig, "_check_scheme_supported", lambda *_, **__: False)
    names = MODELOPT_NAMES if producer is modelopt else COMPRESSED_TENSORS_NAMES
    layer = new_layer(producer())
    assert isinstance(layer.runner.runner_core, PluginRunnerCore) and layer.should_fuse_routed_scaling_factor_in_topk
    g = torch.Generator().manual_seed(7)
    x = torch.randn(5, HIDDEN, generator=g)
    topk_weights, topk_ids = torch.rand(5, TOP_K, generator=g), torch.randint(0, EXPERTS, (5, TOP_K), dtype=torch.int32, generator=g)
    topk_ids[4] = -1  # a padded row
    for seed in (0, 1):
        tensors = load(layer, names, seed)
        layer.quant_method.process_weights_after_loading(layer)
        out = layer.forward_impl(x, StandardTopKOutput(topk_weights, topk_ids, torch.empty(5, EXPERTS)))
        torch.testing.assert_close(out, reference(tensors, x, topk_weights, topk_ids), rtol=2e-2, atol=2e-2)
        assert not out[4].any()
        layer.quant_method.restore_weights_before_loading(layer)


def rank_of(published, size: int, rank: int, expert_parallel: bool):
    """SGLang's state in one of ``size`` processes that share the experts, or the columns of each."""
    from sglang.srt import runtime_context

    kind = "ep" if expert_parallel else "tp"
    return runtime_context.get_parallel().override(tp_size=size, attn_tp_size=size, **{f"moe_{kind}_size": size, f"moe_{kind}_rank": rank})


@pytest.mark.parametrize("expert_parallel", [True, False], ids=["experts", "columns"])
def test_the_ranks_of_a_layer_add_up(published, monkeypatch, expert_parallel):
    """Each gets every tensor of the checkpoint and the ids of all experts; what it makes of them is its part of the reference."""
    from sglang.srt.layers.moe.token_dispatcher import standard
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from moe_backend_plugin.nvfp4.scheme import MODELOPT_NAMES

    monkeypatch.setattr(standard, "get_device", lambda: "cpu")  # SGLang's finds none, for its table of local ids
    ranks, half, tokens = 2, EXPERTS // 2, 9
    g = torch.Generator().manual_seed(11)
    x, topk_weights = torch.randn(tokens, HIDDEN, generator=g), torch.rand(tokens, TOP_K, generator=g)
    topk_ids = torch.randint(0, EXPERTS, (tokens, TOP_K), dtype=torch.int32, generator=g)
    topk_ids[0], topk_ids[1], topk_ids[2] = torch.tensor([0, 1]), torch.tensor([6, 7]), -1
    outs = []
    for rank in range(ranks):
        with rank_of(published, ranks, rank, expert_parallel):
            layer = new_layer(modelopt())
            assert type(layer.dispatcher) is standard.StandardDispatcher
            tensors = load(layer, MODELOPT_NAMES)
            layer.quant_method.process_weights_after_loading(layer)
            problem = layer.quant_method._weights.problem
            assert (problem.num_local_experts, problem.intermediate) == ((half, WIDTH) if expert_parallel else (EXPERTS, WIDTH // ranks))
            outs.append(layer.forward_impl(x, StandardTopKOutput(topk_weights, topk_ids.clone(), torch.empty(tokens, EXPERTS))))
        if expert_parallel:
            elsewhere = torch.where(topk_ids // half == rank, topk_ids, -1)
            torch.testing.assert_close(outs[rank], reference(tensors, x, topk_weights, elsewhere), rtol=2e-2, atol=2e-2)
            assert outs[rank][rank].any() and not outs[rank][[1 - rank, 2]].any()
    torch.testing.assert_close(sum(outs), reference(tensors, x, topk_weights, topk_ids), rtol=2e-2, atol=2e-2)


def test_real_weights_of_a_server_that_began_with_dummy_ones(published):
    """An update, as SGLang makes it: the format of what it loads is "dummy" until after it, and for tensors for good."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.model_loader.loader import DefaultModelLoader

    from moe_backend_plugin.nvfp4.scheme import MODELOPT_NAMES

    layer = new_layer(modelopt())
    x, topk_weights = torch.randn(5, HIDDEN), torch.rand(5, TOP_K)
    topk_ids = torch.randint(0, EXPERTS, (5, TOP_K), dtype=torch.int32)
    with runtime_context.get_model().override(load_format="dummy"):
        layer.quant_method.process_weights_after_loading(layer)
        DefaultModelLoader.restore_weights_before_loading(layer, torch.device("cpu"))
        tensors = load(layer, MODELOPT_NAMES)
        DefaultModelLoader.postprocess_weights(layer, torch.device("cpu"))
    out = layer.forward_impl(x, StandardTopKOutput(topk_weights, topk_ids, torch.empty(5, EXPERTS)))
    torch.testing.assert_close(out, reference(tensors, x, topk_weights, topk_ids), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"num_experts_per_tok": 3}, 3), ({"moe_topk": 5, "num_experts_per_tok": 3}, 5), ({"moe_topk": [1, 6]}, 6)],
    ids=["Llama-4, OLMoE", "Hunyuan", "Hunyuan, by layer"],
)
def test_layers_that_are_not_told_how_many_experts_a_token_has(published, monkeypatch, fields, expected):
    from types import SimpleNamespace

    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.runtime_context import process_model_config

    from moe_backend_plugin.engines.sglang import moe

    def problem(**options):
        return new_layer(modelopt(), top_k=None, **options).quant_method._weights.problem

    assert problem().top_k == process_model_config().hf_text_config.num_experts_per_tok == 4
    monkeypatch.setattr(moe, "process_model_config", lambda: SimpleNamespace(hf_text_config=SimpleNamespace(**fields)))
    assert problem(layer_id=1).top_k == expected
    with draft_model_build_scope(), pytest.raises(PluginError, match="top_k: found 0"):  # that configuration is the target's
        problem()


def test_a_rank_of_expert_parallel_knows_how_many_experts_the_model_has(published):
    """As in vLLM and in the files of the tuner: which kernels are fastest depends on it."""
    from sglang.srt import runtime_context

    with runtime_context.get_parallel().override(tp_size=2, attn_tp_size=2, moe_ep_size=2, moe_ep_rank=1):
        problem = new_layer(modelopt()).quant_method._weights.problem
    assert (problem.num_experts, problem.num_local_experts) == (EXPERTS, EXPERTS // 2)


def fp8():
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128])


def compressed_tensors_fp8():
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    common = {"num_bits": 8, "type": "float", "symmetric": True}
    weights, inputs = common | {"strategy": "channel", "dynamic": False}, common | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return CompressedTensorsConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}, "ignore": []}
    )


@pytest.mark.parametrize("producer", [fp8, compressed_tensors_fp8])
def test_fp8_experts_of_a_draft_model_run_on_triton(published, producer, monkeypatch):
    """A draft model inherits the runner's name, for which SGLang would build them no runner."""
    from sglang.srt.layers.moe.utils import draft_model_build_scope, get_moe_runner_backend, speculative_moe_backend_context
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    monkeypatch.setattr(CompressedTensorsConfig, "_check_scheme_supported", lambda *_, **__: True)
    new_layer(modelopt())
    with speculative_moe_backend_context(), draft_model_build_scope():
        layer = new_layer(producer(), hidden=256, width=128)
        assert get_moe_runner_backend().value == "cutedsl"
    made = layer.scheme if producer is compressed_tensors_fp8 else layer.quant_method
    assert made.runner.runner_backend.is_triton()


def test_mxfp4_experts_of_a_draft_model_are_refused(published):
    config = fp8()
    config.is_fp4_experts = True
    with pytest.raises(PluginError, match="^model.layers.0.mlp.experts: found MXFP4 experts; .*--speculative-moe-runner-backend$"):
        new_layer(config, hidden=256, width=128)


def test_other_experts_of_the_model_itself_are_refused(published, monkeypatch):
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    monkeypatch.setattr(CompressedTensorsConfig, "_check_scheme_supported", lambda *_, **__: True)
    with pytest.raises(PluginError, match="CompressedTensorsW8A8Fp8MoE; allowed: NVFP4 experts"):
        new_layer(compressed_tensors_fp8())


def test_a_clamp_behind_silu_is_refused(published):
    with pytest.raises(PluginError, match="^model.layers.0.mlp.experts: found .*gemm1_clamp_limit 7.0 without gemm1_alpha"):
        new_layer(modelopt(), gemm1_clamp_limit=7.0)


def test_experts_of_another_kind_are_refused_by_the_runner(published):
    from sglang.srt.layers.moe import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner import MoeRunner
    from sglang.srt.layers.moe.utils import resolve_moe_runner_backend

    runner = MoeRunner(resolve_moe_runner_backend("cutedsl"), MoeRunnerConfig())
    with pytest.raises(PluginError, match="experts described by object"):
        runner.run(None, object())


# --- GDN ---------------------------------------------------------------------------------------------------------------------------------

HQ, HV, D = 2, 4, 128


def new_dispatcher():
    from sglang.srt.layers.attention.linear.gdn_backend import GDNKernelDispatcher
    from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend

    custom = LinearAttnKernelBackend("cutedsl_plugin")
    assert custom.is_custom()
    return GDNKernelDispatcher(custom, LinearAttnKernelBackend.TRITON, LinearAttnKernelBackend.TRITON)


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    def make(tokens: int) -> dict:
        return dict(
            mixed=random(tokens, (2 * HQ + HV) * D), a=random(tokens, HV), b=random(tokens, HV), A_log=random(HV), dt_bias=random(HV)
        )

    return make, random(9, HV, D, D) * 0.1


def heads_of(mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v [1, tokens, heads, D] of packed tokens, as SGLang hands them over: views."""
    parts = torch.split(mixed, [HQ * D, HQ * D, HV * D], -1)
    return tuple(part.view(1, -1, heads, D) for part, heads in zip(parts, (HQ, HQ, HV), strict=True))


def verify(dispatcher, x: dict, states: torch.Tensor, table, starts, buffer: torch.Tensor, rows: torch.Tensor, steps: int) -> torch.Tensor:
    """Verification of chains of ``steps`` tokens; ``rows``: SGLang's own rows of the ``buffer``."""
    q, k, v = heads_of(x["mixed"])
    return dispatcher.target_verify(
        A_log=x["A_log"],
        dt_bias=x["dt_bias"],
        q=q,
        k=k,
        v=v,
        a=x["a"],
        b=x["b"],
        ssm_states=states,
        cache_indices=table,
        query_start_loc=starts,
        intermediate_states_buffer=buffer,
        intermediate_state_indices=rows,
        cache_steps=steps,
        retrieve_parent_token=None,
        stable_rows=False,
    )


def expected(x: dict, pool: torch.Tensor, cache: torch.Tensor, tokens: int, update_state: bool, intermediate=None) -> torch.Tensor:
    from moe_backend_plugin.gdn import reference as gdn
    from moe_backend_plugin.gdn.slots import PoolLayout, from_sglang

    rows = cache.shape[0]
    q, k, v = (part.reshape(rows, tokens, -1, D) for part in heads_of(x["mixed"]))
    a, b = (x[name].view(rows, tokens, HV) for name in "ab")
    starts = torch.arange(0, rows * tokens + 1, tokens)
    table = from_sglang(cache, PoolLayout.of(pool), query_start_loc=starts)
    arguments = (q, k, v, a, b, x["A_log"], x["dt_bias"], pool, table)
    return gdn.gdn_decode(*arguments, intermediate=intermediate, update_state=update_state).reshape(1, rows * tokens, HV, D)


@pytest.mark.parametrize("is_packed", [True, False])
def test_decode_through_the_dispatcher(published, case, is_packed):
    """Slots of SGLang's pool: -1 pads a graph's rows and 0 an eager batch's; the last slot is a slot."""
    make, pool = case
    dispatcher, x, cache = new_dispatcher(), make(4), torch.tensor([8, -1, 3, 0], dtype=torch.int32)
    assert dispatcher.supports_packed_decode
    ours, theirs = pool.clone(), pool.clone()
    common = dict(A_log=x["A_log"], dt_bias=x["dt_bias"], ssm_states=ours, cache_indices=cache)
    if is_packed:
        sizes = dict(scale=D**-0.5, num_v_heads=HV, head_v_dim=D)
        out = dispatcher.packed_decode(mixed_qkv=x["mixed"], a=x["a"], b=x["b"], **common, **sizes, replayssm_d=None)
    else:
        out = dispatcher.decode(*heads_of(x["mixed"]), x["a"], x["b"], **common, query_start_loc=torch.arange(5, dtype=torch.int32))
    torch.testing.assert_close(out, expected(x, theirs, cache, 1, True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not out[0, [1, 3]].any() and torch.equal(ours[[0, 1, 2, 4, 5, 6, 7]], pool[[0, 1, 2, 4, 5, 6, 7]])


def test_verification_leaves_the_pool_and_fills_rows(published, case):
    make, pool = case
    dispatcher, steps, cache = new_dispatcher(), 3, torch.tensor([5, -1, 8], dtype=torch.int32)
    x = make(3 * steps)
    ours, theirs = torch.full((4, steps, HV, D, D), 7.0), torch.full((4, steps, HV, D, D), 7.0)
    states = pool.clone()
    assert dispatcher.target_verify_supports_strided_qkv(None)
    starts, rows = torch.arange(0, 10, steps, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    out = verify(dispatcher, x, states, cache, starts, ours, rows, steps)
    torch.testing.assert_close(out, expected(x, pool, cache, steps, False, theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(states, pool) and (ours[1] == 7).all() and (ours[3] == 7).all()


def test_a_flag_for_verification_is_obeyed(published, monkeypatch):
    from types import SimpleNamespace

    from moe_backend_plugin.engines.sglang import gdn

    mamba = SimpleNamespace(
        linear_attn_backend="triton",
        linear_attn_decode_backend="cutedsl_plugin",
        linear_attn_prefill_backend=None,
        linear_attn_verify_backend="triton",
    )
    monkeypatch.setattr(gdn, "get_exec", lambda: SimpleNamespace(mamba=mamba))
    dispatcher = new_dispatcher()
    assert isinstance(dispatcher.decode_kernel, gdn.PluginGDNKernel)
    assert dispatcher.verify_kernel is dispatcher.tree_verify_kernel
