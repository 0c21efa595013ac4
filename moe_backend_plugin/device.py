"""What this machine is, and which provider serves each kind of layer on it.

Engines ask before they start their workers, where touching CUDA would break the fork that follows: the device is read through NVML,
never through torch.cuda, unless the caller says that CUDA may be initialised.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_backend_plugin.config import PluginConfig
from moe_backend_plugin.errors import ConfigError, UnsupportedLayerError
from moe_backend_plugin.kernels.compile import ARCHITECTURES, architecture_of, capabilities

LayerKind = Literal["moe", "linear", "gdn"]
LAYER_KINDS: tuple[LayerKind, ...] = ("moe", "linear", "gdn")

LAYER_NAMES = {"moe": "NVFP4 MoE", "linear": "dense NVFP4", "gdn": "gated-delta-net"}
FLASHINFER = ((10, 0), (10, 3))
"""Compute capabilities on which FlashInfer's CuTe DSL kernels can serve NVFP4 MoE layers through this package."""
# Layer kinds with CuTe DSL kernels of this package: the architectures these are written for, and those where auto takes them.
_WRITTEN = {"moe": ("sm_90a",), "linear": ("sm_90a",), "gdn": ARCHITECTURES}
_AUTO = {"moe": ("sm_90a",), "gdn": ("sm_90a",)}
# Why auto does not take them where they could be.
_UNTRIED = {
    "linear": "these are the kernels of the experts, and have not been measured on dense layers",
    "gdn": "these kernels compile for this device and have not been run on one",
}
_GPUS = {
    "moe": "a GPU of compute capability 9.0 (these kernels are wgmma, which only Hopper has), or in vLLM 10.0 or 10.3 with FlashInfer",
    "linear": "a GPU of compute capability 9.0 (these kernels are wgmma, which only Hopper has)",
    "gdn": f"a GPU of compute capability {capabilities()}",
}
_SERVED = {"moe": "NVFP4 MoE layers", "linear": "dense NVFP4 layers", "gdn": "gated-delta-net decode"}
# What the engines run on each architecture without this package.
_ENGINE_PATHS = {
    ("moe", "sm90"): "Humming or Marlin",
    ("linear", "sm90"): "Humming or Marlin",
    ("moe", "sm100"): "FlashInfer or CUTLASS",
    ("linear", "sm100"): "FlashInfer or CUTLASS",
    ("moe", "sm103"): "FlashInfer or CUTLASS",
    ("linear", "sm103"): "FlashInfer or CUTLASS",
}


@dataclass(frozen=True)
class Device:
    """One device an engine would run on."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory: int  # bytes, 0 when unknown
    capability: tuple[int, int] | None = None
    note: str = ""  # what could not be found out, and why

    @property
    def arch(self) -> str:
        """ "cpu", "sm90", "sm100", "sm103", ...; "cuda" when the compute capability is unknown."""
        if self.kind == "cpu":
            return "cpu"
        return f"sm{self.capability[0]}{self.capability[1]}" if self.capability else "cuda"

    @classmethod
    def cpu(cls, note: str = "") -> Device:
        """The host's processor."""
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            memory = 0
        return cls("cpu", _cpu_name(), memory, None, note)


@dataclass(frozen=True)
class Choice:
    """Who serves a kind of layer, why, and what this package lacks to serve it itself."""

    provider: Literal["cutedsl", "flashinfer", "torch", "engine"]
    reason: str
    missing: tuple[str, ...] = ()


def find_device(kind: Literal["cpu", "cuda"] | None = None, allow_cuda_init: bool = False) -> Device:
    """The first visible CUDA device, else the CPU.

    ``kind`` forces one: an adapter that knows its engine's platform passes it. ``allow_cuda_init`` lets torch.cuda answer where NVML
    cannot, which initialises CUDA in this process.
    """
    if kind == "cpu":
        return Device.cpu()
    device, note = _from_nvml()
    if device is None and allow_cuda_init:
        device = _from_torch()
    if device is not None:
        return device
    if kind == "cuda":
        return Device("cuda", "unknown", 0, None, note or "no CUDA device is visible")
    return Device.cpu(note if Path("/dev/nvidiactl").exists() else "")


