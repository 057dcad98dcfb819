# SPDX-License-Identifier: Apache-2.0
"""
Which rule of a domain binds a descriptor, under which name it is counted and measured.

A domain is a tree; a descriptor's entries walk down it, one level each. At every level the exact
value wins, then the patterns in the order of the file, then the key alone. A rule binds a
descriptor that ends at it: neither a longer nor a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final


class Unit(Enum):
    """What a rule counts over: a window of fixed length that starts at a multiple of it since 1970."""

    SECOND = "second"
    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


#: In seconds. A month is 30 days and a year 365, as in envoyproxy/ratelimit; calendar windows are Peaje's own limits'.
LENGTHS_SECONDS: Final = MappingProxyType(
    {
        Unit.SECOND: 1,
        Unit.MINUTE: 60,
        Unit.HOUR: 3_600,
        Unit.DAY: 86_400,
        Unit.WEEK: 7 * 86_400,
        Unit.MONTH: 30 * 86_400,
        Unit.YEAR: 365 * 86_400,
    }
)
WILDCARD: Final = "*"
#: 128 bits: who chooses the values cannot make two of them meet.
_NAME_BYTES: Final = 16

#: One pair of a descriptor. Pairs, never joined text: `a_b` with `c` is not `a` with `b_c`.
Entry = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rate limit, as people wrote it or as a descriptor brings it along."""

    #: Where it is written: the domain and the keys (with their values, if written) down to it, joined by dots.
    path: str
    #: None: unlimited, never counted.
    unit: Unit | None
    #: Hits that may pass in one window; 0 lets nothing pass.
    requests_per_unit: int
    name: str = ""
    #: Names of rules that do not act on a request on which this one does.
    replaces: frozenset[str] = frozenset()
    #: Counted and measured, but never the reason of a refusal.
    shadow: bool = False
    #: Refuses only if every such rule of the request is over.
    quota: bool = False
    detailed_metric: bool = False
    #: What a passed descriptor adds to the answer's dynamic metadata.
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One descriptor of a file; without a rule it is a step on the way, or lets its value pass."""

    key: str
    #: "" is any value; one with `*` is a pattern.
    value: str
    rule: Rule | None
    value_to_metric: bool
    #: All values that match the pattern are counted together.
    share_threshold: bool
    below: Level


class Level:
    """The descriptors of one list, found by key and value. Immutable."""

    __slots__ = ("_exact", "_patterns")

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._exact: dict[Entry, Node] = {}
        self._patterns: dict[str, list[tuple[list[str], Node]]] = {}
        for node in nodes:
            self._exact[node.key, node.value] = node
            if WILDCARD in node.value:
                self._patterns.setdefault(node.key, []).append((node.value.split(WILDCARD), node))

    def find(self, key: str, value: str) -> tuple[Node | None, bool]:
        """The most specific descriptor for an entry, and whether it was found by its pattern."""
        if value and (node := self._exact.get((key, value))):
            return node, False
        for parts, node in self._patterns.get(key, ()):
            if matches(parts, value):
                return node, True
        return self._exact.get((key, "")), False

    def __bool__(self) -> bool:
        return bool(self._exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A rule bound to a descriptor's values."""

    rule: Rule
    #: The store's name of the counter; "" for an unlimited rule, which has none.
    counter: str
    #: What its metrics are called; other than the rule's path, it has a caller's values in it.
    metric: str


class Rules:
    """All domains that are in force; a change makes new ones. Immutable."""

    def __init__(self, domains: Mapping[str, Level]) -> None:
        self._domains = dict(domains)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in order."""
        return tuple(sorted(self._domains))

    def __contains__(self, domain: str) -> bool:
        return domain in self._domains

    def match(self, domain: str, entries: Sequence[Entry], own: Rule | None = None) -> Match | None:
        """
        The rule that binds a descriptor, or None; *own* is the limit that the descriptor brings along.

        A limit of its own needs the domain but no rule in it, and takes the place of any that is there.
        """
        level = self._domains.get(domain)
        if level is None:
            return None
        if own is not None:
            metric = ".".join((domain, *(_joined(key, value) for key, value in entries)))
            return Match(rule=own, counter=counter_name(domain, entries, own.unit), metric=metric)
        way: list[tuple[Node, bool]] = []
        for key, value in entries:
            node, by_pattern = level.find(key, value)
            if node is None:
                return None
            way.append((node, by_pattern))
            level = node.below
        rule = way[-1][0].rule if way else None
        if rule is None:
            return None
        counted = [
            (key, node.value if by_pattern and node.share_threshold else value)
            for (key, value), (node, by_pattern) in zip(entries, way, strict=True)
        ]
        if rule.detailed_metric:
            metric = ".".join((domain, *(_joined(key, value) for key, value in counted)))
        else:
            metric = ".".join((domain, *(_measured(node, value) for (node, _), (_, value) in zip(way, counted, strict=True))))
        return Match(rule=rule, counter=counter_name(domain, counted, rule.unit), metric=metric)


def matches(parts: Sequence[str], value: str) -> bool:
    """
    Whether *value* matches a pattern that was split at its `*`; each stands for any text, also none.

    >>> matches("/api/*/action".split("*"), "/api/123/action"), matches("/api/*/action".split("*"), "/api/action")
    (True, False)
    >>> matches("ab*ba".split("*"), "aba")
    False
    """
    first, *middle, last = parts
    end = len(value) - len(last)
    position = len(first)
    if position > end or not value.startswith(first) or not value.endswith(last):
        return False
    for part in middle:
        found = value.find(part, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True


def counter_name(domain: str, entries: Sequence[Entry], unit: Unit | None) -> str:
    """
    What the store calls the counter of a descriptor: of one length whatever the values hold, and without them.

    A changed number of requests keeps the count; another unit counts anew.

    >>> counter_name("edge", [("path", "/")], Unit.DAY)
    'peaje:rls:day:264f83f8c6c4083faeb7a43af3f31287'
    """
    if unit is None:
        return ""
    digest = blake2b(digest_size=_NAME_BYTES)
    for text in (domain, *(text for entry in entries for text in entry)):
        raw = text.encode()
        digest.update(b"%d:%b" % (len(raw), raw))
    return f"peaje:rls:{unit.value}:{digest.hexdigest()}"


def replaced(found: Sequence[Match | None]) -> list[Match | None]:
    """Without the rules of a request that another of its rules replaces; an unlimited one has no name to be replaced by."""
    names = frozenset[str]().union(*(one.rule.replaces for one in found if one is not None))
    return [None if one is not None and one.rule.name in names else one for one in found]


def _measured(node: Node, value: str) -> str:
    """A step of a metric's name: the value as the file has it, or as it came where the file says so."""
    if node.share_threshold or not node.value_to_metric:
        return _joined(node.key, node.value)
    return _joined(node.key, value)


def _joined(key: str, value: str) -> str:
    return f"{key}_{value}" if value else key
