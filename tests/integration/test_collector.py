# SPDX-License-Identifier: Apache-2.0
"""The collector on a real Postgres: whatever happens to it, to the journal or to the clock, the bill is the same."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from metering import collector
from metering.adapters.reading import read
from metering.adapters.rotation import QUIET_SECONDS
from metering.adapters.sources import Source
from metering.adapters.tail import Piece, next_piece, starts_of
from tests.journals import (
    NOON,
    collect,
    collecting,
    end,
    exchanges,
    images,
    lease_id,
    periodic,
    request_id,
    rows,
    start,
    sums,
    write,
    write_apart,
)
from tests.waiting import until

USAGE = "select * from billing_usage_v1 order by started_at, request_id"
DEFECTS = "select file_name, byte_offset, byte_count, reason from journal_defect order by 1, 2"


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    return tmp_path / "journal" / "journal.jsonl"


class Killed(Exception):
    """Stands for `kill -9`: nothing after it runs, and the connection is gone."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[int]]]:
    """
    Give a function that has the statement of that number, from now on, die before it is sent; None: none does.

    Only the test's own thread counts: a listener of an earlier test lives for ever and has statements too.
    """
    count = [0]
    limit: list[int | None] = [None]
    here = threading.get_ident()

    def counted(method: Any) -> Any:
        def call(cursor: Any, *arguments: Any, **named: Any) -> Any:
            if threading.get_ident() == here:
                count[0] += 1
                if count[0] == limit[0]:
                    raise Killed
            return method(cursor, *arguments, **named)

        return call

    for name in ("execute", "executemany", "copy"):
        monkeypatch.setattr(psycopg.Cursor, name, counted(getattr(psycopg.Cursor, name)))

    def set_limit(number: int | None) -> list[int]:
        count[0], limit[0] = 0, number
        return count

    return set_limit


def a_bit_of_everything() -> list[bytes]:
    """Ended, open, twice, contradicting, refused and damaged records."""
    return [
        *exchanges(20, leases=3),
        start(100), periodic(100, output=4), start(101, lease=lease_id(1)), end(102), end(102), end(102, output=6),
        end(105, lease=lease_id(1)), end(105, lease=lease_id(1), output=6),
        end(103, admission=None, status=429, details="limited"), b'{"type":"Sta\n',
    ]


def test_killed_between_any_two_statements_it_repeats_into_no_change(
    live: Path, kill_at: Callable[[int | None], list[int]], ledger_url: str
) -> None:
    """Every statement of every transaction is the last one once."""
    write_apart(live, [*a_bit_of_everything(), start(104, epoch="e" * 32, lease=lease_id(1))])
    everything = (
        USAGE, "select * from usage_hour order by 1, 2, 3, 4, 5", DEFECTS,
        "select request_id, entry from usage_conflict order by 1, 2::text",
        "select request_id, entry from open_exchange order by 1", "select * from refusal order by 1",
        "select file_id, byte_offset from journal_position order by 1", "select * from journal_stream order by 1, 2",
        "select journal, epoch from ended_life", "select * from lease_use order by lease_id, currency",
    )
    tables = (
        "usage_event, usage_hour, journal_defect, usage_conflict, open_exchange, refusal, journal_position, "
        "journal_stream, ended_life, lease_use"
    )
    with psycopg.connect(ledger_url, autocommit=True) as connection:
        collect(ledger_url, live)
        expected = [rows(ledger_url, query) for query in everything]
        connection.execute(f"truncate {tables}".encode())
        # The first time also made partitions.
        count = kill_at(None)
        collect(ledger_url, live)
        statements = count[0]
        for number in range(1, statements + 1):
            connection.execute(f"truncate {tables}".encode())
            kill_at(number)
            with pytest.raises(Killed):
                collect(ledger_url, live)
            kill_at(None)

            collect(ledger_url, live)
            # And once more: killed after the commit, before anybody heard of it.
            connection.execute("delete from journal_position")
            collect(ledger_url, live)

            assert expected == [rows(ledger_url, query) for query in everything], f"statement {number}"
    assert statements > 15


