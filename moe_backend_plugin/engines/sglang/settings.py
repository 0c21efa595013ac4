"""The plugin's configuration and device, as seen from inside an SGLang process."""

from __future__ import annotations

from functools import cache

from ...config import PluginConfig, load_config
from ...device import Choice, Device, choose_provider, find_device
from ...errors import UnsupportedLayerError


@cache
def plugin_config() -> PluginConfig:
    """Read once a process, from the YAML file and the environment: SGLang has no place for settings of plugins in its arguments."""
    return load_config()


@cache
def device() -> Device:
    """The device that SGLang runs on."""
    return find_device()


def moe_provider(where: str) -> Choice:
    """Who serves NVFP4 experts of a model for which ``--moe-runner-backend`` names this package: "cutedsl", or "torch" on a CPU.

    Raises:
        UnsupportedLayerError: nobody does on this device, or by these settings.
    """
    config, found = plugin_config(), device()
    choice = choose_provider("moe", found, config, where=where)
    if config.moe.provider == "engine":
        raise UnsupportedLayerError(where, "moe.provider 'engine' in this package's settings", "auto, or another --moe-runner-backend")
    if choice.provider == "engine":
        allowed = "a GPU of compute capability 9.0 (Hopper), or another --moe-runner-backend"
        raise UnsupportedLayerError(where, f"{found.name} ({found.arch})", allowed)
    if choice.provider == "cutedsl" and config.moe.activations == "nvfp4":
        raise UnsupportedLayerError(where, "moe.activations 'nvfp4'", "auto or bf16: these kernels multiply 16-bit activations")
    return choice


def dummy_weights() -> bool:
    """Whether the model gets random weights instead of a checkpoint's."""
    from sglang.srt.runtime_context import get_model

    return get_model().load_format == "dummy"


def largest_call() -> int:
    """Tokens of the largest call of a MoE layer, as far as the arguments say; a larger one is served and then takes more memory."""
    from sglang.srt.runtime_context import get_parallel, get_schedule

    schedule = get_schedule()
    return most_tokens(schedule.chunked_prefill_size, schedule.max_prefill_tokens, get_parallel().attn_dp_size)


def most_tokens(chunked_prefill: int | None, max_prefill: int | None, gathered: int) -> int:
    """A chunk if prefill is chunked (SGLang says -1 or None if it is not), else a batch of prefills; of every data-parallel rank."""
    batch = chunked_prefill if chunked_prefill and chunked_prefill > 0 else max_prefill or 16384
    return batch * max(1, gathered)
