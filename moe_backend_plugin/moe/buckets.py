"""Which token counts are tuned, and which of them a call of some size belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from ..errors import PluginError
from .families import HOPPER, Family
from .problem import MoEProblem

MOST_TOKENS = 131072


def edges(
    problem: MoEProblem,
    max_tokens: int,
    multiprocessors: int,
    sizes: Iterable[int] = (),
    cap: int | None = None,
    family: Family = HOPPER,
) -> list[int]:
    """The token counts to tune, ascending, the last one ``max_tokens``.

    Every power of two up to it; ``sizes`` that calls are known to have (a server's graphs); and each count after which the heuristic
    changes its choice (that of ``family``), so that no bucket is coarser than the heuristic. ``cap`` is a known mistake of other tuners:
    nothing above it is tuned, and larger calls run as if they had that many tokens.
    Raises PluginError (a ValueError) on counts outside 1 .. 131072, or a size above ``max_tokens``.
    """
    sizes = set(sizes)
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise PluginError("max_tokens", str(max_tokens), f"1 to {MOST_TOKENS}")
    if sizes and not 1 <= min(sizes) <= max(sizes) <= max_tokens:
        raise PluginError("sizes", ", ".join(map(str, sorted(sizes))), f"1 to max_tokens = {max_tokens}")
    last = min(max_tokens, cap or max_tokens)
    powers = {1 << i for i in range(last.bit_length())}
    found = powers | changes(problem, last, multiprocessors, family) | sizes | {last}
    return sorted(tokens for tokens in found if tokens <= last)


@lru_cache(64)
def changes(problem: MoEProblem, last: int, multiprocessors: int, family: Family) -> frozenset[int]:
    """After which counts, of those up to ``last``, the heuristic changes its choice."""
    found = [family.heuristic(problem, tokens, multiprocessors) for tokens in range(1, last + 1)]
    return frozenset(tokens for tokens, (one, next_) in enumerate(pairwise(found), 1) if one != next_)
