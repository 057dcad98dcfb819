# SPDX-License-Identifier: Apache-2.0
"""
Read the journal's records and judge what each exchange used.

Knows Envoy's record types, response flags and our metadata. Must not know files, Postgres or
the time. A record that makes no sense is `Malformed`: never skipped in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple

import orjson

from chassis import contract as c

#: A count beyond this is no count: the longest contexts have a few million tokens.
TOKENS_MAX = 100_000_000
#: Bytes per token where neither the engine nor the chunks told: the usual figure for English text.
ESTIMATE_BYTES_PER_TOKEN = 4

#: Engine kinds that send one token in each frame with content: a conformance suite holds their recorded
#: shapes to it, and Dynamo itself. Others may put several into one, or none.
TOKEN_A_FRAME = frozenset({"vllm", "dynamo"})

_OF_ENVOY = frozenset({c.JOURNAL_PERIODIC, c.JOURNAL_END})
_TYPES = _OF_ENVOY | {c.JOURNAL_START}
#: Envoy mints the id; anything else in its place is damage.
_REQUEST_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
#: Postgres cannot hold U+0000 in text, and a caller may have put one into a model's name.
_NUL, _REPLACEMENT = rb"\u0000", rb"\ufffd"
#: Longer text is cut: nothing of ours is, and a row is no place for a caller's essay.
TEXT_LENGTH_MAX = 256
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECONDS: Final = 1_000_000
#: HTTP has three digits.
_STATUS_MAX = 999
_TEXTS = (c.J_FLAGS, c.J_DETAILS, c.J_UPSTREAM, c.J_ENGINE, c.J_TRACE)
_COUNTS = (c.REQ_PROMPT_BYTES, c.REQ_QUANTITY)
_NESTED = (c.J_IDENTITY, c.J_REQUEST, c.J_USAGE, c.J_ADMISSION)
#: All that Envoy can say of a request without an id; with anything else it is a record that lost its id.
_OF_NAMELESS = frozenset({c.J_TYPE, c.J_STARTED_AT, c.J_DURATION_MS, c.J_STATUS, c.J_FLAGS, c.J_DETAILS, c.J_PATH, c.J_BYTES_SENT, c.J_EPOCH})

#: Envoy response flags by who ended the exchange.
_CLIENT_FLAGS = {"DC", "DPE"}
_UPSTREAM_FLAGS = {"UH", "UF", "UC", "UR", "UT", "UO", "URX", "LR", "NC", "UPE", "UMSDR", "SI", "OM"}


#: Dialects whose answers have no generated tokens.
_WITHOUT_OUTPUT = frozenset({"openai.embeddings", "rerank"})
#: Dialects in which the request says how much can be delivered at the most, and an engine need not report tokens.
_METERED_ALONE = frozenset({"openai.images", "openai.speech"})
#: Anomalies of an answer that nobody could read: what was asked for stands in for what was delivered.
_UNREAD = frozenset({"encoded", "unreadable"})
#: How metering can know what a stream that it ended has delivered.
_STOPPED_BASES = ("running", "counted")


class Malformed(ValueError):
    """A complete line that is not a record."""


class Nameless(Malformed):
    """
    A record of a request whose head Envoy could not read, or has not: it has no id, and nobody was asked about it.

    Whoever can connect makes as many of these as they like, so it is no sign of a damaged journal.
    """


# These three are made for each record, and a named tuple is made in half the time of a frozen dataclass.
class Entry(NamedTuple):
    """One journal record. Every record of one exchange has the same id and start."""

    type: str
    request_id: str
    started_at: datetime
    seen_at: datetime
    epoch: str
    fields: dict[str, Any]

    @property
    def admitted(self) -> bool:
        """Whether the request was let through by every control, so that it must have a row."""
        return bool(self.fields[c.J_ADMISSION].get(c.ADM_ADMITTED))

    @property
    def tenant_id(self) -> str:
        """Who pays; empty when nobody was recognised."""
        return _text(self.fields[c.J_IDENTITY], c.ID_TENANT)

    @property
    def lease_id(self) -> str | None:
        """The lease of quotas that the request passed on; None if it passed on none, or the record names something else."""
        lease_id = self.fields[c.J_ADMISSION].get(c.ADM_LEASE)
        return lease_id if isinstance(lease_id, str) and is_request_id(lease_id) else None


class Usage(NamedTuple):
    """Tokens of an exchange, what else it is metered by, and how they are known."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    #: Of the dialect's meter; 0 where it has none.
    quantity: int
    basis: str
    anomaly: str | None


