# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.scale`: what a load takes, worked out from the costs in docs/benchmarks.md.

Pure but for `main`: the text of that document in, the tables of docs/scale.md out. `--write` puts them there, and plays
the simulation of leases (`bench.lending`) for its own two. A house test holds docs/scale.md to docs/benchmarks.md, so a
new measurement changes both.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import lending
from bench.lending import REMEMBERED_MS
from ratelimit.adapters.limits_source import WHOLE_EVERY_SECONDS

_DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
SHAPES: Final = ("small JSON", "50-chunk stream", "100 KB prompt")
_FAR, _NEAR = "far from limits", "asked each time"
#: Of the first table, by their heads.
_COLUMNS: Final = {
    "bare": "bare Envoy", "envoy": "Envoy", "extauth": "extauth", "ratelimit": "ratelimit", "metering": "metering",
    "collector": "collector", "valkey": "Valkey", "postgres": "Postgres", "all": "all",
}  # fmt: skip
_REMEMBERED_SECONDS: Final = REMEMBERED_MS / 1000
_DAY_SECONDS: Final = 86_400
#: How much of a core ratelimit reads everything with: it rests between pages.
_READING_SHARE: Final = 0.2
#: Postgres' largest table: 2³² pages of 8 KiB.
_TABLE_BYTES_MAX: Final = 2**32 * 8192
#: `PEAJE_COLLECTOR_KEPT_FILES` of `PEAJE_COLLECTOR_ROTATE_BYTES`.
_KEPT_BYTES: Final = 8 * 2**28
#: Of a worker's memory of callers: the half that is surely there.
_ENTRIES_MAX: Final = 10_000
#: Keys that a process of extauth remembers (`KNOWN_COUNT_MAX` of its cache).
EXTAUTH_KEYS_MAX: Final = 100_000
#: Questions to ratelimit in one life of what a worker remembers: who calls, and leases that end before that is over.
#: By the simulation, which a test holds this to.
QUESTIONS_A_LIFE: Final = 1.8
#: Until the number of workers is found that their own number asks for; it moves by less than one after three.
_ROUNDS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What was measured; microseconds of CPU unless it says otherwise."""

    #: Per lane, shape and column of the first table, a request.
    lanes: Mapping[tuple[str, str], Mapping[str, float]]
    extauth_call: float
    extauth_miss: float
    #: The store's part of an admission and its settle, under two limits.
    valkey_asked: float
    collector_records_per_second: float
    journal_bytes_per_record: float
    row_bytes: float
    limit_read: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is assumed; change it here and write the document anew."""

    requests_per_second: float = 1e5
    tenants: int = 1_000_000
    limits_a_tenant: int = 2
    #: Shares of the three shapes.
    mix: tuple[float, float, float] = (0.5, 0.45, 0.05)
    #: How long a stream lasts, each second of which is a record in the journal.
    stream_seconds: float = 10.0
    first_byte_seconds: float = 0.2
    #: Of the requests, those whose callers have a limit on concurrency or are near another: asked each time.
    near_share: float = 0.05
    #: The n-th busiest tenant has 1/n of the busiest one's requests.
    zipf: float = 1.0
    #: What a core is used of at this load: the rest is for peaks and for what dies.
    used_share: float = 0.6
    #: Workers (cores) of one gateway.
    workers_a_gateway: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How often the services are asked, a second, where tenants are spread over so many workers."""

    workers: int
    extauth: float
    ratelimit: float
    #: Of extauth's, those by tenants beyond the ones that a process remembers.
    postgres_reads: float
    #: Callers that one worker remembers at a time.
    entries: float


def read_costs(text: str) -> Costs:
    """Read docs/benchmarks.md; raises `ValueError` with the name of what is missing."""
    lanes = {}
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in _between(text, "bench").splitlines())
    for cells in lines:
        lane = dict(zip(head, cells, strict=True))
        lanes[lane["lane"], lane["request"]] = {name: float(lane[title]) for name, title in _COLUMNS.items()}
    for wanted in ((lane, shape) for lane in (_FAR, _NEAR) for shape in SHAPES):
        if wanted not in lanes:
            raise ValueError(f"docs/benchmarks.md has no line {' | '.join(wanted)}")

    def number(name: str, pattern: str) -> float:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"docs/benchmarks.md has no {name}")
        return float(str(found[1]).replace(",", ""))

    records, megabytes = number("journal's records", r"journal of ([\d,]+) records"), number("journal's size", r"records, ([\d,]+) MB")
    return Costs(
        lanes=lanes,
        extauth_call=number("call of extauth", r"8 calls under way: a remembered key \|.*?([\d,]+) µs CPU each"),
        extauth_miss=number("miss of extauth", r"miss: known key, read from Postgres \| ([\d,]+) µs"),
        valkey_asked=number("admission of 2 limits", r"\| admit, 2 limits \| [\d,]+ \| ([\d,]+)")
        + number("settle of 2 limits", r"\| settle, 2 limits \| [\d,]+ \| ([\d,]+)"),
        collector_records_per_second=number("rate of the collector", r"core of the collector's own CPU: ([\d,]+)"),
        journal_bytes_per_record=megabytes * 1e6 / records,
        row_bytes=number("size of a row", r"([\d,]+) bytes a row"),
        limit_read=number("price of a limit that is read", r"\| ratelimit, µs CPU a limit .*\n.*\n\| [\d,]+ \| ([\d.]+)"),
    )


def asked_share(rate: float, *, first_byte_seconds: float, questions: float) -> float:
    """
    Of one caller's requests at one worker, *rate* a second, those that ask.

    What an answer brings is remembered for five seconds from the request on, but known only when the answer begins.
    Who comes in between asks; as soon as that is more than one, one goes ahead for all and the others pass.

    >>> [round(asked_share(rate, first_byte_seconds=0, questions=1), 2) for rate in (0.02, 0.2, 2, 20)]
    [0.91, 0.5, 0.09, 0.01]
    """
    asking = questions * (1 + min(1.0, rate * first_byte_seconds))
    return asking / (asking + rate * _REMEMBERED_SECONDS)


def asked(load: Load, *, workers: int, workers_a_tenant: int) -> Asked:
    """Add up over all tenants, of whom each is spread over *workers_a_tenant* of the *workers*."""
    total = sum(count * rank**-load.zipf for rank, count in _ranks(load.tenants))
    extauth = ratelimit = reads = entries = 0.0
    for rank, count in _ranks(load.tenants):
        each = float(load.requests_per_second * rank**-load.zipf / total)
        rate = each / workers_a_tenant
        who = each * asked_share(rate, first_byte_seconds=load.first_byte_seconds, questions=1)
        far = asked_share(rate, first_byte_seconds=load.first_byte_seconds, questions=QUESTIONS_A_LIFE)
        extauth += count * who
        ratelimit += count * each * (load.near_share + (1 - load.near_share) * far)
        reads += count * who if rank > EXTAUTH_KEYS_MAX else 0
        entries += count * (1 - math.exp(-rate * _REMEMBERED_SECONDS)) * workers_a_tenant / workers
    return Asked(workers=workers, extauth=extauth, ratelimit=ratelimit, postgres_reads=reads, entries=entries)


def mixed(costs: Costs, load: Load, column: str, lane: str = _FAR) -> float:
    """Microseconds a request of *column*, over the mix of shapes."""
    return sum(share * costs.lanes[lane, shape][column] for share, shape in zip(load.mix, SHAPES, strict=True))


def cores(microseconds: float, per_second: float, load: Load) -> float:
    """Cores that *per_second* of what costs *microseconds* take, with room left."""
    return microseconds * per_second / 1e6 / load.used_share


def envoy(costs: Costs, load: Load, *, asking: float) -> float:
    """Microseconds of Envoy a request, where a share *asking* of them asks ratelimit."""
    return (1 - asking) * mixed(costs, load, "envoy") + asking * mixed(costs, load, "envoy", _NEAR)


def workers_for(costs: Costs, load: Load, *, by_tenant: bool) -> int:
    """Envoy's workers, one a core: more workers are asked for more, which takes more workers."""
    workers = load.workers_a_gateway
    for _ in range(_ROUNDS):
        found = asked(load, workers=workers, workers_a_tenant=load.workers_a_gateway if by_tenant else workers)
        each = envoy(costs, load, asking=found.ratelimit / load.requests_per_second)
        workers = math.ceil(cores(each, load.requests_per_second, load))
    return workers


