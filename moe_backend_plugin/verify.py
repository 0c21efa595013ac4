"""Does a served NVFP4 checkpoint compute what its numbers say?

The engine's log-probabilities of a text are compared with those of transformers running the same checkpoint with every NVFP4 matrix
written out. Both see the same token ids, so that kernels, weight layouts and routing are all that can differ.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_backend_plugin.errors import CheckpointError, PluginError

SHARD_BYTES = 4 << 30
_QUANT_FILES = ("hf_quant_config.json", "model.safetensors.index.json")


class EngineError(PluginError):
    """The engine stopped while it scored the text."""


@dataclass(frozen=True)
class Scores:
    """One model on one text: for each scored token its log-probability, and the token the model thought likeliest."""

    logprobs: Sequence[float]
    top1: Sequence[int]

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; infinite when the model is far off."""
        mean = -sum(self.logprobs) / len(self.logprobs)
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Bounds:
    """How far the engine may be from the reference."""

    perplexity: float = 0.005  # relative difference
    logprob: float = 0.02  # mean absolute difference
    top1: float = 0.98  # share of positions where both prefer the same token


@dataclass(frozen=True)
class Comparison:
    """Engine against reference; NaN anywhere makes ``within`` false."""

    tokens: int
    engine_perplexity: float
    reference_perplexity: float
    relative_perplexity: float
    mean_logprob_difference: float
    top1_agreement: float

    def within(self, bounds: Bounds) -> bool:
        """Whether every figure is inside its bound."""
        return (
            abs(self.relative_perplexity) <= bounds.perplexity
            and self.mean_logprob_difference <= bounds.logprob
            and self.top1_agreement >= bounds.top1
        )


def compare(engine: Scores, reference: Scores) -> Comparison:
    """The figures :class:`Bounds` limits. Both scores must be of the same windows."""
    count = len(reference.logprobs)
    if len(engine.logprobs) != count or not count:
        raise EngineError("the engine's scores", f"{len(engine.logprobs)} tokens", f"{count} tokens, as the reference scored")
    difference = sum(abs(a - b) for a, b in zip(engine.logprobs, reference.logprobs, strict=True)) / count
    agreement = sum(a == b for a, b in zip(engine.top1, reference.top1, strict=True)) / count
    ours, theirs = engine.perplexity, reference.perplexity
    return Comparison(count, ours, theirs, ours / theirs - 1, difference, agreement)


# --- the reference -------------------------------------------------------------------------------------------------------------------


def dequantize_checkpoint(model: str | Path, out: str | Path, dtype: str = "bfloat16") -> Path:
    """Write ``model`` to the new folder ``out`` with every tensor as ``dtype`` and no quantisation description.

    The result is an ordinary Hugging Face folder; its path is returned. Raises CheckpointError.
    """
    import torch
    from safetensors.torch import save_file

    model, out = Path(model), Path(out)
    out.mkdir()
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        part.pop("quantization_config", None)
        part["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", *_QUANT_FILES):
            shutil.copyfile(path, out / path.name)

    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    held = 0

    def flush() -> None:
        nonlocal held
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()
        held = 0

    for name, tensor in _dense_tensors(model, getattr(torch, dtype)):
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
        if held >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return out


