"""The plugin's configuration and device, as seen from inside a vLLM process."""

from __future__ import annotations

from functools import cache

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from ...config import PluginConfig, load_config
from ...device import Choice, Device, choose_provider, find_device
from ...errors import UnsupportedLayerError
from .arguments import current_extra, extra_config


def plugin_config() -> PluginConfig:
    """The configuration in force for the engine whose arguments are being read, or whose model is being built."""
    vllm_config = get_current_vllm_config_or_none()
    return load_config(current_extra.get() if vllm_config is None else extra_config(vllm_config))


@cache
def device() -> Device:
    """The device vLLM runs on: the platform decides, not what else is in the machine."""
    return find_device("cpu" if current_platform.is_cpu() else "cuda")


def provider(layer_kind: str, where: str) -> Choice:
    """The provider that serves ``layer_kind`` ("moe", "linear", "gdn") at ``where``.

    Raises:
        UnsupportedLayerError: ``strict`` forbids the only provider, or the one asked for does not run on this device.
    """
    choice = choose_provider(layer_kind, device(), plugin_config(), where=where)
    if choice.provider == "torch" and not current_platform.is_cpu():
        raise UnsupportedLayerError(
            where, f"{layer_kind}.provider: torch on {device().name}", "auto or engine here; torch on vLLM's CPU build"
        )
    return choice
