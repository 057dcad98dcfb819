# SPDX-License-Identifier: Apache-2.0
"""Write journals as Envoy and the tap do, and read them into a ledger as the collector does."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from metering.adapters.disk import Disk
from metering.adapters.ledger import Ledger
from metering.adapters.metrics import Exchanges
from metering.adapters.rotation import Rotation
from metering.adapters.tail import starts_of
from metering.collector import Collector, Settings
from metering.core.watermark import WhenFull

#: Any moment that is none of the day's the test runs on.
NOON = datetime(2026, 11, 12, 12, 0, tzinfo=UTC)
EPOCH = "0123456789abcdef0123456789abcdef"


def request_id(number: int) -> str:
    """The id of the exchange with that *number*."""
    return str(uuid.UUID(int=number, version=4))


def stamp(moment: datetime) -> str:
    """A moment as the gate writes it."""
    return f"{int(moment.timestamp())}.{moment.microsecond:06d}"


def start(
    number: int, *, at: datetime = NOON, tenant: str = "acme", model: str = "tiny", epoch: str = EPOCH, lease: str | None = None
) -> bytes:
    """The tap's record, as the request goes to a model server."""
    return _line(
        {
            "type": "Start", "request_id": request_id(number), "started_at": stamp(at), "epoch": epoch,
            "identity": {"tenant": tenant, "project": "default", "key_id": "k" * 12},
            "request": {
                "started_at": stamp(at), "dialect": "openai.chat", "model": model, "stream": True,
                "prompt_bytes": "77", "output_tokens_max": "16", "choices": "1",
            },
            "admission": _admission(lease),
        }
    )


def periodic(number: int, *, output: int, after_ms: int = 1000, **facts: Any) -> bytes:
    """Envoy's record of an exchange under way."""
    usage = {"input": 3, "output": output, "cached": 0, "seen": "running", "total": 3 + output}
    return end(number, type="DownstreamPeriodic", usage=usage, after_ms=after_ms, **facts)


def end(
    number: int, *, at: datetime = NOON, tenant: str = "acme", model: str = "tiny", epoch: str = EPOCH, input: int = 3,
    output: int = 5, cached: int = 0, after_ms: int = 250, lease: str | None = None, **changes: Any,
) -> bytes:
    """Envoy's last record of an exchange; *changes* replace top-level fields, None removes one."""
    fields = {
        "admission": _admission(lease), "bytes_sent": 357, "details": "via_upstream",
        "duration_ms": after_ms, "epoch": epoch, "flags": "-",
        "identity": {"ext_authz_duration": 9, "key_id": "k" * 12, "project": "default", "tenant": tenant},
        "path": "/v1/chat/completions",
        "request": {
            "choices": "1", "dialect": "openai.chat", "model": model, "output_tokens_max": "16", "prompt_bytes": "77",
            "shape": "no", "started_at": stamp(at), "stream": False, "wants_usage": "no",
        },
        "request_id": request_id(number), "started_at": stamp(at), "status": 200, "type": "DownstreamEnd",
        "upstream": f"pool/main/{model}",
        "usage": {"cached": cached, "input": input, "output": output, "seen": "final", "total": input + output},
    } | changes
    return _line({name: value for name, value in fields.items() if value is not None})


def _admission(lease: str | None) -> dict[str, Any]:
    return {"admitted": True, "reserved_tokens": 0} | ({"lease": lease} if lease else {})


def lease_id(number: int) -> str:
    """The id of the lease with that *number*."""
    return str(uuid.UUID(int=1_000_000_000 + number, version=4))


def images(number: int, quantity: int, *, at: datetime = NOON, model: str = "tiny", **facts: Any) -> bytes:
    """The last record of an exchange that made images and reported no tokens."""
    asked = {"started_at": stamp(at), "dialect": "openai.images", "model": model, "quantity": str(quantity), "prompt_bytes": "50"}
    return end(number, at=at, request=asked, usage={"seen": "none", "quantity": quantity, "total": 0}, **facts)


def exchanges(count: int, *, at: datetime = NOON, first: int = 0, seed: int = 1, leases: int = 0) -> list[bytes]:
    """
    Start and end records of *count* exchanges of three tenants, mixed as they are under load.

    *leases*: how many leases of each tenant they pass on, every other one of them.
    """
    chance = random.Random(seed)
    placed: list[tuple[float, bytes]] = []
    for number in range(first, first + count):
        tenant = chance.choice(("acme", "bolt", "crux"))
        model = chance.choice(("tiny", "large"))
        begun, lasted = chance.random(), chance.random() / 10
        facts: dict[str, Any] = {"at": at, "tenant": tenant, "model": model}
        if leases and number % 2:
            facts["lease"] = lease_id(number % leases + leases * ("acme", "bolt", "crux").index(tenant))
        placed.append((begun, start(number, **facts)))
        placed.append((begun + lasted, end(number, input=chance.randint(1, 900), output=chance.randint(0, 900), **facts)))
    return [line for _, line in sorted(placed)]


def write_apart(live: Path, lines: Iterable[bytes]) -> Path:
    """Append *lines* to the journal at *live*: start records to the file of their own, as the workers do."""
    lines = list(lines)
    write(starts_of(live), [line for line in lines if line.startswith(b'{"type":"Start"')])
    return write(live, [line for line in lines if not line.startswith(b'{"type":"Start"')])


def write(path: Path, lines: Iterable[bytes]) -> Path:
    """Append *lines* to the journal at *path*."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.writelines(lines)
    return path


@contextmanager
def collecting(url: str, live: Path, *, journal: str = "local", reopened: bool = True, **settings: Any) -> Iterator[Collector]:
    """A collector on *url* that tests step by hand; Envoy always confirms that it has reopened, unless told otherwise."""
    chosen = Settings(journal=journal, **settings)
    ledger = Ledger(url, journal)
    rotation = Rotation(live=live, bytes_max=chosen.rotate_bytes, reopen=lambda: reopened)
    disk = Disk(directory=live.parent, closed_mark=live.parent / "closed", when_full=WhenFull.REFUSE)
    try:
        yield Collector(journal, live, ledger, chosen, rotation, disk, ledger.places(), ledger.lives(), Exchanges(tenants_max=100))
    finally:
        ledger.close()


def collect(url: str, live: Path, *, now: datetime = NOON, **settings: Any) -> None:
    """Read everything at *live* into the ledger at *url*, in a collector's life of its own."""
    live.parent.mkdir(parents=True, exist_ok=True)
    with collecting(url, live, **settings) as collector:
        # Once more, behind what was read: then a life that is over is known to be.
        for monotonic in (0.0, 1.0):
            while collector.step(now, monotonic):
                pass


def sums(url: str) -> list[tuple[Any, ...]]:
    """The hourly sums, all of them."""
    return rows(url, "select * from usage_hour order by 1, 2, 3, 4, 5, currency, meter")


def rows(url: str, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """Rows of one query, times in UTC."""
    with psycopg.connect(url, options="-c timezone=UTC") as connection:
        return connection.execute(query.encode(), arguments).fetchall()


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"
