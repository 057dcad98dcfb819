# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.revocation`: how long a caller who was shut out still gets through, under load.

Two extauth processes, three of ratelimit, two Envoy workers that all remember every caller; keys are
revoked and disabled, tenants suspended, one after another, while every key is used
all the time, and the one whose turn it is half of the time. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.load import answered_ok
from tests.dataplane.installation import REPOSITORY, Installation, Tenant, chat, running

#: Connections, each of which uses every key in turn; enough that no worker is without some.
CONNECTIONS: Final = 8
#: The written bound, whatever is lost on the way.
BOUND_SECONDS: Final = 5.0
#: Looked at after the last change; more than the bound, so that a caller who comes back would be seen.
LOOKED_ON_SECONDS: Final = BOUND_SECONDS + 1.0
SEVERAL: Final = {"PEAJE_EXTAUTH_PROCESSES": "2", "PEAJE_RATELIMIT_PROCESSES": "3"}
_KEYS: Final = 150
#: Uses of a key before its holder is shut out, so that every worker remembers it.
_WARM_USES: Final = 4 * CONNECTIONS
#: Refusals in a row after which it is out; every connection has had one.
_REFUSED_USES: Final = 2 * CONNECTIONS
#: However long it takes: what is then still wrong is for the reader of the figures to see.
_WAIT_SECONDS_MAX: Final = 40.0
_DOCUMENT: Final = REPOSITORY / "docs/benchmarks.md"
_BEGIN, _END = "<!-- revocation: begin -->", "<!-- revocation: end -->"

Change = Callable[[Installation, Tenant], None]


def _revoke(road: Installation, tenant: Tenant) -> None:
    road.control("POST", f"/v1/keys/{tenant.key_id}/revoke").raise_for_status()


def _disable(road: Installation, tenant: Tenant) -> None:
    road.control("PATCH", f"/v1/keys/{tenant.key_id}", json={"state": "disabled"}).raise_for_status()


def _suspend(road: Installation, tenant: Tenant) -> None:
    road.control("PATCH", f"/v1/tenants/{tenant.tenant_id}", json={"state": "suspended"}).raise_for_status()


#: In turn, so that each kind of change is a third of all.
CHANGES: Final[tuple[Change, ...]] = (_revoke, _disable, _suspend)


@dataclass(slots=True)
class Caller:
    """One key: when each of its requests began and whether it passed, and when it was shut out."""

    tenant: Tenant
    uses: list[tuple[float, bool]] = field(default_factory=list)
    #: When the control API had answered; the change is committed before that.
    changed_at: float = float("inf")

    @property
    def passed_after_seconds(self) -> float:
        """How long after the change the last request began that passed; at most 0 if none did."""
        return max((began for began, passed in self.uses if passed), default=0.0) - self.changed_at

    def is_warm(self) -> bool:
        """Whether every worker has had it often enough to remember it."""
        return len(self.uses) >= _WARM_USES

    def is_out(self) -> bool:
        """Whether it has been refused often enough, by every worker, for the next one's turn to have come."""
        return not any(passed for _, passed in self.uses[-_REFUSED_USES:])

    @property
    def shut_out_after_seconds(self) -> float:
        """How long after the change the first request began after which none passed: never less than the truth."""
        passed = max((began for began, passed in self.uses if passed), default=0.0)
        return max(0.0, min(began for began, _ in self.uses if began > max(passed, self.changed_at)) - self.changed_at)


@dataclass(slots=True)
class _Load:
    callers: list[Caller]
    #: Who is shut out now.
    focus: Caller | None = None
    is_over: bool = False


async def shut_out(
    road: Installation, tenants: list[Tenant], *, changes: tuple[Change, ...] = CHANGES, looked_on: float = LOOKED_ON_SECONDS
) -> list[Caller]:
    """Use every key all the time, shut their holders out one by one meanwhile, look on for a while."""
    load = _Load(callers=[Caller(tenant) for tenant in tenants])
    clients = [asyncio.create_task(_use(road, load, number)) for number in range(CONNECTIONS)]
    try:
        for number, caller in enumerate(load.callers):
            load.focus = caller
            await _until(caller.is_warm, clients)
            await asyncio.to_thread(changes[number % len(changes)], road, caller.tenant)
            caller.changed_at = time.monotonic()
            await _until(caller.is_out, clients)
        await asyncio.sleep(looked_on)
    finally:
        load.is_over = True
        await asyncio.gather(*clients)
    return load.callers


async def _until(condition: Callable[[], bool], clients: list[asyncio.Task[None]]) -> None:
    until = time.monotonic() + _WAIT_SECONDS_MAX
    while not condition() and time.monotonic() < until:
        await asyncio.sleep(0.005)
        for client in clients:
            if client.done():
                client.result()


async def _use(road: Installation, load: _Load, number: int) -> None:
    body = json.dumps(chat(max_tokens=1)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", road.port)
    # Each begins elsewhere, so that a key is used about equally often at all times.
    turn = number * len(load.callers) // CONNECTIONS
    while not load.is_over:
        turn += 1
        # Every other request is that of whoever is shut out now, so that not much time passes between two.
        caller = load.focus if turn % 2 and load.focus is not None else load.callers[turn // 2 % len(load.callers)]
        began = time.monotonic()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n%s" % (caller.tenant.key.encode(), len(body), body)
        )
        caller.uses.append((began, await answered_ok(reader)))
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def table(callers: list[Caller], *, asked: int) -> str:
    """What was seen, in milliseconds."""
    times = sorted(caller.shut_out_after_seconds * 1000 for caller in callers)
    uses = sum(len(caller.uses) for caller in callers)

    def at(q: float) -> str:
        return f"{times[min(len(times) - 1, int(q * len(times)))]:.0f} ms"

    rows = {
        "callers shut out": str(len(callers)),
        "requests meanwhile, of which extauth was asked about": f"{uses:,}, {asked:,}",
        "until none passes: p50": at(0.5),
        "p99": at(0.99),
        "longest": at(1.0),
        "the last request that passed began after": f"{max(0.0, *(caller.passed_after_seconds for caller in callers)) * 1000:.0f} ms",
    }
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows.items())])


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=_KEYS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peaje-bench-") as directory:
        home = Path(directory) / "home"
        with running(home, "--engine", "fake", "--concurrency", "2", environment=SEVERAL) as road:
            tenants = [road.new_tenant(f"out-{number}") for number in range(options.keys)]
            before = road.asked_extauth()
            callers = asyncio.run(shut_out(road, tenants))
            text = table(callers, asked=road.asked_extauth() - before)
    print(text)
    if options.write:
        document = _DOCUMENT.read_text()
        _DOCUMENT.write_text(re.sub(f"(?s){_BEGIN}.*{_END}", f"{_BEGIN}\n{text}\n{_END}", document))


if __name__ == "__main__":
    main()
