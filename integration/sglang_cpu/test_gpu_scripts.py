"""What the scripts of integration/gpu send to SGLang, as SGLang reads it; its server starts on a GPU only."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from .conftest import MODELS

GPU = Path(__file__).resolve().parents[1] / "gpu"


@pytest.fixture(scope="module")
def server():
    sys.path.insert(0, str(GPU))
    import sglang_server

    yield sglang_server
    sys.path.remove(str(GPU))


@pytest.fixture(scope="module")
def loadable(server):
    from sglang_checkpoint import loadable

    return loadable


@pytest.mark.parametrize(("provider", "runner", "decode"), [("cutedsl", "cutedsl", "cutedsl_plugin"), ("sglang", "marlin", "triton")])
def test_the_command_line_is_sglangs(sglang, server, provider, runner, decode):
    command = server.command(MODELS / "pycoder-next-nvfp4", provider, ["--attention-backend", "triton", "--sampling-backend", "pytorch"])
    assert command[1:3] == ["-m", "sglang.launch_server"]
    made = sglang.prepare_server_args(command[3:])
    assert (made.moe_runner_backend, made.linear_attn_decode_backend) == (runner, decode)
    assert (made.attention_backend, made.sampling_backend, made.max_running_requests) == ("triton", "pytorch", 256)
    assert (made.max_total_tokens, made.max_mamba_cache_size) == (1_000_000, 4096)
    assert not made.disable_radix_cache and not made.disable_cuda_graph and not made.disable_decode_cuda_graph


def test_drafts_are_a_chain_of_ngrams(sglang, server):
    command = server.command(MODELS / "pycoder-next-nvfp4", "cutedsl", server.drafting(3))
    made = sglang.prepare_server_args([*command[3:], "--enable-fp32-lm-head"])
    assert made.enable_fp32_lm_head
    assert (made.speculative_algorithm, made.speculative_num_draft_tokens, made.speculative_ngram_max_bfs_breadth) == ("NGRAM", 4, 1)
    assert server.drafting(0) == []


def test_options_are_sglangs(sglang, server):
    import argparse

    parser = argparse.ArgumentParser()
    server.add_options(parser)
    options = vars(parser.parse_args(["--state-dtype", "bfloat16", "--dp-attention"]))
    for name, states in (("pycoder-moe-nvfp4", None), ("pycoder-next-nvfp4", "bfloat16")):
        made = sglang.prepare_server_args(server.command(MODELS / name, "cutedsl", server.further_of(name, 2, **options))[3:])
        assert (made.tp_size, made.dp_size, made.enable_dp_attention, made.mamba_ssm_dtype) == (2, 2, True, states)
    plain = vars(parser.parse_args([]))
    assert server.further_of("pycoder-next-nvfp4", 1, **plain) == ["--tp-size", "1"]
    with pytest.raises(SystemExit, match="--dp-attention: found --gpus 1; allowed: 2 or more"):
        server.further_of("pycoder-next-nvfp4", 1, **options)


def test_a_row_says_who_verifies(server, tmp_path):
    from sglang_text import with_gdn_line, within

    line = "Gated-delta-net decode is served by: cutedsl_plugin (verification of drafts: this package's kernel)"
    (tmp_path / "server.log").write_text(f"[2026-01-01 00:00:00] a\n[2026-01-01 00:00:00 TP0] {line}\n")
    row = {"served_by": "cutedsl (sm90)", "gdn_line": server.gdn_line(tmp_path / "server.log")}
    assert with_gdn_line(row) == {"served_by": f"cutedsl (sm90); {line}"}
    run = {"provider": "cutedsl", "model": "pycoder-next-nvfp4", "drafts": 3}
    assert within(run | with_gdn_line(row))
    row["gdn_line"] = line.replace("this package's", "SGLang's")
    assert not within(run | with_gdn_line(row)) and within(run | with_gdn_line(row) | {"drafts": 0})
    assert with_gdn_line({"served_by": None, "gdn_line": None}) == {"served_by": None}


def test_sglang_loads_the_copy_of_pycoder_next(qwen3_next, loadable, tmp_path):
    """And not the model itself: once it does, the copy is not needed."""
    from safetensors.torch import load_file

    model = MODELS / "pycoder-next-nvfp4"
    copy = loadable(model, tmp_path)
    assert loadable(MODELS / "pycoder-moe-nvfp4", tmp_path) == MODELS / "pycoder-moe-nvfp4"
    built, missing = qwen3_next(copy, load_file(copy / "model.safetensors").items())
    assert all(name.endswith((".k_scale", ".v_scale")) for name in missing)
    assert built.model.layers[0].linear_attn.in_proj_qkvz.weight.dtype == torch.bfloat16
    with pytest.raises(Exception, match="(?i)shape|size"):
        qwen3_next(model, load_file(model / "model.safetensors").items())


@pytest.mark.parametrize("drafts", [False, True])
def test_a_gpu_server_compiles_what_it_will_launch(qwen3_next, arguments, loadable, tmp_path, monkeypatch, drafts):
    """The whole preparation but for the compiler: of SGLang's model and config, on what says it is an H200."""
    from safetensors.torch import load_file
    from sglang.srt.arg_groups.model_override_base import model_config_of

    from moe_backend_plugin.device import Device
    from moe_backend_plugin.engines.sglang import gdn
    from moe_backend_plugin.gdn import cuda

    copy = loadable(MODELS / "pycoder-next-nvfp4", tmp_path)
    model, _ = qwen3_next(copy, load_file(copy / "model.safetensors").items())
    compiled = []
    monkeypatch.setattr(gdn, "device", lambda: Device("cuda", "NVIDIA H200", 0, (9, 0)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda.kernels, "device_architecture", lambda index: "sm_90a")
    monkeypatch.setattr(cuda.kernels, "prepare", lambda family, variants, arch: compiled.extend(variants) or len(compiled))
    states = SimpleNamespace(temporal=torch.empty(1), intermediate_ssm=torch.empty(1) if drafts else None)
    pool = SimpleNamespace(mamba_pool=SimpleNamespace(mamba_cache=states))
    config = model_config_of(arguments(copy, disable_radix_cache=True))
    runner = SimpleNamespace(model=model, model_config=config, req_to_token_pool=pool, dtype=torch.bfloat16)
    gdn.prepare(runner, verify=True)
    assert {(v.state, v.tokens, v.heads_per_group) for v in compiled} == {("float32", "bfloat16", 2)}
    assert {v.intermediate for v in compiled} == ({False, True} if drafts else {False})
    assert all(v.write == "none" for v in compiled if v.intermediate)


@pytest.mark.parametrize("options", [{}, {"tops": 5}, {"score_prompt": True}, {"stream": True}])
def test_requests_are_sglangs(sglang, server, options):
    """The server's own check of a body, and the type that it becomes."""
    from sglang.srt.entrypoints.http_server import GenerateReqInput, generate_contract_error

    body = server.payload([1, 2, 3], 4, **options)
    assert generate_contract_error(body) is None
    made = GenerateReqInput(**body)
    made.normalize_batch_and_arguments()
    assert made.input_ids == [1, 2, 3] and made.sampling_params["max_new_tokens"] == 4 and made.return_logprob
    assert made.top_logprobs_num == options.get("tops", 0) and made.logprob_start_len == (0 if options.get("score_prompt") else -1)


def test_entries_of_logprobs_are_read_as_sglang_writes_them(sglang, server):
    """(log-probability, token, text), from the function that fills an answer."""
    from types import SimpleNamespace

    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    entries = TokenizerManager.detokenize_logprob_tokens(SimpleNamespace(tokenizer=None), [-0.5, -0.25], [7, 8], False)
    assert server.chosen({"meta_info": {"output_token_logprobs": entries}}) == ([7, 8], [-0.5, -0.25])
