"""What this package adds to SGLang's arguments: an alias, the GDN backend by the configuration file, checks before anything starts.

Imported in every process, so SGLang is imported in the functions that need it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ...errors import CheckpointError, ConfigError, PluginError, UnsupportedLayerError
from . import GDN_BACKEND, MOE_BACKEND

logger = logging.getLogger("sglang.moe_backend_plugin")
FLAG = f"--moe-runner-backend {MOE_BACKEND}"
GDN_FLAG = f"--linear-attn-decode-backend {GDN_BACKEND}"
ALIAS, FIELD = "moe_backend", "moe_runner_backend"
QUANTIZATIONS = ("modelopt_fp4", "modelopt_mixed", "compressed-tensors")
"""SGLang's names of what describes NVFP4 experts; the layers themselves are checked when they are built."""
_MAKE = "an NVFP4 checkpoint from ModelOpt or compressed-tensors; `moe-backend quantize MODEL OUT` makes one from a bf16 model"

_EXPERT_SCALE = re.compile(r"\.experts\..*(weight_scale_2|weight_global_scale)$")
"""Tensors that NVFP4 experts have, and experts of another format do not."""
_COMMAND_LINE = "_moe_backend_plugin_command_line"
"""On a ``ServerArgs`` that a program made of its command line; SGLang keeps notes of its own there."""

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


def refuse(
    quantization: str | None,
    a2a: str,
    *,
    eplb: bool = False,
    redundant: int = 0,
    lora: bool = False,
    tbo: bool = False,
    pdmux: bool = False,
    ray: bool = False,
) -> None:
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
    if pdmux:
        raise ConfigError(FLAG, "--enable-pdmux", "no PD multiplexing: its two streams would share one workspace")
    if ray:
        raise ray_error(FLAG)


def ray_error(flag: str) -> ConfigError:
    return ConfigError(flag, "Ray's scheduler actors (--use-ray), which load no plugins", "SGLang's own processes, or another backend")


def quantization_of(asked: str | None, model_config: Any) -> str | None:
    """SGLang's name of what describes the experts; ``asked``: the resolved flag, which may be the generic ``modelopt`` or None."""
    if model_config.nvfp4_moe_meta is not None:
        return "modelopt_fp4"  # FP8 with NVFP4 experts (DeepSeek-V4-Pro-NVFP4), for which SGLang takes that class
    return model_config.quantization if asked in (None, "modelopt") else asked


def gdn_by_file(provider: str, decode: str | None, base: str) -> str | None:
    """The decode backend that the configuration file asks for where the command line leaves it open, or None.

    ``provider`` is the setting ``gdn.provider``: only an explicit ``cutedsl`` does, ``auto`` leaves SGLang's default.
    """
    return GDN_BACKEND if provider == "cutedsl" and decode is None and base == "triton" else None


def moe_by_file(take: bool, provider: str, runner: str) -> bool:
    """Whether the configuration file asks for this package's runner where the model's experts are NVFP4 and no flag names a runner.

    ``take`` and ``provider`` are the settings ``take_nvfp4_checkpoints`` and ``moe.provider``.
    """
    return take and provider != "engine" and runner == "auto"


def nvfp4_experts(view: Any, model_config: Any) -> bool:
    """Whether a model has NVFP4 experts: by its files, or by its description where they are still to be downloaded."""
    from ...nvfp4.files import read_headers
    from ...nvfp4.scheme import lacks_layers, parse_scheme

    if model_config.nvfp4_moe_meta is not None:
        return True
    quantization = quantization_of(view.quantization, model_config)
    if quantization not in QUANTIZATIONS:
        return False
    if holds_weights(view.model_path):
        return any(map(_EXPERT_SCALE.search, read_headers(Path(view.model_path))))
    text = model_config.hf_text_config
    if not any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return False
    described = getattr(model_config.hf_config, "quantization_config", None)
    if not isinstance(described, Mapping) or lacks_layers(described):
        return quantization.startswith("modelopt")  # by a file beside config.json, which SGLang has read for that name
    try:
        scheme = parse_scheme(described)
    except CheckpointError:  # of another format
        return False
    layers = range(text.num_hidden_layers)
    return any(scheme.layer_kind(f"model.layers.{layer}.mlp.experts.0.up_proj") == "nvfp4" for layer in layers)


