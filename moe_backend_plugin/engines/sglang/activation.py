"""SGLang's words for what lies between an expert's projections."""

from __future__ import annotations

from typing import Any

from ...errors import PluginError
from ...moe.problem import Activation


def activation_of(config: Any) -> Activation:
    """From a ``MoeRunnerConfig``. Raises PluginError (a ValueError) where this package has no such function.

    SGLang says "silu" for four functions: plain, clamped (``swiglu_limit``), with ``gemm1_alpha`` the one that other engines call
    swigluoai, whose clamp is ``gemm1_clamp_limit`` and whose ``gemm1_beta`` is 1 where the model says nothing; and with that clamp alone
    the one that they call swiglustep, which clamps the gate after silu and is not served.
    """
    name = config.activation
    if not config.is_gated:
        if name != "relu2":
            raise PluginError("activation without a gate", repr(name), "relu2")
        return Activation("relu2")
    if name != "silu":
        raise PluginError("activation", repr(name), "silu (plain, with swiglu_limit, or with gemm1_alpha)")
    if config.gemm1_alpha is None:
        if config.gemm1_clamp_limit is not None:
            found = f"gemm1_clamp_limit {config.gemm1_clamp_limit} without gemm1_alpha, which clamps the gate after silu"
            raise PluginError("activation", found, "silu (plain, with swiglu_limit, or with gemm1_alpha)")
        return Activation("silu", limit=config.swiglu_limit or None)
    beta = 1.0 if config.gemm1_beta is None else config.gemm1_beta
    return Activation("swigluoai", float(config.gemm1_alpha), float(beta), config.gemm1_clamp_limit or None)