def records_a_request(load: Load) -> float:
    """Of the journal: start, end, and one for each second of a stream."""
    return 2 + load.mix[1] * load.stream_seconds


def inputs_table(costs: Costs, load: Load) -> str:
    """What is taken from docs/benchmarks.md, and what is assumed."""
    far = {column: mixed(costs, load, column) for column in _COLUMNS}
    rows = {
        "bare Envoy, Envoy, all of Peaje: µs a request, far from limits": f"{far['bare']:,.0f}, {far['envoy']:,.0f}, {far['all']:,.0f} ({far['all'] / far['bare']:.1f}×)",
        "of these the second witness, the collector, Postgres": f"{far['metering']:,.0f}, {far['collector']:,.0f}, {far['postgres']:,.0f}",
        "ratelimit for a request that asks (admission and settle, gRPC and all)": f"{mixed(costs, load, 'ratelimit', _NEAR):,.0f} µs",
        "the store for it, two limits": f"{costs.valkey_asked:,.0f} µs",
        "extauth over gRPC; what a key that it does not remember costs more": f"{costs.extauth_call:,.0f} µs; {costs.extauth_miss:,.0f} µs",
        "the collector": f"{costs.collector_records_per_second:,.0f} records a second and core",
        "a record of the journal, a row of the ledger with its indexes": f"{costs.journal_bytes_per_record:,.0f} bytes, {costs.row_bytes:,.0f} bytes",
        "a limit, when ratelimit reads them all": f"{costs.limit_read:.1f} µs",
        "assumed: small requests, streams, large prompts": ", ".join(f"{share:.0%}" for share in load.mix),
        "assumed: a stream lasts, its first byte comes after": f"{load.stream_seconds:g} s, {load.first_byte_seconds:g} s",
        "assumed: asked each time (concurrency, near a limit)": f"{load.near_share:.0%} of the requests",
        "assumed: the n-th tenant has 1/n of the first one's requests; a core is used to": f"{load.used_share:.0%}",
    }
    return _table(("measured or assumed", "figure"), list(rows.items()))