class UsageEvent(NamedTuple):
    """The one row of an admitted request, in the order in which it is copied."""

    request_id: str
    tenant_id: str
    project_id: str
    key_id: str
    model: str
    dialect: str
    started_at: datetime
    ended_at: datetime
    status: int
    outcome: str
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    #: What the quantity is of; None where there is none.
    meter: str | None
    quantity: int
    basis: str
    anomaly: str | None
    streamed: bool
    upstream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request of a known caller that was not let through."""

    request_id: str
    started_at: datetime
    tenant_id: str
    key_id: str
    model: str
    status: int
    details: str

    @property
    def was_answered(self) -> bool:
        """Whether the gateway gave what was asked for itself: a list of models, of which ratelimit is not asked."""
        return 200 <= self.status < 400


def parse(line: bytes) -> Entry:
    """Read one complete line; raises `Malformed` for whatever Envoy and the tap do not write, and `Nameless`."""
    try:
        fields = orjson.loads(line.replace(_NUL, _REPLACEMENT) if _NUL in line else line)
        if c.J_REQUEST_ID not in fields and fields[c.J_TYPE] in _OF_ENVOY and fields.keys() <= _OF_NAMELESS:
            raise Nameless("a request without an id")
        for nested in _NESTED:
            if not isinstance(fields.setdefault(nested, {}), dict):
                raise TypeError(nested)
        # The gate's stamp is in every record; Envoy's own start is not seen by the start record.
        started_at = moment(fields[c.J_REQUEST].get(c.REQ_STARTED_AT) or fields[c.J_STARTED_AT])
        # Absent while the exchange has just begun (Envoy omits what it does not know yet).
        duration_ms = fields.get(c.J_DURATION_MS)
        seen_at = started_at + timedelta(milliseconds=duration_ms) if duration_ms else started_at
        kind, request_id = fields[c.J_TYPE], fields[c.J_REQUEST_ID]
        if kind not in _TYPES or not is_request_id(request_id):
            raise ValueError(c.J_TYPE)
        _refuse_odd_values(fields)
        return Entry(
            type=kind, request_id=request_id, started_at=started_at, seen_at=seen_at,
            epoch=str(fields.get(c.J_EPOCH, "")), fields=fields,
        )
    except Nameless:
        raise
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError) as exc:
        raise Malformed(f"{type(exc).__name__} in a journal line of {len(line)} bytes") from exc


def moment(stamp: str) -> datetime:
    """Seconds since 1970 with microseconds, as the gate writes them; raises what `datetime` raises for what is none."""
    seconds, _, micros = stamp.partition(".")
    microseconds = int(micros or 0)
    if not 0 <= microseconds < _MICROSECONDS:
        raise ValueError(stamp)
    # Half the price of `fromtimestamp`, which asks what the local time is.
    return _EPOCH + timedelta(0, int(seconds), microseconds)


def is_request_id(text: str) -> bool:
    """Whether it looks like an id of Envoy's."""
    return _REQUEST_ID.fullmatch(text) is not None


def _refuse_odd_values(fields: dict[str, Any]) -> None:
    status, bytes_sent = fields.get(c.J_STATUS, 0), fields.get(c.J_BYTES_SENT, 0)
    if type(status) is not int or not 0 <= status <= _STATUS_MAX:
        raise ValueError(c.J_STATUS)
    if type(bytes_sent) is not int or bytes_sent < 0:
        raise ValueError(c.J_BYTES_SENT)
    for name in _TEXTS:
        if type(fields.get(name, "")) is not str:
            raise ValueError(name)
    request = fields[c.J_REQUEST]
    for name in _COUNTS:
        if int(request.get(name) or 0) < 0:
            raise ValueError(name)


def usage_event(entry: Entry) -> UsageEvent:
    """The row of an exchange that ended: *entry* is its end record."""
    status = int(entry.fields.get(c.J_STATUS) or 0)
    outcome = _outcome(entry, status)
    return _event(entry, status=status, outcome=outcome, usage=judge(entry, outcome))


def lost_event(entry: Entry) -> UsageEvent:
    """The row of an exchange whose Envoy is gone: *entry* is the last that was heard of it."""
    usage = _counted(entry, basis="checkpoint")
    return _event(entry, status=int(entry.fields.get(c.J_STATUS) or 0), outcome="lost", usage=usage)


