"""Check a checkpoint against its quantisation description before any weight is loaded.

Headers say dtypes and shapes; of the data only the global scales and, at depth "full", the block scales are read (as bytes).

What exporters write for blocks of zeros, and for blocks too small for an E4M3 scale (looked up in the installed code and
tried out): ModelOpt 0.47 writes the scale 1 for zeros and raises underflows to 2^-9; compressed-tensors 0.17 writes 0.125
for both. Neither writes a zero scale. ModelOpt before the clamp rounded underflows to zero and the block's codes to +-6, so
a zero scale over nonzero codes means lost (if tiny) weights or a damaged file: refused unless tolerated. ModelOpt 0.47
writes ``weight_scale_2`` 0 and NaN block scales for a matrix of zeros: refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import CheckpointError
from .coverage import check_excludes, check_experts
from .files import Reader, Stored, read_headers
from .format import BLOCK
from .scheme import LayerKind, QuantScheme, TensorNames, read_json, read_scheme

Role = Literal["weight", "scale", "global_scale", "input_scale"]
_FLOATS = ("BF16", "F16", "F32")
_EXPERT = re.compile(r"\.experts\.")
_LAYER = re.compile(r"^(?:.*?\.)?(?:layers|h|blocks)\.\d+(?=\.)")
_GATE_UP = {"gate_proj": "up_proj", "w1": "w3"}
# Modules with a 2-D weight that no producer quantises and older exports leave out of their exclude lists.
_NOT_LINEAR = re.compile(r"(?:norm\w*|embed\w*|embeddings?|wte|wpe|conv\w*|(?:^|[._])gate|router|score|rotary\w*)$", re.IGNORECASE)
_NOT_TEXT = re.compile(r"(?:^|\.)(?:vision_\w+|visual|vit_large_projector|multi_modal_projector|audio_tower)\.")


@dataclass(frozen=True)
class Module:
    """One weight: module name, kind, whether a routed expert's, shape of the weight it stands for, bytes of all its tensors."""

    name: str
    kind: LayerKind
    expert: bool
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds.

    ``nbytes``: bytes by "expert" (NVFP4 weights of routed experts with their scales), "dense" (other NVFP4 weights),
    "other" (other quantised formats) and "unquantized". ``mismatched_gate_up``: global scales of gates that differ from
    their up projection's (a kernel with one scale for both must requantise). ``zero_blocks``: blocks with a zero scale
    (counted at depth "full"). ``unmatched_excludes``: exclude patterns that name nothing and were tolerated.
    """

    scheme: QuantScheme
    files: int
    tensors: int
    nbytes: dict[str, int]
    modules: tuple[Module, ...]
    mismatched_gate_up: tuple[str, ...] = ()
    zero_blocks: int = 0
    unmatched_excludes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> dict[str, dict[str, int]]:
        """Bytes by kind (as in ``nbytes``) for each decoder layer, in the file's order; "" holds what is in no layer."""
        table: dict[str, dict[str, int]] = {}
        for module in self.modules:
            match = _LAYER.match(module.name + ".")
            row = table.setdefault(match.group(0) if match else "", dict.fromkeys(self.nbytes, 0))
            row[_bucket(module)] += module.nbytes
        return table


@dataclass
class _Parts:
    """Tensors of one module, by role; ``rest`` are its others (biases, cache scales)."""

    name: str
    roles: dict[Role, Stored] = field(default_factory=dict)
    rest: list[Stored] = field(default_factory=list)

    @property
    def quantized(self) -> bool:
        weight = self.roles.get("weight")
        return bool(self.roles.keys() - {"weight"}) or weight is not None and weight.dtype not in (*_FLOATS, "F64")


def _bucket(module: Module) -> str:
    return module.kind if module.kind != "nvfp4" else "expert" if module.expert else "dense"


def _group(tensors: dict[str, Stored], names: TensorNames) -> dict[str, _Parts]:
    """Tensors by module. A fused expert weight ``experts.gate_up_proj`` with ``experts.gate_up_proj_weight_scale`` counts as one."""
    suffixes: dict[str, Role] = {names.scale: "scale", names.global_scale: "global_scale", names.input_scale: "input_scale"}
    fused = {n.removesuffix("_" + names.scale) for n in tensors if n.endswith("_" + names.scale)}
    modules: dict[str, _Parts] = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        role: Role | None = "weight" if leaf in (names.weight, "weight") else suffixes.get(leaf)
        if name in fused or tensor.dtype in _FLOATS and len(tensor.shape) == 3 and parent.endswith("experts"):
            parent, role = name, "weight"
        elif role is None:
            for suffix, suffix_role in suffixes.items():
                if leaf.endswith("_" + suffix):
                    parent, role = name.removesuffix("_" + suffix), suffix_role
        parts = modules.setdefault(parent, _Parts(parent))
        if role is None:
            parts.rest.append(tensor)
        elif role in parts.roles:
            raise CheckpointError(str(tensor), f"a second weight beside {parts.roles[role].name}", "one")
        else:
            parts.roles[role] = tensor
    return modules


