"""vLLM: the entry point of ``vllm.general_plugins``.

vLLM calls :func:`register` in every process, before it parses arguments and before it builds a model, so the
function must be idempotent and cheap.  It therefore registers one light class and two import hooks; the layers
themselves are imported only when vLLM imports theirs.
"""

from __future__ import annotations

QUANTIZATION = "nvfp4_cutedsl"
"""The value of ``--quantization`` that selects this package."""

_registered = False


def register() -> None:
    """Register the quantization method and the GDN layer with vLLM; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True

    from wrapt.importer import register_post_import_hook

    from . import quantization  # noqa: F401  registers the method

    register_post_import_hook(_wrap_arguments, "vllm.engine.arg_utils")
    # Importing vLLM's GDN layer costs a third of a second and most models have none: replace it when it appears.
    register_post_import_hook(_register_gdn, "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn")


def _wrap_arguments(module: object) -> None:
    from wrapt import wrap_function_wrapper

    from .arguments import create_engine_config

    wrap_function_wrapper(module, "EngineArgs.create_engine_config", create_engine_config)


def _register_gdn(_module: object) -> None:
    from . import gdn  # noqa: F401  registers the layer
