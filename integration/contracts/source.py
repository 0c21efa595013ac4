"""A package's sources, read without importing them: does a dotted name exist there, and what is its signature?

Names are followed as Python would: through re-exports, lazy modules, base classes, and, where the sources say a type,
through attributes (``pkg.mod.Layer.config.size``) and return values (``pkg.mod.get().size``).  Where the sources do
not say, the answer is "may be": :class:`External`.  A contract then checks less, and never fails for that reason.
"""

from __future__ import annotations

import ast
import zipfile
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, Signature
from pathlib import Path, PurePosixPath

from . import members
from .signatures import Call, fields_signature, forwarding, misfit, signature_of, without_first


class Drift(AssertionError):
    """A name is not what the contract says; the message starts with the name."""


@dataclass(frozen=True)
class External:
    """Something defined outside the sources, or of a type they do not say."""

    name: str = "?"


@dataclass(eq=False)
class Module:
    name: str
    tree: ast.Module
    is_package: bool

    @cached_property
    def bindings(self) -> dict[str, members.Binding]:
        return members.module_bindings(self.tree)

    @cached_property
    def stars(self) -> list[ast.ImportFrom]:
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]


@dataclass(eq=False)
class Class:
    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return f"{self.module.name}.{self.node.name}"

    @cached_property
    def members(self) -> dict[str, members.Binding]:
        return members.class_members(self.node)


@dataclass(eq=False)
class Function:
    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: Class | None = None

    def decorated(self, *names: str) -> bool:
        return any(members.last_name(d) in names for d in self.node.decorator_list)


@dataclass(eq=False)
class Value:
    module: Module
    annotation: ast.expr | None
    value: ast.expr | None
    name: str = ""


Found = Module | Class | Function | Value | External


