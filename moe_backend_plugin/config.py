"""The plugin's settings: one model, three sources, and errors that name the source of a bad value.

Sources, first wins:

1. the engine's own extra configuration (vLLM: ``--additional-config '{"moe_backend_plugin": {...}}'``),
2. the YAML file named by the environment variable ``MOE_BACKEND_PLUGIN_CONFIG``,
3. environment variables: ``MOE_BACKEND_PLUGIN_STRICT=1``, ``MOE_BACKEND_PLUGIN_MOE__PROVIDER=torch``.

Engines read the settings in every process they start, so this module imports neither torch nor an engine.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from moe_backend_plugin.errors import ConfigError

ENV_PREFIX = "MOE_BACKEND_PLUGIN_"
ENV_FILE = "MOE_BACKEND_PLUGIN_CONFIG"
EXTRA_SOURCE = "the engine's additional config"
DEFAULT_SOURCE = "default"
_OF_A_SERVICE = re.compile(ENV_PREFIX + r"(SERVICE_HOST|SERVICE_PORT|PORT)(_\w+)?")
"""What Kubernetes tells every pod of a Service named moe-backend-plugin: no settings."""

KernelProvider = Literal["auto", "cutedsl", "torch", "engine"]
Activations = Literal["auto", "bf16", "nvfp4"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MoeConfig(_Group):
    """Expert layers."""

    provider: KernelProvider = Field(
        "auto",
        description="who runs the experts: this package's CuTe DSL kernels (Hopper) or torch ops (CPU), or the engine's own kernels; "
        "auto takes this package's wherever it has any for the device; in vLLM on Blackwell, cutedsl stands for FlashInfer's, which no "
        "author of this package has run and which are checked against the reference when the server starts",
    )
    activations: Activations = Field(
        "auto",
        description="precision of the tokens entering an expert matrix: bf16, nvfp4 (quantised on the fly; torch ops and FlashInfer's "
        "kernels only), or auto (bf16 in this release; with FlashInfer's kernels nvfp4, where the checkpoint has input scales)",
    )
    tactics: Literal["cache", "heuristic"] = Field(
        "cache",
        description="how the CuTe DSL kernels are cut up for a number of tokens: cache takes what moe-backend tune found for this device "
        "and layer, where it did; heuristic never looks. A server never tunes",
    )


class LinearConfig(_Group):
    """Dense NVFP4 layers: attention projections, shared experts, GDN projections."""

    provider: KernelProvider = Field(
        "auto",
        description="who runs dense NVFP4 layers in vLLM (in SGLang they stay SGLang's): this package's CuTe DSL kernels (Hopper) or torch "
        "ops (CPU), or the engine's own kernels; auto takes this package's torch ops on a CPU, and the engine's kernels on a GPU, where "
        "this package's have not been measured",
    )
    activations: Activations = Field(
        "auto",
        description="precision of the tokens entering a dense matrix: bf16, nvfp4 (quantised on the fly), or auto (bf16 in this release)",
    )


class GdnConfig(_Group):
    """Gated-delta-net (linear attention) layers."""

    provider: KernelProvider = Field(
        "auto",
        description="who runs the gated-delta-net decode step: this package's CuTe DSL kernels (GPU) or torch ops (CPU), or the engine's "
        "own kernels; auto takes this package's where it has run on such a device: CuTe DSL on Hopper, torch on CPU",
    )


class PluginConfig(BaseSettings):
    """Every setting of the plugin.

    Build it with :func:`load_config`; calling the class reads the same file and variables but reports bad values as pydantic does.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__")

    strict: bool = Field(False, description="stop with an error when this package cannot serve a layer, instead of using the engine's path")
    take_nvfp4_checkpoints: bool = Field(
        False,
        description="serve NVFP4 checkpoints that name another method (modelopt, compressed-tensors) without --quantization, "
        "and in SGLang NVFP4 experts without --moe-backend; only from the YAML file or the environment",
    )
    checkpoint_check: Literal["full", "headers"] = Field(
        "full",
        description="how a checkpoint is checked before loading: full reads every scale; headers reads names, shapes, types, global scales",
    )
    kernel_cache: str = Field(
        "", description="folder for compiled kernels; empty, as if it were not set: moe_backend_plugin/kernels in the user's cache folder"
    )
    moe: MoeConfig = Field(MoeConfig(), description="expert layers")
    linear: LinearConfig = Field(LinearConfig(), description="dense NVFP4 layers")
    gdn: GdnConfig = Field(GdnConfig(), description="gated-delta-net layers")

    # Where each value came from, by dotted name; what is absent is a default.
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings):
        """Additional config before file before environment."""
        return init_settings, _YamlFile(settings_cls), env_settings


