"""What a model folder holds, by kind of layer, from config.json and the headers of its safetensors files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from moe_backend_plugin.device import Choice
from moe_backend_plugin.errors import PluginError
from moe_backend_plugin.gdn.support import heads_reason
from moe_backend_plugin.nvfp4.files import Stored

if TYPE_CHECKING:
    from moe_backend_plugin.moe.problem import MoEProblem

KINDS = (
    "experts", "shared experts", "router", "attention projections", "gdn projections", "gdn state update", "dense mlp",
    "embedding", "lm_head", "norms", "other",
)  # fmt: skip

# First match wins; names as Hugging Face writes them for decoder models.
_PATTERNS = (
    ("experts", r"\.experts\."),
    ("shared experts", r"\.shared_experts?\."),
    ("router", r"\.(gate|router|shared_expert_gate)\.(weight|bias|e_score_correction_bias)$"),
    ("gdn state update", r"\.linear_attn\.(conv1d|A_log|dt_bias)"),
    ("norms", r"norm[^.]*\.weight$"),
    ("gdn projections", r"\.linear_attn\."),
    ("attention projections", r"\.(self_attn|attention)\."),
    ("embedding", r"embed_tokens\."),
    ("lm_head", r"lm_head\."),
    ("dense mlp", r"\.mlp\."),
)
_LINEAR_KINDS = ("shared experts", "attention projections", "gdn projections", "dense mlp", "lm_head")
_QUANT_SUFFIX = re.compile(r"\.(weight_packed|weight_scale_2|weight_scale|weight_global_scale|input_scale|input_global_scale)$")


@dataclass(frozen=True)
class LayerRow:
    """One kind of layer of a model and who serves it."""

    kind: str
    format: str  # "nvfp4", or the dtypes found
    count: int  # weight matrices; experts count one a projection and expert
    bytes: int
    provider: str
    reason: str


def layer_kind(name: str) -> str:
    """The kind of layer a tensor belongs to."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), "other")


def choices_for(config: dict[str, Any], choices: dict[str, Choice], moe_activations: str, input_scales: bool) -> dict[str, Choice]:
    """``choices`` of this machine as they stand for one model: layers that the kernels do not serve stay the engine's.

    ``moe_activations``: the setting of that name. ``input_scales``: whether the checkpoint has them for its experts.
    """
    text = config.get("text_config", config)
    names = {"head_k": "key_head_dim", "head_v": "value_head_dim", "key_heads": "num_key_heads", "value_heads": "num_value_heads"}
    heads = {ours: text.get(f"linear_{name}") for ours, name in names.items()}
    found = dict(choices)
    if choices["gdn"].provider == "cutedsl" and None not in heads.values() and (reason := heads_reason(**heads)):
        found["gdn"] = replace(choices["gdn"], provider="engine", reason=reason)
    provider, rounded = choices["moe"].provider, moe_activations == "nvfp4"
    if provider == "flashinfer":
        rounded |= moe_activations == "auto" and input_scales
    if provider in ("cutedsl", "flashinfer") and (reason := _experts_reason(text, provider, rounded)):
        found["moe"] = replace(choices["moe"], provider="engine", reason=reason)
    return found


def has_input_scales(tensors: Mapping[str, Stored]) -> bool:
    """Whether experts of a checkpoint come with scales for their inputs."""
    return any(layer_kind(name) == "experts" and name.endswith(("input_scale", "input_global_scale")) for name in tensors)


def _experts_reason(text: dict[str, Any], provider: str, rounded: bool) -> str | None:
    """Why the kernels cannot serve a model's experts on one GPU, or None if they can, or if its description does not tell.

    ``rounded``: activations are to be rounded to NVFP4.
    """
    import torch

    try:
        problem = experts_problem(text, "nvfp4" if rounded else "bf16")
    except PluginError as error:
        return str(error)
    if problem is None:
        return None
    if provider == "flashinfer":
        from moe_backend_plugin.moe import blackwell

        return blackwell.missing() or blackwell.unsupported_reason(problem, torch.bfloat16)
    try:
        from moe_backend_plugin.moe.cuda import unsupported_reason
    except ImportError:  # without CuTe DSL the engine's own packages are missing too, and that is said elsewhere
        return None
    return unsupported_reason(problem, torch.bfloat16)


def experts_problem(text: dict[str, Any], precision: Literal["bf16", "nvfp4"] = "bf16") -> MoEProblem | None:
    """A model's expert layer on one GPU, by its (text) configuration; None if that does not tell.

    Raises PluginError on one that this package does not have.
    """
    from moe_backend_plugin.moe.problem import Activation, MoEProblem

    sizes = _experts(text), text.get("hidden_size"), text.get("moe_intermediate_size") or text.get("intermediate_size")
    top_k, function = text.get("num_experts_per_tok"), text.get("hidden_act") or text.get("mlp_hidden_act")
    if None in (*sizes, top_k, function):
        return None
    experts, hidden, width = sizes
    activation = Activation.parse(function, limit=text.get("swiglu_limit"))
    on_input = text.get("model_type") == "llama4_text"  # no field says it: the engines' model does
    return MoEProblem(experts, experts, hidden, width, top_k, activation, precision, apply_router_weight_on_input=on_input)


def _experts(text: dict[str, Any]) -> int | None:
    return text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts")


def inventory(tensors: dict[str, Stored], choices: dict[str, Choice]) -> list[LayerRow]:
    """One row for each kind of layer and number format found, in the order of :data:`KINDS`."""
    scaled = {_QUANT_SUFFIX.sub("", name) for name in tensors if _QUANT_SUFFIX.search(name)}
    rows: dict[tuple[str, str], list[int]] = {}
    for name, tensor in tensors.items():
        module = _QUANT_SUFFIX.sub("", name).removesuffix(".weight")
        packed = module in scaled and _is_nvfp4(module, tensors)
        entry = rows.setdefault((layer_kind(name), "nvfp4" if packed else tensor.dtype.lower()), [0, 0])
        entry[0] += name.endswith((".weight", ".weight_packed")) or not packed
        entry[1] += tensor.nbytes
    order = {kind: index for index, kind in enumerate(KINDS)}
    return [
        LayerRow(kind, dtype, count, total, *_server(kind, dtype, choices))
        for (kind, dtype), (count, total) in sorted(rows.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


def model_facts(config: dict[str, Any], tensors: dict[str, Stored]) -> dict[str, Any]:
    """The figures of a model that decide how it is served."""
    text = config.get("text_config", config)
    experts = _experts(text)
    layer_types = text.get("layer_types") or []
    return {
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "decoder_layers": text.get("num_hidden_layers"),
        "gdn_layers": layer_types.count("linear_attention"),
        "experts": experts,
        "experts_per_token": text.get("num_experts_per_tok"),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def _is_nvfp4(module: str, tensors: dict[str, Stored]) -> bool:
    weight = tensors.get(f"{module}.weight_packed") or tensors.get(f"{module}.weight")
    return weight is not None and weight.dtype == "U8"


def _server(kind: str, dtype: str, choices: dict[str, Choice]) -> tuple[str, str]:
    if kind == "gdn state update":
        return choices["gdn"].provider, choices["gdn"].reason
    if dtype == "nvfp4" and kind == "experts":
        return choices["moe"].provider, choices["moe"].reason
    if dtype == "nvfp4" and kind in _LINEAR_KINDS:
        return choices["linear"].provider, choices["linear"].reason
    if dtype == "nvfp4":
        return "engine", "this package has no NVFP4 layer of this kind"
    return "engine", "not quantised to NVFP4"
