"""SGLang: the entry point of ``sglang.srt.plugins``.

SGLang calls :func:`register` in every process, before it parses arguments. The function is idempotent and cheap: it extends two lists
of choices and leaves the rest to import hooks, so that processes which build no model (tokenizer, detokenizer) import nothing heavy.
"""

from __future__ import annotations

MOE_BACKEND = "cutedsl"
"""The value of ``--moe-runner-backend``, and of its alias ``--moe-backend``, that selects this package."""
GDN_BACKEND = "cutedsl_plugin"
"""The value of ``--linear-attn-decode-backend``; SGLang has a ``cutedsl`` of its own there."""

_registered = False


def register() -> None:
    """Register the MoE runner, the GDN backend and their arguments with SGLang; a second call does nothing.

    Raises:
        ConfigError: SGLang is not installed.
    """
    global _registered
    if _registered:
        return
    try:
        from sglang.srt.arg_groups import choices
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != "sglang":
            raise  # SGLang is there and lacks something itself
        from ...errors import ConfigError

        raise ConfigError("engine", "no SGLang", "SGLang 0.5.22 or 0.5.23; pip install 'moe-backend-plugin[sglang]'") from None
    _registered = True

    from . import arguments, hooks

    if MOE_BACKEND in choices.MOE_RUNNER_BACKEND_CHOICES:
        arguments.claim_failed(f"an entry of that name in this SGLang, or from another plugin, before {__name__}")
    else:
        choices.add_moe_runner_backend_choices([MOE_BACKEND])
    if GDN_BACKEND not in choices.LINEAR_ATTN_KERNEL_BACKEND_CHOICES:
        choices.add_linear_attn_kernel_backend_choices([GDN_BACKEND])
    register_resolution_hook("handle_moe_kernel_config")(arguments.check_moe)
    register_resolution_hook("handle_linear_attn_backend")(arguments.choose_gdn)
    hooks.install()