class Setting(NamedTuple):
    """One line of ``moe-backend config show``."""

    field: str
    value: Any
    source: str


def load_config(extra: Mapping[str, Any] | None = None) -> PluginConfig:
    """Read the settings of this process.

    ``extra`` is what the engine's additional config holds under ``moe_backend_plugin``. Raises ConfigError.
    """
    extra = {} if extra is None else _what_is_set(_mapping(extra, EXTRA_SOURCE))
    layers = [(EXTRA_SOURCE, extra), (_file_source(), _read_file()), ("environment", _read_environment())]
    origin: dict[str, str] = {}
    for source, values in layers:
        for field, _ in _leaves(values, source):
            origin.setdefault(field, variable(field) if source == "environment" else source)
    if origin.get("take_nvfp4_checkpoints") == EXTRA_SOURCE:
        raise ConfigError(
            f"take_nvfp4_checkpoints ({EXTRA_SOURCE})",
            repr(extra["take_nvfp4_checkpoints"]),
            f"this field only in the YAML file named by {ENV_FILE} or as {variable('take_nvfp4_checkpoints')}, "
            "because the engine picks the quantization method before it reads its additional config",
        )
    try:
        config = PluginConfig(**extra)
    except ValidationError as error:
        raise _explain(error, origin) from None
    config._sources.update(origin)
    _check_contradictions(config)
    return config


def describe(config: PluginConfig) -> list[Setting]:
    """Every setting with its value and where it came from, in the order of the model."""
    return [Setting(name, _value(config, name), config._sources.get(name, DEFAULT_SOURCE)) for name, _ in fields()]


