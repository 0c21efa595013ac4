"""The comparison, and the dequantised copy of a checkpoint that it is made with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_backend_plugin import verify
from moe_backend_plugin.errors import CheckpointError
from moe_backend_plugin.nvfp4.format import dequantize
from moe_backend_plugin.verify import Bounds, EngineError, Scores, compare, dequantize_checkpoint, score_transformers, score_vllm

MOE = Path(__file__).parents[2] / "integration" / "models" / "pycoder-moe-nvfp4"


def test_compare():
    reference = Scores([-1.0, -2.0, -3.0, -2.0], [1, 2, 3, 4])
    same = compare(reference, reference)
    assert same.tokens == 4 and same.engine_perplexity == pytest.approx(math.exp(2)) and same.within(Bounds())
    found = compare(Scores([-1.1, -1.9, -3.0, -2.4], [1, 2, 3, 5]), reference)
    assert found.relative_perplexity == pytest.approx(math.exp(0.1) - 1)
    assert found.mean_logprob_difference == pytest.approx(0.15) and found.top1_agreement == 0.75


@pytest.mark.parametrize("change", [{"perplexity": 0.1}, {"logprob": 0.1}, {"top1": 0.8}])
def test_each_bound_counts(change):
    found = compare(Scores([-1.1, -1.9, -3.0, -2.4], [1, 2, 3, 5]), Scores([-1.0, -2.0, -3.0, -2.0], [1, 2, 3, 4]))
    loose = {"perplexity": 1.0, "logprob": 1.0, "top1": 0.0}
    assert found.within(Bounds(**loose)) and not found.within(Bounds(**loose | change))


def test_garbage_is_never_within():
    reference = Scores([-1.0, -1.0], [1, 2])
    assert not compare(Scores([math.nan, -1.0], [1, 2]), reference).within(Bounds())
    assert not compare(Scores([-math.inf, -1.0], [1, 2]), reference).within(Bounds())
    with pytest.raises(EngineError, match="1 tokens; allowed: 2 tokens"):
        compare(Scores([-1.0], [1]), reference)


def test_dequantize_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "SHARD_BYTES", 4 << 20)  # several shards
    out = dequantize_checkpoint(MOE, tmp_path / "model", "float32")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert not (out / "hf_quant_config.json").exists() and (out / "tokenizer.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    packed = load_file(MOE / "model.safetensors")
    assert set(index) == {name for name in packed if not name.endswith(("_scale", "_scale_2"))}
    assert len(set(index.values())) > 2
    for name in ("model.layers.1.mlp.experts.3.down_proj", "model.layers.0.self_attn.q_proj"):
        with safe_open(out / index[f"{name}.weight"], "pt") as file:
            found = file.get_tensor(f"{name}.weight")
        tensors = (packed[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
        assert torch.equal(found, dequantize(*tensors, torch.float32))


def test_dequantize_checkpoint_of_compressed_tensors(tmp_path):
    """Its global scale is stored as the reciprocal."""
    model = tmp_path / "model"
    model.mkdir()
    packed = load_file(MOE / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{name}.weight_packed": packed[f"{name}.weight"],
            f"{name}.weight_scale": packed[f"{name}.weight_scale"],
            f"{name}.weight_global_scale": (1 / packed[f"{name}.weight_scale_2"]).reshape(1),
            f"{name}.input_global_scale": torch.ones(1),
        },
        model / "model.safetensors",
    )
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    description = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (model / "config.json").write_text(json.dumps({"quantization_config": description}))
    out = dequantize_checkpoint(model, tmp_path / "out", "float32")
    (found,) = load_file(out / "model-00001.safetensors").items()
    expected = dequantize(*(packed[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2")), torch.float32)
    assert found[0] == f"{name}.weight"
    torch.testing.assert_close(found[1], expected, rtol=1e-6, atol=0)


def test_dequantize_checkpoint_refuses_other_formats(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}, model / "model.safetensors")
    (model / "config.json").write_text((MOE / "config.json").read_text())
    with pytest.raises(CheckpointError, match="a.weight_scale: .*not NVFP4"):
        dequantize_checkpoint(model, tmp_path / "out")


def test_score_transformers(tmp_path):
    pytest.importorskip("transformers")
    model = dequantize_checkpoint(MOE, tmp_path / "model", "float32")
    windows = [[0, *range(100, 115)], [0, *range(200, 215)], [0, *range(300, 315)]]
    done = []
    scores = score_transformers(model, windows, batch_size=2, progress=done.append)
    assert done == [2, 1] and len(scores.logprobs) == len(scores.top1) == 3 * 15
    assert all(-40 < value < 0 for value in scores.logprobs)
    # A batch changes nothing but the order of sums.
    alone = score_transformers(model, windows[1:2])
    assert alone.logprobs == pytest.approx(scores.logprobs[15:30], abs=1e-4)


def test_the_engine_s_own_error_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(verify.sys, "executable", _fake_engine(tmp_path))
    with pytest.raises(EngineError) as caught:
        score_vllm(tmp_path, [[1, 2]], "nvfp4_cutedsl")
    assert "exit code 3" in str(caught.value) and "ValueError: no kernel for this layer" in str(caught.value)


def _fake_engine(folder: Path) -> str:
    """A program that fails as vLLM does: the cause first, then the reports of the processes above it."""
    script = folder / "engine"
    script.write_text(
        "#!/bin/sh\n"
        "echo '(EngineCore pid=12) ERROR 01-02 03:04:05 [core.py:1] Traceback (most recent call last):'\n"
        "echo '(EngineCore pid=12) ERROR 01-02 03:04:05 [core.py:1] ValueError: no kernel for this layer'\n"
        "echo 'RuntimeError: Engine core initialization failed. See root cause above.'\n"
        "exit 3\n"
    )
    script.chmod(0o755)
    return str(script)


# --- verify --kernels -------------------------------------------------------------------------------------------------


def invoke(*arguments: str):
    from typer.testing import CliRunner

    from moe_backend_plugin.cli.main import app

    return CliRunner().invoke(app, ["verify", *arguments])


def test_the_kernels_of_a_machine_without_a_gpu(monkeypatch):
    from moe_backend_plugin.moe import kernel_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernel_check, "ACTIVATIONS", kernel_check.ACTIVATIONS[:1])
    done = invoke("--kernels", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["passed"] is True and found["kernels"] == ["gdn_decode", "nvfp4_linear", "nvfp4_moe"]
    said = invoke("--kernels").stdout
    assert f"all {len(found['rows'])} calls agree with the reference" in said
    for whose, capability in (("Hopper", "9.0"), ("Blackwell (FlashInfer's)", "10.0 or 10.3")):
        assert f"the {whose} kernels of the experts were not run: this machine has no GPU of compute capability {capability}" in said


def test_a_wrong_kernel_ends_the_command_with_1(monkeypatch):
    from moe_backend_plugin import self_check
    from moe_backend_plugin.moe import kernel_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad = kernel_check.Row("nvfp4_moe", "a layer", "float32", 7, "not finite: 1 of 9 values", math.nan, math.nan)
    monkeypatch.setattr(self_check, "rows", lambda device: [bad, bad._replace(tokens=1, reason=None, max_abs=0.1, relative=0.1)])
    done = invoke("--kernels")
    assert done.exit_code == 1 and "not finite: 1 of 9 values (at 7 tokens)" in done.stdout and "problem: 1 of 2 calls" in done.stdout


def test_a_lost_gpu_is_told_from_a_wrong_kernel(monkeypatch):
    from moe_backend_plugin import self_check
    from moe_backend_plugin.moe import kernel_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong = kernel_check.Row("moe_gemm", "a layer", "t8", 1, "not repeatable", 0.1, 0.1)
    lost = wrong._replace(tokens=5, reason="fails: AcceleratorError: CUDA error", device_lost=True)
    monkeypatch.setattr(self_check, "rows", lambda device: iter([wrong, lost]))
    done = invoke("--kernels")
    words = "the remaining checks were not run: the GPU is lost to moe_gemm t8 at 5 tokens, which fails: AcceleratorError: CUDA error"
    assert done.exit_code == 1 and words in done.stdout and "problem: 2 of 2 calls" in done.stdout
    assert [row["device_lost"] for row in json.loads(invoke("--kernels", "--json").stdout)["rows"]] == [False, True]


@pytest.mark.parametrize(
    ("capability", "words"), [((8, 0), "compute capability 8.0; allowed: compute capability 9.0"), ((10, 0), "FlashInfer 0.7")]
)
def test_a_gpu_whose_kernels_are_not_here_is_bad_input(monkeypatch, capability, words):
    from moe_backend_plugin.moe import blackwell

    monkeypatch.setattr(blackwell, "missing", lambda: "no package flashinfer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    done = invoke("--kernels")
    assert done.exit_code == 2 and words in done.stderr


def test_a_model_or_the_kernels():
    assert "allowed: one of them" in invoke(str(MOE), "--kernels").stderr
    assert "--tokens: found '5' beside --kernels; allowed: one of them" in invoke("--kernels", "--tokens", "5").stderr
    nothing = invoke()
    assert nothing.exit_code == 2 and "--kernels" in nothing.stderr
