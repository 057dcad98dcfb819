# SPDX-License-Identifier: Apache-2.0
"""
Read the journal's records and judge what each exchange used.

Knows Envoy's record types, response flags and our metadata. Must not know files, Postgres or
the time. A record that makes no sense is `Malformed`: never skipped in silence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from chassis import contract as c

#: A count beyond this is no count: the longest contexts have a few million tokens.
TOKENS_MAX = 100_000_000
#: Bytes per token where neither the engine nor the chunks told: the usual figure for English text.
ESTIMATE_BYTES_PER_TOKEN = 4

#: Envoy response flags by who ended the exchange.
_CLIENT_FLAGS = {"DC", "DPE"}
_UPSTREAM_FLAGS = {"UH", "UF", "UC", "UR", "UT", "UO", "URX", "LR", "NC", "UPE", "UMSDR", "SI", "OM"}


class Malformed(ValueError):
    """A complete line that is not a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
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
        return bool(self.fields.get(c.J_ADMISSION, {}).get(c.ADM_ADMITTED))

    @property
    def tenant_id(self) -> str:
        """Who pays; empty when nobody was recognised."""
        return str(self.fields.get(c.J_IDENTITY, {}).get(c.ID_TENANT, ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of an exchange and how they are known."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    basis: str
    anomaly: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """The one row of an admitted request."""

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


def parse(line: bytes) -> Entry:
    """Read one complete line."""
    try:
        fields = orjson.loads(line)
        for nested in (c.J_IDENTITY, c.J_REQUEST, c.J_USAGE, c.J_ADMISSION):
            if not isinstance(fields.setdefault(nested, {}), dict):
                fields[nested] = {}
        # The gate's stamp is in every record; Envoy's own start is not seen by the start record.
        stamp = fields[c.J_REQUEST].get(c.REQ_STARTED_AT) or fields[c.J_STARTED_AT]
        seconds, _, micros = str(stamp).partition(".")
        started_at = datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(micros or 0))
        # Absent while the exchange has just begun (Envoy omits what it does not know yet).
        duration = timedelta(milliseconds=int(fields.get(c.J_DURATION_MS) or 0))
        kind, request_id = fields[c.J_TYPE], fields[c.J_REQUEST_ID]
        return Entry(
            type=kind, request_id=request_id, started_at=started_at, seen_at=started_at + duration,
            epoch=str(fields.get(c.J_EPOCH, "")), fields=fields,
        )
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError, OverflowError) as exc:
        raise Malformed(f"{type(exc).__name__} in a journal line of {len(line)} bytes") from exc


def usage_event(entry: Entry) -> UsageEvent:
    """The row of an exchange that ended: *entry* is its end record."""
    status = int(entry.fields.get(c.J_STATUS) or 0)
    outcome = _outcome(entry, status)
    return _event(entry, status=status, outcome=outcome, usage=judge(entry, outcome))


def lost_event(entry: Entry) -> UsageEvent:
    """The row of an exchange whose Envoy is gone: *entry* is the last that was heard of it."""
    usage = _counted(entry, basis="checkpoint")
    return _event(entry, status=int(entry.fields.get(c.J_STATUS) or 0), outcome="lost", usage=usage)


def refused(entry: Entry) -> Refused:
    """What is kept of a refusal: *entry* is its end record."""
    return Refused(
        request_id=entry.request_id,
        started_at=entry.started_at,
        tenant_id=entry.tenant_id,
        key_id=str(entry.fields[c.J_IDENTITY].get(c.ID_KEY, "")),
        model=str(entry.fields[c.J_REQUEST].get(c.REQ_MODEL, "")),
        status=int(entry.fields.get(c.J_STATUS) or 0),
        details=str(entry.fields.get(c.J_DETAILS) or ""),
    )


