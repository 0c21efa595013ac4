"""What this package adds to SGLang's arguments: an alias, the GDN backend by the configuration file, checks before anything starts.

Imported in every process, so SGLang is imported in the functions that need it.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...errors import ConfigError, UnsupportedLayerError
from . import GDN_BACKEND, MOE_BACKEND

logger = logging.getLogger("sglang.moe_backend_plugin")
FLAG = f"--moe-runner-backend {MOE_BACKEND}"
ALIAS, FIELD = "moe_backend", "moe_runner_backend"
QUANTIZATIONS = ("modelopt_fp4", "modelopt_mixed", "compressed-tensors")
"""SGLang's names of what describes NVFP4 experts; the layers themselves are checked when they are built."""
_MAKE = "an NVFP4 checkpoint from ModelOpt or compressed-tensors; `moe-backend quantize MODEL OUT` makes one from a bf16 model"

_claimed_by: str | None = None
"""Who else has the name :data:`MOE_BACKEND`, or None."""


def claim_failed(who: str) -> None:
    """Note that the name is somebody else's. Said when it is asked for: SGLang only logs what fails while it loads plugins."""
    global _claimed_by
    _claimed_by = _claimed_by or who


# --- pure ------------------------------------------------------------------------------------------------------------------------------


def with_alias(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``Engine`` with ``moe_backend`` as what it stands for. Raises ConfigError if both are given and differ."""
    kwargs = dict(kwargs)
    if ALIAS in kwargs:
        value = kwargs.pop(ALIAS)
        if kwargs.setdefault(FIELD, value) != value:
            raise ConfigError(f"{ALIAS} and {FIELD}", f"{value!r} and {kwargs[FIELD]!r}", "one of them, or the same value")
    return kwargs


def known(backend: str, choices: Iterable[str]) -> None:
    """Raises ConfigError that lists the choices: ``Engine`` keywords do not go through the command line's parser."""
    choices = list(choices)
    if backend not in choices:
        close = difflib.get_close_matches(str(backend), choices, n=1)
        raise ConfigError("--moe-runner-backend", repr(backend), ", ".join(choices) + (f" (did you mean {close[0]}?)" if close else ""))


def refuse(quantization: str | None, a2a: str, *, eplb: bool = False, redundant: int = 0, lora: bool = False, tbo: bool = False) -> None:
    """Raises ConfigError on what the experts of this package cannot be combined with; in SGLang's own words, before anything is loaded."""
    if quantization is None:
        raise ConfigError(FLAG, "a checkpoint without quantisation (bf16 or fp16 weights)", _MAKE)
    if quantization not in QUANTIZATIONS:
        raise ConfigError(FLAG, f"quantization {quantization!r}", f"{', '.join(QUANTIZATIONS)}: {_MAKE}")
    if a2a != "none":
        found = f"--moe-a2a-backend {a2a}, which hands over tokens in a layout of its own"
        raise ConfigError(FLAG, found, "--moe-a2a-backend none: tensor and expert parallel, and DP attention's gathered batches")
    if eplb or redundant:
        raise ConfigError(FLAG, "--enable-eplb or redundant experts", "experts that stay on their rank")
    if lora:
        raise ConfigError(FLAG, "--enable-lora", "a model without adapters, or another runner")
    if tbo:
        raise ConfigError(FLAG, "--enable-two-batch-overlap", "no two-batch overlap: calls of a device share one workspace")


def gdn_by_file(provider: str, decode: str | None, base: str) -> str | None:
    """The decode backend that the configuration file asks for where the command line leaves it open, or None.

    ``provider`` is the setting ``gdn.provider``: only an explicit ``cutedsl`` does, ``auto`` leaves SGLang's default.
    """
    return GDN_BACKEND if provider == "cutedsl" and decode is None and base == "triton" else None


def dense_by_file(provider: str, activations: str, strict: bool) -> str | None:
    """What to say of settings for dense NVFP4 layers, which stay SGLang's; None if there are none. Raises ConfigError if ``strict``."""
    asked = {"linear.provider": provider, "linear.activations": activations}
    unused = [f"{name} {value!r}" for name, value in asked.items() if value not in ("auto", "engine")]
    if unused and strict:
        raise ConfigError("strict", f"true with {' and '.join(unused)}", "auto: dense NVFP4 layers stay on SGLang's kernels")
    return f"Dense NVFP4 layers stay on SGLang's kernels; not used: {', '.join(unused)}" if unused else None


# --- resolution of arguments: (server_args, previous), see SGLang's resolution_hooks ----------------------------------------------------


def check_moe(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around ``handle_moe_kernel_config``: refuse what cannot work, before weights are read."""
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view

    known(resolved_view(server_args).moe_runner_backend, MOE_RUNNER_BACKEND_CHOICES)
    previous(server_args)
    view = resolved_view(server_args)
    if view.moe_runner_backend != MOE_BACKEND:
        return
    import sglang.srt.layers.moe.moe_runner.runner  # noqa: F401  registers the core, and finds out whether the name is free

    if MOE_RUNNER_BACKEND_CHOICES.count(MOE_BACKEND) > 1:
        claim_failed("an entry of that name from another plugin too")
    if _claimed_by:
        raise ConfigError(FLAG, _claimed_by, "one owner of the name; SGLANG_PLUGINS says which plugins are loaded")
    refuse(
        view.quantization or model_config_of(server_args).quantization,
        view.moe_a2a_backend,
        eplb=view.enable_eplb,
        redundant=view.ep_num_redundant_experts,
        lora=bool(view.enable_lora or view.lora_paths),
        tbo=view.enable_two_batch_overlap,
    )
    from .settings import moe_provider, plugin_config

    moe_provider(FLAG)
    config = plugin_config()
    if said := dense_by_file(config.linear.provider, config.linear.activations, config.strict):
        logger.warning(said)


def choose_gdn(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around ``handle_linear_attn_backend``: ``gdn.provider: cutedsl`` chooses this package where no flag says otherwise."""
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    from ...config import load_config

    view = resolved_view(server_args)
    config = load_config()
    if chosen := gdn_by_file(config.gdn.provider, view.linear_attn_decode_backend, view.linear_attn_backend):
        declare_resolution(server_args, "moe_backend_plugin", linear_attn_decode_backend=chosen)
    elif GDN_BACKEND in (view.linear_attn_decode_backend, view.linear_attn_backend) and config.gdn.provider in ("engine", "torch"):
        found = f"gdn.provider {config.gdn.provider!r} in this package's settings"
        raise ConfigError(f"--linear-attn-decode-backend {GDN_BACKEND}", found, "auto or cutedsl")
    view = resolved_view(server_args)
    if GDN_BACKEND in (view.linear_attn_decode_backend, view.linear_attn_backend) and view.enable_linear_replayssm:
        raise UnsupportedLayerError(
            f"--linear-attn-decode-backend {GDN_BACKEND}", "--enable-linear-replayssm, which keeps states in rings", "one of the two"
        )
    previous(server_args)


# --- changes of SGLang, see hooks.py ----------------------------------------------------------------------------------------------------


def add_alias(module: Any) -> None:
    """``--moe-backend`` beside ``--moe-runner-backend``; an unknown name lists the choices, as SGLang's own flag does.

    A plain function, no wrapt wrapper: where another plugin wraps this one too (SGLang itself depends on one that does), SGLang's
    HookRegistry takes what a static method holds, which a wrapper says is the original.
    """
    original = module.ServerArgs.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> None:
        original(parser)
        extend_parser(parser)

    module.ServerArgs.add_cli_args = staticmethod(add_cli_args)


def extend_parser(parser: Any) -> None:
    """Add the alias; its value goes where the long name's goes, and of several the last counts, as argparse has it."""
    import argparse

    long = next(action for action in parser._actions if action.dest == FIELD)
    parser.add_argument(
        "--moe-backend",
        dest=FIELD,
        type=str,
        choices=long.choices,
        default=argparse.SUPPRESS,
        help=f"Alias of {long.option_strings[0]} (moe-backend-plugin).",
    )


def accept_alias(module: Any) -> None:
    """``Engine(moe_backend="cutedsl")``."""
    original = module.Engine.server_args_class

    def server_args_class(**kwargs: Any) -> Any:
        return original(**with_alias(kwargs))

    module.Engine.server_args_class = staticmethod(server_args_class)