def leases_of(entries: Iterable[Entry]) -> dict[str, str]:
    """The leases of *entries* by request id, of those that have one."""
    return {entry.request_id: lease_id for entry in entries if (lease_id := entry.lease_id) is not None}


def refused(entry: Entry) -> Refused:
    """What is kept of a request that was not admitted: *entry* is its end record."""
    return Refused(
        request_id=entry.request_id,
        started_at=entry.started_at,
        tenant_id=entry.tenant_id,
        key_id=_text(entry.fields[c.J_IDENTITY], c.ID_KEY),
        model=_text(entry.fields[c.J_REQUEST], c.REQ_MODEL),
        status=int(entry.fields.get(c.J_STATUS) or 0),
        details=_text(entry.fields, c.J_DETAILS),
    )


def judge(entry: Entry, outcome: str) -> Usage:
    """
    Tokens and basis of an exchange that ended: reported > running > counted > estimated > none.

    Counted are frames that carried content, of engines that send one token in each: the content is kept
    nowhere, so no tokenizer can read it afterwards. The prompt is an estimate even then. Counted is also what the
    dialect is metered by besides tokens. Zero stays zero when the engine said zero. An exchange that failed before
    a token has none.
    """
    stopped = entry.fields[c.J_USAGE].get(c.USE_STOPPED)
    if stopped in _STOPPED_BASES:
        # The closing usage is ours: what metering let through before it ended the stream.
        return _counted(entry, basis=stopped)
    seen = entry.fields[c.J_USAGE].get(c.USE_SEEN, "none")
    if seen == "final":
        return _counted(entry, basis="reported")
    if seen == "running":
        return _counted(entry, basis="running")
    anomaly = entry.fields[c.J_USAGE].get(c.USE_ANOMALY)
    counted = whole(entry.fields[c.J_USAGE].get(c.USE_FRAMES))
    frames, sends_tokens = counted or 0, entry.fields.get(c.J_ENGINE) in TOKEN_A_FRAME
    dialect = entry.fields[c.J_REQUEST].get(c.REQ_DIALECT)
    # Read to its end, a stream without any text is one that failed within: an error as its only event.
    streamed_nothing = counted == 0 and anomaly is None and sends_tokens and bool(entry.fields[c.J_REQUEST].get(c.REQ_STREAM))
    nothing = dialect == "openai.models" or outcome in ("gateway_error", "refused_by_engine") or streamed_nothing
    said = entry.fields[c.J_USAGE].get(c.USE_QUANTITY)
    if nothing or (frames == 0 and outcome != "ok" and (said is None or outcome == "upstream_error")):
        return _without_tokens(0, basis="none", anomaly=anomaly)
    if dialect in _METERED_ALONE or (dialect in c.DIALECT_METERS and said is not None):
        quantity, anomaly = _quantity(entry, anomaly)
        by_whom = "counted" if dialect in _METERED_ALONE else "reported"
        is_guess = said is None or anomaly in _UNREAD
        return _without_tokens(quantity, basis="estimated" if is_guess else by_whom, anomaly=anomaly)
    return Usage(
        input_tokens=_prompt_estimate(entry),
        output_tokens=frames or _answer_estimate(entry, dialect),
        cached_tokens=0, reasoning_tokens=0, quantity=0,
        basis="counted" if frames and sends_tokens else "estimated",
        anomaly=anomaly,
    )


def _without_tokens(quantity: int, *, basis: str, anomaly: str | None) -> Usage:
    return Usage(
        input_tokens=0, output_tokens=0, cached_tokens=0, reasoning_tokens=0, quantity=quantity, basis=basis, anomaly=anomaly
    )


def _quantity(entry: Entry, anomaly: str | None) -> tuple[int, str | None]:
    return metered(entry.fields[c.J_REQUEST], entry.fields[c.J_USAGE], anomaly)


def metered(request: Mapping[str, Any], usage: Mapping[str, Any], anomaly: str | None = None) -> tuple[int, str | None]:
    """What was delivered by the dialect's meter, and what is odd about it. Where nobody said: what was asked for."""
    dialect = request.get(c.REQ_DIALECT)
    if dialect not in c.DIALECT_METERS:
        return 0, anomaly
    asked = min(int(request.get(c.REQ_QUANTITY) or 0), TOKENS_MAX)
    said = usage.get(c.USE_QUANTITY)
    if said is None:
        return asked if dialect in _METERED_ALONE else 0, anomaly
    quantity = whole(said)
    if quantity is None:
        return asked, "impossible_count"
    if dialect in _METERED_ALONE and quantity > asked:
        # Who asked for two images pays for no third.
        return asked, "more_than_asked"
    return quantity, anomaly