def test_batches_delivered_one_to_five_times_and_shuffled_are_the_distinct_exchanges(ledger_url: str, live: Path) -> None:
    """Rows, sums and places are those of one delivery."""
    chance = random.Random(4)
    write(live, exchanges(2000))
    data = live.read_bytes()
    cuts = sorted(chance.sample([i for i, byte in enumerate(data) if byte == 10], 30))
    pieces = [data[a:b] for a, b in zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(data) - 1], strict=True)]
    deliveries = [piece for piece in pieces for _ in range(chance.randint(1, 5))]
    chance.shuffle(deliveries)
    with collecting(ledger_url, live) as collector:
        whole = next_piece(live, {})
        assert whole is not None

        for piece in deliveries:
            single = Piece(start=0, data=piece, place=whole.place)
            collector.ledger.write(read(single), [single], NOON)

        assert [(2000,)] == rows(ledger_url, "select count(*) from usage_event")
        assert [] == rows(ledger_url, "select * from usage_conflict")
        assert 2000 == sum(row[5] for row in sums(ledger_url))
        assert rows(ledger_url, "select sum(input_tokens), sum(output_tokens) from usage_event") == rows(
            ledger_url, "select sum(input_tokens), sum(output_tokens) from usage_hour"
        )


EDGES = {
    "midnight": datetime(2026, 11, 12, tzinfo=UTC),
    "month end": datetime(2026, 12, 1, tzinfo=UTC),
    "year end": datetime(2027, 1, 1, tzinfo=UTC),
    "leap day begins": datetime(2028, 2, 29, tzinfo=UTC),
    "leap day ends": datetime(2028, 3, 1, tzinfo=UTC),
    # The test server's zone is America/St_Johns: half an hour off, with daylight saving.
    "local midnight": datetime(2026, 11, 12, 3, 30, tzinfo=UTC),
    "daylight saving begins": datetime(2026, 3, 8, 5, 30, tzinfo=UTC),
    "daylight saving ends": datetime(2026, 11, 1, 4, 30, tzinfo=UTC),
}


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_exchanges_around_an_edge_of_the_calendar_are_one_row_each_in_their_utc_hour(
    ledger_url: str, live: Path, edge: datetime
) -> None:
    """Delivered twice, begun up to a second before and after: no day and no hour gets what is another's."""
    moments = [edge + timedelta(milliseconds=ms) for ms in (-1000, -1, 0, 1, 999)]
    lines = [line for n, at in enumerate(moments) for line in (start(n, at=at), end(n, at=at, after_ms=2000))]
    write(live, lines)
    collect(ledger_url, live)
    write(live, reversed(lines))
    collect(ledger_url, live)

    assert moments == [row[0] for row in rows(ledger_url, "select started_at from usage_event order by 1")]
    hours = rows(ledger_url, "select hour, sum(request_count) from usage_hour group by 1 order by 1")
    before = (edge - timedelta(hours=1)).replace(minute=0)
    expected = [(before, 2), (edge, 3)] if edge.minute == 0 else [(edge.replace(minute=0), 5)]
    assert expected == hours


