# SPDX-License-Identifier: Apache-2.0
"""
Read the files that operators bring: text in, domains out, and by line what is wrong or does nothing.

The format is envoyproxy/ratelimit's. What it takes is taken here with the same meaning; what it
takes and ignores is a remark; what would mean something else than it says is a fault. A file with
a fault is of no use, one with remarks is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import yaml

from chassis.contract import RLS_DOMAIN
from ratelimit.core.rls.rules import WILDCARD, Level, Node, Rule, Rules, Unit, matches

#: Of all files together: what is read in a few seconds beside the requests that go on meanwhile.
DESCRIPTORS_MAX: Final = 50_000
#: Levels of YAML; a descriptor takes two. What parses deeper ones slowly or overruns a stack is no configuration.
DEPTH_MAX: Final = 64
#: Values in all `metadata` of one file, each alias counted as often as it is used.
METADATA_MAX: Final = 10_000
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

_TAG: Final = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _MERGE = (f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "merge"))
#: libyaml's, with the wheel; elsewhere the slower one reads the same.
_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """
    Something in a file that its author should know.

    >>> print(Remark(file="edge.yaml", line=7, what="unit is missing.", mend="Write one of second, minute."))
    edge.yaml:7: unit is missing. Write one of second, minute.
    """

    file: str
    #: Counted from 1; 0 when the whole file is meant.
    line: int
    what: str
    mend: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.what} {self.mend}"


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


class _Stop(Exception):
    """The rest of the file cannot be read."""


class _Reader:
    """Reads one file; collects what it has to say instead of stopping at the first fault."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._faults: list[Remark] = []
        self._remarks: list[Remark] = []
        self._names: set[str] = set()
        self._replaced: list[tuple[str, yaml.Node]] = []
        self._fields_of: dict[tuple[int, str], dict[str, yaml.Node]] = {}
        self._count = 0
        self._metadata_count = 0

    def document(self, text: str) -> Document:
        domain, line, level = "", 0, Level(())
        try:
            fields = self._fields(self._root(text), _ROOT, "a file")
            domain = self._text(fields.get("domain"))
            line = _line(fields["domain"]) if "domain" in fields else 0
            self._check_domain(domain, line)
            level = self._level(fields.get("descriptors"), domain, 0)
            if not level:
                self._remarks.append(self._at(line, f"domain {domain!r} has no descriptors.", "Nothing of it is limited."))
            self._check_replaced()
        except _Stop:
            pass
        return Document(
            file=self._file, domain=domain, line=line, descriptors=level, count=self._count,
            # What follows from a fault would read like a fault of its own.
            faults=tuple(self._faults), remarks=() if self._faults else tuple(self._remarks),
        )  # fmt: skip

    def _root(self, text: str) -> yaml.Node:
        try:
            depth = 0
            for event in yaml.parse(text, Loader=_Loader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > DEPTH_MAX:
                    self._fail(_line(event), "nested too deep.", f"Keep to {DEPTH_MAX} levels.")
            # Its own methods read numbers and truth values below, as YAML 1.1 has them.
            self._loader = _Loader(text)
            root: yaml.Node | None = self._loader.get_single_node()
        except yaml.YAMLError as exc:
            mark = getattr(exc, "problem_mark", None)
            problem = getattr(exc, "problem", None) or "unreadable"
            self._fail(mark.line + 1 if mark is not None else 0, f"not YAML: {problem}.", "Write one YAML document.")
        if root is None:
            self._fail(0, "the file is empty.", "Write a domain, or remove the file.")
        return root

    def _check_domain(self, domain: str, line: int) -> None:
        if not domain:
            self._fail(line, "domain is missing.", "Write the domain of Envoy's ratelimit filter.")
        if domain == RLS_DOMAIN:
            self._fail(line, f"domain {domain!r} is Peaje's own.", "Choose another; its limits are set with `peaje limits`.")

    def _level(self, node: yaml.Node | None, path: str, depth: int) -> Level:
        if node is None or node.tag == _NULL:
            return Level(())
        if not isinstance(node, yaml.SequenceNode):
            self._fail(_line(node), "descriptors is not a list.", "Begin each descriptor with `- key:`.")
        if depth > DEPTH_MAX:
            self._fail(_line(node), "nested too deep.", f"Keep to {DEPTH_MAX} levels.")
        found: dict[tuple[str, str], tuple[Node, yaml.Node]] = {}
        for item in node.value:
            self._count += 1
            if self._count > DESCRIPTORS_MAX:
                self._fail(_line(item), f"more than {DESCRIPTORS_MAX} descriptors.", "Use patterns, or keys without a value.")
            one = self._descriptor(item, path, depth)
            if one.key and (one.key, one.value) in found:
                self._fault(item, f"descriptor {one.key!r} with value {one.value!r} is there twice.", "Keep one of them.")
            found[one.key, one.value] = one, item
        self._remark_level(list(found.values()))
        return Level(one for one, _ in found.values())

    def _descriptor(self, item: yaml.Node, path: str, depth: int) -> Node:
        fields = self._fields(item, _DESCRIPTOR, "a descriptor")
        key, value = self._text(fields.get("key")), self._text(fields.get("value"))
        if not key and isinstance(item, yaml.MappingNode):
            self._fault(item, "a descriptor has no key.", "Write the key that Envoy's action sends.")
        if WILDCARD in key:
            self._fault(fields["key"], f"key {key!r} has a {WILDCARD}.", "Patterns are for values; a key is compared as it is.")
        here = f"{path}.{key}_{value}" if value else f"{path}.{key}"
        shares = self._flag(fields.get("share_threshold"))
        if shares and WILDCARD not in value:
            mend = f"It is for a value with a {WILDCARD}: all that match are counted together."
            self._fault(fields["share_threshold"], "share_threshold without a pattern.", mend)
        value_to_metric, detailed = self._flag(fields.get("value_to_metric")), self._flag(fields.get("detailed_metric"))
        if value_to_metric and detailed:
            self._no_effect(fields["value_to_metric"], "value_to_metric", "detailed_metric has all values already")
        rule = self._rule(fields, here, detailed=detailed)
        if rule is None:
            for name in _OF_A_LIMIT:
                if name in fields:
                    self._no_effect(fields[name], name, "there is no rate_limit beside it")
        return Node(
            key=key, value=value, rule=rule, value_to_metric=value_to_metric, share_threshold=shares,
            below=self._level(fields.get("descriptors"), here, depth + 1),
        )  # fmt: skip

    def _rule(self, fields: dict[str, yaml.Node], path: str, *, detailed: bool) -> Rule | None:
        node = fields.get("rate_limit")
        if node is None or node.tag == _NULL:
            return None
        limit = self._fields(node, _RATE_LIMIT, "rate_limit")
        name = self._text(limit.get("name"))
        shadow, quota = self._flag(fields.get("shadow_mode")), self._flag(fields.get("quota_mode"))
        unlimited = self._flag(limit.get("unlimited"))
        if not unlimited:
            self._names.add(name)
        else:
            for word in ("requests_per_unit", "name"):
                if word in limit:
                    self._no_effect(limit[word], word, "the rule is unlimited")
            for word in ("shadow_mode", "quota_mode"):
                if word in fields:
                    self._no_effect(fields[word], word, "the rule is unlimited")
        return Rule(
            path=path,
            unit=self._unit(node, limit, unlimited=unlimited),
            requests_per_unit=0 if unlimited else self._number(node, limit.get("requests_per_unit")),
            name="" if unlimited else name,
            replaces=self._replaces(limit.get("replaces"), name),
            shadow=shadow,
            quota=quota,
            detailed_metric=detailed,
            metadata=self._metadata(fields.get("metadata")),
        )

    def _unit(self, rate_limit: yaml.Node, limit: dict[str, yaml.Node], *, unlimited: bool) -> Unit | None:
        word = self._text(limit.get("unit"))
        if unlimited:
            if word:
                self._fault(limit["unit"], "an unlimited rule has a unit.", "Remove the unit, or `unlimited`.")
            return None
        try:
            return Unit(word.lower())
        except ValueError:
            what = f"unit {word!r} is none." if word else "unit is missing."
            self._fault(limit.get("unit", rate_limit), what, f"Write one of {', '.join(unit.value for unit in Unit)}.")
            return None

    def _number(self, rate_limit: yaml.Node, node: yaml.Node | None) -> int:
        if node is None:
            self._fault(rate_limit, "requests_per_unit is missing.", "Write how many may pass in a unit; 0 lets nothing pass.")
            return 0
        number = self._value(node) if node.tag == _INT else None
        if not isinstance(number, int) or not 0 <= number <= _NUMBER_MAX:
            self._fault(node, f"requests_per_unit {_shown(node)} is no number of requests.", f"Write one from 0 to {_NUMBER_MAX}.")
            return 0
        return number

    def _replaces(self, node: yaml.Node | None, own_name: str) -> frozenset[str]:
        if node is None or node.tag == _NULL:
            return frozenset()
        if not isinstance(node, yaml.SequenceNode):
            self._fault(node, "replaces is not a list.", "Write `- name:` and the name of the rule that gives way.")
            return frozenset()
        names = set()
        for item in node.value:
            name = self._text(self._fields(item, _REPLACES, "replaces").get("name"))
            if not name:
                self._fault(item, "replaces has an entry without a name.", "Name the rule that gives way.")
            elif name == own_name:
                self._fault(item, f"rule {name!r} replaces itself.", "Name another rule.")
            else:
                self._replaced.append((name, item))
                names.add(name)
        return frozenset(names)

    def _check_replaced(self) -> None:
        for name, item in self._replaced:
            if name not in self._names:
                self._remarks.append(self._at(_line(item), f"replaces {name!r} has no effect:", "no rule of the domain has this name."))

    def _remark_level(self, siblings: list[tuple[Node, yaml.Node]]) -> None:
        """What of a list can never be reached, or lets pass what passes anyway."""
        patterns: dict[str, list[str]] = {}
        bare = {node.key for node, _ in siblings if not node.value}
        for node, item in siblings:
            earlier = patterns.setdefault(node.key, [])
            if WILDCARD in node.value:
                # A pattern that matches another's text, `*` and all, matches whatever that one does.
                if any(matches(one.split(WILDCARD), node.value) for one in earlier):
                    self._no_effect(item, f"value {node.value!r}", "a pattern before it matches all that it would")
                earlier.append(node.value)
        for node, item in siblings:
            general = [one for one in patterns[node.key] if one != node.value and matches(one.split(WILDCARD), node.value)]
            if not node.value and WILDCARD in patterns[node.key]:
                self._no_effect(item, f"key {node.key!r} without a value", f"the value {WILDCARD} beside it matches everything")
            elif node.rule is None and not node.below and not general and (not node.value or node.key not in bare):
                self._no_effect(item, f"descriptor {node.key!r}", "it has no rate_limit, no descriptors, and nothing beside it to except from")

    # --- YAML ---------------------------------------------------------------------------------------

    def _fields(self, node: yaml.Node, allowed: Sequence[str], what: str) -> dict[str, yaml.Node]:
        """The fields of a mapping, checked once however many aliases lead to it."""
        if (known := self._fields_of.get((id(node), what))) is not None:
            return known
        fields = self._fields_of[id(node), what] = {}
        if not isinstance(node, yaml.MappingNode):
            self._fault(node, f"{what} is not a mapping.", f"It has {', '.join(allowed)}.")
            return fields
        for merged in self._merged(node):
            fields |= self._fields(merged, allowed, what)
        own: set[str] = set()
        for key, value in _pairs(node):
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in own:
                self._fault(key, f"{name} is given twice.", "Parsers differ in which one counts: keep one.")
            own.add(name)
            if name in allowed:
                fields[name] = value
            elif name in _KNOWN:
                self._no_effect(key, name, f"{what} has {', '.join(allowed)}")
            else:
                near = difflib.get_close_matches(name, allowed, n=1)
                mend = f"Write {near[0]}." if near else f"Here are {', '.join(allowed)}."
                self._fault(key, f"{name or 'a key that is no text'} is not known.", mend)
        return fields

    def _merged(self, node: yaml.MappingNode) -> list[yaml.MappingNode]:
        """The mappings that `<<` names, the ones that win last."""
        found: list[yaml.MappingNode] = []
        for key, value in node.value:
            if key.tag != _MERGE:
                continue
            bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(base, yaml.MappingNode) for base in bases):
                self._fail(_line(key), "<< names something else than mappings.", "Merge mappings only.")
            found += reversed(bases)
        return found

    def _text(self, node: yaml.Node | None) -> str:
        """A scalar as it is written: `value: 404` is the text 404."""
        if node is None or node.tag == _NULL:
            return ""
        if not isinstance(node, yaml.ScalarNode):
            self._fault(node, "a text is a mapping or a list.", "Write one value.")
            return ""
        return str(node.value)

    def _flag(self, node: yaml.Node | None) -> bool:
        if node is None or node.tag == _NULL:
            return False
        if node.tag != _BOOL:
            self._fault(node, f"{_shown(node)} is neither true nor false.", "Write true or false.")
            return False
        return bool(self._value(node))

    def _metadata(self, node: yaml.Node | None) -> dict[str, Any] | None:
        if node is None or node.tag == _NULL:
            return None
        if not isinstance(node, yaml.MappingNode):
            self._fault(node, "metadata is not a mapping.", "Write names and values.")
            return None
        plain: dict[str, Any] = self._plain(node, 0)
        return plain

    def _plain(self, node: yaml.Node, depth: int) -> Any:
        """What a protobuf Struct can hold; a date stays the text that it is."""
        self._metadata_count += 1
        if self._metadata_count > METADATA_MAX or depth > DEPTH_MAX:
            self._fail(_line(node), "too much metadata.", f"Keep to {METADATA_MAX} values and {DEPTH_MAX} levels.")
        if isinstance(node, yaml.MappingNode):
            plain: dict[str, Any] = {}
            for merged in self._merged(node):
                plain |= self._plain(merged, depth + 1)
            return plain | {self._text(key): self._plain(value, depth + 1) for key, value in _pairs(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, depth + 1) for item in node.value]
        return self._value(node) if node.tag in (_NULL, _BOOL, _INT, _FLOAT) else node.value

    def _value(self, node: yaml.Node) -> Any:
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError):
            # Tagged as a number or a truth value by hand, and none.
            return None

    def _no_effect(self, node: yaml.Node, what: str, reason: str) -> None:
        self._remarks.append(self._at(_line(node), f"{what} has no effect:", f"{reason}."))

    def _fault(self, node: yaml.Node, what: str, mend: str) -> None:
        self._faults.append(self._at(_line(node), what, mend))

    def _fail(self, line: int, what: str, mend: str) -> NoReturn:
        self._faults.append(self._at(line, what, mend))
        raise _Stop

    def _at(self, line: int, what: str, mend: str) -> Remark:
        return Remark(file=self._file, line=line, what=what, mend=mend)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """What a mapping has by itself, in the order of the file."""
    return [(key, value) for key, value in node.value if key.tag != _MERGE]


def _shown(node: yaml.Node) -> str:
    return repr(node.value[:40]) if isinstance(node, yaml.ScalarNode) else "a mapping or a list"


def all_remarks(documents: Iterable[Document]) -> list[Remark]:
    """What does nothing in any of the files."""
    return [remark for document in documents for remark in document.remarks]