def _counted(entry: Entry, *, basis: str) -> Usage:
    usage = entry.fields[c.J_USAGE]
    quantity, anomaly = _quantity(entry, usage.get(c.USE_ANOMALY))
    if basis == "checkpoint" and usage.get(c.USE_QUANTITY) is None:
        quantity = 0
    counts: dict[str, int] = {}
    for name in (c.USE_INPUT, c.USE_OUTPUT, c.USE_CACHED, c.USE_REASONING):
        count = whole(usage.get(name, 0))
        if count is None:
            # An impossible count is never billed: what we counted ourselves stands in, flagged.
            anomaly = "impossible_count"
            count = _own_count(entry, name)
        counts[name] = count
    if usage.get(c.USE_SEEN, "none") == "none":
        counts[c.USE_OUTPUT] = whole(usage.get(c.USE_FRAMES)) or 0
    return Usage(
        input_tokens=counts[c.USE_INPUT],
        output_tokens=counts[c.USE_OUTPUT],
        cached_tokens=min(counts[c.USE_CACHED], counts[c.USE_INPUT]),
        reasoning_tokens=min(counts[c.USE_REASONING], counts[c.USE_OUTPUT]),
        quantity=quantity,
        basis=basis,
        anomaly=anomaly,
    )


def _own_count(entry: Entry, name: str) -> int:
    if name == c.USE_INPUT:
        return _prompt_estimate(entry)
    if name == c.USE_OUTPUT:
        return whole(entry.fields[c.J_USAGE].get(c.USE_FRAMES)) or 0
    return 0


def _prompt_estimate(entry: Entry) -> int:
    size = int(entry.fields[c.J_REQUEST].get(c.REQ_PROMPT_BYTES) or 0)
    return math.ceil(size / ESTIMATE_BYTES_PER_TOKEN)


def _answer_estimate(entry: Entry, dialect: str | None) -> int:
    if dialect in _WITHOUT_OUTPUT:
        return 0
    return math.ceil(int(entry.fields.get(c.J_BYTES_SENT) or 0) / ESTIMATE_BYTES_PER_TOKEN)


def whole(count: object) -> int | None:
    """A count of tokens; None for what cannot be one."""
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= TOKENS_MAX:
        return None
    return count


def _outcome(entry: Entry, status: int) -> str:
    flags = set(str(entry.fields.get(c.J_FLAGS) or "").split(",")) - {"-", ""}
    if flags & _CLIENT_FLAGS:
        return "client_closed"
    if flags & _UPSTREAM_FLAGS:
        return "upstream_error"
    if entry.fields[c.J_USAGE].get(c.USE_STOPPED) in _STOPPED_BASES:
        return "budget_exhausted"
    if 200 <= status < 400:
        return "ok"
    from_engine = entry.fields.get(c.J_DETAILS) == "via_upstream"
    if status >= 500 or status == 0:
        return "upstream_error" if from_engine else "gateway_error"
    return "refused_by_engine" if from_engine else "gateway_error"


def _event(entry: Entry, *, status: int, outcome: str, usage: Usage) -> UsageEvent:
    identity, request = entry.fields[c.J_IDENTITY], entry.fields[c.J_REQUEST]
    return UsageEvent(
        request_id=entry.request_id,
        tenant_id=entry.tenant_id,
        project_id=_text(identity, c.ID_PROJECT),
        key_id=_text(identity, c.ID_KEY),
        model=_text(request, c.REQ_MODEL),
        dialect=_text(request, c.REQ_DIALECT),
        started_at=entry.started_at,
        ended_at=entry.seen_at,
        status=status,
        outcome=outcome,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        meter=c.DIALECT_METERS.get(_text(request, c.REQ_DIALECT)) if usage.quantity else None,
        quantity=usage.quantity,
        basis=usage.basis,
        anomaly=None if usage.anomaly is None else str(usage.anomaly)[:TEXT_LENGTH_MAX],
        streamed=bool(request.get(c.REQ_STREAM)),
        upstream=_text(entry.fields, c.J_UPSTREAM) or None,
    )


def _text(fields: dict[str, Any], name: str) -> str:
    return str(fields.get(name) or "")[:TEXT_LENGTH_MAX]
