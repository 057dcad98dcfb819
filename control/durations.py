# SPDX-License-Identifier: Apache-2.0
"""Durations and moments as people type them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from chassis.errors import Invalid

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_DURATION = re.compile(r"([0-9]{1,6})([smhd])")
#: A century: longer is a mistake, and the calendar has an end.
_DAYS_MAX = 36_525


def duration(text: str, *, what: str) -> timedelta:
    """
    A duration such as 90s, 15m, 24h or 30d; *what* names it in the error.

    >>> duration("24h", what="overlap")
    datetime.timedelta(days=1)
    """
    matched = _DURATION.fullmatch(text)
    if matched is None:
        raise Invalid(f"{what} is {text!r}.", mend="Write a duration such as 90s, 15m, 24h or 30d.")
    found = timedelta(**{_UNITS[matched[2]]: int(matched[1])})
    if found > timedelta(days=_DAYS_MAX):
        raise Invalid(f"{what} is {text!r}.", mend=f"Write at most {_DAYS_MAX}d.")
    return found


def moment_ahead(text: str, *, what: str, now: datetime) -> datetime:
    """A moment after *now*: a duration from it, or an ISO date or time (UTC unless it says otherwise)."""
    if _DURATION.fullmatch(text):
        moment = now + duration(text, what=what)
    else:
        try:
            moment = datetime.fromisoformat(text)
            # In UTC the last hours of 9999 may lie beyond the calendar.
            moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
        except (ValueError, OverflowError) as exc:
            raise Invalid(f"{what} is {text!r}.", mend="Write a duration such as 30d, or a date such as 2030-01-31.") from exc
    if moment <= now:
        raise Invalid(f"{what} is {text!r}, which is past.")
    return moment
