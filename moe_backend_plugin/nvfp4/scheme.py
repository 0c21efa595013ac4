"""What a checkpoint says about its own quantisation, in one form for both producers.

ModelOpt writes ``hf_quant_config.json`` (``quantization.quant_algo``, ``exclude_modules``, ``quantized_layers``) and a
translation of it in ``config.json["quantization_config"]``; compressed-tensors writes the latter with ``config_groups``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from .format import BLOCK
from .names import targets, wildcards

Producer = Literal["modelopt", "compressed-tensors"]
Activations = Literal["nvfp4", "bf16"]
LayerKind = Literal["nvfp4", "unquantized", "other"]

MODELOPT_ALGOS: dict[str, Activations] = {"NVFP4": "nvfp4", "W4A16_NVFP4": "bf16"}
"""The ModelOpt algorithms of one layer that this package serves, and what their activations are."""
MIXED = "MIXED_PRECISION"
BESIDE = "hf_quant_config.json"
"""ModelOpt's own description, beside ``config.json``."""
PACKED_FORMAT = "nvfp4-pack-quantized"
_PRODUCERS = "'modelopt' (NVFP4) or 'compressed-tensors' (nvfp4-pack-quantized)"
_HOW_TO_MAKE = "a ModelOpt or compressed-tensors NVFP4 checkpoint; make one with `moe-backend quantize MODEL OUT`"


@dataclass(frozen=True)
class TensorNames:
    """Suffixes of a quantised module's tensors. ``reciprocal``: both global scales are stored as their reciprocals."""

    weight: str
    scale: str
    global_scale: str
    input_scale: str
    reciprocal: bool


MODELOPT_NAMES = TensorNames("weight", "weight_scale", "weight_scale_2", "input_scale", reciprocal=False)
COMPRESSED_TENSORS_NAMES = TensorNames("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", reciprocal=True)


@dataclass(frozen=True)
class TargetGroup:
    """One ``config_groups`` entry of compressed-tensors: targets, the kind of their layers, and their activations."""

    targets: tuple[str, ...]
    kind: LayerKind
    activations: Activations


@dataclass(frozen=True)
class QuantScheme:
    """How a checkpoint is quantised.

    ``algo``: ModelOpt's name in upper case, or compressed-tensors' format. ``activations``: "nvfp4" if any NVFP4 layer has
    quantised activations (:meth:`nvfp4_activations` answers for one layer). ``kv_cache``: None, "fp8", "nvfp4", ... in lower
    case. ``exclude``: the patterns of unquantised modules. ``layers``: ModelOpt's per-layer algorithms of a mixed checkpoint.
    ``groups``: compressed-tensors' targets. ``source``: the file and field it was read from, for error messages.
    """

    producer: Producer
    algo: str
    activations: Activations
    group_size: int
    kv_cache: str | None
    names: TensorNames
    exclude: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict, hash=False)
    groups: tuple[TargetGroup, ...] = ()
    source: str = "quantization_config"

    def excludes(self, name: str, class_name: str = "Linear", patterns: tuple[str, ...] | None = None) -> bool:
        """Whether the exclude patterns (or the given ones, read by the producer's rules) cover a module."""
        patterns = self.exclude if patterns is None else patterns
        if self.producer == "modelopt":
            return wildcards(patterns)(name)
        return class_name in patterns or targets(patterns)(name)

    def layer_kind(self, name: str, class_name: str = "Linear") -> LayerKind:
        """What the module ``name`` (a checkpoint name, such as ``model.layers.0.mlp.experts.3.gate_proj``) is.

        "nvfp4", "unquantized" or "other" (another number format of a mixed checkpoint). Only names and the class name
        decide: a norm, a router or an embedding is for the caller to tell apart by ``class_name``.
        """
        if self.excludes(name, class_name):
            return "unquantized"
        if self.producer == "compressed-tensors":
            group = self._group(name, class_name)
            return "unquantized" if group is None else group.kind
        if class_name != "Linear":
            return "unquantized"
        if self.algo != MIXED:
            return "nvfp4"
        algo = self._layer_algo(name)
        return "unquantized" if algo is None else "nvfp4" if algo in MODELOPT_ALGOS else "other"

    def nvfp4_activations(self, name: str, class_name: str = "Linear") -> Activations:
        """Activations of one layer that :meth:`layer_kind` says is NVFP4: "nvfp4" (W4A4) or "bf16" (W4A16)."""
        if self.producer == "compressed-tensors":
            group = self._group(name, class_name)
            return group.activations if group else "bf16"
        return MODELOPT_ALGOS[self._layer_algo(name) or "NVFP4"] if self.algo == MIXED else self.activations

    def _group(self, name: str, class_name: str) -> TargetGroup | None:
        # A target that names the module wins over one that names its class.
        for group in self.groups:
            if targets(group.targets)(name):
                return group
        return next((g for g in self.groups if class_name in g.targets), None)

    def _layer_algo(self, name: str) -> str | None:
        """Algorithm of a module in ``quantized_layers``: its own, its nearest parent's, or what all its children share."""
        module = name
        while module:
            if module in self.layers:
                return self.layers[module]
            module = module.rpartition(".")[0]
        below = self._algos_below.get(name, ())
        return next(iter(below)) if len(below) == 1 else None

    @cached_property
    def _algos_below(self) -> dict[str, set[str]]:
        table: dict[str, set[str]] = {}
        for layer, algo in self.layers.items():
            parent = layer.rpartition(".")[0]
            while parent:
                table.setdefault(parent, set()).add(algo)
                parent = parent.rpartition(".")[0]
        return table


