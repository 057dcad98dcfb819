# SPDX-License-Identifier: Apache-2.0
"""
Read how long an exchange took from Envoy's own timings of it.

They are for people who watch, never for bills: one that is missing or makes no sense is left out, and the
row stands. Must not know metrics or the time.
"""

from __future__ import annotations

from typing import NamedTuple

from chassis import contract as c
from metering.core.journal import Entry, UsageEvent

_MICROSECONDS = 1_000_000
#: A day; no stream is longer, and a clock that was set in between says anything.
_MICROSECONDS_MAX = 86_400 * _MICROSECONDS


class Timings(NamedTuple):
    """Seconds; None where the exchange did not come so far, or where the figure would say nothing."""

    #: From the last byte of the request to the first one sent to the model server: what the gateway added.
    added: float | None
    #: From the last byte of the request to the first byte of a streamed answer.
    first_token: float | None
    #: Mean time between two tokens of a stream.
    between_tokens: float | None
    #: Of a stream, from its first byte to its last one.
    tokens_per_second: float | None


def timings(entry: Entry, event: UsageEvent) -> Timings:
    """The timings of the exchange whose end record is *entry* and whose row is *event*."""
    added = _seconds(entry, c.J_ADDED_US)
    if not event.streamed or event.outcome != "ok" or event.output_tokens < 1:
        return Timings(added=added, first_token=None, between_tokens=None, tokens_per_second=None)
    first, answer = _seconds(entry, c.J_FIRST_BYTE_US), _seconds(entry, c.J_ANSWER_US)
    gaps = event.output_tokens - 1
    return Timings(
        added=added,
        first_token=first,
        between_tokens=answer / gaps if answer is not None and gaps else None,
        # An answer that came in one piece has no rate.
        tokens_per_second=event.output_tokens / answer if answer and gaps else None,
    )


def _seconds(entry: Entry, name: str) -> float | None:
    value = entry.fields.get(name)
    if type(value) is not int or not 0 <= value <= _MICROSECONDS_MAX:
        return None
    return value / _MICROSECONDS
