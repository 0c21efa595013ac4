"""A whole SGLang server on a CPU, asked over HTTP by the client of integration/gpu: its experts are served by this package's runner.

SGLang has neither NVFP4 kernels nor a CPU build here. Two things make it serve all the same: the model's attention is bf16, and a name that
its rotary embedding imports from vLLM where there is no GPU, and never calls, exists.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from .conftest import MODELS
from .test_gpu_scripts import GPU

NAME = "pycoder-moe-nvfp4"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 24, 96, 16
IMPORTED = "import sys, types\nops = types.ModuleType('vllm._custom_ops')\nops.rotary_embedding = None\nsys.modules[ops.__name__] = ops\n"

pytestmark = pytest.mark.timeout(1800)


def with_bf16_attention(source: Path, target: Path) -> Path:
    """A copy of a ModelOpt checkpoint whose attention is not quantised."""
    import torch
    from safetensors.torch import load_file, save_file

    from moe_backend_plugin.nvfp4.unscaled import unscaled

    shutil.copytree(source, target)
    found, kept = load_file(source / "model.safetensors"), {}
    for name, tensor in found.items():
        module, _, kind = name.rpartition(".")
        if ".self_attn." in name and f"{module}.weight_scale" in found:
            if kind == "weight":
                weight = unscaled(tensor, found[f"{module}.weight_scale"]) * found[f"{module}.weight_scale_2"]
                kept[name] = weight.to(torch.bfloat16).contiguous()
        else:
            kept[name] = tensor
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["ignore"] += [f"model.layers.{layer}.self_attn*" for layer in range(config["num_hidden_layers"])]
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def server(sglang, tmp_path_factory):
    """(the client's module, the model, the log) of a running server."""
    folder = tmp_path_factory.mktemp("server")
    model = with_bf16_attention(MODELS / NAME, folder / NAME)
    (folder / "sitecustomize.py").write_text(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(GPU)
        import sglang_server

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            patch.setattr(sglang_server, "PORT", free.getsockname()[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        backends = ("--attention-backend", "torch_native", "--sampling-backend", "pytorch")
        limits = ("--max-total-tokens", "8192", "--disable-overlap-schedule", "--skip-server-warmup")
        log = folder / "server.log"
        process = sglang_server.start(model, "cutedsl", log, "--device", "cpu", *backends, *limits)
        yield sglang_server, model, log
        sys.modules["mixed_load"].stop(process)


@pytest.fixture(scope="module")
def prompts(server):
    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    return windows(load_tokenizer(server[1]), standard_library("verification"), PROMPT_TOKENS, PROMPTS, per_file=1)


def ask(server, prompts, **options) -> list[dict]:
    async def all_at_once():
        async with server[0].client() as client:
            return await asyncio.gather(*(client.generate(prompt, NEW_TOKENS, **options) for prompt in prompts))

    return asyncio.run(all_at_once())


def test_answers_are_transformers(server, prompts, tmp_path):
    """Prompts and greedy continuations have the log-probabilities that transformers gives them on the dequantised weights."""
    from moe_backend_plugin.verify import dequantize_checkpoint, score_transformers

    scripts, model, log = server
    answers = ask(server, prompts, score_prompt=True)
    assert scripts.missing(log, NAME, "cutedsl") == []
    whole = [prompt + scripts.chosen(answer)[0] for prompt, answer in zip(prompts, answers, strict=True)]
    ours = [score for answer in answers for score in (*scripts.prompt_scores(answer), *scripts.chosen(answer)[1])]
    theirs = score_transformers(dequantize_checkpoint(model, tmp_path / "reference"), whole, device="cpu", batch_size=8).logprobs
    assert len(ours) == len(theirs) == PROMPTS * (PROMPT_TOKENS + NEW_TOKENS - 1)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    print("perplexity", sum(differences) / len(differences), "log-probabilities", sum(map(abs, differences)) / len(differences))
    assert abs(sum(differences) / len(differences)) < 0.005
    assert sum(map(abs, differences)) / len(differences) < 0.02


def test_the_radix_cache_is_hit_and_changes_nothing(server, prompts):
    scripts = server[0]
    first, second = (ask(server, prompts[:4], tops=2) for _ in range(2))
    assert all(answer["meta_info"]["cached_tokens"] >= PROMPT_TOKENS - 1 for answer in second)
    assert [scripts.chosen(answer)[0] for answer in first] == [scripts.chosen(answer)[0] for answer in second]
    for answer in second:
        tokens, logprobs = scripts.chosen(answer)
        assert [max(tops.values()) for tops in scripts.alternatives(answer)] == pytest.approx(logprobs)
        assert [tops[token] for token, tops in zip(tokens, scripts.alternatives(answer), strict=True)] == pytest.approx(logprobs)


def test_a_client_that_leaves_does_no_harm(server, prompts):
    async def leave():
        async with server[0].client() as client:
            await asyncio.gather(*(client.give_up(prompt, 400, after=2) for prompt in prompts[:4]))

    asyncio.run(leave())
    (answer,) = ask(server, prompts[:1])
    assert len(server[0].chosen(answer)[0]) == NEW_TOKENS


def test_weights_are_replaced_in_place(server, prompts, tmp_path):
    """By the functions of sglang_reload.py: other experts say something else, the model's own again what they said."""
    from sglang_reload import reload, texts_of, with_other_experts

    model = server[1]
    first = texts_of(prompts[:2], NEW_TOKENS)
    reload(with_other_experts(model, tmp_path / "other"))
    assert all(a != b for a, b in zip(first, texts_of(prompts[:2], NEW_TOKENS), strict=True))
    reload(model)
    assert texts_of(prompts[:2], NEW_TOKENS) == first
