"""``moe-backend doctor``: will this machine serve that model, by what, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_backend_plugin.cli.output import EXIT_WRONG, command, is_quantized, model_folder, print_json, print_table, size


@command
def doctor(
    model: Annotated[Path | None, typer.Option(help="Also examine this model folder; weights are not loaded.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the device, the packages and who serves each kind of layer; exit 1 when something is wrong."""
    from moe_backend_plugin.cli.machine import examine

    config = model_folder(model, "--model") if model else None
    machine = examine()
    report: dict[str, Any] = machine.as_dict()
    report["model"] = _examine_model(model, config, machine) if model else None
    report |= {"problems": machine.problems, "notes": machine.notes, "ok": not machine.problems}
    if json:
        print_json(report)
    else:
        _print(report)
    if machine.problems:
        raise typer.Exit(EXIT_WRONG)


def _examine_model(model: Path, config: dict[str, Any], machine) -> dict[str, Any]:
    from dataclasses import asdict

    from moe_backend_plugin.cli.inventory import choices_for, has_input_scales, inventory, model_facts
    from moe_backend_plugin.errors import CheckpointError
    from moe_backend_plugin.nvfp4.checkpoint import check_checkpoint
    from moe_backend_plugin.nvfp4.files import read_headers

    tensors = read_headers(model)
    facts = model_facts(config, tensors)
    choices = choices_for(config, machine.choices, machine.config.moe.activations, has_input_scales(tensors))
    layers = inventory(tensors, choices)
    check = "passed (headers and global scales)"
    if is_quantized(model, config) or any(row.format == "nvfp4" for row in layers):
        try:
            check_checkpoint(model, depth="headers")
        except CheckpointError as error:
            check = str(error)
            machine.problems.append(f"checkpoint: {error}")
    else:
        check = "not quantised: only gated-delta-net layers are this package's; moe-backend quantize makes an NVFP4 checkpoint"
    if machine.device.memory and facts["bytes"] > machine.device.memory:
        # Several GPUs may share the weights; a CPU has one memory.
        findings = machine.problems if machine.device.kind == "cpu" else machine.notes
        findings.append(f"the weights need {size(facts['bytes'])}, the device has {size(machine.device.memory)}")
    return {"path": str(model), **facts, "check": check, "layers": [asdict(row) for row in layers]}


def _print(report: dict[str, Any]) -> None:
    device = report["device"]
    memory = size(device["memory"]) if device["memory"] else "unknown memory"
    print_table(
        "machine",
        ("what", "found"),
        [
            ("device", f"{device['name']} ({device['arch']}, {memory})"),
            ("python", report["python"]),
            ("moe-backend-plugin", report["package"]),
            *((name, version or "not installed") for name, version in report["packages"].items()),
            *((f"plugin registered with {name}", "yes" if found else "no") for name, found in report["entry_points"].items()),
        ],
    )
    providers = report["providers"].items()
    print_table(
        "who serves",
        ("layers", "provider", "why", "missing"),
        [(k, p["provider"], p["reason"], ", ".join(p["missing"]) or "-") for k, p in providers],
    )
    print_table("settings", ("setting", "value", "source"), [(k, s["value"], s["source"]) for k, s in report["settings"].items()])
    if report["model"]:
        _print_model(report["model"])
    for note in report["notes"]:
        print(f"note: {note}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("nothing is wrong")


def _print_model(model: dict[str, Any]) -> None:
    experts = f", {model['experts']} experts, {model['experts_per_token']} a token" if model["experts"] else ""
    gdn = f" ({model['gdn_layers']} gated-delta-net)" if model["gdn_layers"] else ""
    title = f"{model['path']}: {model['architecture']}, {model['decoder_layers']} layers{gdn}{experts}, {size(model['bytes'])} of weights"
    rows = [(row["kind"], row["format"], row["count"], size(row["bytes"]), row["provider"], row["reason"]) for row in model["layers"]]
    print_table(title, ("layers", "format", "tensors", "memory", "provider", "why"), rows)
    print(f"checkpoint check: {model['check']}")
