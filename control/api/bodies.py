# SPDX-License-Identifier: Apache-2.0
"""What requests have in common: strict bodies, and pages of lists."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query
from pydantic import BaseModel, ConfigDict

from control.store import PAGE_ROWS_MAX


class Body(BaseModel):
    """A request body: a field nobody knows is a mistake, not a wish."""

    model_config = ConfigDict(extra="forbid", strict=True)


After = Annotated[str | None, Query(max_length=200, description="The `next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=PAGE_ROWS_MAX, description="Rows of this page.")]


def page(rows: list[dict[str, Any]], name: str, *, key: str, limit: int) -> dict[str, Any]:
    """A page: the rows under *name*, and in `next` where the following one starts, None at the end."""
    return {name: rows, "next": rows[-1][key] if len(rows) == limit else None}
