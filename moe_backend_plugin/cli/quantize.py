"""``moe-backend quantize``: a bf16 checkpoint in, an NVFP4 checkpoint out, by NVIDIA ModelOpt."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_backend_plugin.cli.output import InputError, command, first_line, is_quantized, model_folder, size

INSTALL = 'pip install "moe-backend-plugin[quantize]"'
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.tiktoken")


class Algo(StrEnum):
    """What is rounded to NVFP4."""

    nvfp4 = "nvfp4"
    w4a16_nvfp4 = "w4a16_nvfp4"


class Target(StrEnum):
    """Where calibration runs."""

    cpu = "cpu"
    cuda = "cuda"


# ModelOpt's own recipes: every linear layer except lm_head, routers and the small GDN projections.
_RECIPES = {Algo.nvfp4: "NVFP4_DEFAULT_CFG", Algo.w4a16_nvfp4: "W4A16_NVFP4_CFG"}


@command
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of the unquantised model (Hugging Face format).")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    algo: Annotated[
        Algo, typer.Option(help="nvfp4: weights, and activation scales for W4A4 kernels; w4a16_nvfp4: weights only, no calibration.")
    ] = Algo.nvfp4,
    calib_file: Annotated[
        list[Path] | None, typer.Option(help="Text to calibrate with; repeatable. Default: Python's standard library.")
    ] = None,
    calib_size: Annotated[int, typer.Option(min=1, help="Windows of text to calibrate with.")] = 64,
    calib_length: Annotated[int, typer.Option(min=16, help="Tokens a window.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a forward pass.")] = 8,
    device: Annotated[Target, typer.Option(help="Where the model is loaded and calibrated.")] = Target.cpu,
) -> None:
    """Quantise a model to NVFP4 with NVIDIA ModelOpt."""
    quantize_model(model, out, algo, calib_file, calib_size, calib_length, batch_size, device)
    total = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size(total)}; next: moe-backend verify {out} --bf16 {model}")


def quantize_model(
    model: Path, out: Path, algo: Algo, calib_file: list[Path] | None, calib_size: int, calib_length: int, batch_size: int, device: Target
) -> None:
    """Write the quantised model to ``out``, which appears only when it is complete. Raises InputError, CheckpointError."""
    config = model_folder(model)
    if is_quantized(model, config):
        raise InputError("MODEL", f"{str(model)!r}, which is already quantised", "a bf16, fp16 or fp32 model")
    if out.exists():
        raise InputError("OUT", f"{str(out)!r}, which exists", "a folder that does not exist yet")
    for path in calib_file or ():
        if not path.is_file():
            raise InputError("--calib-file", f"{str(path)!r}, which is not a file", "a text file")
    for package, module in (("nvidia-modelopt", "modelopt"), ("transformers", "transformers"), ("accelerate", "accelerate")):
        if importlib.util.find_spec(module) is None:
            raise InputError("quantize", f"no package {package}", INSTALL)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise InputError("OUT", f"{str(partial)!r}, left by an interrupted run", "removing that folder first")
    try:
        _export(model, partial, algo, calib_file, calib_size, calib_length, batch_size, device)
        _copy_tokenizer(model, partial)
        _check(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _export(
    model: Path, out: Path, algo: Algo, calib_file: list[Path] | None, calib_size: int, calib_length: int, batch_size: int, device: Target
) -> None:
    import torch

    with warnings.catch_warnings():
        # ModelOpt 0.47 warns about every transformers from 5.15 on; the Qwen3 MoE and Qwen3-Next exports are tested with 5.19.
        warnings.filterwarnings("ignore", message=r"transformers .* is not tested with current version of modelopt")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hf_logging

    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows

    hf_logging.disable_progress_bar()
    if device is Target.cuda and not torch.cuda.is_available():
        raise InputError("--device", "cuda, but torch sees no CUDA device", "cpu")
    tokenizer = load_tokenizer(model)
    try:
        network = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto" if device is Target.cuda else "cpu").eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            "MODEL", f"{str(model)!r}, which transformers cannot load ({first_line(error)})", "a causal language model"
        ) from None
    forward = None
    if algo is Algo.nvfp4:
        text, per_file = (calib_file, None) if calib_file else (standard_library("calibration"), 2)
        tokens = torch.tensor(windows(tokenizer, text, calib_length, calib_size, per_file), device=network.device)
        forward = _calibration(tokens, batch_size)
    network = mtq.quantize(network, getattr(mtq, _RECIPES[algo]), forward)
    with torch.inference_mode():
        export_hf_checkpoint(network, export_dir=out)


def _calibration(tokens, batch_size: int):
    """The forward loop ModelOpt calls to see the activations."""
    import torch
    from rich.progress import track

    def forward(network) -> None:
        with torch.inference_mode():
            for batch in track(tokens.split(batch_size), description="calibrating"):
                network(batch, use_cache=False)

    return forward


def _copy_tokenizer(model: Path, out: Path) -> None:
    """The tokenizer as it was, byte for byte: saving it again writes what this transformers version thinks of it."""
    for pattern in TOKENIZER_FILES:
        for path in model.glob(pattern):
            shutil.copyfile(path, out / path.name)
    # The writer of safetensors leaves files only their owner may read; a server often runs as another user.
    mask = os.umask(0)
    os.umask(mask)
    for path in out.iterdir():
        path.chmod(stat.S_IMODE(0o666 & ~mask))


def _check(out: Path) -> Any:
    from moe_backend_plugin.nvfp4.checkpoint import check_checkpoint

    return check_checkpoint(str(out), depth="full")
