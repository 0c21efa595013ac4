"""``moe-backend bench``: the kernels' speed on this machine's GPU beside the engines' own."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_backend_plugin.cli.output import EXIT_WRONG, InputError, check_files, check_gpu, command, print_table
from moe_backend_plugin.gdn.support import HEADS_PER_GROUP

app = typer.Typer(help="Time the kernels on this machine's GPU.", no_args_is_help=True, rich_markup_mode=None)

INSTALL = 'pip install "moe-backend-plugin[bench]"'
HEADS = tuple(16 * ratio for ratio in HEADS_PER_GROUP)
"""Value heads on 16 key heads."""


@app.command()
@command
def gdn(
    batch: Annotated[str | None, typer.Option(help="Rows, e.g. 1,64. Default: powers of two from 1 to 512.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens a row, 1 to 8. Default: all.")] = None,
    heads: Annotated[str | None, typer.Option(help="Value heads on 16 key heads. Default: 16,32,64.")] = None,
    state: Annotated[str | None, typer.Option(help="Types of the state: float32, bfloat16. Default: both.")] = None,
    providers: Annotated[str | None, typer.Option(help="Whose kernels, e.g. plugin,triton. Default: all that are installed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: B=1,64, T=1,4, HV=32.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Time to take; what is least important is dropped. Default: 420.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file. Default: gdn_<device>.json in integration/bench/results or here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf). Default: beside the JSON file.")] = None,
) -> None:
    """Time gated-delta-net decode; writes a JSON file and a plot, prints the figures of the targets."""
    from moe_backend_plugin.bench import gdn as bench
    from moe_backend_plugin.bench import report
    from moe_backend_plugin.bench.stamp import results_folder, slug
    from moe_backend_plugin.kernels.compile import ARCHITECTURES

    options = bench.Options(
        batch=_numbers("--batch", batch, range(1, 4097)),
        tokens=_numbers("--tokens", tokens, range(1, 9)),
        heads=_numbers("--heads", heads, HEADS),
        state=_names("--state", state, list(bench.STATES)),
        providers=_names("--providers", providers, list(bench.PROVIDERS)),
        quick=quick,
        seconds=bench.SECONDS if seconds is None else seconds,
    )
    if not options.seconds > 0:
        raise InputError("--seconds", str(options.seconds), "more than 0")
    check_files(out, "--plot", plot)
    if not bench.plan(options):
        raise InputError("bench gdn", "no case that the chosen providers serve", "another choice of --tokens, --state or --providers")
    device, stamp = _device("bench gdn", ARCHITECTURES)
    out = out or results_folder() / f"gdn_{slug(stamp['device'])}.json"
    result = _run(bench.run(options, device, say=_say), stamp, out)
    _print(result, report.summary(result))
    print(f"{out}: {len(result['rows'])} rows in {result['seconds']} s, {len(result['dropped'])} cells dropped")
    _plot(report.plot, result, out, plot)
    if any(entry.get("failed") and entry["provider"].startswith("plugin") for entry in result["skipped"]):
        raise typer.Exit(EXIT_WRONG)


@app.command()
@command
def moe(
    models: Annotated[str | None, typer.Option(help="Shapes, e.g. qwen3-30b-a3b,deepseek-v3-ep8. Default: all.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens a call, e.g. 1,32,4096. Default: powers of two from 1 to 16384.")] = None,
    routings: Annotated[str | None, typer.Option(help="balanced, zipf, one-expert. Default: all.")] = None,
    providers: Annotated[str | None, typer.Option(help="plugin, marlin, humming, triton_bf16. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: one model, 1, 32 and 1024 tokens, balanced.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Time to take; what is least important is dropped. Default: 240.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the file's rows of other models, measured with the same software.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file. Default: moe_<device>.json in integration/bench/results or here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf). Default: beside the JSON file.")] = None,
) -> None:
    """Time NVFP4 expert layers beside vLLM's own; writes a JSON file and a plot, prints the figures of the targets."""
    from moe_backend_plugin.bench import moe as bench
    from moe_backend_plugin.bench import moe_report
    from moe_backend_plugin.bench.stamp import results_folder, slug
    from moe_backend_plugin.config import load_config
    from moe_backend_plugin.moe import cuda

    options = bench.Options(
        models=_names("--models", models, list(bench.MODELS)),
        tokens=_numbers("--tokens", tokens, range(1, bench.TOKENS[-1] + 1)),
        routings=_names("--routings", routings, list(bench.ROUTINGS)),
        providers=_names("--providers", providers, list(bench.PROVIDERS)),
        quick=quick,
        seconds=bench.SECONDS if seconds is None else seconds,
    )
    if not options.seconds > 0:
        raise InputError("--seconds", str(options.seconds), "more than 0")
    check_files(out, "--plot", plot)
    device, stamp = _device("bench moe", cuda.ARCHITECTURES, bench.KERNELS)
    stamp["tactics"] = load_config().moe.tactics
    out = out or results_folder() / f"moe_{slug(stamp['device'])}.json"
    others = _kept(out, stamp) if keep else None
    found = bench.run(options, device, say=_say)
    if others:
        found = (moe_report.with_others({"stamp": stamp, **part}, others) for part in found)
    result = _run(found, stamp, out)
    summary, ceilings = moe_report.summary(result), result["ceilings"]
    title = f"NVFP4 MoE layer, copy {ceilings['copy_TB_s']} TB/s, bf16 product {ceilings['matmul_TFLOP_s']} TFLOP/s; geometric mean (range)"
    if result["rows"]:
        columns = ("tokens", "figure", *summary[0][2])
        print_table(title, columns, [(where, figure, *values.values()) for where, figure, values in summary])
    if result["errors"]:
        print_table("errors", ("where", "what"), [(_where(entry, "error"), entry["error"]) for entry in result["errors"]])
    if result["dropped"]:
        print_table("dropped", ("cell", "why"), [(_where(entry, "why"), entry["why"]) for entry in result["dropped"]])
    print(f"{out}: {len(result['rows'])} rows in {result['seconds']} s")
    _plot(moe_report.plot, result, out, plot)
    if any(entry["provider"] == "plugin" for entry in result["errors"]):
        raise typer.Exit(EXIT_WRONG)