def asked_table(costs: Costs, load: Load) -> str:
    """How often the services are asked, spread and by tenant."""
    rows = []
    for said, found in zip(("any worker", "one gateway, by its key"), _both(costs, load), strict=True):
        rows.append(
            (
                said, f"{found.extauth:,.0f} ({found.extauth / load.requests_per_second:.0%})",
                f"{found.ratelimit:,.0f} ({found.ratelimit / load.requests_per_second:.0%})", f"{found.postgres_reads:,.0f}",
                f"{found.entries:,.0f} of {_ENTRIES_MAX:,}",
            )
        )  # fmt: skip
    return _table(
        ("a tenant's connections end at", "extauth, calls a second", "ratelimit, admissions a second", "keys read from Postgres a second", "callers a worker remembers"),
        rows,
    )


def parts_table(costs: Costs, load: Load) -> str:
    """Cores, shards, rows and bytes of each part, for both ways of spreading."""
    rps = load.requests_per_second
    spread, hashed = _both(costs, load)

    def both(cost: float, field: str) -> str:
        return " → ".join(f"{cores(cost, getattr(one, field), load):,.0f}" for one in (spread, hashed))

    records = rps * records_a_request(load)
    record_bytes = records * costs.journal_bytes_per_record / 1e6
    collectors = records / costs.collector_records_per_second / load.used_share
    gateways = math.ceil(hashed.workers / load.workers_a_gateway)
    rows = [
        ("Envoy, cores (bare Envoy alone)", f"{spread.workers:,} → {hashed.workers:,} ({cores(mixed(costs, load, 'bare'), rps, load):,.0f})"),
        (f"gateways of {load.workers_a_gateway} workers", f"{math.ceil(spread.workers / load.workers_a_gateway):,} → {gateways:,}"),
        ("extauth, cores (a process uses one)", both(costs.extauth_call, "extauth")),
        ("ratelimit, cores (a process uses one)", both(mixed(costs, load, "ratelimit", _NEAR), "ratelimit")),
        ("Valkey, shards (each one thread)", both(costs.valkey_asked, "ratelimit")),
        ("metering, the second witness, cores", f"{cores(mixed(costs, load, 'metering'), rps, load):,.0f}"),
        ("journal, records a second", f"{records:,.0f}"),
        ("collectors, cores; of one gateway's, that has one process", f"{collectors:,.0f}; {collectors / gateways:.1f}"),
        ("journal, disk in all, and of one gateway", f"{record_bytes:,.0f} MB/s, {record_bytes / gateways:,.1f} MB/s"),
        ("journal, kept for a replay (8 files of 256 MiB)", f"{_KEPT_BYTES / 1e6 / (record_bytes / gateways):,.0f} s of a gateway"),
        ("ledger, rows a day", f"{rps * _DAY_SECONDS:,.0f}"),
        ("ledger, bytes a day, one partition (the most that a table can have)", f"{rps * _DAY_SECONDS * costs.row_bytes / 1e12:,.1f} TB ({_TABLE_BYTES_MAX / 1e12:,.0f} TB)"),
        ("Postgres, cores for the rows", f"{cores(mixed(costs, load, 'postgres'), rps, load):,.0f}"),
        ("ratelimit reads all limits at its start, until it serves", f"{_reading_seconds(costs, load):,.0f} s"),
        (f"and again, every {WHOLE_EVERY_SECONDS:.0f} s: part of a core", f"{_reading_seconds(costs, load) / WHOLE_EVERY_SECONDS:.0%}"),
    ]
    return _table((f"at {rps:,.0f} requests a second, {load.tenants:,} tenants", "spread → by tenant"), rows)