def damaged(lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
    """Each way to lose the end of a journal's last three lines, and to flip a bit in each of their bytes."""
    head, tail = b"".join(lines[:-3]), b"".join(lines[-3:])
    for length in range(len(tail)):
        yield f"cut at {length}", head + tail[:length]
    for position in range(len(tail)):
        flipped = bytes([tail[position] ^ (1 << position % 8)])
        yield f"flipped at {position}", head + tail[:position] + flipped + tail[position + 1 :]


def test_a_journal_damaged_at_any_byte_of_its_tail_stops_nothing_and_hides_nothing(live: Path) -> None:
    """What is no record is named; all other lines count; a torn last line waits."""
    lines = [line for n in range(4) for line in (start(n), end(n))]
    whole = {request_id(n) for n in range(4)}
    for name, data in damaged(lines):
        live.parent.mkdir(exist_ok=True)
        live.write_bytes(data)

        piece = next_piece(live, {})

        assert piece is not None
        batch = read(piece)
        defects = batch.defects.get(piece.place.file_id, [])
        kept = piece.data.count(b"\n") + 1
        good = sum(line.rstrip(b"\n") in piece.data.split(b"\n") for line in lines)
        # Exchanges 0 and 1 and the start of 2 lie before the damage.
        assert {request_id(0), request_id(1)} <= set(batch.events), name
        if name.startswith("cut"):
            assert ([], good) == (defects, kept), name
            assert set(batch.events) <= whole
            continue
        # A flipped line end makes one line of two; a flip within a value may leave a record that only
        # a checksum could tell from a true one. Everything else is a defect.
        assert kept - good <= 2, name
        assert len(defects) <= 1, name
        assert good + len(defects) >= 7 or good == 7 or kept == 7, name


def test_a_record_torn_by_a_dying_writer_is_named_and_the_next_one_counts(ledger_url: str, live: Path) -> None:
    """The next life of Envoy appends to the same line."""
    write(live, [start(1), end(1), end(2)[:200], start(3), end(3)])

    collect(ledger_url, live)

    assert [(request_id(1),), (request_id(3),)] == rows(ledger_url, "select request_id from usage_event order by 1")
    [(name, offset, size, reason)] = rows(ledger_url, DEFECTS)
    assert ("journal.jsonl", len(start(1) + end(1)), 200) == (name, offset, size)
    assert "JSONDecodeError" in reason


def test_a_record_that_postgres_refuses_holds_up_no_other(ledger_url: str, live: Path) -> None:
    """Well-formed for us, and not for the table: one defect, the rest goes on."""
    with psycopg.connect(ledger_url) as connection:
        connection.execute("alter table usage_event add check (model <> 'cursed')")
    write(live, [end(1), end(2, model="cursed"), end(3), end(4, model="a\0b")])

    collect(ledger_url, live)

    assert [("tiny",), ("tiny",), ("a\ufffdb",)] == rows(ledger_url, "select model from usage_event order by request_id")
    [(name, offset, _, reason)] = rows(ledger_url, DEFECTS)
    assert ("journal.jsonl", len(end(1)), "CheckViolation from Postgres") == (name, offset, reason)


def test_what_is_left_behind_in_cycles_is_looked_for(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cycles wait for nobody: it grew by 5 MiB a minute, at rest as well, until Python's own look, which is rare here."""

    class Knot:
        own: Knot

    knot = Knot()
    knot.own, left = knot, weakref.ref(knot)
    del knot
    for pause in ("_DIRECTORY_EVERY", "_GARBAGE_EVERY"):
        monkeypatch.setattr(collector, pause, 0.01)
    stop = threading.Event()
    gc.disable()
    try:
        running = threading.Thread(
            target=collector.collect_all, args=([Source(name="one", live=live, admin_port=None)], None, lambda _: stop.wait(), stop)
        )
        running.start()
        try:
            until(lambda: left() is None, "the knot is still there", seconds=10)
        finally:
            stop.set()
            running.join()
    finally:
        gc.enable()


def test_an_amount_that_no_column_holds_is_a_defect_of_its_record_alone(ledger_url: str, live: Path) -> None:
    """The dearest price of the most that can be counted; half as many fit."""
    with psycopg.connect(ledger_url) as connection:
        connection.execute(
            "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, meter, each_nano, effective, "
            "created_at) values ('tiny', 'USD', 0, 0, 0, 0, 'images', 1000000000000000, tstzrange('2026-01-01Z', null), now())"
        )
    fits, dear = 9_223, 9_224
    write(live, [images(1, fits), images(2, dear), end(3)])

    collect(ledger_url, live)

    assert [(fits * 10**15,), (0,)] == rows(ledger_url, "select amount_nano from usage_event order by request_id")
    assert ["DataError from Postgres"] == [reason for *_, reason in rows(ledger_url, DEFECTS)]


def test_a_run_without_line_ends_is_one_defect(ledger_url: str, live: Path) -> None:
    """However long it is, it is never held in memory whole, and what follows counts."""
    write(live, [end(1), b"\0" * (9 << 20), b"\n", end(2)])

    collect(ledger_url, live)

    assert [(2,)] == rows(ledger_url, "select count(*) from usage_event")
    assert [("journal.jsonl", len(end(1)))] == [row[:2] for row in rows(ledger_url, DEFECTS)]


def test_a_torn_last_line_waits_for_its_end(ledger_url: str, live: Path) -> None:
    """A write that is under way is no damage."""
    write(live, [end(1), end(2)[:300]])
    collect(ledger_url, live)
    assert [(1,)] == rows(ledger_url, "select count(*) from usage_event")

    write(live, [end(2)[300:]])
    collect(ledger_url, live)

    assert [(2,)] == rows(ledger_url, "select count(*) from usage_event")
    assert [] == rows(ledger_url, DEFECTS)


def test_a_truncated_journal_is_an_alarm_and_is_read_again(ledger_url: str, live: Path) -> None:
    """Known rows are absorbed, later ones count, a person is told."""
    write(live, [end(1), end(2), end(3)])
    collect(ledger_url, live)

    live.write_bytes(end(1))
    write(live, [end(4)])
    collect(ledger_url, live)

    assert [(4,)] == rows(ledger_url, "select count(*) from usage_event")
    assert [("the file was truncated", len(end(1)) * 3)] == rows(ledger_url, "select reason, byte_offset from journal_defect")


def test_a_journal_emptied_and_written_anew_is_another_file(ledger_url: str, live: Path) -> None:
    """Same name, same inode, longer than before: known by its first line, and the old one's end is an alarm."""
    write(live, [end(1)])
    collect(ledger_url, live)

    with live.open("r+b") as file:
        file.truncate()
        file.write(b"".join([end(2), end(3)]))
    with collecting(ledger_url, live) as collector:
        for monotonic in (0.0, 10.0, 20.0):
            collector.step(NOON, monotonic)

    assert [(3,)] == rows(ledger_url, "select count(*) from usage_event")
    assert [("the file is gone",)] == rows(ledger_url, "select reason from journal_defect")


def test_rotation_loses_nothing_however_late_the_writers_follow(ledger_url: str, live: Path) -> None:
    """Three files, each written to after its rename: all is read, and no file goes before it is quiet and read."""
    live.parent.mkdir()
    with collecting(ledger_url, live, rotate_bytes=len(end(1)) * 2, kept_files=1) as collector:
        number, clock = 0, 0.0
        handles = []
        for _ in range(4):
            with live.open("ab") as writer:
                for _ in range(2):
                    number += 1
                    writer.write(end(number))
            handles.append(live.open("ab"))
            clock += 5.0
            while collector.step(NOON, clock):
                pass
        late = [handle.write(end(number := number + 1)) for handle in handles]
        for handle in handles:
            handle.close()
        while collector.step(NOON, clock):
            pass

        assert 4 == len(late)
        assert [(number,)] == rows(ledger_url, "select count(*) from usage_event")
        names = ["journal-000001.jsonl", "journal-000002.jsonl", "journal-000003.jsonl", "journal-000004.jsonl"]
        assert names == sorted(path.name for path in live.parent.iterdir())

        for later in (5.0, QUIET_SECONDS + 4.0):
            collector.step(NOON, clock + later)
            assert names == sorted(path.name for path in live.parent.iterdir())
        collector.step(NOON, clock + QUIET_SECONDS + 9.0)
        assert ["journal-000004.jsonl"] == [path.name for path in live.parent.iterdir()]
        assert [("journal-000004.jsonl",)] == rows(ledger_url, "select file_name from journal_position")
    assert [] == rows(ledger_url, DEFECTS)


def test_no_file_is_removed_while_envoy_may_still_write_to_it(ledger_url: str, live: Path) -> None:
    """It was asked to reopen and did not answer: the old file is read on, for as long as that takes."""
    write(live, [end(1)])
    with collecting(ledger_url, live, rotate_bytes=1, kept_files=0, reopened=False) as collector:
        for monotonic in (0.0, 100.0, 200.0, 300.0):
            if monotonic:
                write(live.with_name("journal-000001.jsonl"), [end(int(monotonic))])
            while collector.step(NOON, monotonic):
                pass

    assert [(4,)] == rows(ledger_url, "select count(*) from usage_event")
    assert ["journal-000001.jsonl"] == [path.name for path in live.parent.iterdir()]


def test_a_new_collector_goes_on_where_the_last_one_stopped(ledger_url: str, live: Path) -> None:
    """From the place, not from zero: in every file."""
    old = live.with_name("journal-000001.jsonl")
    write(old, exchanges(10))
    write(live, exchanges(10, first=10))
    collect(ledger_url, live)
    write(live, exchanges(5, first=20))

    with collecting(ledger_url, live) as collector:
        piece = next_piece(live, collector.places)

    assert piece is not None
    assert len(b"".join(exchanges(10, first=10))) == piece.start
    assert 10 == len(piece.data.split(b"\n"))


def test_an_exchange_whose_envoy_is_gone_is_closed_from_its_last_record(ledger_url: str, live: Path) -> None:
    """A record of the next life is proof; the row says what was last heard."""
    write(live, [start(1), periodic(1, output=7), start(2), end(3, epoch="f" * 32)])

    collect(ledger_url, live)

    found = rows(ledger_url, "select request_id, outcome, basis, output_tokens from usage_event order by 1")
    assert [(request_id(1), "lost", "checkpoint", 7), (request_id(2), "lost", "checkpoint", 0), (request_id(3), "ok", "reported", 5)] == found
    assert [] == rows(ledger_url, "select * from open_exchange")


def test_a_start_that_is_read_late_ends_no_life_that_is_alive(ledger_url: str, live: Path) -> None:
    """The earlier life's last start was written before the later one's records and is read after them."""
    early, late = "a" * 32, "b" * 32
    write_apart(live, [start(1, epoch=early), end(1, epoch=early)])
    collect(ledger_url, live)
    write(live, [periodic(2, output=3, epoch=late)])
    collect(ledger_url, live)

    write(starts_of(live), [start(3, epoch=early)])
    collect(ledger_url, live)
    collect(ledger_url, live)

    assert [(request_id(2), late)] == rows(ledger_url, "select request_id, epoch from open_exchange")
    lost = rows(ledger_url, "select request_id, outcome from usage_event order by 1")
    assert [(request_id(1), "ok"), (request_id(3), "lost")] == lost


def test_a_start_whose_end_was_read_before_it_opens_nothing(ledger_url: str, live: Path) -> None:
    """Its row is there; with its identity, whatever the start says."""
    write(live, [end(1), end(2, admission=None, status=429)])
    collect(ledger_url, live)

    write(starts_of(live), [start(1, tenant="other")])
    collect(ledger_url, live)

    assert [("acme", 5)] == rows(ledger_url, "select tenant_id, output_tokens from usage_event")
    assert [] == rows(ledger_url, "select * from open_exchange")


def test_what_is_at_the_end_is_known_under_unceasing_load(ledger_url: str, live: Path) -> None:
    """There is always something new; orphans are closed and months can be closed all the same."""
    with collecting(ledger_url, live) as collector:
        for second in range(3):
            write_apart(live, [start(2 * second, epoch=f"{second:032}"), start(2 * second + 1, epoch=f"{second:032}")])

            assert not collector.step(NOON + timedelta(seconds=second), float(second))

    assert [(NOON + timedelta(seconds=2),)] == rows(ledger_url, "select read_until from journal_state")
    assert [(request_id(0),), (request_id(1),)] == rows(ledger_url, "select request_id from usage_event order by 1")


def test_two_envoys_on_one_postgres_do_not_close_each_others_exchanges(ledger_url: str, tmp_path: Path) -> None:
    """Each journal has its own lives."""
    one, two = tmp_path / "one/journal.jsonl", tmp_path / "two/journal.jsonl"
    write(one, [start(1, epoch="a" * 32)])
    write(two, [start(2, epoch="b" * 32), end(3, epoch="b" * 32)])

    collect(ledger_url, one, journal="one")
    collect(ledger_url, two, journal="two")
    write(two, [start(4, epoch="c" * 32)])
    collect(ledger_url, two, journal="two")

    assert [(request_id(1),), (request_id(4),)] == rows(ledger_url, "select request_id from open_exchange order by 1")
    assert [(request_id(2), "lost"), (request_id(3), "ok")] == rows(
        ledger_url, "select request_id, outcome from usage_event order by 1"
    )


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)], ids=["forward", "back"])
def test_a_jump_of_the_clock_closes_no_exchange_that_is_alive(ledger_url: str, live: Path, jump: timedelta) -> None:
    """Silence is measured by a clock that does not jump."""
    with collecting(ledger_url, live) as collector:
        write(live, [start(1)])
        while collector.step(NOON, 0.0):
            pass
        for second in range(1, 90):
            write(live, [periodic(1, output=second, after_ms=1000 * second)])
            while collector.step(NOON + jump, float(second)):
                pass
        write(live, [end(1, output=90, after_ms=90_000)])
        while collector.step(NOON + jump, 91.0):
            pass

    assert [("ok", 90)] == rows(ledger_url, "select outcome, output_tokens from usage_event")
    assert [] == rows(ledger_url, "select * from usage_conflict")


