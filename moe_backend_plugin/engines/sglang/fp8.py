"""FP8 experts beside NVFP4 ones, of a draft model or of some layers of a mixed checkpoint: they stay SGLang's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import UnsupportedLayerError
from .hooks import wrap
from .moe import selected, with_triton


def take(module: Any) -> None:
    """Have FP8 experts find a runner where the flag names this package's."""
    wrap(module, "Fp8MoEMethod.create_moe_runner", _create_moe_runner)


def _create_moe_runner(wrapped: Callable, instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around ``Fp8MoEMethod.create_moe_runner(layer, moe_runner_config)``."""
    if not selected():
        return wrapped(*args, **kwargs)
    if instance.is_fp4_expert:
        layer = args[0] if args else kwargs["layer"]
        allowed = "NVFP4, FP8 or bf16 experts, or for a draft model another --speculative-moe-runner-backend"
        raise UnsupportedLayerError(f"{layer.layer_name}", "MXFP4 experts", allowed)
    return with_triton(wrapped, *args, **kwargs)