def _expect(value: Any, kind: type | tuple[type, ...], where: str, allowed: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) and bool not in (kind if isinstance(kind, tuple) else (kind,)):
        raise CheckpointError(where, f"{type(value).__name__} {value!r}", allowed)
    return value


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    _expect(value, (list, tuple), where, "a list of module names or patterns")
    for entry in value:
        _expect(entry, str, where, "a list of strings")
    return tuple(value)


def _group_size(value: Any, where: str) -> None:
    """Raise unless ``value`` is absent or 16."""
    if value is None:
        return
    try:
        size = int(_expect(value, (int, str), where, str(BLOCK)))
    except ValueError:
        raise CheckpointError(where, repr(value), str(BLOCK)) from None
    if size != BLOCK:
        raise CheckpointError(where, str(value), f"{BLOCK} (the NVFP4 block; 32 is MXFP4)")


def _kv_cache(value: Any, where: str) -> str | None:
    """ "fp8", "nvfp4", "int8", ...: from ModelOpt's string or the ``{"num_bits", "type"}`` mapping; None when absent."""
    if value is None:
        return None
    _expect(value, (str, Mapping), where, "a string or a mapping with num_bits and type")
    if isinstance(value, str):
        return value.lower() or None
    bits, kind = value.get("num_bits"), str(value.get("type", "")).lower()
    found = {(8, "float"): "fp8", (4, "float"): "nvfp4", (8, "int"): "int8"}.get((bits, kind))
    if found is None:
        raise CheckpointError(where, f"num_bits {bits!r}, type {kind!r}", "8-bit float, 4-bit float or 8-bit int")
    return found


