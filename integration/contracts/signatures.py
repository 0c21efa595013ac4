"""Function signatures from syntax trees, and whether a call fits one."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from inspect import Parameter, Signature

_DEFAULT = "..."
_LEADING = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """A call's shape: ``open`` calls also pass ``*args`` or ``**kwargs``, whose content the syntax does not tell."""

    args: int = 0
    keywords: tuple[str, ...] = ()
    open: bool = False
    unbound: bool = False
    """``Class.method(self, ...)``: the first argument is the instance."""

    @classmethod
    def of(cls, node: ast.Call) -> Call:
        starred = any(isinstance(arg, ast.Starred) for arg in node.args)
        named = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        return cls(sum(not isinstance(arg, ast.Starred) for arg in node.args), named, starred or len(named) < len(node.keywords))

    def __str__(self) -> str:
        parts = ["_"] * self.args + [f"{name}=" for name in self.keywords] + (["..."] if self.open else [])
        return f"({', '.join(parts)})"


def signature_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Signature:
    """The signature of a definition; defaults count, annotations do not."""
    a = node.args
    leading = [*a.posonlyargs, *a.args]
    first_default = len(leading) - len(a.defaults)
    parameters = [
        Parameter(
            arg.arg,
            Parameter.POSITIONAL_ONLY if index < len(a.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=_DEFAULT if index >= first_default else Parameter.empty,
        )
        for index, arg in enumerate(leading)
    ]
    if a.vararg:
        parameters.append(Parameter(a.vararg.arg, Parameter.VAR_POSITIONAL))
    for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        parameters.append(Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else _DEFAULT))
    if a.kwarg:
        parameters.append(Parameter(a.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


def fields_signature(fields: list[tuple[str, bool]]) -> Signature:
    """The constructor of a dataclass with ``(name, has a default)`` fields."""
    # A subclass may add required fields after inherited defaults (kw_only); inspect wants defaults last.
    ordered = sorted(fields, key=lambda field: field[1])
    return Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=_DEFAULT if d else Parameter.empty) for n, d in ordered])


def without_first(signature: Signature) -> Signature:
    """The signature of a bound method."""
    parameters = list(signature.parameters.values())
    return signature.replace(parameters=parameters[1:]) if parameters and parameters[0].kind in _LEADING else signature


def forwarding(signature: Signature, target: Signature | None) -> Signature:
    """``signature``, whose ``**kwargs`` go on to ``target`` (None: to something unknown)."""
    if target is None:
        return signature
    own = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    taken = {p.name for p in own}
    more, rest = [], []
    for parameter in target.parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            rest.append(parameter)
        elif parameter.kind is not Parameter.VAR_POSITIONAL and parameter.name not in taken:
            more.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    return signature.replace(parameters=[*own, *more, *rest])


def misfit(signature: Signature, call: Call) -> str | None:
    """Why ``call`` cannot be made on ``signature``, or None."""
    bind = signature.bind_partial if call.open else signature.bind
    try:
        bind(*[None] * call.args, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return str(error)
    return None


def incompatible(ours: Signature, theirs: Signature) -> str | None:
    """Why ``ours`` cannot stand in for ``theirs`` (both bound), or None: every call theirs takes, ours must take."""
    parameters = list(theirs.parameters.values())
    leading = [p for p in parameters if p.kind in _LEADING]
    named = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    positional_only = sum(p.kind is Parameter.POSITIONAL_ONLY for p in leading)
    # What an override of *args or **kwargs must take is up to its callers: there only the named part is compared.
    unsettled = any(p.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for p in parameters)
    by_position = Call(len(leading), tuple(p.name for p in named), unsettled)
    by_name = replace(by_position, args=positional_only, keywords=tuple(p.name for p in (*leading[positional_only:], *named)))
    required = [p for p in (*leading, *named) if p.default is Parameter.empty]
    least = Call(
        sum(p.kind is Parameter.POSITIONAL_ONLY for p in required),
        tuple(p.name for p in required if p.kind is not Parameter.POSITIONAL_ONLY),
        unsettled,
    )
    for call in (by_position, by_name, least):
        if problem := misfit(ours, call):
            return f"called as {call}: {problem}"
    mine = [p.name for p in ours.parameters.values() if p.kind in _LEADING]
    for position, parameter in enumerate(leading):
        if position < len(mine) and parameter.name in mine and mine[position] != parameter.name:
            return f"parameter {position + 1} is {parameter.name!r} there and {mine[position]!r} here"
    return None
