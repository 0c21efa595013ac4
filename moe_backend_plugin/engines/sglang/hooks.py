"""Every place where this package changes SGLang without a registry for it, and why.

SGLang's registries are used where they exist: runner cores (``register_moe_runner_core``), choices of arguments
(``add_moe_runner_backend_choices``, ``add_linear_attn_kernel_backend_choices``) and steps of the resolution of arguments
(``register_resolution_hook``). What is left is in :data:`HOOKS`. SGLang's ``HookRegistry`` could make these changes too, but it imports
each target as soon as plugins are loaded, in every process; here a change waits until SGLang imports the module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from wrapt.importer import register_post_import_hook


@dataclass(frozen=True)
class Hook:
    """``apply(module)`` changes ``name`` (a dotted name in ``module``) once SGLang has imported ``module``."""

    module: str
    name: str
    apply: str
    """A function of this package, as ``module:function``."""
    reason: str

    def install(self) -> None:
        register_post_import_hook(self._imported, self.module)

    def _imported(self, module: object) -> None:
        ours, _, function = self.apply.partition(":")
        getattr(import_module(f".{ours}", __package__), function)(module)


HOOKS = (
    Hook(
        "sglang.srt.layers.moe.moe_runner.runner",
        "register_moe_runner_core",
        "moe:register_core",
        "not a change: the registry itself, called when SGLang has imported it, which takes seconds",
    ),
    Hook(
        "sglang.srt.server_args",
        "ServerArgs.add_cli_args",
        "arguments:add_alias",
        "no registry adds a flag or an alias; --moe-backend, on the command line and in --config, stands for --moe-runner-backend",
    ),
    Hook(
        "sglang.srt.server_args",
        "ServerArgs.from_cli_args",
        "arguments:mark_command_lines",
        "nothing says whether arguments were a command line, for which a refusal should be one line, or Engine's keywords, for which it "
        "must be an exception that can be caught; programs are the only callers",
    ),
    Hook(
        "sglang.srt.entrypoints.engine",
        "Engine.server_args_class",
        "arguments:accept_alias",
        "Engine(moe_backend=...) constructs this class with its keywords, after it has loaded plugins; a Struct has no __init__ to wrap",
    ),
    Hook(
        "sglang.srt.layers.quantization.modelopt_quant",
        "ModelOptNvFp4FusedMoEMethod.__new__",
        "modelopt:take",
        "ModelOpt configurations name this class, whose __init__ refuses Hopper with any runner but marlin and whose apply knows the "
        "built-in runners only; where the runner is this package's, a subclass comes instead",
    ),
    Hook(
        "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors",
        "CompressedTensorsConfig.get_moe_scheme",
        "compressed_tensors:take",
        "NVFP4 schemes of compressed-tensors ignore --moe-runner-backend and construct a marlin or FlashInfer runner",
    ),
    Hook(
        "sglang.srt.layers.quantization.fp8",
        "Fp8MoEMethod.create_moe_runner",
        "fp8:take",
        "for a runner that is not built in it makes none and fails in the first forward; FP8 experts of a draft model, which inherits the "
        "runner's name, and of a mixed checkpoint run on Triton, as beside SGLang's own NVFP4 runners",
    ),
    Hook(
        "sglang.srt.ray.engine",
        "RayEngine._launch_scheduler_processes",
        "arguments:refuse_in_ray",
        "scheduler actors never load plugins, and RayEngine may be constructed without use_ray, which is looked at with the arguments",
    ),
    Hook(
        "sglang.srt.layers.attention.linear.gdn_backend",
        "GDNKernelDispatcher.__init__",
        "gdn:take_dispatcher",
        "an unknown linear attention backend becomes CUSTOM, for which the dispatcher has no registry and raises",
    ),
    Hook(
        "sglang.srt.layers.attention.linear.gdn_backend",
        "GDNAttnBackend.__init__",
        "gdn:take_backend",
        "kernels are compiled before the first request, and the dispatcher is not told the model's sizes and types",
    ),
)


def install() -> None:
    for hook in HOOKS:
        hook.install()


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Put ``around(wrapped, instance, args, kwargs)`` around a function or method."""
    from wrapt import wrap_function_wrapper

    wrap_function_wrapper(owner, name, around)