def judge(entry: Entry, outcome: str) -> Usage:
    """
    Tokens and basis of an exchange that ended: reported > running > estimated > none.

    Zero stays zero when the engine said zero. An exchange that failed before a token has none.
    """
    seen = entry.fields[c.J_USAGE].get(c.USE_SEEN, "none")
    if seen == "final":
        return _counted(entry, basis="reported")
    if seen == "running":
        return _counted(entry, basis="running")
    anomaly = entry.fields[c.J_USAGE].get(c.USE_ANOMALY)
    frames = _whole(entry.fields[c.J_USAGE].get(c.USE_FRAMES)) or 0
    dialect = entry.fields[c.J_REQUEST].get(c.REQ_DIALECT)
    nothing = dialect == "openai.models" or outcome in ("gateway_error", "refused_by_engine")
    if nothing or (frames == 0 and outcome != "ok"):
        return Usage(
            input_tokens=0, output_tokens=0, cached_tokens=0, reasoning_tokens=0, basis="none", anomaly=anomaly
        )
    return Usage(
        input_tokens=_prompt_estimate(entry),
        output_tokens=frames or _answer_estimate(entry, dialect),
        cached_tokens=0, reasoning_tokens=0, basis="estimated", anomaly=anomaly,
    )


def _counted(entry: Entry, *, basis: str) -> Usage:
    usage = entry.fields[c.J_USAGE]
    anomaly = usage.get(c.USE_ANOMALY)
    counts: dict[str, int] = {}
    for name in (c.USE_INPUT, c.USE_OUTPUT, c.USE_CACHED, c.USE_REASONING):
        count = _whole(usage.get(name, 0))
        if count is None:
            # An impossible count is never billed: what we counted ourselves stands in, flagged.
            anomaly = "impossible_count"
            count = _own_count(entry, name)
        counts[name] = count
    if usage.get(c.USE_SEEN, "none") == "none":
        counts[c.USE_OUTPUT] = _whole(usage.get(c.USE_FRAMES)) or 0
    return Usage(
        input_tokens=counts[c.USE_INPUT],
        output_tokens=counts[c.USE_OUTPUT],
        cached_tokens=min(counts[c.USE_CACHED], counts[c.USE_INPUT]),
        reasoning_tokens=min(counts[c.USE_REASONING], counts[c.USE_OUTPUT]),
        basis=basis,
        anomaly=anomaly,
    )


def _own_count(entry: Entry, name: str) -> int:
    if name == c.USE_INPUT:
        return _prompt_estimate(entry)
    if name == c.USE_OUTPUT:
        return _whole(entry.fields[c.J_USAGE].get(c.USE_FRAMES)) or 0
    return 0


def _prompt_estimate(entry: Entry) -> int:
    size = int(entry.fields[c.J_REQUEST].get(c.REQ_PROMPT_BYTES) or 0)
    return math.ceil(size / ESTIMATE_BYTES_PER_TOKEN)


def _answer_estimate(entry: Entry, dialect: str | None) -> int:
    if dialect == "openai.embeddings":
        return 0
    return math.ceil(int(entry.fields.get(c.J_BYTES_SENT) or 0) / ESTIMATE_BYTES_PER_TOKEN)


def _whole(count: object) -> int | None:
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
    if 200 <= status < 400:
        return "ok"
    from_engine = entry.fields.get(c.J_DETAILS) == "via_upstream"
    if status >= 500 or status == 0:
        return "upstream_error" if from_engine else "gateway_error"
    return "refused_by_engine" if from_engine else "gateway_error"


def _event(entry: Entry, *, status: int, outcome: str, usage: Usage) -> UsageEvent:
    identity, request = entry.fields[c.J_IDENTITY], entry.fields[c.J_REQUEST]
    upstream = entry.fields.get(c.J_UPSTREAM)
    return UsageEvent(
        request_id=entry.request_id,
        tenant_id=entry.tenant_id,
        project_id=str(identity.get(c.ID_PROJECT, "")),
        key_id=str(identity.get(c.ID_KEY, "")),
        model=str(request.get(c.REQ_MODEL, "")),
        dialect=str(request.get(c.REQ_DIALECT, "")),
        started_at=entry.started_at,
        ended_at=entry.seen_at,
        status=status,
        outcome=outcome,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        basis=usage.basis,
        anomaly=usage.anomaly,
        streamed=bool(request.get(c.REQ_STREAM)),
        upstream=upstream,
    )
