"""``--quantization nvfp4_cutedsl``: which method serves which layer of an NVFP4 checkpoint.

vLLM already reads the descriptions that ModelOpt and compressed-tensors write: exclusions, name mappings, KV-cache
scales, layers in other formats.  Each class in :mod:`.configs` therefore *is* vLLM's own configuration class and
changes one decision: an NVFP4 linear or MoE layer goes to this package where it has a provider for it.

This module is imported in every vLLM process at start and stays light: it holds only the class that vLLM looks up by
name, which picks the right one of those classes once a checkpoint's description is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ...errors import CheckpointError, ConfigError
from . import QUANTIZATION


@register_quantization_config(QUANTIZATION)
class Nvfp4CuteDslConfig(QuantizationConfig):
    """The class behind the name; never instantiated: :meth:`from_config` returns one of :mod:`.configs`."""

    def __init__(self) -> None:
        # vLLM comes here when the checkpoint describes no quantisation at all.
        raise CheckpointError(
            f"--quantization {QUANTIZATION}",
            "a checkpoint without a quantisation description (no quantization_config in config.json, no hf_quant_config.json)",
            "an NVFP4 checkpoint from ModelOpt or compressed-tensors; `moe-backend quantize MODEL OUT` makes one from a bf16 model",
        )

    def get_name(self) -> str:
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        # vLLM reads hf_quant_config.json where config.json says nothing, and override_quantization_method where it says too little.
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        from .configs import config_class

        return config_class(config).from_config(config)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None) -> str | None:
        """Claim the checkpoint when the user named this method, or when the configuration file says so.

        Its description in ``hf_config``, from which vLLM makes the configuration, then lists the layers of a mixed checkpoint too.

        Raises:
            ConfigError: the file claims NVFP4 checkpoints and the command line names another method.
        """
        from ...config import load_config
        from ...nvfp4.scheme import parse_scheme
        from .arguments import current_extra

        config = load_config(current_extra.get())
        if user_quant != QUANTIZATION and not config.take_nvfp4_checkpoints:
            return None
        described = _description(hf_config)
        whole = hf_quant_cfg or {} if described is None else _whole(described, hf_config)
        try:
            parse_scheme(whole)
        except CheckpointError:
            # Not NVFP4: none of our business, unless the user says so. Then from_config says what is wrong.
            return QUANTIZATION if user_quant == QUANTIZATION else None
        if described is not None:
            described.update(whole)
        if user_quant not in (None, QUANTIZATION):
            raise ConfigError(
                "take_nvfp4_checkpoints together with --quantization",
                f"true and {user_quant!r}",
                f"one of the two: drop the flag (or say {QUANTIZATION}), or set take_nvfp4_checkpoints to false",
            )
        return QUANTIZATION

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> None:
        raise NotImplementedError("use from_config")


def _description(hf_config: Any) -> dict[str, Any] | None:
    """What vLLM hands to ``from_config`` later: the object itself, since vLLM may have asked with a copy."""
    for owner in (hf_config, getattr(hf_config, "text_config", None)):
        found = getattr(owner, "quantization_config", None)
        if isinstance(found, dict):
            return found
    return None


def _whole(described: dict[str, Any], hf_config: Any) -> dict[str, Any]:
    """The description with the layers that older ModelOpts list only beside ``config.json``; vLLM looks there for its own methods alone."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    from ...nvfp4.scheme import BESIDE, lacks_layers, read_json, with_layers

    if not lacks_layers(described):
        return described
    folder = Path(hf_config.name_or_path)
    if folder.is_dir():
        beside = read_json(folder / BESIDE) if (folder / BESIDE).is_file() else {}
    else:
        beside = get_hf_file_to_dict(BESIDE, hf_config.name_or_path, getattr(hf_config, "_commit_hash", None)) or {}
    return with_layers(described, beside)