def breaks_table(costs: Costs, load: Load) -> str:
    """What one of each can do, first what breaks first."""
    spread, _ = _both(costs, load)
    share = spread.ratelimit / load.requests_per_second
    tenants = _READING_SHARE * WHOLE_EVERY_SECONDS / (load.limits_a_tenant * costs.limit_read / 1e6)
    rates = (
        ("one process of ratelimit", 1 / cores(mixed(costs, load, "ratelimit", _NEAR) * share, 1, load)),
        ("one process of extauth", 1 / cores(costs.extauth_call * spread.extauth / load.requests_per_second, 1, load)),
        ("one Valkey", 1 / cores(costs.valkey_asked * share, 1, load)),
        ("one collector, that is one gateway's journal", costs.collector_records_per_second * load.used_share / records_a_request(load)),
        ("the rows on four cores of Postgres", 4 / cores(mixed(costs, load, "postgres"), 1, load)),
        ("one day's partition, by its size", _TABLE_BYTES_MAX * load.used_share / costs.row_bytes / _DAY_SECONDS),
    )
    rows = [(rate / load.requests_per_second, f"{rate:,.0f} requests/s", what) for what, rate in rates]
    rows.append((tenants / load.tenants, f"{tenants:,.0f} tenants", "reading all limits, when that takes longer than until it is due again"))
    return _table(("what", "ends at", "of this load"), [(what, at, f"{part:.1%}") for part, at, what in sorted(rows)])


def _reading_seconds(costs: Costs, load: Load) -> float:
    """CPU of a process for all limits once."""
    return load.tenants * load.limits_a_tenant * costs.limit_read / 1e6


def waits_table() -> str:
    """Share of one caller's requests that ask ratelimit, by its rate at a worker and the time to the first byte."""
    rates, waits = (0.02, 0.2, 2.0, 20.0, 200.0), (0.05, 0.2, 1.0, 3.0)
    rows = [
        (f"{rate:g}", *(f"{asked_share(rate, first_byte_seconds=wait, questions=QUESTIONS_A_LIFE):.2f}" for wait in waits))
        for rate in rates
    ]
    return _table(("requests a second at one worker", *(f"first byte after {wait:g} s" for wait in waits)), rows)


def tables(text: str, load: Load = Load()) -> dict[str, str]:
    """The computed tables of docs/scale.md by marker."""
    costs = read_costs(text)
    return {
        "inputs": inputs_table(costs, load), "asked": asked_table(costs, load), "parts": parts_table(costs, load),
        "breaks": breaks_table(costs, load), "waits": waits_table(),
    }  # fmt: skip


def put(document: str, made: Mapping[str, str]) -> str:
    """Put each table between its markers; raises `ValueError` for one that the document has no place for."""
    for name, table in made.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, found, rest = document.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"docs/scale.md has no place for {name}")
        document = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return document


def main() -> None:
    """Work out and print, or write."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    options = parser.parse_args()
    made = tables((_DOCS / "benchmarks.md").read_text())
    made |= {"lending": lending.asked_table(), "rush": lending.rush_table()}
    for name, table in made.items():
        print(f"{name}\n{table}\n")
    if options.write:
        path = _DOCS / "scale.md"
        path.write_text(put(path.read_text(), made))


def _both(costs: Costs, load: Load) -> tuple[Asked, Asked]:
    """Tenants spread over all workers, and each on one gateway's."""
    spread, hashed = (workers_for(costs, load, by_tenant=by_tenant) for by_tenant in (False, True))
    return (
        asked(load, workers=spread, workers_a_tenant=spread),
        asked(load, workers=hashed, workers_a_tenant=load.workers_a_gateway),
    )


def _ranks(count: int) -> list[tuple[float, int]]:
    """Ranks of tenants: the first thousand each, then in groups of a hundredth of their rank: the middle, how many."""
    found: list[tuple[float, int]] = [(float(rank), 1) for rank in range(1, min(count, 1000) + 1)]
    first = 1001
    while first <= count:
        last = min(count, first + first // 100)
        found.append((math.sqrt(first * last), last - first + 1))
        first = last + 1
    return found


def _between(text: str, name: str) -> str:
    found = re.search(f"(?s)<!-- {name}: begin -->\n(.*?)<!-- {name}: end -->", text)
    if found is None:
        raise ValueError(f"docs/benchmarks.md has no table {name}")
    return found[1]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