def test_a_silent_exchange_is_closed_after_the_silence_and_not_before(ledger_url: str, live: Path) -> None:
    """Its Envoy went away and none came after it."""
    write(live, [start(1), periodic(1, output=3)])
    with collecting(ledger_url, live, silent_seconds=30.0) as collector:
        while collector.step(NOON, 0.0):
            pass
        collector.step(NOON, 29.9)
        assert [] == rows(ledger_url, "select * from usage_event")

        collector.step(NOON, 31.0)

    assert [("lost", "checkpoint", 3)] == rows(ledger_url, "select outcome, basis, output_tokens from usage_event")


def test_an_end_that_comes_after_all_is_kept_as_a_conflict(ledger_url: str, live: Path) -> None:
    """The first row stands; nothing is dropped in silence."""
    write(live, [start(1), periodic(1, output=3), end(2, epoch="f" * 32)])
    collect(ledger_url, live)

    write(live, [end(1, output=9)])
    collect(ledger_url, live)

    assert [(3,)] == rows(ledger_url, "select output_tokens from usage_event where request_id = %s", request_id(1))
    assert [(request_id(1), 9)] == rows(
        ledger_url, "select request_id, (entry -> 'usage' ->> 'output')::int from usage_conflict"
    )


def test_a_second_collector_on_the_same_journal_is_refused(ledger_url: str, live: Path) -> None:
    """Two would fight over the place."""
    live.parent.mkdir()
    with collecting(ledger_url, live), pytest.raises(psycopg.OperationalError, match="another collector"):
        collect(ledger_url, live)


def test_a_flood_of_refusals_is_bounded(ledger_url: str, live: Path) -> None:
    """429s must not become a flood of writes: 200 a batch."""
    write(live, [end(n, admission=None, status=429) for n in range(300)])

    collect(ledger_url, live)

    assert [(200,)] == rows(ledger_url, "select count(*) from refusal")
    assert [(0,)] == rows(ledger_url, "select count(*) from usage_event")
