# SPDX-License-Identifier: Apache-2.0
"""Read `rows.yaml`: what is sent, at which levels, and what each must get."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import yaml

LEVELS: Final = ("function", "envoy")
_PATH: Final = Path(__file__).with_name("rows.yaml")

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a level must answer."""

    #: Any of these. 0: the connection is closed without an answer.
    status: tuple[int, ...]
    #: `error.code` of the answer; None: not looked at (an answer of Envoy's codec has none).
    code: str | None = None
    #: The caller that a request which passes must be taken for.
    caller: str | None = None
    #: Columns of the billing row of a request that passes, and what they must hold.
    billed: Mapping[str, Any] = field(default_factory=dict)
    #: Whether it passes and the model server refuses it: nothing is wrong for whoever bills.
    by_engine: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One input. Texts may name a caller's key, or what resembles one, in braces (callers.py)."""

    id: str
    title: str
    levels: tuple[str, ...]
    tags: tuple[str, ...]
    expected: Mapping[str, Expected]
    #: Each occurrence of a header, in order, as bytes in Latin-1.
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "POST"
    path: str = "/v1/chat/completions"
    model: str = "tiny"
    address: str = "127.0.0.1"
    host: str = "gateway.example"
    #: The body, as bytes in Latin-1; None: a small chat with *model*.
    content: str | None = None
    #: A whole HTTP/1.1 request instead of the above: for what no client would send.
    raw: str | None = None
    #: An HTTP/2 exchange instead of the above: see `http.py`.
    h2: Mapping[str, Any] | None = None

    def header_bytes(self, spellings: Mapping[str, str]) -> Headers:
        """The headers as they go onto the wire."""
        return [(name, fill(value, spellings).encode("latin-1")) for name, value in self.headers]

    def body(self) -> str:
        """What is sent as body."""
        if self.content is not None:
            return self.content
        return json.dumps({"model": self.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2})

    def exchange(self, spellings: Mapping[str, str]) -> dict[str, Any]:
        """The HTTP/2 exchange with its names filled in."""
        known = {**spellings, "body": self.body()}

        def filled(value: Any) -> Any:
            if isinstance(value, str):
                return fill(value, known)
            return [filled(one) for one in value] if isinstance(value, list) else value

        return {name: filled(value) for name, value in (self.h2 or {}).items()}

    def request_bytes(self, spellings: Mapping[str, str]) -> bytes:
        """The whole request as it goes onto the wire."""
        body = self.body()
        if self.raw is not None:
            text = fill(self.raw, {**spellings, "body": body, "length": str(len(body))})
            return text.replace("\n", "\r\n").replace("\\LF\r\n", "\n").encode("latin-1")
        target, host = fill(self.path, spellings), fill(self.host, spellings)
        lines = [f"{self.method} {target} HTTP/1.1".encode("latin-1"), f"host: {host}".encode()]
        lines += [name.encode("latin-1") + b": " + value for name, value in self.header_bytes(spellings)]
        if self.method == "POST":
            lines.append(f"content-length: {len(body)}".encode())
        return b"\r\n".join([*lines, b"", body.encode("latin-1") if self.method == "POST" else b""])


def load(level: str) -> list[Row]:
    """The rows that run at *level*; raises `ValueError` for a document in which a row could be overlooked."""
    rows = [_row(entry) for entry in yaml.safe_load(_PATH.read_text())["rows"]]
    ids = [row.id for row in rows]
    for one in ids:
        if ids.count(one) > 1:
            raise ValueError(f"row {one} is listed twice")
    return [row for row in rows if level in row.levels]


def elsewhere() -> dict[str, list[str]]:
    """The rows that are tests of their own, by id: `file::test` of each, relative to tests/."""
    found: dict[str, list[str]] = yaml.safe_load(_PATH.read_text())["elsewhere"]
    return found


def fill(text: str, spellings: Mapping[str, str]) -> str:
    """*text* with the names in braces replaced; other braces stay, so that a body may hold them."""
    for name, value in spellings.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _row(entry: dict[str, Any]) -> Row:
    given = dict(entry)
    levels = tuple(given.pop("levels"))
    expect, overrides = given.pop("expect"), {level: given.pop(level) for level in LEVELS if level in given}
    unknown = set(given) - {it.name for it in fields(Row)}
    if unknown or not set(levels) <= set(LEVELS) or not levels or not set(overrides) <= set(levels):
        raise ValueError(f"row {entry.get('id')}: unknown field or level")
    given["headers"] = tuple((name, _long(value)) for name, value in given.get("headers", ()))
    given["content"] = None if "content" not in given else _long(given["content"])
    given["tags"] = tuple(given.pop("tags", ()))
    expected = {level: _expected(overrides.get(level, expect)) for level in levels}
    return Row(levels=levels, expected=expected, **given)


def _expected(entry: dict[str, Any]) -> Expected:
    status = entry["status"]
    return Expected(
        status=(status,) if isinstance(status, int) else tuple(status), code=entry.get("code"), caller=entry.get("caller"),
        billed=entry.get("billed", {}), by_engine=entry.get("by_engine", False),
    )


def _long(value: str | dict[str, Any]) -> str:
    """A value that is too long to write down: {repeat: a, times: 10000, before: "Bearer ", after: ""}."""
    if isinstance(value, str):
        return value
    return value.get("before", "") + value["repeat"] * value["times"] + value.get("after", "")
