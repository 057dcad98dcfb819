# SPDX-License-Identifier: Apache-2.0
"""
Say what the files mean that Envoy does not run, and what it runs that they do not say.

Pure: two lists of resources in, differences out. Both are read as values and compared leaf by leaf, so that a field
that was moved or spelled otherwise is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

#: Of one difference; a whole resource would be a page.
_SHOWN_MAX: Final = 200
ABSENT: Final = None
_WHOLE: Final = re.compile(r"-?[0-9]+\.0")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Difference:
    """One place in one resource where files and Envoy say different things; None: it is not there."""

    resource: str
    #: Empty: the whole resource.
    place: str
    running: str | None
    files: str | None

    def __str__(self) -> str:
        """As one line of a diff: what is to be added, removed, changed."""
        if not self.place:
            return f"+ {self.resource}" if self.running is ABSENT else f"- {self.resource}"
        return f"~ {self.resource}: {self.place}: {_or_nothing(self.running)} -> {_or_nothing(self.files)}"


def differences(running: Mapping[str, list[dict[str, Any]]], files: Mapping[str, list[dict[str, Any]]]) -> list[Difference]:
    """Compare clusters and route tables, each by its name, routes by what they match."""
    found: list[Difference] = []
    runs, said = _clusters(running["clusters"]), _clusters(files["clusters"])
    found += _compare(runs, said)
    found += _compare(_routes(running["routes"]), _routes(files["routes"]))
    return sorted(found)


def _compare(running: Mapping[str, Any], files: Mapping[str, Any]) -> Iterator[Difference]:
    for name in running.keys() | files.keys():
        if name not in files:
            yield Difference(resource=name, place="", running="", files=ABSENT)
        elif name not in running:
            yield Difference(resource=name, place="", running=ABSENT, files="")
        else:
            runs, said = dict(_leaves(running[name])), dict(_leaves(files[name]))
            for place in runs.keys() | said.keys():
                if runs.get(place) != said.get(place):
                    yield Difference(
                        resource=name, place=place, running=_shown(runs.get(place)), files=_shown(said.get(place))
                    )


def _clusters(resources: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"cluster {resource['name']}": resource for resource in resources}


def _routes(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Each route by what it matches; the order of those that match different things decides nothing."""
    found: dict[str, Any] = {}
    for table in tables:
        for host in table.get("virtual_hosts", []):
            rest = {name: value for name, value in host.items() if name != "routes"}
            found[f"virtual host {host['name']}"] = rest
            for route in host.get("routes", []):
                found[f"route {_matched(route['match'])}"] = route
    return found


def _matched(match: Mapping[str, Any]) -> str:
    models = [value["string_match"]["exact"] for wanted in match.get("dynamic_metadata", []) if (value := wanted.get("value"))]
    path = match.get("path") or f"{match.get('prefix', '')}*"
    return " ".join([str(path), *models])


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{place}.{name}" if place else str(name))
        if not value:
            yield place, {}
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}[{number}]")
    else:
        yield place, _plain(value)


def _plain(value: Any) -> Any:
    """
    One spelling of a number.

    64-bit ones are text in protobuf's JSON, and in Envoy's dump those of metadata; whole ones may be written as floats.
    """
    if isinstance(value, str):
        return value.removesuffix(".0") if _WHOLE.fullmatch(value) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value)) if float(value).is_integer() else str(value)


def _shown(value: Any) -> str | None:
    return None if value is None else str(value)[:_SHOWN_MAX]


def _or_nothing(text: str | None) -> str:
    return "nothing" if text is None else text
