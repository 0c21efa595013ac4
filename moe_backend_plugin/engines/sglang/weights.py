"""The NVFP4 experts of one SGLang layer: parameters that SGLang's weight loader fills, and what they become.

Nothing here imports SGLang: a layer is a module with ``layer_name`` and ``_map_global_expert_id_to_local_expert_id``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Module, Parameter

from ...errors import CheckpointError
from ...kernels.compile import name_of
from ...moe.problem import MoEProblem
from ...nvfp4.format import BLOCK
from ...nvfp4.scheme import TensorNames
from ...nvfp4.unscaled import to_planes
from .. import packing
from ..loading import MISSING, WEIGHT_ALLOWED, check_block_scales, check_global_scales, nan_filled

PROJECTIONS = {"w1": "gate projection", "w2": "down projection", "w3": "up projection"}
DUMMY_SCALE_2 = 2.0**-6


class ExpertWeights:
    """Weights of one layer. ``provider``: "cutedsl", in the order of ``nvfp4.hopper``; or "torch", in planes of codes.

    While a checkpoint is loaded the layer has ``w13_`` and ``w2_`` parameters under the names of :class:`TensorNames`. After
    :meth:`finish` it has ``w13_weight`` and ``w2_weight`` in the provider's form (and for torch ``w13_planes_scale``,
    ``w2_planes_scale``), ``w13_scale_2`` float32 [E, 2 or 1] and ``w2_scale_2`` float32 [E]. :meth:`restore` goes back, so that
    weights can be loaded again; the Hopper kernels' tensors then keep their addresses, which CUDA graphs hold.
    """

    def __init__(self, names: TensorNames, provider: str, problem: MoEProblem) -> None:
        self.names, self.provider, self.problem = names, provider, problem
        self.loaded: dict[str, set[tuple[int, str]]] = {"w13": set(), "w2": set()}
        self.finished = False
        self._loader: Callable | None = None

    # -- loading ---------------------------------------------------------------------------------------------------------------------

    def create(self, layer: Module, loader: Callable, input_experts: int | None, everyone: bool = False) -> None:
        """Register the parameters.

        ``input_experts``: how many experts have input scales, which nobody reads but which SGLang's loader must find; None if the
        checkpoint has none. ``everyone``: those are all experts of the model, not only this rank's.
        """
        self._loader = loader
        for gemm in ("w13", "w2"):
            self._register(layer, gemm, *self._allocate(gemm), nan_filled(self._scale_2_shape(gemm), torch.float32))
            if input_experts is not None:
                shape = (input_experts, *self._scale_2_shape(gemm)[1:])
                attributes = {"quant_method": "tensor", **({"_sglang_require_global_experts": True} if everyone else {})}
                self._parameter(layer, f"{gemm}_{self.names.input_scale}", torch.ones(shape), loader, **attributes)

    def _sizes(self, gemm: str) -> tuple[int, int, int]:
        p = self.problem
        return (p.num_local_experts, *((p.w13_rows, p.hidden) if gemm == "w13" else (p.hidden, p.intermediate)))

    def _scale_2_shape(self, gemm: str) -> tuple[int, ...]:
        experts = self.problem.num_local_experts
        return (experts, 2 if self.problem.activation.gated else 1) if gemm == "w13" else (experts,)

    def _gated(self, gemm: str) -> bool:
        return gemm == "w13" and self.problem.activation.gated

    def _allocate(self, gemm: str) -> tuple[torch.Tensor, torch.Tensor]:
        experts, rows, columns = self._sizes(gemm)
        if self.provider == "cutedsl":
            return packing.allocate(experts, rows, columns, self._gated(gemm))
        codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
        return codes, nan_filled((experts, rows, columns // BLOCK), torch.float8_e4m3fn)

    def _register(self, layer: Module, gemm: str, codes: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor) -> None:
        names, loader = self.names, self._loader
        # SGLang slices what is marked "block" by rank as it slices weights, and keeps what is marked "tensor" apart for gate and up.
        self._parameter(layer, f"{gemm}_{names.weight}", codes, self._checked(layer, gemm, names.weight, loader, count=True))
        scale_loader = self._checked(layer, gemm, names.scale, loader)
        self._parameter(layer, f"{gemm}_{names.scale}", scales, scale_loader, quant_method="block")
        scale_2_loader = self._checked(layer, gemm, names.global_scale, loader)
        self._parameter(layer, f"{gemm}_{names.global_scale}", scale_2, scale_2_loader, quant_method="tensor")

    @staticmethod
    def _parameter(layer: Module, name: str, data: torch.Tensor, loader: Callable, **attributes: Any) -> None:
        parameter = Parameter(data, requires_grad=False)
        for attribute, value in {"weight_loader": loader, **attributes}.items():
            setattr(parameter, attribute, value)
        layer.register_parameter(name, parameter)

    def _checked(self, layer: Module, gemm: str, suffix: str, loader: Callable, count: bool = False) -> Callable:
        """SGLang's loader, which copies and so converts silently, but for tensors of another type; ``count``: note what came."""

        def load(param: torch.Tensor, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int | None = None) -> None:
            if loaded_weight.dtype != param.dtype:
                place = self._name(layer, expert_id, shard_id, suffix)
                raise CheckpointError(place, f"dtype {name_of(loaded_weight.dtype)}", name_of(param.dtype))
            # The loader of checkpoints with one tensor for all experts takes no expert.
            which = {} if expert_id is None else {"expert_id": expert_id}
            loader(param, loaded_weight, weight_name, shard_id=shard_id, **which)
            if count:
                local = layer._map_global_expert_id_to_local_expert_id(expert_id) if which else -1
                experts = range(self.problem.num_local_experts) if not which else (local,) if local != -1 else ()
                self.loaded[gemm] |= set(itertools.product(experts, ("w1", "w3") if shard_id == "w13" else (shard_id,)))

        return load

    @staticmethod
    def _name(layer: Module, expert: int | None, shard_id: str, suffix: str) -> str:
        which = "all experts" if expert is None else f"expert {expert}"
        return f"{layer.layer_name}, {which}, {PROJECTIONS.get(shard_id, shard_id)}: {suffix}"

    # -- after loading ---------------------------------------------------------------------------------------------------------------

    def finish(self, layer: Module, dummy: bool = False) -> None:
        """From the checkpoint's form to the provider's. ``dummy``: what no loader delivered are random numbers, which need not be valid.

        Raises:
            CheckpointError: a tensor is missing, or a scale is no number or negative.
        """
        if self.finished:
            return
        # SGLang still says "dummy" when the first real weights have come, by an update.
        if dummy and not any(self.loaded.values()):
            self._make_valid(layer)
        else:
            self._check(layer)
        for gemm in ("w13", "w2"):
            codes, scales = self._take(layer, gemm, self.names.weight), self._take(layer, gemm, self.names.scale)
            scale_2 = self._take(layer, gemm, self.names.global_scale)
            if self.names.reciprocal:
                scale_2 = scale_2.reciprocal()
            if self.provider == "cutedsl":
                self._keep(layer, f"{gemm}_weight", packing.rearrange(codes, scales, gated=self._gated(gemm)))
            else:
                planes, planes_scale = to_planes(codes, scales)
                self._keep(layer, f"{gemm}_weight", planes)
                self._keep(layer, f"{gemm}_planes_scale", planes_scale)
            if (kept := getattr(layer, f"{gemm}_scale_2", None)) is not None:
                kept.data.copy_(scale_2)  # a graph may hold its address
            else:
                self._keep(layer, f"{gemm}_scale_2", scale_2)
        self.finished = True

    def restore(self, layer: Module) -> None:
        """From the provider's form to parameters that weights can be loaded into again, all of them or some."""
        if not self.finished:
            return
        for gemm in ("w13", "w2"):
            scale_2 = getattr(layer, f"{gemm}_scale_2").data.clone()
            if self.names.reciprocal:
                scale_2 = scale_2.reciprocal()
            packed = getattr(layer, f"{gemm}_weight").data
            delattr(layer, f"{gemm}_weight")
            if self.provider == "cutedsl":
                codes, scales = packing.restore(packed, *self._sizes(gemm)[1:], gated=self._gated(gemm))
            else:  # nothing holds addresses on a CPU; all weights have to come again
                codes, scales = self._allocate(gemm)
                self.loaded[gemm].clear()
            self._register(layer, gemm, codes, scales, scale_2)
        self.finished = False

    @staticmethod
    def _take(layer: Module, gemm: str, suffix: str) -> torch.Tensor:
        tensor = getattr(layer, f"{gemm}_{suffix}").data
        delattr(layer, f"{gemm}_{suffix}")
        return tensor

    @staticmethod
    def _keep(layer: Module, name: str, data: torch.Tensor) -> None:
        layer.register_parameter(name, Parameter(data, requires_grad=False))

    def _parts(self, gemm: str) -> tuple[str, ...]:
        return ("w2",) if gemm == "w2" else ("w1", "w3") if self.problem.activation.gated else ("w1",)

    def _check(self, layer: Module) -> None:
        names = self.names
        for gemm in ("w13", "w2"):
            parts = self._parts(gemm)
            # An expert without a gate has one input projection, which models call either way.
            seen = {(e, "w1" if part == "w3" and len(parts) == 1 else part) for e, part in self.loaded[gemm]}
            for expert, part in itertools.product(range(self.problem.num_local_experts), parts):
                if (expert, part) not in seen:
                    raise CheckpointError(self._local(layer, expert, part, names.weight), MISSING, WEIGHT_ALLOWED)
            rows = self._sizes(gemm)[1] // len(parts)
            check_block_scales(
                getattr(layer, f"{gemm}_{names.scale}").data,
                lambda expert, row, parts=parts, rows=rows: self._local(layer, expert, parts[row // rows], names.scale),
            )
            check_global_scales(
                getattr(layer, f"{gemm}_{names.global_scale}").data,
                lambda expert, part=0, parts=parts: self._local(layer, expert, parts[part], names.global_scale),
            )

    def _local(self, layer: Module, expert: int, shard_id: str, suffix: str) -> str:
        return self._name(layer, expert, shard_id, suffix).replace(", expert", ", local expert")

    def _make_valid(self, layer: Module) -> None:
        for gemm in ("w13", "w2"):
            # Finite and not negative: below 2 in E4M3.
            getattr(layer, f"{gemm}_{self.names.scale}").data.view(torch.uint8).bitwise_and_(0x3F)
            scale_2 = 1 / DUMMY_SCALE_2 if self.names.reciprocal else DUMMY_SCALE_2
            getattr(layer, f"{gemm}_{self.names.global_scale}").data.fill_(scale_2)
            # As if delivered: an update of some tensors then finds the others in place.
            self.loaded[gemm] = set(itertools.product(range(self.problem.num_local_experts), self._parts(gemm)))
