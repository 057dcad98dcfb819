# SPDX-License-Identifier: Apache-2.0
"""
Compare what an engine counted with what the ledger says, from one quiet moment of its pool to the next.

Between two moments without a request under way, both must have counted the same requests. An engine
counts tokens that it generated and nobody received; so where requests were cut, it may have more.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

#: An interval is at least this long, or every pause would be one.
INTERVAL_MIN = timedelta(minutes=1)
#: A pool that is never quiet for this long is told of as busy, not compared.
INTERVAL_MAX = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the engines of a pool have counted since they were started, and what they are at."""

    input_tokens: int
    output_tokens: int
    running: int

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            running=self.running + other.running,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """Counters at a moment around which no request was under way."""

    at: datetime
    counters: Counters


class State(Enum):
    """Whether an interval can be compared."""

    COMPARED = "compared"
    #: The counters went back: an engine was restarted within it.
    RESET = "reset"
    #: The pool was never quiet.
    BUSY = "busy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What the engines counted from one moment to another."""

    state: State
    starts_at: datetime
    ends_at: datetime
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Where the watch of one pool stands: since which quiet moment; None: it waits for one."""

    since: Quiet | None = None

    def next(self, at: datetime, quiet: Counters | None) -> tuple[Watch, Interval | None]:
        """Go on with what was seen *at* a moment: the counters if it was *quiet*, None if not."""
        here = None if quiet is None else Quiet(at=at, counters=quiet)
        if self.since is None:
            return Watch(since=here), None
        if here is None:
            if at - self.since.at < INTERVAL_MAX:
                return self, None
            return Watch(), _interval(State.BUSY, self.since, at, self.since.counters)
        if at - self.since.at < INTERVAL_MIN:
            return self, None
        before = self.since.counters
        went_back = here.counters.input_tokens < before.input_tokens or here.counters.output_tokens < before.output_tokens
        return Watch(since=here), _interval(State.RESET if went_back else State.COMPARED, self.since, at, here.counters)


def unexplained(drift: int, *, cut_count: int) -> int:
    """
    What of *drift* (ledger less engine) has to be explained by somebody.

    Where requests were cut the engine may have more: it counts what it generated and nobody received.
    """
    return 0 if cut_count and drift < 0 else drift


def _interval(state: State, since: Quiet, at: datetime, counters: Counters) -> Interval:
    return Interval(
        state=state, starts_at=since.at, ends_at=at,
        input_tokens=max(0, counters.input_tokens - since.counters.input_tokens),
        output_tokens=max(0, counters.output_tokens - since.counters.output_tokens),
    )