def choose_provider(
    layer_kind: LayerKind, device: Device, config: PluginConfig, where: str = "", drives_flashinfer: bool = False
) -> Choice:
    """Which provider serves a kind of layer; ``where`` names the layer in errors.

    ``drives_flashinfer``: the caller can hand NVFP4 MoE layers to FlashInfer's kernels, which then answer to "cutedsl" on Blackwell.
    Raises UnsupportedLayerError when the provider asked for does not run on the device, or ``strict`` forbids the only one left.
    """
    if layer_kind not in LAYER_KINDS:
        raise ConfigError("layer kind", repr(layer_kind), ", ".join(LAYER_KINDS))
    asked = getattr(config, layer_kind).provider
    name = LAYER_NAMES[layer_kind]
    architecture = architecture_of(device.capability) if device.capability else None
    target = architecture if architecture in _WRITTEN.get(layer_kind, ()) else None
    missing = () if device.kind == "cpu" or target else (f"{name} kernel for {device.arch}",)
    if asked == "torch":
        if device.kind != "cpu":
            raise UnsupportedLayerError(
                where or f"{name} layers", f"{layer_kind}.provider: torch on {device.name}", "auto or engine here; torch on a CPU"
            )
        return Choice("torch", f"{layer_kind}.provider is torch")
    if asked == "cutedsl":
        if layer_kind == "moe" and drives_flashinfer and device.capability in FLASHINFER:
            untried = "never run by this package's authors, so checked against the reference when the server starts"
            return Choice("flashinfer", f"moe.provider is cutedsl; on {device.arch} FlashInfer's CuTe DSL kernels, {untried}")
        if target is None:
            raise UnsupportedLayerError(
                where or f"{name} layers",
                f"{layer_kind}.provider: cutedsl on {device.name}",
                f"{_GPUS[layer_kind]}, or auto",
            )
        untried = "" if target in _AUTO.get(layer_kind, ()) else f"; {_UNTRIED[layer_kind]}"
        return Choice("cutedsl", f"{layer_kind}.provider is cutedsl{untried}")
    if asked == "engine":
        return Choice("engine", f"{layer_kind}.provider is engine; {_engine_path(layer_kind, device)}", missing)
    if device.kind == "cpu":
        return Choice("torch", f"cpu: this package's torch ops serve {name} layers", missing)
    if target in _AUTO.get(layer_kind, ()):
        return Choice("cutedsl", f"{device.arch}: this package's CuTe DSL kernels serve {_SERVED[layer_kind]}", missing)
    lack = f"this release has no {name} kernel for this device"
    if target:
        lack = f"{layer_kind}.provider: cutedsl would take this package's kernels ({_UNTRIED[layer_kind]})"
    reason = f"{device.arch}: {lack}; {_engine_path(layer_kind, device)}"
    if layer_kind == "moe" and drives_flashinfer and device.capability in FLASHINFER:
        reason += "; moe.provider: cutedsl would take FlashInfer's CuTe DSL kernels through this package, never run by its authors"
    if config.strict:
        lack = f"{layer_kind}.provider: auto takes no kernel" if target else "no kernel"
        raise UnsupportedLayerError(
            where or f"{name} layers",
            f"{device.name} ({device.arch}), {lack} of this package for {device.arch}, and strict is true",
            f"strict: false (the engine serves the layers), or {layer_kind}.provider: engine{' or cutedsl' if target else ''}",
        )
    return Choice("engine", reason, missing)


def _engine_path(layer_kind: LayerKind, device: Device) -> str:
    if layer_kind == "gdn":
        return "the engine runs its own gated-delta-net kernels"
    if device.kind == "cpu":
        return "vLLM has no NVFP4 kernel for CPU and stops at start-up"
    path = _ENGINE_PATHS.get((layer_kind, device.arch))
    return f"vLLM serves it with {path}" if path else "vLLM picks one of its own kernels"


# --- queries -----------------------------------------------------------------------------------------------------------------------


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _from_nvml() -> tuple[Device | None, str]:
    """The first visible device, and why there is none."""
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed, so GPUs cannot be queried without initialising CUDA"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    try:
        handle = _first_visible(pynvml)
        if handle is None:
            return None, "CUDA_VISIBLE_DEVICES hides every GPU"
        name = pynvml.nvmlDeviceGetName(handle)
        capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        return Device("cuda", name if isinstance(name, str) else name.decode(), _memory(pynvml, handle), capability), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """The NVIDIA driver's version, from NVML; None where it cannot be asked. CUDA stays untouched in this process."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001  whatever NVML raises, the version is unknown
        return None
    return version if isinstance(version, str) else version.decode()


def _first_visible(nvml):
    """CUDA_VISIBLE_DEVICES holds indices or UUIDs (of a GPU or of a MIG slice); what follows an invalid entry is hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = nvml.nvmlDeviceGetCount()
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(0) if count else None
    first = visible.split(",")[0].strip()
    if first.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(first)) if int(first) < count else None
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.startswith("GPU-"):  # CUDA takes any unique beginning of a UUID, NVML only the whole
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return next((handle for handle in handles if str(nvml.nvmlDeviceGetUUID(handle)).startswith(first)), None)
    return None


def _memory(nvml, handle) -> int:
    # Devices that share the host's memory answer "not supported".
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:
        return 0


def _from_torch() -> Device | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Device("cuda", properties.name, properties.total_memory, (properties.major, properties.minor))