def _modelopt(config: Mapping[str, Any], where: str) -> QuantScheme:
    legacy = "quantization" in config
    body = _expect(config["quantization"], Mapping, f"{where}.quantization", "a mapping") if legacy else config
    at = f"{where}.quantization" if legacy else where
    ignore_key = "exclude_modules" if "exclude_modules" in body else "ignore"
    kv_key = "kv_cache_quant_algo" if "kv_cache_quant_algo" in body else "kv_cache_scheme"

    allowed = ", ".join((*MODELOPT_ALGOS, MIXED))
    algo = body.get("quant_algo")
    if algo is None:
        raise CheckpointError(f"{at}.quant_algo", "no value", allowed)
    algo = _expect(algo, str, f"{at}.quant_algo", allowed).upper()
    if algo not in MODELOPT_ALGOS and algo != MIXED:
        raise CheckpointError(f"{at}.quant_algo", body["quant_algo"], allowed)

    layers: dict[str, str] = {}
    if algo == MIXED:
        wanted = f"a mapping of layer names to algorithms, here or in {BESIDE}"
        listed = _expect(body.get("quantized_layers"), Mapping, f"{at}.quantized_layers", wanted)
        for layer, entry in listed.items():
            spot = f"{at}.quantized_layers[{layer!r}]"
            entry = _expect(entry, Mapping, spot, "a mapping with quant_algo")
            layers[layer] = _expect(entry.get("quant_algo"), str, f"{spot}.quant_algo", "a string").upper()
            if layers[layer] in MODELOPT_ALGOS:
                _group_size(entry.get("group_size"), f"{spot}.group_size")
        used = {MODELOPT_ALGOS[a] for a in layers.values() if a in MODELOPT_ALGOS}
        if not used:
            found = ", ".join(sorted(set(layers.values()))) or "no layers"
            raise CheckpointError(f"{at}.quantized_layers", found, f"at least one layer of {' or '.join(MODELOPT_ALGOS)}")
        activations: Activations = "nvfp4" if "nvfp4" in used else "bf16"
    else:
        activations = MODELOPT_ALGOS[algo]
        _group_size(body.get("group_size"), f"{at}.group_size")
        groups = _expect(body.get("config_groups") or {}, Mapping, f"{at}.config_groups", "a mapping")
        for key, group in groups.items():
            for part in ("weights", "input_activations"):
                args = group.get(part) if isinstance(group, Mapping) else None
                if isinstance(args, Mapping):
                    _group_size(args.get("group_size"), f"{at}.config_groups.{key}.{part}.group_size")
        # vLLM's rule: where every group leaves the inputs alone, the checkpoint is W4A16 whatever quant_algo says.
        if groups and all(isinstance(group, Mapping) and group.get("input_activations") is None for group in groups.values()):
            activations = "bf16"

    return QuantScheme(
        producer="modelopt",
        algo=algo,
        activations=activations,
        group_size=BLOCK,
        kv_cache=_kv_cache(body.get(kv_key), f"{at}.{kv_key}"),
        names=MODELOPT_NAMES,
        exclude=_patterns(body.get(ignore_key), f"{at}.{ignore_key}"),
        layers=layers,
        source=where,
    )


def _target_group(key: str, group: Any, fmt: str, where: str) -> TargetGroup | None:
    """One config group, or None if it quantises no weights (attention's cache). Raises on an NVFP4 group that breaks the format."""
    at = f"{where}.config_groups.{key}"
    group = _expect(group, Mapping, at, "a mapping with targets and weights")
    listed = _patterns(group.get("targets"), f"{at}.targets")
    targets(listed)  # compiles its regexes, or says which one is broken
    weights = group.get("weights")
    if weights is None:
        return None
    weights = _expect(weights, Mapping, f"{at}.weights", "a mapping")
    fmt = (group.get("format") or fmt).lower()
    four_bit_float = weights.get("num_bits") == 4 and str(weights.get("type", "")).lower() == "float"
    if fmt != PACKED_FORMAT:
        return TargetGroup(listed, "other", "bf16")
    if not four_bit_float:
        found = f"num_bits {weights.get('num_bits')!r}, type {weights.get('type')!r}"
        raise CheckpointError(f"{at}.weights", found, f"num_bits 4, type 'float' with the format {PACKED_FORMAT}")
    if (strategy := weights.get("strategy")) not in (None, "tensor_group"):
        raise CheckpointError(f"{at}.weights.strategy", repr(strategy), "'tensor_group'")
    _group_size(weights.get("group_size"), f"{at}.weights.group_size")
    if weights.get("symmetric") is False:
        raise CheckpointError(f"{at}.weights.symmetric", "False", "True (NVFP4 has no zero points)")
    inputs = group.get("input_activations")
    if inputs is None:
        return TargetGroup(listed, "nvfp4", "bf16")
    inputs = _expect(inputs, Mapping, f"{at}.input_activations", "a mapping or null")
    if inputs.get("num_bits") != 4 or str(inputs.get("type", "")).lower() != "float":
        found = f"num_bits {inputs.get('num_bits')!r}, type {inputs.get('type')!r}"
        raise CheckpointError(f"{at}.input_activations", found, "num_bits 4, type 'float', or null for bf16 activations")
    _group_size(inputs.get("group_size"), f"{at}.input_activations.group_size")
    return TargetGroup(listed, "nvfp4", "nvfp4")