def holds_weights(model_path: str) -> bool:
    folder = Path(model_path)
    return folder.is_dir() and any(folder.glob("*.safetensors"))


def dense_by_file(provider: str, activations: str, strict: bool) -> str | None:
    """What to say of settings for dense NVFP4 layers, which stay SGLang's; None if there are none. Raises ConfigError if ``strict``."""
    asked = {"linear.provider": provider, "linear.activations": activations}
    unused = [f"{name} {value!r}" for name, value in asked.items() if value not in ("auto", "engine")]
    if unused and strict:
        raise ConfigError("strict", f"true with {' and '.join(unused)}", "auto: dense NVFP4 layers stay on SGLang's kernels")
    return f"Dense NVFP4 layers stay on SGLang's kernels; not used: {', '.join(unused)}" if unused else None


# --- resolution of arguments: (server_args, previous), see SGLang's resolution_hooks ----------------------------------------------------


def ends_programs(step: Callable[[Any, Callable[[Any], None]], None]) -> Callable[[Any, Callable[[Any], None]], None]:
    """A step whose refusals end a program as argparse's do, with one line; whoever made the arguments in Python gets the exception."""

    @functools.wraps(step)
    def resolve(server_args: Any, previous: Callable[[Any], None]) -> None:
        try:
            step(server_args, previous)
        except PluginError as error:
            if not getattr(server_args, _COMMAND_LINE, False):
                raise
            raise SystemExit(f"moe-backend-plugin: error: {error}") from None

    return resolve