def _dense_tensors(model: Path, dtype) -> Iterator[tuple[str, Any]]:
    """Every tensor of a checkpoint by its unquantised name; scales are folded into their weights."""
    from safetensors import safe_open

    from moe_backend_plugin.nvfp4.format import dequantize
    from moe_backend_plugin.nvfp4.scheme import read_scheme

    names = read_scheme(model).names
    # A matrix and its scales may lie in different shards.
    files = {path: safe_open(path, framework="pt") for path in sorted(model.glob("*.safetensors"))}
    where = {name: file for file in files.values() for name in file.keys()}
    extra = tuple(f".{suffix}" for suffix in (names.scale, names.global_scale, names.input_scale))
    for name, file in where.items():
        module, _, last = name.rpartition(".")
        if last == names.weight and f"{module}.{names.global_scale}" in where:
            scale, global_scale = (where[f"{module}.{s}"].get_tensor(f"{module}.{s}") for s in (names.scale, names.global_scale))
            scale_2 = 1.0 / global_scale if names.reciprocal else global_scale
            yield f"{module}.weight", dequantize(file.get_tensor(name), scale, scale_2, dtype)
        elif name.endswith(extra) and f"{module}.{names.global_scale}" in where:
            continue
        elif name.endswith(f".{names.scale}"):
            raise CheckpointError(name, "a scale of a format that is not NVFP4", "NVFP4 and unquantised tensors")
        else:
            tensor = file.get_tensor(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def score_transformers(
    model: Path,
    windows: Sequence[Sequence[int]],
    dtype: str = "float32",
    device: str = "cpu",
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score windows of token ids with transformers; the first token of a window only gives context."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map="auto" if device == "cuda" else "cpu").eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(str(model), f"a model that transformers cannot load ({error})", "a causal language model") from None
    logprobs: list[float] = []
    top1: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            tokens = torch.tensor(windows[start : start + batch_size], device=network.device)
            logits = network(tokens, use_cache=False).logits[:, :-1].float()
            scored = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None].to(logits.device))
            logprobs += scored.flatten().tolist()
            top1 += logits.argmax(-1).flatten().tolist()
            progress(len(tokens))
    if device == "cuda":
        # The engine's process asks for most of the GPU, of which torch would keep what the model took.
        del network, logits, scored
        gc.collect()
        torch.cuda.empty_cache()
    return Scores(logprobs, top1)


# --- the engine ----------------------------------------------------------------------------------------------------------------------


def score_vllm(
    model: Path,
    windows: Sequence[Sequence[int]],
    quantization: str | None,
    dtype: str = "bfloat16",
    additional_config: dict[str, Any] | None = None,
) -> Scores:
    """Score the same windows with vLLM, in a process of its own so that its memory is free again afterwards. Raises EngineError."""
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="moe-backend-verify-") as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.json", "log.txt"))
        arguments = {"model": str(model), "quantization": quantization, "dtype": dtype, "additional_config": additional_config or {}}
        job.write_text(json.dumps({"windows": windows, "arguments": arguments}))
        with log.open("w") as output:
            command = [sys.executable, "-m", "moe_backend_plugin.verify", str(job), str(result)]
            code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
        # With the result there, nothing is left to do: vLLM's threads may abort the interpreter's own end ("terminate called ...").
        if not result.exists():
            raise EngineError("vLLM", f"exit code {code}: {_cause(log.read_text(errors='replace'))}", "a model that vLLM serves")
        found = json.loads(result.read_text())
    return Scores(found["logprobs"], found["top1"])


def _cause(log: str) -> str:
    """The line that says what went wrong: the first exception of the log, since later ones only report that a process ended."""
    prefix = re.compile(r"^(\(\w+ pid=\d+\)\s*)?((ERROR|WARNING) [\d:. -]+\[[^]]*\])?\s*")
    lines = [prefix.sub("", line).strip() for line in log.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    return errors[0] if errors else next((line for line in reversed(lines) if line), "no output")


def _engine_process(job_path: str, result_path: str) -> None:
    """What the child process of :func:`score_vllm` runs."""
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_path).read_text())
    windows = job["windows"]
    engine = LLM(
        **job["arguments"],
        max_model_len=max(map(len, windows)) + 1,  # vLLM always generates one token
        enforce_eager=True,
        seed=0,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    outputs = engine.generate([{"prompt_token_ids": window} for window in windows], sampling, use_tqdm=False)
    logprobs: list[float] = []
    top1: list[int] = []
    for window, output in zip(windows, outputs, strict=True):
        for token, candidates in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(candidates[token].logprob)
            top1.append(min(candidates, key=lambda candidate: candidates[candidate].rank))
    unfinished = Path(f"{result_path}.unfinished")
    unfinished.write_text(json.dumps({"logprobs": logprobs, "top1": top1}))
    unfinished.replace(result_path)


if __name__ == "__main__":
    _engine_process(*sys.argv[1:])