def fields(model: type[BaseModel] = PluginConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and pydantic field of every setting; groups are opened, not listed."""
    for name, field in model.model_fields.items():
        if _is_group(field):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def allowed_values(field: Any) -> str:
    """The values a field takes, in words."""
    choices = get_args(field.annotation)
    return ", ".join(map(str, choices)) if choices else "the path of a folder" if field.annotation is str else "true, false"


# --- sources -----------------------------------------------------------------------------------------------------------------------


class _YamlFile(PydanticBaseSettingsSource):
    """The YAML file as a pydantic-settings source."""

    def get_field_value(self, field, field_name):  # required by the base class; __call__ answers for all fields at once
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        return _read_file()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a settings file must not."""

    def construct_mapping(self, node, deep=False):
        keys = [str(key.value) for key, _ in node.value]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated[0]!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _file_source() -> str:
    return os.environ.get(ENV_FILE, "")


def _read_file() -> dict[str, Any]:
    if ENV_FILE not in os.environ:
        return {}
    path = os.environ[ENV_FILE]
    if not path.strip():
        raise ConfigError(ENV_FILE, "an empty value", "the path of a YAML file; unset the variable to use no file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(ENV_FILE, f"{path!r}, which does not exist", "the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(ENV_FILE, f"{path!r}, which cannot be read ({reason})", "the path of a readable YAML file") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else path
        raise ConfigError(place, f"malformed YAML ({getattr(error, 'problem', None) or error})", "a mapping of settings") from None
    if values is None:
        # An empty mount looks like this too, so it is not taken as "use the defaults".
        raise ConfigError(path, "no settings", f"a mapping of settings ({{}} for none); unset {ENV_FILE} to use no file")
    return _what_is_set(_mapping(values, path))


def _what_is_set(values: dict[str, Any]) -> dict[str, Any]:
    """Without an empty ``kernel_cache``, so that a copy of the sample file does not take the folder that a container's variable names."""
    return {name: value for name, value in values.items() if (name, value) != ("kernel_cache", "")}


def _read_environment() -> dict[str, Any]:
    """The variables with the plugin's prefix, nested. The values are read again, and typed, by pydantic-settings."""
    names = {variable(name): name for name, _ in fields()}
    groups = {variable(name): name for name, field in PluginConfig.model_fields.items() if _is_group(field)}
    found: dict[str, Any] = {}
    for key, value in sorted(os.environ.items()):
        upper = key.upper()
        if not upper.startswith(ENV_PREFIX) or upper == ENV_FILE or _OF_A_SERVICE.fullmatch(upper):
            continue
        if upper in groups:
            members = ", ".join(v for v, name in names.items() if name.startswith(groups[upper] + "."))
            raise ConfigError(key, f"{value!r} for a group of settings", f"one variable a setting: {members}")
        if upper not in names:
            raise ConfigError(key, "an environment variable that names no setting", _near(upper, [*names, ENV_FILE]))
        if not value.strip():
            raise ConfigError(key, "an empty value", f"{allowed_values(dict(fields())[names[upper]])}; unset the variable for the default")
        *path, last = names[upper].split(".")
        group = found
        for part in path:
            group = group.setdefault(part, {})
        group[last] = value
    return found


# --- checks and messages -------------------------------------------------------------------------------------------------------------


def _check_contradictions(config: PluginConfig) -> None:
    for group in ("moe", "linear"):
        settings = getattr(config, group)
        if settings.provider == "engine" and settings.activations != "auto":
            raise ConfigError(
                _place(config, f"{group}.activations"),
                f"{settings.activations!r} together with {_place(config, f'{group}.provider')} = 'engine'",
                f"{group}.activations 'auto', since the engine's kernels choose their own activation precision; "
                f"or {group}.provider 'auto' or 'torch'",
            )
    groups = [name for name, field in PluginConfig.model_fields.items() if _is_group(field)]
    if config.strict and all(getattr(config, group).provider == "engine" for group in groups):
        raise ConfigError(
            _place(config, "strict"),
            f"true while {', '.join(f'{group}.provider' for group in groups)} are all 'engine'",
            "strict with at least one provider 'auto' or 'torch', since otherwise this package serves nothing",
        )


def _explain(error: ValidationError, origin: Mapping[str, str]) -> ConfigError:
    """The first pydantic error in the words of this package; unknown fields were refused before."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    field = dict(fields()).get(name)
    return ConfigError(
        f"{name} ({origin.get(name, DEFAULT_SOURCE)})", repr(first["input"]), allowed_values(field) if field else first["msg"]
    )


def _leaves(values: Mapping[str, Any], source: str, model: type[BaseModel] = PluginConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted settings in a nested mapping; refuses what names no field."""
    for name, value in values.items():
        field = model.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            raise ConfigError(f"{prefix}{name} ({source})", "an unknown setting", _near(str(name), list(model.model_fields), prefix))
        if _is_group(field):
            yield from _leaves(_mapping(value, f"{prefix}{name} ({source})"), source, field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(where, f"{type(value).__name__} {value!r}", "a mapping of settings")
    return dict(value)


def _near(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = ", ".join(prefix + item for item in known)
    return f"{listed} (did you mean {prefix}{close[0]}?)" if close else listed


def _place(config: PluginConfig, name: str) -> str:
    return f"{name} ({config._sources.get(name, DEFAULT_SOURCE)})"


def _value(config: PluginConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _is_group(field: Any) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + name.upper().replace(".", "__")