def _compressed_tensors(config: Mapping[str, Any], where: str) -> QuantScheme:
    allowed = f"{PACKED_FORMAT!r}, or 'mixed-precision' with a group of that format"
    fmt = _expect(config.get("format"), str, f"{where}.format", allowed).lower()
    if fmt not in (PACKED_FORMAT, "mixed-precision"):
        raise CheckpointError(f"{where}.format", repr(config["format"]), allowed)
    listed = _expect(config.get("config_groups"), Mapping, f"{where}.config_groups", "a mapping of groups")
    groups = tuple(g for key, entry in listed.items() if (g := _target_group(key, entry, fmt, where)) is not None)
    if not any(g.kind == "nvfp4" for g in groups):
        found = f"{len(listed)} groups, none of them NVFP4"
        raise CheckpointError(f"{where}.config_groups", found, f"a group of weights with num_bits 4, type 'float', group_size {BLOCK}")
    ignore = _patterns(config.get("ignore"), f"{where}.ignore")
    targets(ignore)
    return QuantScheme(
        producer="compressed-tensors",
        algo=fmt,
        activations="nvfp4" if any(g.activations == "nvfp4" for g in groups) else "bf16",
        group_size=BLOCK,
        kv_cache=_kv_cache(config.get("kv_cache_scheme"), f"{where}.kv_cache_scheme"),
        names=COMPRESSED_TENSORS_NAMES,
        exclude=ignore,
        groups=groups,
        source=where,
    )


def lacks_layers(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json``'s description is of a mixed checkpoint and lists no layers: older ModelOpts do so only in :data:`BESIDE`."""
    return str(config.get("quant_algo")).upper() == MIXED and "quantized_layers" not in config


def with_layers(config: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``'s description with the layers that ``beside``, the content of :data:`BESIDE`, lists, where it lacks them."""
    body = beside.get("quantization")
    if not lacks_layers(config) or not isinstance(body, Mapping) or "quantized_layers" not in body:
        return dict(config)
    return {"ignore": body.get("exclude_modules") or [], **config, "quantized_layers": body["quantized_layers"]}


def parse_scheme(quantization_config: Mapping[str, Any], where: str = "quantization_config") -> QuantScheme:
    """The scheme of ``config.json["quantization_config"]`` or of the content of ``hf_quant_config.json``.

    ``where`` prefixes the field in error messages. Raises :class:`CheckpointError` for another producer, an algorithm,
    format or group size that is not NVFP4's, or a field of the wrong type.
    """
    config = _expect(quantization_config, Mapping, where, "a mapping")
    producer = config.get("producer")
    default = producer.get("name") if isinstance(producer, Mapping) else None
    if default is None and ("quant_algo" in config or isinstance(config.get("quantization"), Mapping)):
        default = "modelopt"
    method = config.get("quant_method") or default
    if method is None:
        raise CheckpointError(f"{where}.quant_method", "no value", _PRODUCERS)
    name = _expect(method, str, f"{where}.quant_method", _PRODUCERS).lower().replace("_", "-")
    if name.startswith("modelopt"):
        return _modelopt(config, where)
    if name == "compressed-tensors":
        return _compressed_tensors(config, where)
    raise CheckpointError(f"{where}.quant_method", repr(method), f"{_PRODUCERS}; for another checkpoint: {_HOW_TO_MAKE}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with a mapping at its top. Raises :class:`CheckpointError` if it is missing, not JSON or not a mapping."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(str(path), "no such file", "a model folder in the Hugging Face layout") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(str(path), f"unreadable JSON ({error})", "a JSON mapping") from None
    return _expect(value, dict, str(path), "a JSON mapping")


def read_scheme(model_dir: str | Path) -> QuantScheme:
    """The scheme of a checkpoint folder: of ``config.json`` if it describes one, else of ``hf_quant_config.json``.

    Raises :class:`CheckpointError` as :func:`parse_scheme`, if neither file describes a quantisation, or if both do and
    name different algorithms.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such folder", "a model folder with config.json and *.safetensors")
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    inside = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    beside = read_json(folder / BESIDE) if (folder / BESIDE).is_file() else None
    second = None if beside is None else parse_scheme(beside, BESIDE)
    if inside is None:
        if second is None:
            dtype = config.get("dtype") or config.get("torch_dtype") or "dtype unknown"
            found = f"no quantisation description in config.json or hf_quant_config.json (weights are {dtype})"
            raise CheckpointError(f"{folder}: quantization_config", found, _HOW_TO_MAKE)
        return second
    if beside is not None and isinstance(inside, Mapping):
        inside = with_layers(inside, beside)
    scheme = parse_scheme(inside, "config.json: quantization_config")
    if second is not None and scheme.producer == second.producer and scheme.algo != second.algo:
        raise CheckpointError(f"{BESIDE}.quantization.quant_algo", second.algo, f"{scheme.algo}, as in config.json")
    return scheme
