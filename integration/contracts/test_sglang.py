"""The contract with every supported SGLang release; see test_vllm.py. SGLang is neither installed nor imported."""

from __future__ import annotations

import ast

import pytest

from moe_backend_plugin.engines.sglang.hooks import HOOKS, Hook

from .checks import PLUGIN, check_entry_points, check_parameters, check_texts, check_value, drift, names_of, per
from .sglang_contract import ENGINE, MODELOPT, RELEASES, SIGNATURES, SRT, TEXTS, USES, VALUES, VIEWS
from .signatures import incompatible, signature_of, without_first
from .source import Drift, Function
from .usage import Plugin, PluginClass, Use
from .wheels import Release

# The first test of a release may download its wheel.
pytestmark = pytest.mark.timeout(1500)

plugin = Plugin(PLUGIN / "engines" / "sglang", ENGINE)
scanned = [use for use in plugin.uses() if not use.symbol.startswith(VIEWS)]
uses = sorted({str(use): use for use in (*USES, *scanned)}.values(), key=str)
releases = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.version)


@per("use", uses)
@releases
def test_symbol(source_of, release: Release, use: Use):
    source, errors = source_of(release), []
    for symbol in (use.symbol, *use.others):
        try:
            return source.check(symbol, use.call)
        except Drift as error:
            errors.append(error)
    drift(errors[0], use.where)


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


@per("hook", [pytest.param(hook, id=f"{hook.module.rpartition('.')[2]}.{hook.name}") for hook in HOOKS])
@releases
def test_hook(source_of, release: Release, hook: Hook):
    """What a hook changes exists there, and what it calls exists here."""
    try:
        source_of(release).resolve(f"{hook.module}.{hook.name.removesuffix('.__new__')}")
    except Drift as error:
        drift(error, "hooks.py")
    module, _, function = hook.apply.partition(":")
    tree = ast.parse((PLUGIN / "engines" / "sglang" / f"{module}.py").read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), hook.apply
    assert hook.reason


@pytest.mark.parametrize(
    ("cls", "method"), [(c, m) for c in plugin.derived() for m in plugin.methods(c)], ids=lambda v: getattr(v, "name", v)
)
@releases
def test_override(source_of, release: Release, cls: PluginClass, method: str):
    """A method that overrides SGLang's takes every call that SGLang's takes."""
    source, node = source_of(release), plugin.methods(cls)[method]
    for base in plugin.engine_bases(cls):
        try:
            found = source.attribute(source.resolve(base), method)
        except Drift as error:
            drift(error, cls.where)
        if isinstance(found, Function) and method != "__init__":  # the plugin constructs its own classes, but for ModelOpt's
            ours = signature_of(node) if found.decorated("staticmethod") else without_first(signature_of(node))
            if problem := incompatible(ours, source.signature(found)):
                drift(f"{base}.{method}: {release}, {cls.name} overrides it with {ours}: {problem}", cls.where)


@releases
def test_modelopt_constructor(source_of, release: Release):
    """The base's constructor is not called: the subclass sets what it sets."""
    theirs = source_of(release).resolve(f"{MODELOPT}.ModelOptNvFp4FusedMoEMethod.__init__")
    ours = next(cls for cls in plugin.derived() if cls.name == "PluginModelOptNvFp4FusedMoEMethod").methods["__init__"]
    stores = [
        {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"}
        for tree in (theirs.node, ours)
    ]
    if lacking := sorted(stores[0] - stores[1]):
        drift(f"{MODELOPT}.ModelOptNvFp4FusedMoEMethod.__init__: {release} sets {', '.join(lacking)}, the subclass does not")


@releases
def test_entry_point(source_of, release: Release):
    """The group that the package registers itself in is the one that SGLang loads."""
    check_entry_points("sglang", VALUES[f"{SRT}.plugins.GENERAL_PLUGINS_GROUP"])


@releases
def test_names_are_free(source_of, release: Release):
    """The plugin's backends have names of their own in this release."""
    names = names_of("engines/sglang/__init__.py")
    for ours, theirs in (("MOE_BACKEND", "MOE_RUNNER_BACKEND_CHOICES"), ("GDN_BACKEND", "LINEAR_ATTN_KERNEL_BACKEND_CHOICES")):
        found = source_of(release).resolve(f"{SRT}.arg_groups.choices.{theirs}")
        if (name := ast.literal_eval(names[ours])) in ast.literal_eval(found.value):
            drift(f"{SRT}.arg_groups.choices.{theirs}: {release} has {name!r} itself")


def test_the_scan_sees_the_plugin():
    """A scan that finds nothing would make the tests above pass."""
    symbols = {use.symbol for use in scanned}
    assert "sglang.srt.layers.moe.moe_runner.base.DispatchMoeRunnerCore" in symbols
    assert {"PluginRunnerCore", "PluginGDNKernel", "PluginModelOptNvFp4FusedMoEMethod"} <= {cls.name for cls in plugin.derived()}