class Source:
    """The sources in a wheel (or any zip of one): ``name`` says which in messages."""

    def __init__(self, archive: Path, name: str) -> None:
        self.name = name
        self._zip = zipfile.ZipFile(archive)
        self._paths = {path for path in self._zip.namelist() if path.endswith(".py")}
        self._modules: dict[str, Module | None] = {}
        self._classes: dict[ast.ClassDef, Class] = {}
        self._orders: dict[Class, list[Class | External]] = {}
        # A folder without __init__.py is a package as well, an empty one.
        self._folders = {str(parent) for path in self._paths for parent in PurePosixPath(path).parents}
        self._packages = {path.split("/", 1)[0].removesuffix(".py") for path in self._paths}

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            base = name.replace(".", "/")
            path = next((p for p in (f"{base}/__init__.py", f"{base}.py") if p in self._paths), None)
            if path:
                self._modules[name] = Module(name, ast.parse(self._zip.read(path)), path.endswith("__init__.py"))
            else:
                self._modules[name] = Module(name, ast.parse(""), True) if base in self._folders else None
        return self._modules[name]

    # -- names ------------------------------------------------------------------------------------------------------

    def resolve(self, symbol: str) -> Found:
        """What the dotted name is; a segment ``name()`` stands for what a call of it returns.

        Raises:
            Drift: there is no such name.
        """
        segments = symbol.split(".")
        found = self.module(segments[0])
        if found is None:
            raise Drift(f"{symbol}: {self.name} has no module {segments[0]!r}")
        for position, segment in enumerate(segments[1:], 1):
            before = found
            found = self.attribute(before, segment.removesuffix("()"))
            if found is None:
                raise Drift(f"{symbol}: {self.name} has no {segment!r} in {_place(before, segments[:position])}")
            if segment.endswith("()"):
                found = self.result(found)
        return found

    def attribute(self, found: Found, name: str) -> Found | None:
        """``found.name``, or None where it does not exist."""
        if isinstance(found, Module):
            return self.in_module(found, name)
        if isinstance(found, Class):
            return self.in_class(found, name)
        if isinstance(found, Value) or (isinstance(found, Function) and found.decorated("property", "cached_property")):
            kind = self.type_of(found)
            return self.in_class(kind, name) if isinstance(kind, Class) else External()
        return External()

    def in_module(self, module: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        if (module.name, name) in seen:  # ``from . import name`` in a package's own __init__
            return self.module(f"{module.name}.{name}")
        seen |= {(module.name, name)}
        binding = module.bindings.get(name)
        if binding is not None and (not binding.typing_only or members.served_lazily(module.tree, name)):
            return self._bound(module, binding, seen)
        for star in module.stars:
            target = self.module(self._absolute(module, star))
            found = self.in_module(target, name, seen) if target and not name.startswith("_") else None
            if found is not None:
                return found
        submodule = self.module(f"{module.name}.{name}")
        if submodule is not None:
            return submodule
        if members.served_lazily(module.tree, name):
            target = members.lazy_target(module.tree, name)
            return self._lazy(module, target, name) if target else External()
        return None

    def _bound(self, module: Module, binding: members.Binding, seen: frozenset) -> Found | None:
        node = binding.node
        if isinstance(node, ast.ClassDef):
            return self._class(module, node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return Function(module, node)
        if isinstance(node, ast.ImportFrom):
            origin = self._absolute(module, node)
            if origin.split(".")[0] not in self._packages:
                return External(f"{origin}.{binding.origin}")
            target = self.module(origin)
            return self.in_module(target, binding.origin, seen) if target else None
        if isinstance(node, ast.Import):
            if binding.origin.split(".")[0] not in self._packages:
                return External(binding.origin)
            return self.module(binding.origin)
        return Value(module, binding.annotation, binding.value)

    def _lazy(self, module: Module, target: str, name: str) -> Found | None:
        """A lazy table's entry: ``".mod:attr"``, ``"pkg.mod"`` (holding ``name``) or ``"pkg.mod.attr"``."""
        path, _, attribute = target.partition(":")
        if path.startswith("."):
            path = module.name + path
        holder = self.module(path)
        if holder is None and not attribute:
            path, _, attribute = path.rpartition(".")
            holder = self.module(path)
        return self.in_module(holder, attribute or name) if holder else External(target)

    def _absolute(self, module: Module, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        drop = node.level - (1 if module.is_package else 0)
        parts = module.name.split(".")
        return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])

    # -- classes ----------------------------------------------------------------------------------------------------

    def _class(self, module: Module, node: ast.ClassDef) -> Class:
        return self._classes.setdefault(node, Class(module, node))

    def bases(self, cls: Class) -> list[Class | External]:
        found = []
        for base in cls.node.bases:
            target = self.expression(cls.module, base.value if isinstance(base, ast.Subscript) else base)
            found.append(target if isinstance(target, (Class, External)) else External(ast.unparse(base)))
        return found

    def mro(self, cls: Class | External) -> list[Class | External]:
        """Python's order (C3); bases that are not in the sources stay as :class:`External`."""
        if isinstance(cls, External):
            return [cls]
        if cls not in self._orders:
            self._orders[cls] = self._linearised(cls)
        return self._orders[cls]

    def _linearised(self, cls: Class) -> list[Class | External]:
        bases = self.bases(cls)
        queues = [*(list(self.mro(base)) for base in bases), list(bases)]
        order: list[Class | External] = [cls]

        def same(a: Class | External, b: Class | External) -> bool:
            return a.name == b.name

        while queues := [queue for queue in queues if queue]:
            heads = (queue[0] for queue in queues)
            head = next((h for h in heads if not any(same(h, other) for queue in queues for other in queue[1:])), queues[0][0])
            order.append(head)
            queues = [[c for c in queue if not same(c, head)] for queue in queues]
        return order

    def in_class(self, cls: Class, name: str) -> Found | None:
        for owner in self.mro(cls):
            if isinstance(owner, External):
                if members.external_has(owner.name, name):
                    return External(f"{owner.name}.{name}")
            elif binding := owner.members.get(name):
                if isinstance(binding.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    return Function(owner.module, binding.node, owner)
                if isinstance(binding.node, ast.ClassDef):
                    return self._class(owner.module, binding.node)
                return Value(owner.module, binding.annotation, binding.value, name)
        return None

    # -- types ------------------------------------------------------------------------------------------------------

    def expression(self, module: Module, node: ast.expr | None) -> Found | None:
        """What a dotted name in the module's code refers to."""
        if isinstance(node, ast.Name):
            return self.in_module(module, node.id) or External(node.id)
        if isinstance(node, ast.Attribute):
            base = self.expression(module, node.value)
            if isinstance(base, External):
                return External(f"{base.name}.{node.attr}")
            return self.attribute(base, node.attr) if base else None
        return None

    def annotated(self, module: Module, node: ast.expr | None) -> Class | External:
        """The class an annotation names; unions other than with None count as unknown."""
        target = self.expression(module, members.annotated_name(node))
        return target if isinstance(target, Class) else External()

    def type_of(self, found: Value | Function) -> Class | External:
        """The class of a value, or of what a function returns."""
        if isinstance(found, Function):
            return self.annotated(found.module, found.node.returns)
        if found.annotation is not None:
            return self.annotated(found.module, found.annotation)
        if isinstance(found.value, ast.Call):
            made = self.result(self.expression(found.module, found.value.func) or External())
            # Layers get their parameters at run time, from a quantisation method: their attributes are open.
            if isinstance(made, Class) and not any(c.name.startswith("torch.nn") for c in self.mro(made)):
                return made
        return External()

    def result(self, found: Found) -> Class | External:
        """What a call gives: an instance stands for its class."""
        if isinstance(found, Class):
            return found
        return self.type_of(found) if isinstance(found, Function) else External()

    # -- calls ------------------------------------------------------------------------------------------------------

    def signature(self, found: Found, unbound: bool = False) -> Signature | None:
        """The signature as a caller sees it; None where the sources do not say."""
        if isinstance(found, Class):
            return self._constructor(found)
        if not isinstance(found, Function):
            return None
        signature = signature_of(found.node)
        if found.owner is not None and not found.decorated("staticmethod"):
            if not unbound or found.decorated("classmethod"):
                signature = without_first(signature)
            if found.node.args.kwarg and members.forwards_to_super(found.node):
                signature = forwarding(signature, self._next(found))
        return signature

    def _next(self, function: Function) -> Signature | None:
        """The signature of the method that ``super()`` finds from ``function``, in its own class's order."""
        return self._method(self.mro(function.owner)[1:], function.node.name)

    def _method(self, order: list[Class | External], name: str) -> Signature | None:
        for position, owner in enumerate(order):
            if isinstance(owner, External):
                if members.external_has(owner.name, name):
                    return None
            elif (binding := owner.members.get(name)) and isinstance(binding.node, ast.FunctionDef):
                signature = without_first(signature_of(binding.node))
                if binding.node.args.kwarg and members.forwards_to_super(binding.node):
                    return forwarding(signature, self._method(order[position + 1 :], name))
                return signature
        return None

    def _constructor(self, cls: Class) -> Signature | None:
        order = self.mro(cls)
        if not any(isinstance(c, Class) and "__init__" in c.members for c in order):
            if any(isinstance(c, Class) and members.is_dataclass(c.node) for c in order):
                fields: dict[str, bool] = {}
                for owner in reversed(order):
                    fields |= dict(members.dataclass_fields(owner.node)) if isinstance(owner, Class) else {}
                return fields_signature(list(fields.items()))
        return self._method(order, "__init__")

    def check(self, symbol: str, call: Call | None = None) -> None:
        """Raise :class:`Drift`, naming the symbol, unless it exists and takes the call."""
        found = self.resolve(symbol)
        if call is None:
            return
        unbound = call.unbound and isinstance(self.resolve(symbol.rpartition(".")[0]), Class)
        signature = self.signature(found, unbound)
        if signature is not None and (problem := misfit(signature, call)):
            raise Drift(f"{symbol}{call}: {self.name} has {symbol.rpartition('.')[2]}{signature}: {problem}")

    def parameters(self, symbol: str) -> list[str]:
        """The parameter names of a function or constructor, as a caller sees them."""
        signature = self.signature(self.resolve(symbol))
        if signature is None:
            raise Drift(f"{symbol}: {self.name} does not define it as a function")
        return [p.name for p in signature.parameters.values() if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]

    def calls(self, module: str, function: str) -> list[Call]:
        """The calls of ``function`` (a dotted tail such as ``quant_method.apply``) in a module's code."""
        found = self.module(module)
        if found is None:
            raise Drift(f"{module}: {self.name} has no such module")
        nodes = (n for n in ast.walk(found.tree) if isinstance(n, ast.Call))
        return [Call.of(n) for n in nodes if f".{ast.unparse(n.func)}".endswith(f".{function}")]


def _place(found: Found, segments: list[str]) -> str:
    """Where a name was looked for: the path, and what it leads to where that is somewhere else."""
    path = ".".join(segments)
    return f"{path} ({found.name})" if isinstance(found, (Class, Module)) and found.name != path else path
