# SPDX-License-Identifier: Apache-2.0
"""Match names against patterns in which `*` stands for any run of characters, and nothing else is special."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """A set of patterns; an empty one matches nothing."""

    exact: frozenset[str]
    #: Each pattern with a `*`, cut at every `*`.
    cut: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Patterns:
        """
        Prepare *patterns* for matching.

        >>> Patterns.of(["llama-*", "tiny"]).match("llama-3-8b")
        True
        >>> Patterns.of(["llama-*", "tiny"]).match("Tiny")
        False
        """
        kept = frozenset(patterns)
        starred = sorted(pattern for pattern in kept if "*" in pattern)
        return cls(exact=kept.difference(starred), cut=tuple(tuple(pattern.split("*")) for pattern in starred))

    def match(self, name: str) -> bool:
        """Whether any pattern covers the whole of *name*; time grows with length, never with how stars combine."""
        if name in self.exact:
            return True
        return bool(self.cut) and any(_covers(parts, name) for parts in self.cut)


NOTHING = Patterns.of(())


def _covers(parts: tuple[str, ...], name: str) -> bool:
    first, *middle, last = parts
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    position, end = len(first), len(name) - len(last)
    # Leftmost places suffice: taking a later one leaves less room for the rest.
    for part in middle:
        found = name.find(part, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True
