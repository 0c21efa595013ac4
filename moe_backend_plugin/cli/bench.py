"""``moe-backend bench``: the kernels' speed on this machine's GPU beside the engines' own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_backend_plugin.cli.output import InputError, command, print_table
from moe_backend_plugin.gdn.support import HEADS_PER_GROUP

app = typer.Typer(help="Time the kernels on this machine's GPU.", no_args_is_help=True, rich_markup_mode=None)

INSTALL = 'pip install "moe-backend-plugin[bench]"'
HEADS = tuple(16 * ratio for ratio in HEADS_PER_GROUP)
"""Value heads on 16 key heads."""


@app.command()
@command
def gdn(
    batch: Annotated[str | None, typer.Option(help="Rows, e.g. 1,64. Default: 1 to 512, fewer with several tokens.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens a row, 1 to 8. Default: 1,2,3,4,5,6,8.")] = None,
    heads: Annotated[str | None, typer.Option(help="Value heads on 16 key heads. Default: 16,32,64; 32 with several tokens.")] = None,
    state: Annotated[str | None, typer.Option(help="Types of the state: float32, bfloat16. Default: both.")] = None,
    providers: Annotated[str | None, typer.Option(help="Whose kernels, e.g. plugin,triton. Default: all that are installed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid: B=1,64, T=1,4, HV=32.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file. Default: gdn_<device>.json in integration/bench/results or here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf). Default: beside the JSON file.")] = None,
) -> None:
    """Time gated-delta-net decode; writes a JSON file and a plot, prints the figures of the targets."""
    from moe_backend_plugin.bench import gdn as bench
    from moe_backend_plugin.bench import report
    from moe_backend_plugin.bench.stamp import results_folder, slug

    options = bench.Options(
        batch=_numbers("--batch", batch, range(1, 4097)),
        tokens=_numbers("--tokens", tokens, range(1, 9)),
        heads=_numbers("--heads", heads, HEADS),
        state=_names("--state", state, list(bench.STATES)),
        providers=_names("--providers", providers, list(bench.PROVIDERS)),
        quick=quick,
    )
    for name, file in (("--out", out), ("--plot", plot)):
        if file is not None and file.is_dir():
            raise InputError(name, f"{str(file)!r}, which is a folder", "a file's name")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError("--plot", repr(str(plot)), "a file's name that ends in .png, .svg or .pdf")
    if not bench.plan(options):
        raise InputError("bench gdn", "no case that the chosen providers serve", "another choice of --tokens, --state or --providers")
    device, stamp = _device()
    out = out or results_folder() / f"gdn_{slug(stamp['device'])}.json"
    unfinished = out.with_name(out.name + ".unfinished")
    result: dict[str, Any] = {}
    for found in bench.run(options, device, say=lambda line: print(line, flush=True)):
        result = {"stamp": stamp, **found}
        report.write(result, unfinished)  # what a machine that is taken away leaves behind
    unfinished.replace(out)
    _print(result, report.summary(result))
    print(f"{out}: {len(result['rows'])} rows")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot", "no package matplotlib (the JSON file is written)", INSTALL)
    plot = plot or out.with_suffix(".png")
    report.plot(result, plot)
    print(plot)


def _device():
    """The GPU to time and the stamp of its results. Raises InputError where this package's kernels cannot run."""
    import torch

    from moe_backend_plugin.bench.stamp import gpu_stamp

    if not torch.cuda.is_available():
        raise InputError("bench gdn", "no CUDA device that torch can use", "a machine with an NVIDIA GPU and torch built for CUDA")
    for module, install in (("cutlass", 'pip install "moe-backend-plugin[kernels]"'), ("triton", "pip install triton")):
        if importlib.util.find_spec(module) is None:
            raise InputError("bench gdn", f"no package with the module {module}", install)
    from moe_backend_plugin.kernels.compile import architecture_of

    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if architecture_of(capability) is None:
        raise InputError("bench gdn", f"{torch.cuda.get_device_name(device)}, compute capability {capability}", "9.0 and 10.x")
    return device, gpu_stamp(torch.cuda.get_device_name(device), "moe-backend bench gdn")


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
