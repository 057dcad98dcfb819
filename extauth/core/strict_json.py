# SPDX-License-Identifier: Apache-2.0
"""
Read JSON that only one reading is possible of: no member twice, no NaN, no depth without end.

Two parsers that differ in which of two members counts are how a proxy and its policy come to
disagree. `orjson` and `json` both take the last one in silence.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

#: Levels of nesting. Claims and key sets need three or four; the parser recurses.
DEPTH_MAX: Final = 16
#: Digits of a number; Python's own conversion is quadratic in them.
_DIGITS_MAX: Final = 40

#: A string, or what begins as one and never ends: so that looking for it is linear in any text.
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_OPENING, _CLOSING = "[{", "]}"


class _Ambiguous(ValueError):
    """More than one reading, or none worth having."""


def read_object(text: str | bytes) -> dict[str, Any] | None:
    """
    The JSON object that *text* is, None for anything else.

    >>> read_object('{"tenant": "acme"}')
    {'tenant': 'acme'}
    >>> read_object('{"tenant": "acme", "tenant": "other"}')
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        if _depth(decoded) > DEPTH_MAX:
            return None
        value = json.loads(
            decoded, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_whole, parse_float=_finite
        )
        # Half of a surrogate pair is no text: whoever writes it somewhere would fail.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _depth(text: str) -> int:
    deepest = level = 0
    for character in _STRING.sub("", text):
        if character in _OPENING:
            level += 1
            deepest = max(deepest, level)
        elif character in _CLOSING:
            level -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _Ambiguous
    return members


def _refuse(_name: str) -> Any:
    raise _Ambiguous


def _whole(text: str) -> int:
    if len(text) > _DIGITS_MAX:
        raise _Ambiguous
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Ambiguous
    return value
