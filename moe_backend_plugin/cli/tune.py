"""``moe-backend tune``: find the fastest way to run a model's expert layers on this GPU, ahead of serving."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moe_backend_plugin.cli.output import EXIT_WRONG, InputError, check_files, check_gpu, command, model_folder, print_table

if TYPE_CHECKING:
    from moe_backend_plugin.moe.families import Family, Tactic
    from moe_backend_plugin.moe.problem import MoEProblem
    from moe_backend_plugin.moe.tactic_cache import Kind
    from moe_backend_plugin.moe.tuner import Case, Conditions, Tuned

BIASES = ("unequal-allocations", "capped", "random-inputs", "warm-l2")
CAP = 8192
GPUS = (
    "a machine with an NVIDIA GPU of compute capability 9.0 (H100, H200), or 10.0 or 10.3 with FlashInfer (B200, B300), and torch built "
    "for CUDA"
)
UNTRIED = (
    "note: tuning FlashInfer's kernels has never run on a Blackwell GPU; every tactic is checked against the reference before it is timed"
)


class Machine(NamedTuple):
    """The GPU to tune on; ``problem`` as its kernels compute it, and as a server's layers on them have it; ``make`` makes the inputs of a
    bucket."""

    kind: Kind
    problem: MoEProblem
    make: Callable[[Conditions], Case]


@command
def tune(
    model: Annotated[str, typer.Argument(help="Folder of the model, or a shape of the benchmarks such as qwen3-30b-a3b, deepseek-v3.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens of the largest call, up to 131072: a server's largest batch.")] = 16384,
    sizes: Annotated[str | None, typer.Option(help="Further token counts to tune, e.g. a server's graphs: 24,40.")] = None,
    coarse: Annotated[bool, typer.Option("--coarse", help="Only powers of two and --sizes: a third of the time.")] = False,
    ep: Annotated[int, typer.Option(min=1, help="Ranks that share out the experts; one of them is tuned here.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Which of these ranks, from 0.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Ranks that each hold a part of every expert.")] = 1,
    dtype: Annotated[str, typer.Option(help="Type of the tokens: bfloat16, or on Hopper float16.")] = "bfloat16",
    force: Annotated[str | None, typer.Option(metavar="TACTIC", help="Check this tactic and make it win every bucket.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out the buckets that the file has.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the inputs, and of the order in which tactics are timed.")] = 0,
    bias: Annotated[str | None, typer.Option(help=f"Tune as badly as others do, into --out: {', '.join(BIASES)}.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="PLOT", help="Picture to write (.png, .svg, .pdf).")] = None,
    out: Annotated[Path | None, typer.Option(help="Cache file. Default: this device's, in the folder of the compiled kernels.")] = None,
) -> None:
    """Tune the expert kernels for a model on this GPU; servers on such a device then use what was found.

    On Hopper (H100, H200) these are this package's kernels; on Blackwell (B200, B300) FlashInfer's, with NVFP4 activations, which has never
    run on such a GPU.
    """
    import torch

    from moe_backend_plugin.bench import tune_report
    from moe_backend_plugin.bench.stamp import slug
    from moe_backend_plugin.config import load_config
    from moe_backend_plugin.kernels import compile as kernels
    from moe_backend_plugin.moe import buckets, families, tactic_cache, tuner

    if dtype not in ("bfloat16", "float16"):
        raise InputError("--dtype", repr(dtype), "bfloat16, float16")
    if bias is not None and (bias not in BIASES or out is None):
        raise InputError("--bias", f"{bias!r}{'' if out else ' without --out'}", f"one of {', '.join(BIASES)}, with a file of its own")
    if not 1 <= max_tokens <= buckets.MOST_TOKENS:
        raise InputError("--max-tokens", str(max_tokens), f"1 to {buckets.MOST_TOKENS}")
    check_files(out, "--report", report)
    if report is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--report", "no package matplotlib", 'pip install "moe-backend-plugin[bench]"')
    problem, first = _problem(model, ep, rank, tp)
    wanted = _sizes(sizes, max_tokens)
    forced = None
    if force is not None:
        family, forced = families.parse(force)
        if reason := family.validity(problem, forced):
            raise InputError("--force", f"{force}: {reason}", "a tactic that the kernels can have")

    kernels.use_cache_folder(load_config().kernel_cache)
    tokens = getattr(torch, dtype)
    options = tuner.Options(seed=seed, biases=_biases(bias))

    def edges_of(multiprocessors: int, family: Family = families.HOPPER) -> list[int]:
        return buckets.edges(problem, max_tokens, multiprocessors, wanted, options.biases.capped_at, family)

    machine = _machine(problem, tokens, first, edges_of, forced)
    problem, family = machine.problem, machine.kind.family
    path = out or tactic_cache.path_of(machine.kind)
    tactic_cache.refuse_unwritable(path)
    edges = edges_of(machine.kind.multiprocessors, family)
    if coarse:  # buckets begin where they do otherwise, and calls between them are the heuristic's
        edges = [edge for edge in edges if edge.bit_count() == 1 or edge in (*wanted, edges[-1])]
    held = _held(path, problem, tokens, machine.kind)
    missing = {edge for edge in edges if not (resume and str(edge) in held)}
    try:
        with _progress(len(missing)) as (say, step):
            while missing:
                kept = {last: bucket for last, bucket in held.items() if int(last) not in missing}
                for found in tuner.tune(
                    *(problem, max_tokens, machine.kind.multiprocessors, machine.make, options),
                    dtype=tokens,
                    sizes=wanted,
                    forced=forced,
                    skip=lambda last, missing=missing: last not in missing,
                    struck=_struck(kept, family),
                    progress=say,
                    family=family,
                ):
                    tactic_cache.write_bucket(path, problem, tokens, machine.kind, found.last, found.as_dict())
                    step(found)
                # What was wrong at a later count may have won before; no server would use such a bucket.
                held = _held(path, problem, tokens, machine.kind)
                wrong = {family.name(tactic) for tactic in _struck(held, family)}
                missing = {edge for edge in edges if held[str(edge)]["tactic"] in wrong}
    except tuner.Struck as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_WRONG) from None
    done = {last: bucket for last, bucket in held.items() if int(last) in edges}
    title = f"{model}, {problem.num_local_experts} of {problem.num_experts} experts, on {slug(machine.kind.name)}"
    print_table(title, tune_report.COLUMNS, tune_report.lines(done))
    struck: dict[str, str] = {}
    for last, bucket in done.items():
        for name, reason in bucket["struck"].items():
            struck.setdefault(name, reason if reason.startswith("at ") else f"{last} tokens: {reason}")
    for name, reason in struck.items():
        print(f"struck out: {name}: {reason}")
    print(tune_report.summary(done))
    print(path)
    if report is not None:
        tune_report.plot(done, f"{title}, kernels {machine.kind.stamp['kernel']}", report)
        print(report)


def _problem(model: str, ep: int, rank: int, tp: int) -> tuple[MoEProblem, int]:
    """The expert layer on one rank, and the global id of its first expert. Raises InputError."""
    from moe_backend_plugin.bench.moe import MODELS

    shapes = {found.name: replace(found, ep=1) for found in MODELS.values()} | MODELS
    if model in shapes:
        shape = shapes[model]
        if shape.ep > 1 and ep > 1:
            raise InputError("--ep", f"{ep}, and a shape of {shape.ep} ranks", f"{shape.name} with --ep")
        ep = max(ep, shape.ep)
        whole = replace(shape, ep=1).problem
    elif Path(model).is_dir():
        from moe_backend_plugin.cli.inventory import experts_problem

        config = model_folder(Path(model))
        whole = experts_problem(config.get("text_config", config))
        if whole is None:
            raise InputError("MODEL", f"{model!r}, whose config.json describes no experts", "a model with experts")
    else:
        raise InputError("MODEL", repr(model), f"a local folder in Hugging Face format, or {', '.join(shapes)}")
    if whole.num_experts % ep:
        raise InputError("--ep", str(ep), f"a divisor of the {whole.num_experts} experts")
    if rank >= ep:
        raise InputError("--rank", str(rank), f"0 to {ep - 1} with --ep {ep}")
    if whole.intermediate % tp or whole.intermediate // tp % 16:
        raise InputError("--tp", str(tp), f"a divisor of the expert width {whole.intermediate} that leaves a multiple of 16")
    local = whole.num_experts // ep
    return replace(whole, num_local_experts=local, intermediate=whole.intermediate // tp), rank * local


def _sizes(text: str | None, max_tokens: int) -> list[int]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if not name.isdecimal() or not 1 <= int(name) <= max_tokens:
            raise InputError("--sizes", repr(name), f"1 to {max_tokens} (--max-tokens); several separated by commas")
    return [int(name) for name in names]


def _biases(name: str | None) -> Any:
    from moe_backend_plugin.moe.tuner import Biases

    switches = {
        None: Biases(),
        "unequal-allocations": Biases(unequal_allocations=True),
        "capped": Biases(capped_at=CAP),
        "random-inputs": Biases(random_inputs=True),
        "warm-l2": Biases(warm_l2=True),
    }
    return switches[name]


def _held(path: Path, problem: MoEProblem, tokens: Any, kind: Kind) -> dict[str, dict[str, Any]]:
    """The buckets that a file has for the problem on this device, by their last number of tokens; without those that are damaged."""
    from moe_backend_plugin.moe import tactic_cache

    def whole(last: str, bucket: Any) -> bool:
        return last.isdecimal() and isinstance(bucket, dict) and "tactic" in bucket and isinstance(bucket.get("struck"), dict)

    found = tactic_cache.entry_of(path, problem, tokens, kind)
    return {last: bucket for last, bucket in found["buckets"].items() if whole(last, bucket)} if found else {}


def _struck(buckets: Mapping[str, dict[str, Any]], family: Family) -> dict[Tactic, str]:
    """What was struck out in any of these buckets, and why."""
    found = {}
    for last, bucket in buckets.items():
        for name, reason in bucket["struck"].items():
            with suppress(ValueError):  # a tactic that these kernels no longer have
                found.setdefault(family.parse(name), reason if reason.startswith("at ") else f"at {last} tokens {reason}")
    return found


def _machine(problem: MoEProblem, dtype: Any, first: int, edges_of: Callable[..., list[int]], forced: Tactic | None) -> Machine:
    """The GPU of this process, with every kernel that is to be timed compiled, or, of FlashInfer's, there to be compiled at its first
    launch; ``edges_of`` gives the buckets by its multiprocessors and its family of tactics.

    Raises InputError where there is no GPU that the kernels run on, or ``forced`` is of another family.
    """
    import torch

    from moe_backend_plugin.device import FLASHINFER
    from moe_backend_plugin.kernels.compile import shown

    check_gpu("tune", GPUS)
    capability, gpu = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    if capability[0] != 9 and capability not in FLASHINFER:
        raise InputError("tune", f"{gpu}, compute capability {shown(capability)}", GPUS)
    from moe_backend_plugin.bench.tactics import BlackwellLayer, Layer
    from moe_backend_plugin.moe import blackwell, cuda, families
    from moe_backend_plugin.moe.tactic_cache import Kind

    device = torch.device("cuda", torch.cuda.current_device())
    kind = Kind.of(device.index)
    family, kernels = kind.family, cuda
    if family is families.BLACKWELL:
        print(UNTRIED, file=sys.stderr, flush=True)
        kernels = blackwell
        if reason := blackwell.missing():
            raise InputError("tune", reason, GPUS)
    problem = replace(problem, activation_precision=family.activations)
    if reason := kernels.unsupported_reason(problem, dtype):
        raise InputError("MODEL", reason, "a layer that the kernels serve")
    edges = edges_of(kind.multiprocessors, family)
    found = {tactic for edge in edges for tactic in family.candidates(problem, edge, kind.multiprocessors)}
    if forced is not None:
        if not isinstance(forced, family.tactic):
            raise InputError("--force", f"a tactic of other kernels than those of {gpu}", f"a tactic of {family.gpu}")
        found = {forced, *(family.heuristic(problem, edge, kind.multiprocessors) for edge in edges)}
    if family is families.BLACKWELL:
        return Machine(kind, problem, BlackwellLayer(problem, dtype, first, device, edges[-1], sorted(found, key=family.name)).case)
    # What is paired later (tactics.crossed) is made of the same kernels.
    print(f"compiling the kernels of {len(found)} tactics, which takes minutes the first time", file=sys.stderr, flush=True)
    return Machine(kind, problem, Layer(problem, dtype, first, device, edges[-1], sorted(found, key=family.name)).case)


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[Tuned], None]]]:
    """A bar on stderr, or in a log a line for each bucket: (say what is under way, one bucket is done)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        numbers = count(1)

        def line(found: Tuned) -> None:
            times = f"{found.us:.1f} us, the heuristic's {found.heuristic_us:.1f}"
            name, number = found.family.name(found.tactic), next(numbers)
            where = f"bucket {number} of {total}" if number <= total else "once more"
            print(f"{where}, to {found.last} tokens: {name}, {times}", file=sys.stderr, flush=True)

        yield lambda what: None, line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("buckets"), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, description=what), lambda found: bar.advance(task)
