"""Which module names a checkpoint's patterns name: ModelOpt wildcards, and compressed-tensors' exact, regex and class names.

A mixture of experts has tens of thousands of modules and an exclude list hundreds of entries, so lists are compiled once
(literal names to a set, the rest to one regex) and asked often.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import translate
from functools import lru_cache

from ..errors import CheckpointError

_WILD = re.compile(r"[*?\[]")
_NEVER = re.compile(r"(?!)")


def spellings(name: str) -> Iterator[str]:
    """``name``, and the name without the wrappers that a model's classes and its checkpoint may disagree on."""
    yield name
    bare = ".".join(part for part in name.split(".") if part != "language_model").removeprefix("model.")
    # "model.*" must not become "*".
    if bare and bare != name and (not bare.startswith("*") or name.startswith("*")):
        yield bare


def _runs(name: str, heads: set[str]) -> Iterator[str]:
    """Runs of neighbouring components of ``name`` that begin with one of ``heads``."""
    parts = name.split(".")
    for start, head in enumerate(parts):
        if head in heads:
            run = head
            yield run
            for part in parts[start + 1 :]:
                run = f"{run}.{part}"
                yield run


@lru_cache(maxsize=64)
def wildcards(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Predicate over module names for ModelOpt ``exclude_modules`` entries.

    A pattern with wildcards matches a name, or a parent of it, as fnmatch does (``*`` crosses dots). One without matches
    when its dotted components stand next to each other in the name: the module, everything beneath it, and a bare
    ``lm_head`` or ``router`` wherever it occurs, but never half a component (``mlp.gate`` leaves ``mlp.gate_proj`` alone).
    """
    spelled = [s for p in patterns for s in spellings(p)]
    literal = {s for s in spelled if not _WILD.search(s)}
    heads = {s.partition(".")[0] for s in literal}
    wild = [translate(form) for s in spelled if _WILD.search(s) for form in (s, s + ".*")]
    regex = re.compile("|".join(wild)) if wild else _NEVER

    def matches(name: str) -> bool:
        return any(regex.match(n) or any(run in literal for run in _runs(n, heads)) for n in spellings(name))

    return matches


@lru_cache(maxsize=64)
def targets(entries: tuple[str, ...]) -> Callable[[str], bool]:
    """Predicate over module names for compressed-tensors targets or ignore entries: exact names, and ``re:`` regexes.

    Class names among the entries are for the caller. Raises :class:`CheckpointError` for a regex that does not compile.
    """
    literal = {s for e in entries if not e.startswith("re:") for s in spellings(e)}
    regexes = []
    for entry in entries:
        if entry.startswith("re:"):
            try:
                regexes.append(re.compile(entry[3:]))
            except re.error as error:
                raise CheckpointError(entry, f"a regex that does not compile ({error})", "'re:' and a Python regex") from None

    def matches(name: str) -> bool:
        return any(n in literal or any(r.match(n) for r in regexes) for n in spellings(name))

    return matches


def is_generic(pattern: str) -> bool:
    """Whether a pattern is a recipe's default that need not match in every model: it starts with a wildcard."""
    return pattern.startswith(("*", "re:.*", "re:^.*", "re:(.*"))


def parents(names: Iterable[str]) -> set[str]:
    """Every module name on the way to the given tensor names (the names themselves left out)."""
    found: set[str] = set()
    for name in names:
        module = name.rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return found
