"""The plugin's configuration and device, as seen from inside a vLLM process."""

from __future__ import annotations

import weakref
from functools import cache

from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.platforms import current_platform

from ...config import PluginConfig, load_config
from ...device import Choice, Device, choose_provider, find_device
from .arguments import EXTRA_KEY, current_extra, extra_config

_read: tuple[weakref.ref[VllmConfig], PluginConfig] | None = None
"""The engine whose settings were read last, and these settings."""


def plugin_config() -> PluginConfig:
    """The configuration in force for the engine whose arguments are being read, or whose model is being built.

    Read once an engine: every layer of a model sees the same settings, whatever happens to the file meanwhile.
    """
    global _read
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return load_config(current_extra.get())
    if _read is None or _read[0]() is not vllm_config:
        _read = weakref.ref(vllm_config), load_config(extra_config(vllm_config))
    return _read[1]


def name_graphs(layers: str, provider: str) -> None:
    """Keep the compiled graphs of a model whose ``layers`` this package serves apart from those around vLLM's own code.

    vLLM keeps compiled graphs on the disk under a hash of its configuration, and where the provider comes from a file or a variable,
    nothing that it knows of differs. ``additional_config`` is a part of that hash.
    """
    vllm_config = get_current_vllm_config()
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[f"{EXTRA_KEY}: {layers}"] = provider


@cache
def device() -> Device:
    """The device vLLM runs on: the platform decides, not what else is in the machine."""
    return find_device("cpu" if current_platform.is_cpu() else "cuda")


def provider(layer_kind: str, where: str) -> Choice:
    """The provider that serves ``layer_kind`` ("moe", "linear", "gdn") at ``where``.

    Raises:
        UnsupportedLayerError: ``strict`` forbids the only provider, or the one asked for does not run on this device.
    """
    return choose_provider(layer_kind, device(), plugin_config(), where=where, drives_flashinfer=True)
