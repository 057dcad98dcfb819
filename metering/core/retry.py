# SPDX-License-Identifier: Apache-2.0
"""When a receiver that failed is tried again, and when it is left alone: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

FIRST_DELAY: Final = timedelta(seconds=1)
DELAY_MAX: Final = timedelta(minutes=15)
#: Without any success for this long, a webhook is paused: a person has to look.
GIVEN_UP_AFTER: Final = timedelta(days=3)


class Outcome(Enum):
    """What became of one attempt."""

    DELIVERED = "delivered"
    #: The receiver had it already and says so: as good as delivered.
    DUPLICATE = "duplicate"
    REFUSED = "refused"
    #: 410: the receiver asks never to be called again.
    GONE = "gone"
    REDIRECTED = "redirected"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    ADDRESS_REFUSED = "address_refused"
    SECRET_UNREADABLE = "secret_unreadable"

    @property
    def is_success(self) -> bool:
        """Whether the next event may be sent."""
        return self in (Outcome.DELIVERED, Outcome.DUPLICATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What a failure leads to: another attempt, or, if *next_attempt_at* is None, a pause."""

    failing_since: datetime
    failure_count: int
    next_attempt_at: datetime | None


def after_failure(
    outcome: Outcome, *, failing_since: datetime | None, failure_count: int, now: datetime, chance: float,
    asked_to_wait: timedelta = timedelta(0),
) -> Fate:
    """
    Judge a failure; *chance* is random from 0 to below 1, *asked_to_wait* is the receiver's Retry-After.

    Delays double from one second to fifteen minutes, each between half and all of it, so that webhooks
    that failed together do not come back together.

    >>> from datetime import UTC
    >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> fate = after_failure(Outcome.TIMEOUT, failing_since=noon, failure_count=3, now=noon, chance=0.0)
    >>> (fate.next_attempt_at - noon).total_seconds()
    4.0
    """
    since = failing_since or now
    count = failure_count + 1
    if outcome is Outcome.GONE or now - since >= GIVEN_UP_AFTER:
        return Fate(failing_since=since, failure_count=count, next_attempt_at=None)
    # The exponent is bounded too: after a thousand failures the number alone would be large.
    delay = min(FIRST_DELAY * 2 ** min(count - 1, 20), DELAY_MAX)
    waited = max(delay * (0.5 + 0.5 * chance), min(asked_to_wait, DELAY_MAX))
    return Fate(failing_since=since, failure_count=count, next_attempt_at=now + waited)