@app.command()
@command
def serve(
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    model: Annotated[
        str, typer.Option(help="Shape: qwen3-30b-a3b, or qwen3-next, where gated-delta-net decode is served too.")
    ] = "qwen3-30b-a3b",
    providers: Annotated[
        str | None,
        typer.Option(
            help="plugin, marlin, humming; in vLLM plugin_linear (dense layers too); of qwen3-next plugin, marlin, in SGLang "
            "plugin_triton_gdn and plugin_cutedsl_gdn too (the engine's own decode). Default: all."
        ),
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences at a time, e.g. 1,32. Default: 1,8,32,128,256.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=48, help="Layers, for a quick look; of qwen3-next a multiple of 4. Default: 48.")
    ] = None,
    attention_backend: Annotated[str | None, typer.Option(help="SGLang's, for every provider, e.g. triton.")] = None,
    sampling_backend: Annotated[str | None, typer.Option(help="SGLang's, for every provider, e.g. pytorch.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="vLLM with torch.compile and piecewise graphs, its default, which takes a minute more each.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file. Default: serve_<engine>_<device>.json, of qwen3-next serve_<engine>_qwen3-next_<device>.json, "
            "with --compile serve_<engine>_compile_<device>.json, in integration/bench/results or here."
        ),
    ] = None,
) -> None:
    """Tokens a second of an NVFP4 model with random weights in the shape of Qwen3-30B-A3B or Qwen3-Next, with this package's kernels and
    with the engine's."""
    from moe_backend_plugin.bench import serve as bench
    from moe_backend_plugin.bench.stamp import as_run, gpu_stamp, results_folder, slug
    from moe_backend_plugin.device import find_device

    if engine not in bench.ENGINES:
        raise InputError("--engine", repr(engine), ", ".join(bench.ENGINES))
    if model not in bench.MODELS:
        raise InputError("--model", repr(model), ", ".join(bench.MODELS))
    shape = bench.MODELS[model]
    if layers and layers % shape.period:
        raise InputError("--layers", str(layers), f"a multiple of {shape.period} with --model {model}")
    backends = {"attention_backend": attention_backend, "sampling_backend": sampling_backend}
    settings = {name: value for name, value in backends.items() if value is not None}
    if settings and engine != "sglang":
        option = f"--{next(iter(settings)).replace('_', '-')}"
        raise InputError(option, f"--engine {engine}", "--engine sglang")
    if compiled and engine != "vllm":
        raise InputError("--compile", f"--engine {engine}", "--engine vllm")
    batches = _numbers("--batch", batch, range(1, 1025))
    options = bench.Options(
        engine=engine,
        model=model,
        providers=_names("--providers", providers, list(bench.child_of(engine).PROVIDERS[model])),
        batches=batches,
        layers=layers or bench.LAYERS,
        settings=settings | ({"compilation_config": {"cudagraph_capture_sizes": [*(batches or bench.BATCHES)]}} if compiled else {}),
    )
    check_files(out, "--plot", None)
    device = find_device()  # the engines' processes need the memory, so this one leaves CUDA alone
    if device.kind != "cuda":
        raise InputError("bench serve", "no CUDA device", "a machine with an NVIDIA GPU")
    if importlib.util.find_spec(engine) is None:
        raise InputError("bench serve", f"no package {engine}", f'pip install "moe-backend-plugin[{engine}]"')
    stamp = gpu_stamp(device.name, as_run("moe-backend"), shape.kernels)
    # Of the default model, the file is named as it was before there was another.
    parts = ["serve", engine, *[model] * (model != bench.MODEL), *["compile"] * compiled, slug(device.name)]
    out = out or results_folder() / f"{'_'.join(parts)}.json"
    result = _run(bench.run(options, say=_say), stamp, out)
    if result["rows"]:
        columns = ("provider", "batch", "output tokens/s", "first token, ms", "prompt tokens/s")
        keys = ("provider", "batch", "output_tok_s", "first_token_ms", "prefill_tok_s")
        title = f"{shape.title} shape in {'vLLM' if engine == 'vllm' else 'SGLang'}"
        print_table(title, columns, [[row.get(key) for key in keys] for row in result["rows"]])
    print(f"{out}: {len(result['rows'])} rows")
    if result["errors"]:
        raise typer.Exit(EXIT_WRONG)


