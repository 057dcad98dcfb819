# SPDX-License-Identifier: Apache-2.0
"""
The calendar of quotas and budgets: UTC days and months, as the invoice has them.

Enforcement windows of a fixed length (second to day) are buckets and have no calendar; a
calendar month is never 30 days. UTC has no summer time, so a day always has 24 hours here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ratelimit.core.limits import Period

#: The window of a prepaid amount never ends; a moment that every store can hold.
NEVER = datetime(9999, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A calendar window: *start* is in it, *end* is the first moment after it."""

    #: Part of the counter's name, so that a new period is a new counter and nothing is ever reset.
    name: str
    start: datetime
    end: datetime


def window(period: Period, now: datetime) -> Window:
    """
    The calendar window of *period* that *now* (aware) is in.

    >>> window(Period.CALENDAR_MONTH, datetime(2028, 2, 29, 23, 59, 59, tzinfo=UTC)).end.isoformat()
    '2028-03-01T00:00:00+00:00'
    >>> window(Period.CALENDAR_DAY, datetime(2026, 12, 31, 12, tzinfo=UTC)).name
    '2026-12-31'
    """
    day = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match period:
        case Period.CALENDAR_DAY:
            return Window(name=f"{day:%Y-%m-%d}", start=day, end=day + timedelta(days=1))
        case Period.CALENDAR_MONTH:
            first = day.replace(day=1)
            following = (first + timedelta(days=31)).replace(day=1)
            return Window(name=f"{first:%Y-%m}", start=first, end=following)
        case Period.EVER:
            return Window(name="ever", start=datetime(1970, 1, 1, tzinfo=UTC), end=NEVER)
    raise ValueError(f"{period} is no calendar window")
