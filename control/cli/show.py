# SPDX-License-Identifier: Apache-2.0
"""Show an answer of the API: JSON as it came, or a table for people."""

from __future__ import annotations

import json
import sys
from typing import Any

#: Characters; wider than any row.
_PIPE_WIDTH = 2000


def show(document: Any, *, as_json: bool, columns: tuple[str, ...] | None = None) -> None:
    """Print *document*; a table for people has *columns* only, if given."""
    if as_json:
        print(json.dumps(document, indent=2))
        return
    values = list(document.values())
    # One thing alone, and a list: that is what was asked for. A list among other fields is one of them.
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else None
    if rows is None:
        _pairs(document)
    elif rows and isinstance(rows[0], dict):
        _table([{name: row[name] for name in columns or row} for row in rows])
    else:
        print("nothing" if not rows else "\n".join(map(str, rows)))


def _pairs(document: dict[str, Any]) -> None:
    width = max(map(len, document), default=0)
    for name, value in document.items():
        if isinstance(value, dict):
            print(f"{name}:")
            _pairs({f"  {inner}": it for inner, it in value.items()})
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            print(f"{name}:")
            _table(value)
        else:
            print(f"{name:<{width}}  {_text(value)}")


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        numeric = isinstance(next((row[name] for row in rows if row[name] is not None), ""), int)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    # For another program a row is a line, however long; for a person it fits the window. What people named is text, whatever
    # brackets it has.
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, markup=False, emoji=False, highlight=False).print(table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    return str(value)
