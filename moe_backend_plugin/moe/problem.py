"""What one MoE layer computes: its sizes, its activation function, and how activations are rounded.

Layout of the first projection, everywhere in this package: ``w13`` holds the gate rows first and the up rows after them
(two halves of I rows each). Checkpoints that interleave them row by row are reordered when they are loaded, so an
activation here never says anything about layout. An activation without a gate has I rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import PluginError
from ..nvfp4.format import BLOCK

ActivationKind = Literal["silu", "swigluoai", "relu2"]
KINDS: tuple[str, ...] = ("silu", "swigluoai", "relu2")

ACTIVATION_NAMES = ("silu", "swiglu", "swigluoai", "swigluoai_uninterleave", "relu2", "relu2_no_mul")
"""Names that :meth:`Activation.parse` knows."""


@dataclass(frozen=True)
class Activation:
    """The function between the two projections, on ``gate`` and ``up`` (or on ``up`` alone), in float32.

    ===========  ============================================================
    silu         ``g * sigmoid(g) * u``
    swigluoai    ``g * sigmoid(alpha * g) * (u + beta)``
    relu2        ``max(u, 0) ** 2``, no gate
    ===========  ============================================================

    With a ``limit`` the gated kinds use ``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)``: before the
    function, so very negative gates pass. ``limit`` None means no clamp. ``alpha`` and ``beta`` belong to swigluoai.
    NaN passes through every step.

    Raises PluginError (a ValueError) on an unknown kind, a limit that is not positive, or parameters the kind has not.
    """

    kind: ActivationKind = "silu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PluginError("activation kind", repr(self.kind), ", ".join(KINDS))
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta)):
            raise PluginError("activation alpha, beta", f"{self.alpha}, {self.beta}", "finite numbers")
        if self.kind != "swigluoai" and (self.alpha, self.beta) != (1.0, 0.0):
            raise PluginError(
                f"activation {self.kind}", f"alpha {self.alpha}, beta {self.beta}", "alpha 1, beta 0 (only swigluoai has them)"
            )
        if self.limit is not None and (self.kind == "relu2" or not self.limit > 0):
            raise PluginError(
                f"activation {self.kind}", f"limit {self.limit}", "no limit" if self.kind == "relu2" else "a positive limit, or none"
            )

    @property
    def gated(self) -> bool:
        """Whether the first projection has gate rows."""
        return self.kind != "relu2"

    @classmethod
    def parse(cls, name: str, alpha: float | None = None, beta: float | None = None, limit: float | None = None) -> Activation:
        """From an engine's or a checkpoint's name and its optional parameters (None: not given).

        * ``silu``, ``swiglu``: gated silu; ``limit`` None or 0 for no clamp. ``alpha`` other than 1 or ``beta`` other
          than 0 is refused: models that set them mean ``swigluoai``.
        * ``swigluoai``: alpha 1.702, beta 1 and limit 7 where not given (the values of the models that brought the name).
        * ``swigluoai_uninterleave``: the same function where the checkpoint already has gate and up in halves; alpha 1
          and beta 0 where not given, and a limit is required. vLLM uses these defaults.
        * ``relu2``, ``relu2_no_mul``: squared ReLU without a gate; parameters must be absent or neutral.

        Not served, and refused: gelu variants, ``swiglustep`` (clamps the gate *after* silu) and ``situ``.

        Raises PluginError (a ValueError) that lists the allowed names.
        """
        if name in ("silu", "swiglu"):
            return cls("silu", _given(alpha, 1.0), _given(beta, 0.0), limit or None)
        if name == "swigluoai":
            return cls("swigluoai", _given(alpha, 1.702), _given(beta, 1.0), _given(limit, 7.0))
        if name == "swigluoai_uninterleave":
            if limit is None:
                raise PluginError("activation swigluoai_uninterleave", "no limit", "a positive swiglu_limit")
            return cls("swigluoai", _given(alpha, 1.0), _given(beta, 0.0), float(limit))
        if name in ("relu2", "relu2_no_mul"):
            return cls("relu2", _given(alpha, 1.0), _given(beta, 0.0), limit or None)
        raise PluginError("activation", repr(name), ", ".join(ACTIVATION_NAMES))

    def apply(self, h: Tensor) -> Tensor:
        """``h`` float32 ``[..., 2I]`` (gate, then up), or ``[..., I]`` without a gate, to a new float32 ``[..., I]``."""
        if self.kind == "relu2":
            return torch.relu(h).square_()
        gate, up = h.chunk(2, dim=-1)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        if self.kind == "silu":
            return torch.nn.functional.silu(gate).mul_(up)
        return torch.sigmoid(gate * self.alpha).mul_(gate).mul_(up + self.beta)


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)


@dataclass(frozen=True)
class MoEProblem:
    """Sizes and rules of one MoE layer on one rank.

    ``num_experts`` counts the model's routed experts (what the ids of the router range over), ``num_local_experts``
    those whose weights this rank holds; ``intermediate`` is the expert width I on this rank. ``activation_precision``
    "nvfp4" rounds the inputs of both projections to NVFP4 with static scales (W4A4); "bf16" leaves them in the model's
    type (W4A16). ``apply_router_weight_on_input`` multiplies the layer's input, not the experts' output, by the router
    weight.

    Raises PluginError (a ValueError) on sizes that no layer can have.
    """

    num_experts: int
    num_local_experts: int
    hidden: int
    intermediate: int
    top_k: int
    activation: Activation = Activation()
    activation_precision: Literal["bf16", "nvfp4"] = "bf16"
    apply_router_weight_on_input: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            if size <= 0 or size % BLOCK:
                raise PluginError(f"MoEProblem.{name}", str(size), f"a positive multiple of {BLOCK}")
        if not 0 < self.num_local_experts <= self.num_experts:
            raise PluginError("MoEProblem.num_local_experts", str(self.num_local_experts), f"1 to num_experts = {self.num_experts}")
        if self.top_k <= 0:
            raise PluginError("MoEProblem.top_k", str(self.top_k), "1 or more")
        if self.activation_precision not in ("bf16", "nvfp4"):
            raise PluginError("MoEProblem.activation_precision", repr(self.activation_precision), "bf16, nvfp4")

    @property
    def w13_rows(self) -> int:
        """Rows of the first projection: 2I with a gate, I without."""
        return self.intermediate * (2 if self.activation.gated else 1)
