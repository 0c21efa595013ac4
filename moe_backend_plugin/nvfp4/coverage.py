"""Whether a checkpoint holds every expert, and whether its exclude patterns name anything."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError
from .names import is_generic, parents, spellings
from .scheme import QuantScheme

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(.+)$")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _listed(numbers: list[int], limit: int = 8) -> str:
    return ", ".join(map(str, numbers[:limit])) + (f", ... ({len(numbers)})" if len(numbers) > limit else "")


def check_experts(tensors: Collection[str], config: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` if a layer's list of experts has a hole, another length than ``config`` says, or ragged entries.

    ``tensors``: tensor names. ``config``: the model's configuration (fields of ``text_config`` at its top).
    """
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in tensors:
        if match := _EXPERT.match(name):
            layers[match.group(1)][int(match.group(2))].add(match.group(3))
    key = next((k for k in _COUNTS if isinstance(config.get(k), int) and config[k] > 0), None)
    for layer, experts in layers.items():
        count = config[key] if key else max(experts) + 1
        missing = sorted(set(range(count)) - set(experts))
        extra = sorted(set(experts) - set(range(count)))
        said = f"experts 0 to {count - 1}" + (f" ({key} = {count} in config.json)" if key else " without holes")
        if missing:
            raise CheckpointError(layer, f"experts {_listed(sorted(experts))}; {_listed(missing)} missing", said)
        if extra:
            raise CheckpointError(layer, f"experts up to {extra[-1]}", said)
        every = set().union(*experts.values())
        for number, held in experts.items():
            if lacking := sorted(every - held):
                raise CheckpointError(f"{layer}.{number}", f"no {lacking[0]}", "the same tensors in every expert of a layer")


def check_excludes(scheme: QuantScheme, tensors: Collection[str], tied: bool, tolerate: bool) -> tuple[str, ...]:
    """Exclude patterns that name no module of the checkpoint and need not; raise :class:`CheckpointError` for one that should.

    A pattern that starts with a wildcard is a recipe's default and need not match; an ``lm_head`` tied to the embedding has
    no tensor of its own; compressed-tensors may list class names. ``tolerate`` accepts all.
    """
    modules = parents(tensors)
    known = {s for m in modules for s in spellings(m)}
    unmatched = []
    for pattern in scheme.exclude:
        if known.intersection(spellings(pattern)):
            continue
        # Matching a leaf's own parents is implied: the predicate also accepts anything beneath what a pattern names.
        if any(scheme.excludes(m, class_name="", patterns=(pattern,)) for m in modules):
            continue
        class_name = scheme.producer == "compressed-tensors" and re.fullmatch(r"[A-Z]\w*", pattern)
        harmless = is_generic(pattern) or class_name or tied and scheme.excludes("lm_head", patterns=(pattern,))
        if not harmless and not tolerate:
            found = f"{pattern!r}, which names no module of the checkpoint"
            raise CheckpointError(f"{scheme.source}: exclude list", found, "names or patterns of modules that are there")
        unmatched.append(pattern)
    return tuple(unmatched)
