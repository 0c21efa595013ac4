"""The contract with every supported vLLM release.

Each test is one name that the plugin uses, so that a drift reads as that name.  vLLM is neither installed nor imported.
"""

from __future__ import annotations

import ast

import pytest

from .checks import PLUGIN, check_entry_points, check_parameters, check_texts, check_value, drift, names_of, per
from .signatures import incompatible, misfit, signature_of, without_first
from .source import Class, Drift, Function, Value
from .usage import Plugin, PluginClass, Use
from .vllm_contract import CALLERS, ENGINE, QUANTIZATION, RELEASES, SIGNATURES, TEXTS, USES, VALUES, Caller
from .wheels import Release

# The first test of a release may download its wheel.
pytestmark = pytest.mark.timeout(1500)

plugin = Plugin(PLUGIN, ENGINE)
scanned = plugin.uses()
uses = sorted({str(use): use for use in (*USES, *scanned)}.values(), key=str)
releases = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.version)


@per("use", uses)
@releases
def test_symbol(source_of, release: Release, use: Use):
    source = source_of(release)
    try:
        source.check(use.symbol, use.call)
    except Drift as error:
        for other in use.others:
            try:
                return source.check(other, use.call)
            except Drift:
                continue
        drift(error, use.where)


@per("symbol", SIGNATURES)
@releases
def test_parameters(source_of, release: Release, symbol: str):
    check_parameters(source_of(release), release, symbol, SIGNATURES[symbol].split())


@per("symbol", VALUES)
@releases
def test_value(source_of, release: Release, symbol: str):
    check_value(source_of(release), release, symbol, VALUES[symbol])


@per("symbol", TEXTS)
@releases
def test_text(source_of, release: Release, symbol: str):
    check_texts(source_of(release), release, symbol, TEXTS[symbol])


@per("caller", CALLERS)
@releases
def test_call(source_of, release: Release, caller: Caller):
    """vLLM's own calls of what the plugin overrides fit the plugin's signatures."""
    cls, *path = caller.ours.split(".")
    node = plugin.classes[cls].node
    for name in path:
        node = next(n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n.name == name)
    signature = signature_of(node)
    if len(path) == 1 and not any(ast.unparse(d) == "staticmethod" for d in node.decorator_list):
        signature = without_first(signature)
    try:
        calls = source_of(release).calls(caller.module, caller.callee)
    except Drift as error:
        drift(error)
    if not calls:
        drift(f"{caller.module}: {release} does not call {caller.callee} there, so it may not call {caller.ours} at all")
    for call in calls:
        if problem := misfit(signature, call):
            drift(f"{caller.callee}{call} in {caller.module} of {release} does not fit {caller.ours}{signature}: {problem}")


def hooks() -> list[tuple[PluginClass, str]]:
    return [(cls, name) for cls in plugin.derived() for name in plugin.methods(cls)]


@pytest.mark.parametrize(("cls", "method"), hooks(), ids=lambda value: getattr(value, "name", value))
@releases
def test_override(source_of, release: Release, cls: PluginClass, method: str):
    """A method that overrides vLLM's takes every call that vLLM's takes; one that vLLM may call exists there."""
    source, node = source_of(release), plugin.methods(cls)[method]
    for base in plugin.engine_bases(cls):
        try:
            found = source.attribute(source.resolve(base), method)
        except Drift as error:
            drift(error, cls.where)
        if not isinstance(found, Function):
            continue
        theirs, static = source.signature(found), found.decorated("staticmethod")
        if method == "__init__" and not cls.replaces:
            return  # the plugin constructs its own classes
        ours = signature_of(node) if static else without_first(signature_of(node))
        if problem := incompatible(ours, theirs):
            drift(f"{base}.{method}: {release} has {theirs}, {cls.name} overrides it with {ours}: {problem}", cls.where)
        return
    if not called_by_us(method):
        drift(f"{plugin.engine_bases(cls)[0]}.{method}: {release} has no such method, and nothing in the plugin calls it", cls.where)


def called_by_us(method: str) -> bool:
    """The plugin itself uses the name, other than through ``super()``: a method of its own, not a hook."""
    if method.startswith("__"):
        return True
    nodes = (node for tree in plugin.files.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return any(node.attr == method and not ast.unparse(node.value).startswith("super(") for node in nodes)


@releases
def test_entry_point(source_of, release: Release):
    """The group that the package registers itself in is the one that vLLM loads in every process."""
    check_entry_points("vllm", VALUES["vllm.plugins.DEFAULT_PLUGINS_GROUP"])
    loader = source_of(release).resolve("vllm.plugins.load_general_plugins")
    assert "load_plugins_by_group(group=DEFAULT_PLUGINS_GROUP)" in ast.unparse(loader.node)


@releases
def test_quantization_names(source_of, release: Release):
    """The plugin's method has a name of its own, and the checkpoints it takes over are still vLLM's under their names."""
    literal = source_of(release).resolve(f"{QUANTIZATION}.QuantizationMethods")
    assert isinstance(literal, Value)
    engine = {node.value for node in ast.walk(literal.value) if isinstance(node, ast.Constant)}
    ours = ast.literal_eval(names_of("engines/vllm/__init__.py")["QUANTIZATION"])
    if ours in engine:
        drift(f"{QUANTIZATION}.QuantizationMethods: {release} has a method {ours!r} itself")
    if lacking := sorted({"modelopt_fp4", "compressed-tensors"} - engine):
        drift(f"{QUANTIZATION}.QuantizationMethods: {release} has no {', '.join(lacking)}")


def test_the_scan_sees_the_plugin():
    """A scan that finds nothing would make every test above pass."""
    symbols = {use.symbol for use in scanned}
    for expected in ("fused_moe.RoutedExperts.ckpt_gate_proj_name", "fused_moe.FusedMoEMethodBase.moe.is_act_and_mul", "linear.LinearBase"):
        assert f"vllm.model_executor.layers.{expected}" in symbols
    assert {"Nvfp4MoEMethod", "Nvfp4LinearMethod", "Nvfp4CuteDslConfig"} <= {cls.name for cls in plugin.derived()}
    assert all(isinstance(cls, PluginClass) and plugin.engine_bases(cls) for cls, _ in hooks())


@releases
def test_bases_resolve_to_classes(source_of, release: Release):
    source = source_of(release)
    for cls in plugin.derived():
        for base in plugin.engine_bases(cls):
            assert isinstance(source.resolve(base), Class), base
