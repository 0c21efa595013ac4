"""``moe-backend quantize`` on a tiny random model; ModelOpt alone takes long to import."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_backend_plugin.cli.main import app
from moe_backend_plugin.nvfp4.checkpoint import check_checkpoint

MOE = Path(__file__).parents[2] / "integration" / "models" / "pycoder-moe-nvfp4"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """One layer of four experts, with the tokenizer of the shipped model."""
    for package in ("modelopt", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, bos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "model"
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MOE / name, folder)
    return folder


def quantize(*arguments: object):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.mark.engine
@pytest.mark.parametrize("algo", ["nvfp4", "w4a16_nvfp4"])
def test_quantize(tiny, tmp_path, algo):
    out = tmp_path / "out"
    result = quantize(tiny, out, "--algo", algo, "--calib-size", "4", "--calib-length", "64")
    assert result.exit_code == 0, result.output + repr(result.exception)
    report = check_checkpoint(out)
    assert report.scheme.algo == algo.upper()
    assert sum(module.expert for module in report.modules) == 4 * 3
    assert sum(module.kind == "nvfp4" for module in report.modules) == 4 * 3 + 4
    assert (out / "tokenizer_config.json").read_bytes() == (tiny / "tokenizer_config.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    assert (out / "model.safetensors").stat().st_mode & 0o077 == (out / "config.json").stat().st_mode & 0o077
    assert not (tmp_path / "out.partial").exists()
    assert quantize(out, tmp_path / "again").exit_code == 2


@pytest.mark.engine
def test_a_text_that_is_too_short(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x = 1\n")
    result = quantize(tiny, tmp_path / "out", "--calib-file", text)
    assert result.exit_code == 2 and "fewer than 512 tokens" in result.stderr
    assert list(tmp_path.iterdir()) == [text]
