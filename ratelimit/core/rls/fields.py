# SPDX-License-Identifier: Apache-2.0
"""
Read YAML by its nodes, so that whatever is said of a file names a line.

Nothing in here knows what the fields mean. What aliases and merges could make large is read once or bounded.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import yaml

#: Levels of YAML; a descriptor takes two. What parses deeper ones slowly or overruns a stack is no configuration.
DEPTH_MAX: Final = 64
#: Values in all `metadata` of one file, each alias counted as often as it is used.
METADATA_MAX: Final = 10_000

_TAG: Final = "tag:yaml.org,2002:"
NULL, _BOOL, INT, _FLOAT, _MERGE = (f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "merge"))
#: libyaml's, with the wheel; elsewhere the slower one reads the same.
_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Fields = dict[str, yaml.Node]


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


class Stop(Exception):
    """The rest of the file cannot be read."""


class YamlReader:
    """Reads one file's nodes; collects what there is to say instead of stopping at the first fault."""

    def __init__(self, file: str, *, known: AbstractSet[str]) -> None:
        """A name that is *known* but in the wrong place has no effect; any other is a fault."""
        self._file = file
        self._known = known
        self.faults: list[Remark] = []
        self.remarks: list[Remark] = []
        self._fields_of: dict[tuple[int, str], Fields] = {}
        self._metadata_count = 0

    def root(self, text: str) -> yaml.Node:
        """The one document of a file; stops if there is none."""
        try:
            depth = 0
            for event in yaml.parse(text, Loader=_Loader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > DEPTH_MAX:
                    self.fail(line_of(event), "nested too deep.", f"Keep to {DEPTH_MAX} levels.")
            # Its own methods read numbers and truth values below, as YAML 1.1 has them.
            self._loader = _Loader(text)
            root: yaml.Node | None = self._loader.get_single_node()
        except yaml.YAMLError as exc:
            mark = getattr(exc, "problem_mark", None)
            problem = getattr(exc, "problem", None) or "unreadable"
            self.fail(mark.line + 1 if mark is not None else 0, f"not YAML: {problem}.", "Write one YAML document.")
        if root is None:
            self.fail(0, "the file is empty.", "Write a domain, or remove the file.")
        return root

    def fields(self, node: yaml.Node, allowed: Sequence[str], what: str) -> Fields:
        """The fields of a mapping, checked once however many aliases lead to it."""
        if (known := self._fields_of.get((id(node), what))) is not None:
            return known
        fields = self._fields_of[id(node), what] = {}
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, f"{what} is not a mapping.", f"It has {', '.join(allowed)}.")
            return fields
        for merged in self._merged(node):
            fields |= self.fields(merged, allowed, what)
        own: set[str] = set()
        for key, value in _pairs(node):
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in own:
                self.fault(key, f"{name} is given twice.", "Parsers differ in which one counts: keep one.")
            own.add(name)
            if name in allowed:
                fields[name] = value
            elif name in self._known:
                self.no_effect(key, name, f"{what} has {', '.join(allowed)}")
            else:
                near = difflib.get_close_matches(name, allowed, n=1)
                mend = f"Write {near[0]}." if near else f"Here are {', '.join(allowed)}."
                self.fault(key, f"{name or 'a key that is no text'} is not known.", mend)
        return fields

    def _merged(self, node: yaml.MappingNode) -> list[yaml.MappingNode]:
        """The mappings that `<<` names, the ones that win last."""
        found: list[yaml.MappingNode] = []
        for key, value in node.value:
            if key.tag != _MERGE:
                continue
            bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(base, yaml.MappingNode) for base in bases):
                self.fail(line_of(key), "<< names something else than mappings.", "Merge mappings only.")
            found += reversed(bases)
        return found

    def text(self, node: yaml.Node | None) -> str:
        """A scalar as it is written: `value: 404` is the text 404."""
        if node is None or node.tag == NULL:
            return ""
        if not isinstance(node, yaml.ScalarNode):
            self.fault(node, "a text is a mapping or a list.", "Write one value.")
            return ""
        return str(node.value)

    def flag(self, node: yaml.Node | None) -> bool:
        """A truth value; false if it is not there."""
        if node is None or node.tag == NULL:
            return False
        if node.tag != _BOOL:
            self.fault(node, f"{shown(node)} is neither true nor false.", "Write true or false.")
            return False
        return bool(self.value(node))

    def metadata(self, node: yaml.Node | None) -> dict[str, Any] | None:
        """Names and values of any kind, bounded in number; None if it is not there."""
        if node is None or node.tag == NULL:
            return None
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, "metadata is not a mapping.", "Write names and values.")
            return None
        plain: dict[str, Any] = self._plain(node, 0)
        return plain

    def _plain(self, node: yaml.Node, depth: int) -> Any:
        """What a protobuf Struct can hold; a date stays the text that it is."""
        self._metadata_count += 1
        if self._metadata_count > METADATA_MAX or depth > DEPTH_MAX:
            self.fail(line_of(node), "too much metadata.", f"Keep to {METADATA_MAX} values and {DEPTH_MAX} levels.")
        if isinstance(node, yaml.MappingNode):
            plain: dict[str, Any] = {}
            for merged in self._merged(node):
                plain |= self._plain(merged, depth + 1)
            return plain | {self.text(key): self._plain(value, depth + 1) for key, value in _pairs(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, depth + 1) for item in node.value]
        if node.tag in (INT, _FLOAT):
            return self._finite(node)
        return self.value(node) if node.tag in (NULL, _BOOL) else node.value

    def _finite(self, node: yaml.Node) -> float:
        """A number as a Struct has it."""
        try:
            number = float(self.value(node))
        except (TypeError, OverflowError):
            number = math.inf
        if not math.isfinite(number):
            self.fault(node, f"{shown(node)} is no number that metadata can hold.", "Write it as a text.")
        return number

    def value(self, node: yaml.Node) -> Any:
        """What a scalar says by its tag; None if it says nothing of that kind."""
        try:
            return self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, IndexError):
            # Tagged as a number or a truth value by hand, and none.
            return None

    def no_effect(self, node: yaml.Node, what: str, reason: str) -> None:
        """Say that something does nothing, and why."""
        self.remarks.append(self.at(line_of(node), f"{what} has no effect:", f"{reason}."))

    def fault(self, node: yaml.Node, what: str, mend: str) -> None:
        """Say what is wrong, and read on."""
        self.faults.append(self.at(line_of(node), what, mend))

    def fail(self, line: int, what: str, mend: str) -> NoReturn:
        """Say what is wrong, and read no further."""
        self.faults.append(self.at(line, what, mend))
        raise Stop

    def at(self, line: int, what: str, mend: str) -> Remark:
        """A remark on this file."""
        return Remark(file=self._file, line=line, what=what, mend=mend)


def line_of(node: Any) -> int:
    """The line on which a node begins, counted from 1."""
    return int(node.start_mark.line) + 1


def shown(node: yaml.Node) -> str:
    """What a node holds, short."""
    return repr(node.value[:40]) if isinstance(node, yaml.ScalarNode) else "a mapping or a list"


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """What a mapping has by itself, in the order of the file."""
    return [(key, value) for key, value in node.value if key.tag != _MERGE]