def _check_presence(parts: _Parts, scheme: QuantScheme, suffix: dict[Role, str]) -> None:
    wanted: list[Role] = ["weight", "scale", "global_scale"]
    if scheme.nvfp4_activations(parts.name) == "nvfp4":
        wanted.append("input_scale")
    for role in wanted:
        if role not in parts.roles:
            found = ", ".join(sorted(t.name.rpartition(".")[2] for t in parts.roles.values()))
            allowed = f"{', '.join(suffix[r] for r in wanted)} together in an NVFP4 module ({scheme.algo})"
            raise CheckpointError(parts.name, f"{found} without {suffix[role]}", allowed)


def _check_shapes(parts: _Parts) -> tuple[int, ...]:
    """Raise unless the tensors of an NVFP4 module fit each other; the shape of the weight they stand for."""
    weight, scale = parts.roles["weight"], parts.roles["scale"]
    if weight.dtype != "U8":
        raise CheckpointError(str(weight), f"dtype {weight.dtype}", "U8, two E2M1 codes a byte")
    if len(weight.shape) not in (2, 3) or 0 in weight.shape:
        raise CheckpointError(str(weight), f"shape {list(weight.shape)}", "[N, K/2], or [E, N, K/2] for fused experts")
    lead, k = weight.shape[:-1], weight.shape[-1] * 2
    if k % BLOCK:
        raise CheckpointError(str(weight), f"shape {list(weight.shape)}, that is K = {k}", f"K a multiple of {BLOCK}")
    if scale.dtype != "F8_E4M3":
        raise CheckpointError(str(scale), f"dtype {scale.dtype}", "F8_E4M3, one scale for 16 values")
    if scale.shape != (*lead, k // BLOCK):
        note = " (a group size of 32: MXFP4)" if scale.shape == (*lead, k // 32) else ""
        allowed = f"{[*lead, k // BLOCK]}, a scale for {BLOCK} values of the weight's {[*lead, k]}"
        raise CheckpointError(str(scale), f"shape {list(scale.shape)}{note}", allowed)
    shapes = [(), (1,)] + ([(lead[0],), (lead[0], 1), (lead[0], 1, 1)] if len(lead) == 2 else [])
    for role in ("global_scale", "input_scale"):
        tensor = parts.roles.get(role)
        if tensor is None:
            continue
        if tensor.dtype != "F32":
            raise CheckpointError(str(tensor), f"dtype {tensor.dtype}", "F32")
        if tensor.shape not in shapes:
            raise CheckpointError(str(tensor), f"shape {list(tensor.shape)}", " or ".join(str(list(s)) for s in shapes))
    return (*lead, k)


def _check_scalars(parts: _Parts, reader: Reader) -> None:
    for role in ("global_scale", "input_scale"):
        if (tensor := parts.roles.get(role)) is not None:
            values = reader.floats_of(tensor)
            bad = ~(np.isfinite(values) & (values > 0))
            if bad.any():
                raise CheckpointError(str(tensor), f"the value {values[bad][0]:g}", "positive finite numbers")


def _check_block_scales(parts: _Parts, reader: Reader, tolerate_zeros: bool) -> int:
    """Raise on a NaN, negative or (over nonzero codes) zero block scale; the number of zero scales."""
    scale, weight = parts.roles["scale"], parts.roles["weight"]
    raw = reader.bytes_of(scale)
    low, high = int(raw.min()), int(raw.max())
    if high > 0x7E:  # 0x7F and 0xFF are NaN, 0x80 and above have the sign
        worst = int(np.argmax(raw > 0x7E))
        what = "NaN" if raw[worst] & 0x7F == 0x7F else "a negative scale"
        raise CheckpointError(f"{scale} (block {worst} of {raw.size})", f"{what} (byte {raw[worst]:#04x})", "positive E4M3 numbers")
    if low > 0:
        return 0
    blocks = np.flatnonzero(raw == 0)
    if not tolerate_zeros:
        codes = reader.bytes_of(weight).reshape(-1, BLOCK // 2)[blocks]
        lossy = (codes & 0x77).any(axis=1)  # 0x88 is the sign bits: -0 loses nothing either
        if lossy.any():
            where = f"{scale} (block {blocks[np.argmax(lossy)]} of {raw.size})"
            found = f"a zero scale over nonzero weights, in {int(lossy.sum())} blocks (older ModelOpt exports round tiny scales to zero)"
            raise CheckpointError(where, found, "positive E4M3 numbers, or zero where all 16 weights are zero")
    return len(blocks)


def _of_a_linear(name: str, modules: dict[str, _Parts]) -> bool:
    """Whether a module belongs to one with a weight of its own: a rotation of compressed-tensors' ``transform_config``."""
    while name := name.rpartition(".")[0]:
        if name in modules and "weight" in modules[name].roles:
            return True
    return False


def _check_kind(parts: _Parts, kind: LayerKind, scheme: QuantScheme, tied: bool, modules: dict[str, _Parts]) -> None:
    """Raise if a module is quantised in the description and not in the files, or the other way round."""
    weight = parts.roles.get("weight")
    if kind == "unquantized" and parts.quantized:
        # The weight itself if it is what is quantised, else the scale beside it.
        tensor = weight if weight is not None and weight.dtype not in _FLOATS else next(t for r, t in parts.roles.items() if r != "weight")
        by = next((p for p in scheme.exclude if scheme.excludes(parts.name, patterns=(p,))), None)
        why = f"excluded by {by!r} in" if by is not None else "not a target of"
        raise CheckpointError(str(tensor), f"a quantised module ({tensor.dtype})", f"unquantised: {parts.name} is {why} {scheme.source}")
    if kind != "nvfp4" or parts.quantized or weight is None or len(weight.shape) < 2:
        return
    linear = len(weight.shape) == 2 or parts.name == weight.name
    ignored = _NOT_LINEAR.search(parts.name) or _NOT_TEXT.search(parts.name + ".") or tied and parts.name.endswith("lm_head")
    if linear and not ignored and not _of_a_linear(parts.name, modules):
        found = f"an unquantised {weight.dtype} weight {list(weight.shape)}"
        raise CheckpointError(str(weight), found, f"U8: {scheme.source} says {scheme.algo} and does not exclude {parts.name}")


def _mismatched(modules: dict[str, _Parts], reader: Reader) -> list[str]:
    found = []
    for name, parts in modules.items():
        parent, _, leaf = name.rpartition(".")
        other = modules.get(f"{parent}.{_GATE_UP[leaf]}") if leaf in _GATE_UP else None
        gate, up = parts.roles.get("global_scale"), other.roles.get("global_scale") if other else None
        if gate is not None and up is not None and not np.array_equal(reader.floats_of(gate), reader.floats_of(up)):
            found.append(gate.name)
    return found


def check_checkpoint(
    model_dir: str | Path,
    scheme: QuantScheme | None = None,
    depth: Literal["full", "headers"] = "full",
    tolerate: Collection[Literal["zero_scales", "unmatched_excludes"]] = (),
) -> CheckpointReport:
    """Check the files of ``model_dir`` against ``scheme`` (read from the folder when None) and say what they hold.

    ``depth``: "headers" reads headers, the index and the float32 scales; "full" the block scales too.
    ``tolerate``: findings to accept that are refused otherwise: "zero_scales" over nonzero weights, and
    "unmatched_excludes", exclude patterns that name no module.

    Raises :class:`CheckpointError`, naming the tensor or file, what was found and what is allowed, for: no safetensors
    files, a missing or truncated shard, a corrupt header; a tensor that its shard lacks; wrong dtypes, shapes or group size;
    a module without one of its tensors; a global or input scale that is not positive and finite; NaN, negative or zero
    block scales; a module quantised in the files but not in the description, or the reverse; holes in a list of experts;
    an exclude list that names nothing.
    """
    folder = Path(model_dir)
    scheme = read_scheme(folder) if scheme is None else scheme
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else {}
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    tensors = read_headers(folder)
    parts_by_name = _group(tensors, scheme.names)
    names = scheme.names
    suffix: dict[Role, str] = {
        "weight": names.weight,
        "scale": names.scale,
        "global_scale": names.global_scale,
        "input_scale": names.input_scale,
    }

    check_experts(tensors, {**text, **config})
    unmatched = check_excludes(scheme, tensors, tied, "unmatched_excludes" in tolerate)
    reader = Reader()
    modules, nbytes, zero_blocks = [], defaultdict(int, dict.fromkeys(("expert", "dense", "unquantized", "other"), 0)), 0
    for parts in parts_by_name.values():
        kind = scheme.layer_kind(parts.name)
        _check_kind(parts, kind, scheme, tied, parts_by_name)
        weight = parts.roles.get("weight")
        shape = weight.shape if weight else ()
        if not parts.quantized:
            kind = "unquantized"
        elif kind == "nvfp4":
            _check_presence(parts, scheme, suffix)
            shape = _check_shapes(parts)
            _check_scalars(parts, reader)
            if depth == "full":
                zero_blocks += _check_block_scales(parts, reader, "zero_scales" in tolerate)
        size = sum(t.nbytes for t in (*parts.roles.values(), *parts.rest))
        module = Module(parts.name, kind, bool(_EXPERT.search(parts.name)), shape, size)
        modules.append(module)
        nbytes[_bucket(module)] += size
    return CheckpointReport(
        scheme=scheme,
        files=len({t.file for t in tensors.values()}),
        tensors=len(tensors),
        nbytes=dict(nbytes),
        modules=tuple(modules),
        mismatched_gate_up=tuple(_mismatched(parts_by_name, reader)),
        zero_blocks=zero_blocks,
        unmatched_excludes=unmatched,
    )
