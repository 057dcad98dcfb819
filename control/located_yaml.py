# SPDX-License-Identifier: Apache-2.0
"""
Read YAML so that a finding can name its line, and so that nothing is read two ways.

Envoy reads YAML as protobuf JSON: `failureModeAllow` and `failure_mode_allow` are the same
field, so names come out in one spelling. A name given twice is refused: parsers differ in
which one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from chassis.errors import Invalid
from chassis.files import read_text_bounded

#: Far above any configuration; a wrong path may name anything.
_BYTES_MAX: Final = 16 << 20
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])([A-Z])")


class Mapping(dict[str, Any]):
    """A mapping that knows the line on which it starts, counted from 1."""

    line: int = 0

    def at(self, *path: str) -> Any:
        """Follow *path* through mappings; None when any step is missing."""
        value: Any = self
        for step in path:
            value = value.get(step) if isinstance(value, dict) else None
        return value

    def mappings(self, name: str) -> list[Mapping]:
        """Return the mappings in the list called *name*; nothing when there is no such list."""
        value = self.get(name)
        return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def load(path: Path) -> Mapping:
    """Read the mapping in *path*; raises `Invalid` with the line of the mistake."""
    text = read_text_bounded(path, bytes_max=_BYTES_MAX)
    try:
        document = yaml.load(text, _Loader)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise Invalid(f"{where}: not YAML: {getattr(exc, 'problem', None) or 'unreadable'}.") from exc
    except RecursionError as exc:
        raise Invalid(f"{path}: nested too deep.") from exc
    if not isinstance(document, Mapping):
        raise Invalid(f"{path}: not a mapping.")
    return document


def walk(value: Any) -> Iterator[Mapping]:
    """Yield every mapping inside *value*, itself included, in the order of the file."""
    pending = [value]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        # An alias is the same object again: its faults are told once.
        if id(current) in seen:
            continue
        if isinstance(current, Mapping):
            seen.add(id(current))
            yield current
            pending.extend(reversed(current.values()))
        elif isinstance(current, list):
            pending.extend(reversed(current))


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps lines and refuses what could be read two ways."""


def _construct(loader: _Loader, node: yaml.MappingNode) -> Iterator[Mapping]:
    mapping = Mapping()
    mapping.line = node.start_mark.line + 1
    yield mapping
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is not a name", key_node.start_mark)
        name = _CAMEL.sub(lambda match: "_" + match[1].lower(), key) if key.isidentifier() else key
        if name in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
        mapping[name] = loader.construct_object(value_node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct)
