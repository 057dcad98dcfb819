# SPDX-License-Identifier: Apache-2.0
"""
Read the files that operators bring: text in, domains out, and by line what is wrong or does nothing.

The format is envoyproxy/ratelimit's. What it takes is taken here with the same meaning; what it
takes and ignores is a remark; what would mean something else than it says is a fault. A file with
a fault is of no use, one with remarks is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import yaml

from chassis.contract import RLS_DOMAIN
from ratelimit.core.rls.fields import DEPTH_MAX, INT, NULL, Fields, Remark, Stop, YamlReader, line_of, shown
from ratelimit.core.rls.rules import WILDCARD, Level, Node, Rule, Rules, Unit, matches

#: Of all files together: what is read in a few seconds beside the requests that go on meanwhile.
DESCRIPTORS_MAX: Final = 50_000
#: Patterns of one key in one list: a request may have to try them all.
PATTERNS_MAX: Final = 500
_NUMBER_MAX: Final = 2**32 - 1

_ROOT: Final = ("domain", "descriptors")
_DESCRIPTOR: Final = (
    "key", "value", "rate_limit", "descriptors", "shadow_mode", "quota_mode", "detailed_metric", "value_to_metric",
    "share_threshold", "metadata",
)  # fmt: skip
_RATE_LIMIT: Final = ("unit", "requests_per_unit", "unlimited", "name", "replaces")
_REPLACES: Final = ("name",)
_KNOWN: Final = frozenset({*_ROOT, *_DESCRIPTOR, *_RATE_LIMIT})
#: What needs a `rate_limit` beside it to mean anything.
_OF_A_LIMIT: Final = ("shadow_mode", "quota_mode", "detailed_metric", "metadata")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What one file says; *faults* make it useless, *remarks* are what does nothing in it."""

    file: str
    domain: str
    #: Where the domain is named.
    line: int
    descriptors: Level
    count: int
    faults: tuple[Remark, ...]
    remarks: tuple[Remark, ...]


def read(text: str, *, file: str) -> Document:
    """Read the one domain of *file*."""
    return _Reader(file).document(text)


def combine(documents: Sequence[Document]) -> tuple[Rules, list[Remark]]:
    """All domains together, and the faults of all files; with any, the rules are not to be used."""
    faults = [fault for document in documents for fault in document.faults]
    first: dict[str, str] = {}
    faults += [
        _remark(one, f"domain {one.domain!r} is also in {other}.", "Keep a domain in one file.")
        for one in documents
        if one.domain and (other := first.setdefault(one.domain, one.file)) != one.file
    ]
    if (count := sum(one.count for one in documents)) > DESCRIPTORS_MAX:
        faults.append(_remark(documents[-1], f"{count} descriptors in all files.", f"Keep to {DESCRIPTORS_MAX}."))
    return Rules({one.domain: one.descriptors for one in documents}), faults


def _remark(document: Document, what: str, mend: str) -> Remark:
    return Remark(file=document.file, line=document.line, what=what, mend=mend)