def _say(line: str) -> None:
    print(line, flush=True)


def _kept(file: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """The result in ``file``. Raises InputError if there is none, or of other kernels, packages, driver or device than ``stamp``'s."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        there = found["stamp"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError("--keep", f"{file}, which cannot be read ({error})", "a file that bench moe wrote") from None
    for name in ("kernel_hash", "device", "driver", "packages"):
        if there.get(name) != stamp[name]:
            raise InputError("--keep", f"{file} with {name} {there.get(name)}", f"a file of {name} {stamp[name]}")
    return found


def _run(found: Iterable[dict[str, Any]], stamp: dict[str, Any], out: Path) -> dict[str, Any]:
    """The last of the growing results, with its stamp; each is written as it comes."""
    from moe_backend_plugin.bench import report

    unfinished = out.with_name(out.name + ".unfinished")
    result: dict[str, Any] = {}
    for part in found:
        result = {"stamp": stamp, **part}
        report.write(result, unfinished)  # what a machine that is taken away leaves behind
    unfinished.replace(out)
    return result


def _plot(draw: Callable[[dict[str, Any], Path], None], result: dict[str, Any], out: Path, plot: Path | None) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot", "no package matplotlib (the JSON file is written)", INSTALL)
    plot = plot or out.with_suffix(".png")
    draw(result, plot)
    print(plot)


def _where(entry: dict[str, Any], but: str) -> str:
    return " ".join(f"{key} {value}" for key, value in entry.items() if key != but)


def _device(name: str, architectures: Sequence[str], kernels: str | Sequence[str] = "gdn_decode"):
    """The GPU to time and the stamp of its results; folder and tactics are the settings' from here on.

    Raises InputError where kernels of ``architectures`` cannot run.
    """
    import torch

    from moe_backend_plugin.bench.stamp import as_run, gpu_stamp

    check_gpu(name, "a machine with an NVIDIA GPU and torch built for CUDA")
    from moe_backend_plugin.config import load_config
    from moe_backend_plugin.engines import experts
    from moe_backend_plugin.kernels.compile import architecture_of, capabilities, shown

    experts.use(load_config())
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if architecture_of(capability) not in architectures:
        found = f"{torch.cuda.get_device_name(device)}, compute capability {shown(capability)}"
        raise InputError(name, found, f"compute capability {capabilities(architectures)}")
    return device, gpu_stamp(torch.cuda.get_device_name(device), as_run("moe-backend"), kernels)


def _names(option: str, text: str | None, allowed: list[str]) -> tuple[str, ...] | None:
    """The comma-separated names of an option, each once. Raises InputError."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise InputError(option, repr(name), f"{', '.join(allowed)}; several separated by commas")
    return tuple(dict.fromkeys(names))


def _numbers(option: str, text: str | None, allowed: Sequence[int]) -> tuple[int, ...] | None:
    """The comma-separated numbers of an option, ascending. Raises InputError."""
    if text is None:
        return None
    described = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
    for name in text.split(","):
        if not name.strip().isdecimal() or int(name) not in allowed:
            raise InputError(option, repr(name), f"{described}; several separated by commas")
    return tuple(sorted({int(name) for name in text.split(",")}))


def _print(result: dict[str, Any], summary) -> None:
    ceilings = result["ceilings"]
    title = f"GDN decode, copy {ceilings['copy_TB_s']} TB/s, empty kernel {ceilings['empty_us']} us; geometric mean (range)"
    print_table(title, ("cases", "figure", *summary[0][2]), [(target, figure, *values.values()) for target, figure, values in summary])
    if result["missing"]:
        print_table("not timed", ("provider", "why"), result["missing"].items())
    reasons = {(entry["provider"], entry["reason"]) for entry in result["skipped"]}
    if reasons:
        print_table("left out of some cases", ("provider", "why"), sorted(reasons))