@ends_programs
def check_moe(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around ``handle_moe_kernel_config``: refuse what cannot work, before weights are read.

    ``take_nvfp4_checkpoints`` chooses this package where no flag says otherwise; what cannot work then stays SGLang's, unless ``strict``.
    """
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    from .settings import plugin_config

    view, config = resolved_view(server_args), plugin_config()
    known(view.moe_runner_backend, MOE_RUNNER_BACKEND_CHOICES)
    by_file = moe_by_file(config.take_nvfp4_checkpoints, config.moe.provider, view.moe_runner_backend)
    if by_file and nvfp4_experts(view, model_config_of(server_args)):
        try:
            check_combination(view, model_config_of(server_args))
        except PluginError as error:
            if config.strict:
                raise
            logger.warning("take_nvfp4_checkpoints: the experts stay on SGLang's runner. %s", error)
        else:
            declare_resolution(server_args, "moe_backend_plugin", moe_runner_backend=MOE_BACKEND)
            logger.info("take_nvfp4_checkpoints in this package's settings: %s", FLAG)
    previous(server_args)
    view = resolved_view(server_args)
    if view.moe_runner_backend != MOE_BACKEND:
        return
    check_combination(view, model_config_of(server_args))
    check_files(view, model_config_of(server_args), config.checkpoint_check)
    if said := dense_by_file(config.linear.provider, config.linear.activations, config.strict):
        logger.warning(said)


def check_combination(view: Any, model_config: Any) -> None:
    """Refuse a name that is somebody else's, and a device, checkpoint or flag that the runner cannot be combined with."""
    import sglang.srt.layers.moe.moe_runner.runner  # noqa: F401  registers the core, and finds out whether the name is free
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES

    from .settings import moe_provider

    if MOE_RUNNER_BACKEND_CHOICES.count(MOE_BACKEND) > 1:
        claim_failed("an entry of that name from another plugin too")
    if _claimed_by:
        raise ConfigError(FLAG, _claimed_by, "one owner of the name; SGLANG_PLUGINS says which plugins are loaded")
    refuse(
        quantization_of(view.quantization, model_config),
        view.moe_a2a_backend,
        eplb=view.enable_eplb,
        redundant=view.ep_num_redundant_experts,
        lora=bool(view.enable_lora or view.lora_paths),
        tbo=view.enable_two_batch_overlap,
        pdmux=view.enable_pdmux,
        ray=view.use_ray,
    )
    moe_provider(FLAG)


def check_files(view: Any, model_config: Any, depth: Literal["full", "headers"]) -> None:
    """Refuse a bad checkpoint that lies here; one that is still to be downloaded is checked while it loads. Raises CheckpointError."""
    from ...nvfp4.checkpoint import check_checkpoint

    here = view.load_format in ("auto", "safetensors") and holds_weights(view.model_path)
    if here and model_config.nvfp4_moe_meta is None:  # that one is described as FP8, with experts apart
        check_checkpoint(Path(view.model_path), depth=depth)


@ends_programs
def choose_gdn(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around ``handle_linear_attn_backend``: ``gdn.provider: cutedsl`` chooses this package where no flag says otherwise.

    Only for a model with gated-delta-net layers. Of other models some ignore the flag, and those whose layers cannot are refused.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    from ...config import load_config

    view = resolved_view(server_args)
    config = load_config()
    by_flag = GDN_BACKEND in (view.linear_attn_decode_backend, view.linear_attn_backend)
    chosen = gdn_by_file(config.gdn.provider, view.linear_attn_decode_backend, view.linear_attn_backend)
    if by_flag and config.gdn.provider in ("engine", "torch"):
        raise ConfigError(GDN_FLAG, f"gdn.provider {config.gdn.provider!r} in this package's settings", "auto or cutedsl")
    is_gdn, others = linear_attention(model_config_of(server_args)) if by_flag or chosen else (False, None)
    if by_flag and others:
        raise UnsupportedLayerError(GDN_FLAG, others, "a model with gated-delta-net layers, or another backend")
    if is_gdn:
        if view.use_ray:
            raise ray_error(GDN_FLAG)
        if view.enable_linear_replayssm:
            raise UnsupportedLayerError(GDN_FLAG, "--enable-linear-replayssm, which keeps states in rings", "one of the two")
        if chosen:
            declare_resolution(server_args, "moe_backend_plugin", linear_attn_decode_backend=chosen)
    previous(server_args)


def linear_attention(model_config: Any) -> tuple[bool, str | None]:
    """Whether the model's layers call SGLang's GDN backend; else what they are if that model must not be given this package's name.

    (False, None): the model's layers read no name of a backend.
    """
    from sglang.srt.configs.hybrid_arch import JetNemotronConfig, JetVLMConfig, hybrid_gdn_config, hybrid_kda_config, linear_attn_model_spec

    spec = linear_attn_model_spec(model_config)
    backend = spec.backend_class_name.rpartition(".")[2] if spec else ""
    config = hybrid_gdn_config(model_config)
    if isinstance(config, JetNemotronConfig | JetVLMConfig):
        return False, "Jet-Nemotron's layers, which call a kernel of their own"
    if hybrid_kda_config(model_config) is not None or backend == "KDAAttnBackend":
        return False, "KDA layers (Kimi Delta Attention)"
    return config is not None or backend == "GDNAttnBackend", None


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


def mark_command_lines(module: Any) -> None:
    """Note on arguments that they were a command line; a plain function for the reason that :func:`add_alias` names."""
    original = inspect.getattr_static(module.ServerArgs, "from_cli_args")

    def from_cli_args(cls: type, args: Any) -> Any:
        made = original.__get__(None, cls)(args)
        setattr(made, _COMMAND_LINE, True)
        return made

    module.ServerArgs.from_cli_args = classmethod(from_cli_args)


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


def refuse_in_ray(module: Any) -> None:
    """No scheduler in an actor of Ray where a backend is this package's."""
    from .hooks import wrap

    wrap(module, "RayEngine._launch_scheduler_processes", _launch_in_ray)


def _launch_in_ray(wrapped: Callable, _instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around ``RayEngine._launch_scheduler_processes(server_args, ...)``."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    view = resolved_view(args[0] if args else kwargs["server_args"])
    if view.moe_runner_backend == MOE_BACKEND:
        raise ray_error(FLAG)
    if GDN_BACKEND in (view.linear_attn_decode_backend, view.linear_attn_backend):
        raise ray_error(GDN_FLAG)
    return wrapped(*args, **kwargs)
