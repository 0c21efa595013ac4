"""What a plugin's code uses of an engine, from its syntax trees.

Seen are imports, attribute chains that start at an imported name, at a variable annotated with an engine class or at
``self`` of a class derived from one, calls on such chains, and the methods of those classes.  What code reaches in
another way (an unannotated variable, ``getattr``) is invisible here and belongs in the engine's own table.
"""

from __future__ import annotations

import ast
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from .members import FunctionNode, annotated_name, last_name
from .signatures import Call

IMPORTERS = ("register_post_import_hook", "import_module", "when_imported")


@dataclass(frozen=True)
class Use:
    """A name of the engine that the plugin relies on, and how it calls it."""

    symbol: str
    call: Call | None = None
    others: tuple[str, ...] = ()
    """Where else the name may be: one of several bases."""
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.symbol}{self.call or ''}"


@dataclass(frozen=True)
class Chain:
    symbols: tuple[str, ...]
    imported: bool = False
    """The chain is the imported name itself (perhaps with attributes), not an instance."""

    def then(self, suffix: str, imported: bool = False) -> Chain:
        return Chain(tuple(symbol + suffix for symbol in self.symbols), imported)


@dataclass
class PluginClass:
    """A class of the plugin; ``engine`` are its engine bases, ``plugin`` the names of its bases in the plugin."""

    name: str
    node: ast.ClassDef
    where: str
    engine: tuple[str, ...] = ()
    plugin: tuple[str, ...] = ()

    @property
    def methods(self) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        return {node.name: node for node in self.node.body if isinstance(node, FunctionNode)}

    @property
    def replaces(self) -> bool:
        """Registered in place of an engine's class: the engine constructs it."""
        return any("register_oot" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    @property
    def attributes(self) -> set[str]:
        """Everything the class itself defines or sets."""
        names = set(self.methods)
        for node in ast.walk(self.node):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
                names.add(node.attr)
        for node in self.node.body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        return names


class Plugin:
    """The plugin's files under ``root`` and their uses of ``engine`` (an import name)."""

    def __init__(self, root: Path, engine: str) -> None:
        self.engine = engine
        self.files = {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}
        self.files = {name: tree for name, tree in self.files.items() if self._concerned(tree)}
        self.classes: dict[str, PluginClass] = {}
        for name, tree in self.files.items():
            imports = self.imports(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    dotted = [_dotted(base) for base in node.bases]
                    engine_bases = tuple(
                        f"{imports[b.split('.')[0]]}{b[len(b.split('.')[0]) :]}" for b in dotted if b.split(".")[0] in imports
                    )
                    ours = tuple(b for b in dotted if b.split(".")[0] not in imports)
                    self.classes[node.name] = PluginClass(node.name, node, f"{name}:{node.lineno}", engine_bases, ours)

    def _concerned(self, tree: ast.Module) -> bool:
        """The file names the engine anywhere: other files are no business of this contract."""
        pattern = re.compile(rf"{self.engine}(\.\w+)*")
        strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        return bool(self.imports(tree)) or any(pattern.fullmatch(s) for s in strings)

    def _ours(self, dotted: str) -> bool:
        return dotted == self.engine or dotted.startswith(f"{self.engine}.")

    def imports(self, tree: ast.Module) -> dict[str, str]:
        """Local name -> engine name, wherever in the file the import stands."""
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and self._ours(node.module or ""):
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if self._ours(alias.name):
                        found[alias.asname or self.engine] = alias.name if alias.asname else self.engine
        return found

    def family(self, cls: PluginClass) -> Iterator[PluginClass]:
        """The class and its bases in the plugin."""
        yield cls
        for name in cls.plugin:
            if name in self.classes:
                yield from self.family(self.classes[name])

    def engine_bases(self, cls: PluginClass) -> tuple[str, ...]:
        return tuple(dict.fromkeys(base for member in self.family(cls) for base in member.engine))

    def derived(self) -> list[PluginClass]:
        """The classes with an engine class among their ancestors."""
        return [cls for cls in self.classes.values() if self.engine_bases(cls)]

    def hosts(self, cls: PluginClass) -> list[PluginClass]:
        """The derived classes that ``cls`` is part of: itself, or those that mix it in."""
        return [host for host in self.derived() if cls in self.family(host)]

    def methods(self, cls: PluginClass) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        """The methods that instances have from the plugin."""
        found: dict = {}
        for member in self.family(cls):
            found = member.methods | found
        return found

    def uses(self) -> list[Use]:
        """Every use, once, by name; a name that is called stands for itself as well."""
        found: dict[Use, None] = {}
        for name, tree in self.files.items():
            scanner = _Scanner(self, name, tree)
            scanner.visit(tree)
            found |= dict.fromkeys(scanner.found)
        called = {use.symbol for use in found if use.call}
        return sorted((use for use in found if use.call or use.symbol not in called), key=str)


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node)


class _Scanner(ast.NodeVisitor):
    def __init__(self, plugin: Plugin, file: str, tree: ast.Module) -> None:
        self.plugin, self.file = plugin, file
        self.imports = plugin.imports(tree)
        names = {name: [Chain((symbol,), imported=True)] for name, symbol in self.imports.items()}
        self.scope: ChainMap[str, list[Chain]] = ChainMap(names)
        self.cls: PluginClass | None = None
        self.stored = list(_stored(tree))
        self.found: list[Use] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and plugin._ours(node.module or ""):
                for alias in node.names:
                    self.note(Chain((f"{node.module}.{alias.name}",)), node)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if plugin._ours(alias.name):
                        self.note(Chain((alias.name,)), node)

    def note(self, chain: Chain, node: ast.AST, call: Call | None = None) -> None:
        first, *others = chain.symbols
        self.found.append(Use(first, call, tuple(others), f"{self.file}:{node.lineno}"))

    # -- what an expression is ---------------------------------------------------------------------------------------

    def chains(self, node: ast.expr) -> list[Chain]:
        """The engine objects the expression may be; more than one where a mixin has several hosts."""
        if isinstance(node, ast.Name):
            return self.scope.get(node.id, [])
        if isinstance(node, ast.Attribute):
            found = []
            for chain in self.chains(node.value):
                if not chain.imported and any(fnmatchcase(node.attr, pattern) for pattern in self.stored):
                    continue
                found.append(chain.then(f".{node.attr}", chain.imported))
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            return self._not_ours(found, node.attr, own, node.value) if self.cls else found
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super" and self.cls:
                return [Chain(self.plugin.engine_bases(host)) for host in self.plugin.hosts(self.cls)]
            return [chain.then("()") for chain in self.chains(node.func)]
        return []

    def _not_ours(self, found: list[Chain], attribute: str, own: bool, receiver: ast.expr) -> list[Chain]:
        """Drop what the plugin's own classes define: for ``self`` any of them, for ``super()`` those after this one."""
        hosts = self.plugin.hosts(self.cls)
        if own:
            keep = {self.plugin.engine_bases(h) for h in hosts if not any(attribute in c.attributes for c in self.plugin.family(h))}
        elif isinstance(receiver, ast.Call) and ast.unparse(receiver.func) == "super":
            later = [c for h in hosts for c in self.plugin.family(h) if c not in (self.cls, h) and h is self.cls]
            keep = set() if any(attribute in c.attributes for c in later) else {self.plugin.engine_bases(h) for h in hosts}
        else:
            return found
        wanted = {tuple(f"{base}.{attribute}" for base in bases) for bases in keep}
        return [chain for chain in found if chain.symbols in wanted]

    def typed(self, annotation: ast.expr | None) -> list[Chain]:
        named = annotated_name(annotation)
        found = self.chains(named) if named is not None else []
        return [Chain(chain.symbols) for chain in found if chain.imported]

    # -- walking -----------------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            for chain in self.chains(node):
                self.note(chain, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        call = Call.of(node)
        for chain in self.chains(node.func):
            # An attribute of an imported name is called on a class or a module: it gets no instance.
            self.note(chain, node, Call(call.args, call.keywords, call.open, unbound=chain.imported))
        if last_name(node.func) in IMPORTERS:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str) and self.plugin._ours(argument.value):
                    self.note(Chain((argument.value,)), node)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.decorators(node)
        outer, self.cls = self.cls, self.plugin.classes.get(node.name)
        self.generic_visit(node)
        self.cls = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.decorators(node)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        local: dict[str, list[Chain]] = {arg.arg: self.typed(arg.annotation) for arg in arguments}
        method = self.cls is not None and node in self.cls.node.body
        if method and arguments and not any(last_name(d) == "staticmethod" for d in node.decorator_list):
            local[arguments[0].arg] = [Chain(self.plugin.engine_bases(host)) for host in self.plugin.hosts(self.cls)]
        self.scope = self.scope.new_child(local)
        self.generic_visit(node)
        self.scope = self.scope.parents

    visit_AsyncFunctionDef = visit_FunctionDef

    def decorators(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            if not isinstance(decorator, ast.Call):
                for chain in self.chains(decorator):
                    self.note(chain, decorator, Call(1, unbound=chain.imported))

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scope[target.id] = self.chains(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self.scope[node.target.id] = self.typed(node.annotation)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.generic_visit(node)
        self.scope |= dict(self.narrowed(node.test))

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.scope = self.scope.new_child(dict(self.narrowed(node.test)))
        for child in node.body:
            self.visit(child)
        self.scope = self.scope.parents
        for child in node.orelse:
            self.visit(child)

    def narrowed(self, test: ast.expr) -> Iterable[tuple[str, list[Chain]]]:
        """``isinstance(name, Class)`` says what ``name`` is."""
        for part in test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]:
            if isinstance(part, ast.Call) and last_name(part.func) == "isinstance" and isinstance(part.args[0], ast.Name):
                if types := self.typed(part.args[1]):
                    yield part.args[0].id, types


def _stored(tree: ast.Module) -> Iterator[str]:
    """Patterns of the attributes that the file sets on objects: the plugin's own, not the engine's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        if isinstance(node, ast.Call) and node.args and last_name(node.func) in ("setattr", "register_parameter", "register_buffer"):
            name = node.args[1 if last_name(node.func) == "setattr" else 0]
            if isinstance(name, ast.Constant):
                yield str(name.value)
            elif isinstance(name, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in name.values)