class _Reader:
    """Reads one file; collects what it has to say instead of stopping at the first fault."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._yaml = YamlReader(file, known=_KNOWN)
        self._names: set[str] = set()
        self._replaced: list[tuple[str, yaml.Node]] = []
        self._count = 0

    def document(self, text: str) -> Document:
        domain, line, level = "", 0, Level(())
        try:
            fields = self._yaml.fields(self._yaml.root(text), _ROOT, "a file")
            domain = self._yaml.text(fields.get("domain"))
            line = line_of(fields["domain"]) if "domain" in fields else 0
            self._check_domain(domain, line)
            level = self._level(fields.get("descriptors"), domain, 0)
            if not level:
                self._yaml.remarks.append(self._yaml.at(line, f"domain {domain!r} has no descriptors.", "Nothing of it is limited."))
            self._check_replaced()
        except Stop:
            pass
        return Document(
            file=self._file, domain=domain, line=line, descriptors=level, count=self._count,
            # What follows from a fault would read like a fault of its own.
            faults=tuple(self._yaml.faults), remarks=() if self._yaml.faults else tuple(self._yaml.remarks),
        )  # fmt: skip

    def _check_domain(self, domain: str, line: int) -> None:
        if not domain:
            self._yaml.fail(line, "domain is missing.", "Write the domain of Envoy's ratelimit filter.")
        if domain == RLS_DOMAIN:
            self._yaml.fail(line, f"domain {domain!r} is Peaje's own.", "Choose another; its limits are set with `peaje limits`.")

    def _level(self, node: yaml.Node | None, path: str, depth: int) -> Level:
        if node is None or node.tag == NULL:
            return Level(())
        if not isinstance(node, yaml.SequenceNode):
            self._yaml.fail(line_of(node), "descriptors is not a list.", "Begin each descriptor with `- key:`.")
        if depth > DEPTH_MAX:
            self._yaml.fail(line_of(node), "nested too deep.", f"Keep to {DEPTH_MAX} levels.")
        found: dict[tuple[str, str], tuple[Node, yaml.Node]] = {}
        for item in node.value:
            self._count += 1
            if self._count > DESCRIPTORS_MAX:
                self._yaml.fail(line_of(item), f"more than {DESCRIPTORS_MAX} descriptors.", "Use patterns, or keys without a value.")
            one = self._descriptor(item, path, depth)
            if one.key and (one.key, one.value) in found:
                self._yaml.fault(item, f"descriptor {one.key!r} with value {one.value!r} is there twice.", "Keep one of them.")
            found[one.key, one.value] = one, item
        self._remark_level(list(found.values()))
        return Level(one for one, _ in found.values())

    def _descriptor(self, item: yaml.Node, path: str, depth: int) -> Node:
        fields = self._yaml.fields(item, _DESCRIPTOR, "a descriptor")
        key, value = self._yaml.text(fields.get("key")), self._yaml.text(fields.get("value"))
        if not key and isinstance(item, yaml.MappingNode):
            self._yaml.fault(item, "a descriptor has no key.", "Write the key that Envoy's action sends.")
        if WILDCARD in key:
            self._yaml.fault(fields["key"], f"key {key!r} has a {WILDCARD}.", "Patterns are for values; a key is compared as it is.")
        here = f"{path}.{key}_{value}" if value else f"{path}.{key}"
        shares = self._yaml.flag(fields.get("share_threshold"))
        if shares and WILDCARD not in value:
            mend = f"It is for a value with a {WILDCARD}: all that match are counted together."
            self._yaml.fault(fields["share_threshold"], "share_threshold without a pattern.", mend)
        value_to_metric, detailed = self._yaml.flag(fields.get("value_to_metric")), self._yaml.flag(fields.get("detailed_metric"))
        if value_to_metric and detailed:
            self._yaml.no_effect(fields["value_to_metric"], "value_to_metric", "detailed_metric has all values already")
        rule = self._rule(fields, here, detailed=detailed)
        if rule is None:
            for name in _OF_A_LIMIT:
                if name in fields:
                    self._yaml.no_effect(fields[name], name, "there is no rate_limit beside it")
        return Node(
            key=key, value=value, rule=rule, value_to_metric=value_to_metric, share_threshold=shares,
            below=self._level(fields.get("descriptors"), here, depth + 1),
        )  # fmt: skip

    def _rule(self, fields: Fields, path: str, *, detailed: bool) -> Rule | None:
        node = fields.get("rate_limit")
        if node is None or node.tag == NULL:
            return None
        limit = self._yaml.fields(node, _RATE_LIMIT, "rate_limit")
        name = self._yaml.text(limit.get("name"))
        shadow, quota = self._yaml.flag(fields.get("shadow_mode")), self._yaml.flag(fields.get("quota_mode"))
        unlimited = self._yaml.flag(limit.get("unlimited"))
        if not unlimited:
            self._names.add(name)
        else:
            for word in ("requests_per_unit", "name"):
                if word in limit:
                    self._yaml.no_effect(limit[word], word, "the rule is unlimited")
            for word in ("shadow_mode", "quota_mode"):
                if word in fields:
                    self._yaml.no_effect(fields[word], word, "the rule is unlimited")
        return Rule(
            path=path,
            unit=self._unit(node, limit, unlimited=unlimited),
            requests_per_unit=0 if unlimited else self._number(node, limit.get("requests_per_unit")),
            name="" if unlimited else name,
            replaces=self._replaces(limit.get("replaces"), name),
            shadow=shadow,
            quota=quota,
            detailed_metric=detailed,
            metadata=self._yaml.metadata(fields.get("metadata")),
        )

    def _unit(self, rate_limit: yaml.Node, limit: Fields, *, unlimited: bool) -> Unit | None:
        word = self._yaml.text(limit.get("unit"))
        if unlimited:
            if word:
                self._yaml.fault(limit["unit"], "an unlimited rule has a unit.", "Remove the unit, or `unlimited`.")
            return None
        try:
            return Unit(word.lower())
        except ValueError:
            what = f"unit {word!r} is none." if word else "unit is missing."
            self._yaml.fault(limit.get("unit", rate_limit), what, f"Write one of {', '.join(unit.value for unit in Unit)}.")
            return None

    def _number(self, rate_limit: yaml.Node, node: yaml.Node | None) -> int:
        if node is None:
            self._yaml.fault(rate_limit, "requests_per_unit is missing.", "Write how many may pass in a unit; 0 lets nothing pass.")
            return 0
        number = self._yaml.value(node) if node.tag == INT else None
        if not isinstance(number, int) or not 0 <= number <= _NUMBER_MAX:
            self._yaml.fault(node, f"requests_per_unit {shown(node)} is no number of requests.", f"Write one from 0 to {_NUMBER_MAX}.")
            return 0
        return number

    def _replaces(self, node: yaml.Node | None, own_name: str) -> frozenset[str]:
        if node is None or node.tag == NULL:
            return frozenset()
        if not isinstance(node, yaml.SequenceNode):
            self._yaml.fault(node, "replaces is not a list.", "Write `- name:` and the name of the rule that gives way.")
            return frozenset()
        names = set()
        for item in node.value:
            name = self._yaml.text(self._yaml.fields(item, _REPLACES, "replaces").get("name"))
            if not name:
                self._yaml.fault(item, "replaces has an entry without a name.", "Name the rule that gives way.")
            elif name == own_name:
                self._yaml.fault(item, f"rule {name!r} replaces itself.", "Name another rule.")
            else:
                self._replaced.append((name, item))
                names.add(name)
        return frozenset(names)

    def _check_replaced(self) -> None:
        for name, item in self._replaced:
            if name not in self._names:
                self._yaml.remarks.append(self._yaml.at(line_of(item), f"replaces {name!r} has no effect:", "no rule of the domain has this name."))

    def _remark_level(self, siblings: list[tuple[Node, yaml.Node]]) -> None:
        """What of a list can never be reached, or lets pass what passes anyway."""
        patterns: dict[str, list[str]] = {}
        bare = {node.key for node, _ in siblings if not node.value}
        for node, item in siblings:
            earlier = patterns.setdefault(node.key, [])
            if WILDCARD in node.value:
                # A pattern that matches another's text, `*` and all, matches whatever that one does.
                if len(earlier) == PATTERNS_MAX:
                    self._yaml.fail(line_of(item), f"more than {PATTERNS_MAX} patterns of {node.key!r}.", "Write fewer, or values.")
                if any(matches(one.split(WILDCARD), node.value) for one in earlier):
                    self._yaml.no_effect(item, f"value {node.value!r}", "a pattern before it matches all that it would")
                earlier.append(node.value)
        for node, item in siblings:
            if not node.value and WILDCARD in patterns[node.key]:
                self._yaml.no_effect(item, f"key {node.key!r} without a value", f"the value {WILDCARD} beside it matches everything")
            elif node.rule is None and not node.below and not _is_exception(node, patterns[node.key], has_bare=node.key in bare):
                reason = "it has no rate_limit, no descriptors, and nothing beside it to except from"
                self._yaml.no_effect(item, f"descriptor {node.key!r}", reason)


def _is_exception(node: Node, patterns: Sequence[str], *, has_bare: bool) -> bool:
    """Whether a value without a limit takes something away from what is beside it."""
    if node.value and has_bare:
        return True
    return any(one != node.value and matches(one.split(WILDCARD), node.value) for one in patterns)


def all_remarks(documents: Iterable[Document]) -> list[Remark]:
    """What does nothing in any of the files."""
    return [remark for document in documents for remark in document.remarks]
