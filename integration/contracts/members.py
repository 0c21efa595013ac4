"""What syntax trees define: the names of a module and of a class, each with its type where the source says it."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)
REGISTERS = ("register_buffer", "register_parameter", "register_module")
# External bases that may be imported to ask what they have; anything else is too heavy or not installed.
ASKABLE = {*sys.stdlib_module_names, "torch"}


@dataclass(frozen=True)
class Binding:
    """One name: the statement that binds it, and its annotation and value where it is a variable."""

    node: ast.AST
    origin: str = ""
    """For imports: the name in (or of) the imported module."""
    annotation: ast.expr | None = None
    value: ast.expr | None = None
    typing_only: bool = False


def last_name(node: ast.expr) -> str:
    """``dataclass`` of ``@dataclass``, ``@dataclasses.dataclass`` and ``@dataclass(...)``."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def statements(body: Iterable[ast.stmt], typing_only: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Statements that run with the body, and whether only a type checker runs them."""
    for node in body:
        if isinstance(node, ast.If):
            guard = last_name(node.test) == "TYPE_CHECKING"
            yield from statements(node.body, typing_only or guard)
            yield from statements(node.orelse, typing_only)
        elif isinstance(node, (ast.Try, ast.With, ast.For, ast.While)):
            for part in ("body", "handlers", "orelse", "finalbody"):
                for child in getattr(node, part, ()):
                    yield from statements(child.body if isinstance(child, ast.ExceptHandler) else [child], typing_only)
        else:
            yield node, typing_only


def _targets(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, (ast.Tuple, ast.List)):
        for element in node.elts:
            yield from _targets(element)
    else:
        yield node


def _variables(node: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr | None, ast.expr | None]]:
    """(target, annotation, value) of an assignment; unpacked values are unknown."""
    if isinstance(node, ast.AnnAssign):
        yield node.target, node.annotation, node.value
    elif isinstance(node, ast.Assign):
        for group in node.targets:
            for target in _targets(group):
                yield target, None, node.value if target is group else None


def module_bindings(tree: ast.Module) -> dict[str, Binding]:
    """Every name bound at import; a definition wins over one that only a type checker sees."""
    found: dict[str, Binding] = {}

    def bind(name: str, binding: Binding) -> None:
        if name not in found or found[name].typing_only or not binding.typing_only:
            found[name] = binding

    for node, typing_only in statements(tree.body):
        if isinstance(node, (*FunctionNode, ast.ClassDef)):
            bind(node.name, Binding(node, typing_only=typing_only))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bind(alias.asname or alias.name, Binding(node, alias.name, typing_only=typing_only))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                bind(alias.asname or root, Binding(node, alias.name if alias.asname else root, typing_only=typing_only))
        for target, annotation, value in _variables(node):
            if isinstance(target, ast.Name):
                bind(target.id, Binding(node, annotation=annotation, value=value, typing_only=typing_only))
    return found


def class_members(cls: ast.ClassDef) -> dict[str, Binding]:
    """Methods, class variables and what methods set on ``self``; of overloads the last, the one that runs."""
    found: dict[str, Binding] = {}
    methods = []
    for node, _ in statements(cls.body):
        if isinstance(node, (*FunctionNode, ast.ClassDef)):
            # A property's setter has the property's name: the getter says the type.
            if not any(last_name(d) in ("setter", "deleter") for d in node.decorator_list):
                found[node.name] = Binding(node)
            if isinstance(node, FunctionNode):
                methods.append(node)
        for target, annotation, value in _variables(node):
            if isinstance(target, ast.Name):
                found[target.id] = Binding(node, annotation=annotation, value=value)
    for method in methods:
        for name, binding in _instance_attributes(method):
            known = found.get(name)
            if known is None or (known.annotation is None and known.value is None and isinstance(known.node, ast.Assign)):
                found[name] = binding
    return found


def _instance_attributes(method: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[str, Binding]]:
    arguments = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
    if not arguments:
        return
    receiver = arguments[0].arg
    types = {arg.arg: arg.annotation for arg in arguments}
    for node in ast.walk(method):
        for target, annotation, value in _variables(node):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == receiver:
                if annotation is None and isinstance(value, ast.Name):
                    annotation = types.get(value.id)
                yield target.attr, Binding(node, annotation=annotation, value=value)
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called in {f"{receiver}.{register}" for register in REGISTERS}:
                name = node.args[0]
            elif called in ("setattr", "object.__setattr__") and len(node.args) > 1 and ast.unparse(node.args[0]) == receiver:
                name = node.args[1]
            else:
                continue
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, Binding(node)


def annotated_name(node: ast.expr | None) -> ast.expr | None:
    """The one class an annotation names: through quotes, ``| None``, ``Optional``, ``ClassVar`` and the like."""
    if isinstance(node, ast.Constant):
        try:
            return annotated_name(ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else None
        except SyntaxError:
            return None
    if isinstance(node, ast.BinOp):
        sides = [side for side in (node.left, node.right) if not (isinstance(side, ast.Constant) and side.value is None)]
        return annotated_name(sides[0]) if len(sides) == 1 else None
    if isinstance(node, ast.Subscript):
        return annotated_name(node.slice) if last_name(node.value) in ("Optional", "ClassVar", "Final", "type") else None
    return node if isinstance(node, (ast.Name, ast.Attribute)) else None


def served_lazily(tree: ast.Module, name: str) -> bool:
    """The module has a ``__getattr__``, and the name is one of its strings."""
    if not any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node, _ in statements(tree.body)):
        return False
    exported = {id(node) for statement in tree.body if "__all__" in ast.unparse(statement)[:16] for node in ast.walk(statement)}
    return any(isinstance(node, ast.Constant) and node.value == name and id(node) not in exported for node in ast.walk(tree))


def lazy_target(tree: ast.Module, name: str) -> str | None:
    """Where a lazy module's table says the name lives: a string, or a (module, attribute) pair as ``module:attribute``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    parts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value]
                    if all(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
                        return ":".join(part.value for part in parts)
    return None


def is_dataclass(cls: ast.ClassDef) -> bool:
    return any(last_name(decorator) in ("dataclass", "config") for decorator in cls.decorator_list)


def dataclass_fields(cls: ast.ClassDef) -> list[tuple[str, bool]]:
    """(name, has a default) of the constructor's parameters."""
    fields = []
    for node, _ in statements(cls.body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in ast.unparse(node.annotation):
            default = node.value is not None
            if isinstance(node.value, ast.Call) and last_name(node.value) in ("field", "Field"):
                options = {k.arg: k.value for k in node.value.keywords}
                if isinstance(init := options.get("init"), ast.Constant) and init.value is False:
                    continue
                default = bool({"default", "default_factory"} & options.keys()) or bool(node.value.args)
            fields.append((node.target.id, default))
    return fields


def forwards_to_super(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """The function passes its own ``**kwargs`` to the method of the same name of ``super()``."""
    own = function.args.kwarg.arg if function.args.kwarg else None
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"super().{function.name}":
            return any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == own for k in node.keywords)
    return False


@cache
def external_has(cls: str, name: str) -> bool:
    """Whether a class of the standard library or PyTorch has the attribute; unknown classes have every attribute."""
    module, _, attribute = cls.rpartition(".")
    root = module.split(".")[0]
    if not module:
        module, attribute, root = "builtins", cls, "builtins"
    if root not in ASKABLE:
        return True
    try:
        owner = getattr(importlib.import_module(module), attribute)
        return any(name in vars(c) or name in vars(c).get("__annotations__", {}) for c in owner.__mro__)
    except (ImportError, AttributeError):
        return True
