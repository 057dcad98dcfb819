# SPDX-License-Identifier: Apache-2.0
"""The journal's records and files, without Postgres: read, salvage, fold, tail."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metering.adapters.disk import Disk
from metering.adapters.reading import Reader, Reading
from metering.adapters.rotation import Rotation
from metering.adapters.tail import BATCH_BYTES_MAX, STARTS_BYTES_MAX, Piece, Place, list_files, look, next_piece
from metering.core import lines
from metering.core.fold import fold
from metering.core.journal import TEXT_LENGTH_MAX, Malformed, leases_of, lost_event, parse, usage_event
from metering.core.lives import ENDED_LIVES_MAX, Lives
from metering.core.watermark import Level, WhenFull
from tests.journals import end, exchanges, lease_id, periodic, request_id, start, write, write_apart


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """Where a journal's live file is."""
    path = tmp_path / "journal" / "journal.jsonl"
    path.parent.mkdir()
    return path


ODD: dict[str, bytes] = {
    "no JSON": b"hello",
    "no object": b"[1]",
    "invalid UTF-8": end(1).rstrip().replace(b"tiny", b"\xff\xfe"),
    "another type": end(1, type="DownstreamStart"),
    "an id that Envoy does not mint": end(1, request_id="mine"),
    "an id that is a number": end(1, request_id=7),
    "identity that is no object": end(1, identity="acme"),
    "status beyond three digits": end(1, status=1000),
    "status below zero": end(1, status=-1),
    "status that is true": end(1, status=True),
    "bytes that are a text": end(1, bytes_sent="many"),
    "details that are an object": end(1, details={}),
    "an engine that is a list": end(1, engine=["vllm"]),
    "no moment": end(1, request={}, started_at=None),
    "a moment that is none": end(1, request={"started_at": "soon.0"}),
    "a moment beyond the calendar": end(1, request={"started_at": "99999999999999.0"}),
    "a duration beyond the calendar": end(1, duration_ms=10**18),
    "prompt bytes that are a word": end(1, request={"started_at": "1.0", "prompt_bytes": "many"}),
    "a quantity that is a word": end(1, request={"started_at": "1.0", "quantity": "many"}),
    "a quantity below zero": end(1, request={"started_at": "1.0", "quantity": "-1"}),
}


@pytest.mark.parametrize("line", ODD.values(), ids=ODD)
def test_what_envoy_and_the_tap_do_not_write_is_malformed(line: bytes) -> None:
    """Never a row, never another exception."""
    with pytest.raises(Malformed):
        parse(line.rstrip())


#: As Envoy writes them.
NAMELESS = {
    "an escaped slash": b'{"bytes_sent":0,"details":"path_normalization_failed","duration_ms":0,"epoch":"e","flags":"-","path":"/v1/models/a/b",'
    b'"started_at":"1795685128.850771","status":400,"type":"DownstreamEnd"}\n',
    "an underscore": b'{"bytes_sent":11,"details":"http1.unexpected_underscore","duration_ms":0,"epoch":"e","flags":"DPE",'
    b'"started_at":"1795685128.878371","status":400,"type":"DownstreamEnd"}\n',
    "a slow head": b'{"bytes_sent":0,"duration_ms":5997,"epoch":"e","flags":"-","started_at":"1795685879.885322","status":0,"type":"DownstreamPeriodic"}\n',
}


@pytest.mark.parametrize("line", NAMELESS.values(), ids=NAMELESS)
def test_a_request_that_envoy_could_not_read_is_no_damage_to_the_journal(line: bytes) -> None:
    """Anybody can send these without a key, and none may fill the table of defects or raise its alert."""
    entries, defects, _ = lines.read(line + end(1) + line, offset=0)

    assert [request_id(1)] == [entry.request_id for entry in entries]
    assert [] == defects


@pytest.mark.parametrize(
    "line",
    [
        end(1, request_id=None), end(1, request_id=None, request=None, identity=None, admission=None),
        start(1).replace(b"request_id", b"requesu_id"), end(1).replace(b"request_id", b"requesu_id"),
    ],
    ids=["no id", "only usage", "a start", "another bit"],
)
def test_a_record_that_lost_its_id_is_a_defect(line: bytes) -> None:
    """Whoever was asked about it, or whatever it used."""
    entries, defects, _ = lines.read(line, offset=0)

    assert ([], 1) == (entries, len(defects))


def test_text_is_bounded_and_holds_nothing_that_postgres_cannot() -> None:
    """A caller chose the model's name of a refused request."""
    entry = parse(end(1, model="a\0" + "b" * 1000).rstrip())

    event = fold([entry]).events[request_id(1)]

    assert "a\ufffd" + "b" * (TEXT_LENGTH_MAX - 2) == event.model


@pytest.mark.parametrize("record", [start, end, lambda *args, **facts: periodic(*args, output=1, **facts)], ids=["start", "end", "periodic"])
def test_every_record_names_the_lease_that_its_request_passed_on(record: Callable[..., bytes]) -> None:
    """Those of requests that were asked about name none."""
    leased, asked = parse(record(1, lease=lease_id(7)).rstrip()), parse(record(2).rstrip())

    assert (lease_id(7), None) == (leased.lease_id, asked.lease_id)
    assert {request_id(1): lease_id(7)} == leases_of([leased, asked])


ODD_LEASES: dict[str, Any] = {
    "a number": 7,
    "true": True,
    "null": None,
    "an object": {"id": lease_id(1)},
    "a list": [lease_id(1)],
    "empty": "",
    "a word": "mine",
    "upper case": lease_id(10).upper(),
    "one digit less": lease_id(1)[:-1],
    "one digit more": lease_id(1) + "0",
    "a line end behind it": lease_id(1) + "\n",
    "a NUL": lease_id(1)[:-1] + "\0",
    "an essay": "0" * 100_000,
}


@pytest.mark.parametrize("lease", ODD_LEASES.values(), ids=ODD_LEASES)
def test_what_is_no_lease_is_ignored_and_its_record_counts(lease: Any) -> None:
    """A row is owed all the same."""
    entry = parse(end(1, admission={"admitted": True, "lease": lease}).rstrip())

    assert usage_event(parse(end(1).rstrip())) == usage_event(entry)
    assert entry.lease_id is None


def test_of_two_ends_the_lease_of_the_one_that_stands_counts() -> None:
    """Also where they differ in nothing else."""
    batch = fold(map(parse, [end(1, lease=lease_id(1)).rstrip(), end(1, lease=lease_id(2)).rstrip()]))

    assert {request_id(1): lease_id(1)} == leases_of(batch.ended.values())


def test_a_torn_record_is_a_defect_with_its_place_and_the_next_one_counts() -> None:
    """Torn anywhere, followed in the same line by a whole record."""
    whole = end(2).rstrip()
    for length in range(1, len(whole)):
        data = start(1) + whole[:length] + end(3).rstrip()

        entries, [found], _ = lines.read(data, offset=1000)

        assert [request_id(1), request_id(3)] == [entry.request_id for entry in entries]
        assert (1000 + len(start(1)), length) == (found.offset, found.byte_count)
        assert hashlib.sha256(whole[:length]).hexdigest() == found.digest


def test_a_record_that_another_writer_broke_in_two_is_put_together_again() -> None:
    """As Envoy's slices and the tap's appends do under load; broken anywhere, also between two batches."""
    whole = end(2)
    for length in range(1, len(whole) - 1):
        data = end(1) + whole[:length] + start(3) + start(4) + whole[length:] + end(5)

        entries, defects, torn = lines.read(data.rstrip(), offset=0)

        assert [1, 3, 4, 2, 5] == [int(entry.request_id.replace("-", "")[-4:], 16) for entry in entries]
        assert ([], b"") == (defects, torn)

        first, second = end(1) + whole[:length] + start(3), start(4) + whole[length:] + end(5)
        before, [half], torn = lines.read(first.rstrip(), offset=0)
        after, defects, left = lines.read(second.rstrip(), offset=len(first), torn=torn)
        assert [1, 3, 4, 2, 5] == [int(entry.request_id.replace("-", "")[-4:], 16) for entry in (*before, *after)]
        assert (length, [], b"") == (half.byte_count, defects, left)


def read_on(live: Path, places: dict[str, Place], reader: Reader | None = None) -> list[Reading]:
    """Readings to the journal's end, each committed; by a collector that has just been started unless it is given."""
    reader, found = reader or Reader(), []
    while True:
        found.append(reader.next(live, places))
        places |= {piece.place.file_id: piece.place for piece in found[-1].pieces}
        if found[-1].is_last:
            return found


def test_a_collector_killed_between_two_slices_of_envoy_finds_every_record(live: Path) -> None:
    """Cut after any byte, starts written meanwhile: the next life of the collector needs to remember nothing."""
    whole = end(2) + end(3)
    for length in range(len(whole) + 1):
        for path in live.parent.iterdir():
            path.unlink()
        places: dict[str, Place] = {}
        write_apart(live, [start(1), end(1), start(2), start(3)])
        write(live, [whole[:length]])
        read_on(live, places)
        write_apart(live, [start(4)])
        [between] = read_on(live, places)
        write(live, [whole[length:]])
        [after] = read_on(live, places)

        assert {request_id(4)} == set(between.batch.open)
        assert {request_id(2), request_id(3)} >= set(after.batch.events)
        assert ({}, {}) == (between.batch.defects, after.batch.defects)
        assert sum(path.stat().st_size for path in live.parent.iterdir()) == sum(place.offset for place in places.values())


def test_an_end_is_read_with_or_after_its_start(live: Path) -> None:
    """However far behind the reader is: ends that come in any piece find their starts in it or before it."""
    exchange_count = 2 * BATCH_BYTES_MAX // len(start(1) + end(1))
    write_apart(live, exchanges(exchange_count))

    readings = read_on(live, {})

    known: set[str] = set()
    for reading in readings:
        ended = set(reading.batch.events)
        known |= {request_id for piece in reading.pieces for request_id in started_in(piece)}
        assert ended <= known
        # And hardly any waits for its end: those under way, and what one small piece was ahead.
        assert len(reading.batch.open) < exchange_count / 5 + STARTS_BYTES_MAX / len(start(1))
    assert len(readings) > 1
    assert exchange_count == len(known) == sum(len(reading.batch.events) for reading in readings)


def started_in(piece: Piece) -> set[str]:
    return {entry.request_id for entry in map(parse, piece.data.split(b"\n")) if entry.type == "Start"}


def test_starts_are_looked_for_after_the_ends_were_cut(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange that begins and ends while the reader is between the two files is not torn apart."""
    write_apart(live, [start(1), end(1)])
    looks: list[str] = []

    def look_and_write(path: Path, *arguments: Any, **named: Any) -> Piece | None:
        piece = next_piece(path, *arguments, **named)
        looks.append(path.name)
        if looks == [live.name]:
            write_apart(live, [start(2), end(2)])
        return piece

    monkeypatch.setattr("metering.adapters.reading.next_piece", look_and_write)
    reading = Reader().next(live, {})

    assert [live.name, "starts.jsonl"] == looks
    assert ({request_id(1)}, {request_id(2)}) == (set(reading.batch.events), set(reading.batch.open))


def test_lives_end_in_the_order_of_their_records_in_one_stream() -> None:
    """Another stream that lags behind brings no life back and ends none."""
    lives = Lives().after("starts", ["a", "b"]).after("journal", ["a"])
    assert ("a",) == lives.ended

    lives = lives.after("journal", ["b", "c"]).after("starts", ["b"])
    assert ("a", "b") == lives.ended
    assert lives is lives.after("starts", ["b"])
    assert ("a", "b") == lives.after("starts", ["c"]).ended


def test_lives_that_took_over_from_each_other_are_over_together() -> None:
    """Both write for a while: neither is over by the other's records, and all are by a stranger's, whoever wrote last."""
    lives = Lives().after("journal", ["a", "a~1", "a", "a~2", "a~1", "a"])
    assert () == lives.ended

    assert ("a", "a~1", "a~2") == lives.after("journal", ["b"]).ended
    assert ("a", "a~1", "a~2", "b") == lives.after("journal", ["b", "b~1", "c"]).ended[:4]
    assert lives is lives.after("journal", ["a~1", "a~2"])


@pytest.mark.parametrize("name", ["a~", "a~x", "a~-1", "a~1~2", "~"])
def test_a_life_that_is_called_oddly_is_a_life(name: str) -> None:
    """Whoever starts Envoy names it; nothing is raised, and a stranger's record ends it."""
    assert name.partition("~")[0] in Lives().after("journal", [name, "other"]).ended


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_lives_that_are_over_are_remembered_up_to_a_bound(beyond: int) -> None:
    """The oldest are forgotten first."""
    count = ENDED_LIVES_MAX + beyond
    lives = Lives().after("starts", [str(number) for number in range(count + 1)])

    assert tuple(str(number) for number in range(max(0, beyond), count)) == lives.ended


def test_a_line_that_opens_a_thousand_braces_is_one_defect() -> None:
    """Looking for a record in it ends."""
    entries, [found], _ = lines.read(b"{" * 5000, offset=0)

    assert ([], 5000) == (entries, found.byte_count)


def test_the_last_word_of_each_exchange_is_kept_and_the_first_end_stands() -> None:
    """Whatever the order within a batch."""
    records = [end(1), start(1), start(2), periodic(2, output=4), end(1), end(1, output=9), end(3, admission=None, status=429)]

    batch = fold(parse(record.rstrip()) for record in records)

    assert {request_id(1): 5} == {name: event.output_tokens for name, event in batch.events.items()}
    assert {request_id(2): "DownstreamPeriodic"} == {name: entry.type for name, entry in batch.open.items()}
    assert [9] == [entry.fields["usage"]["output"] for entry in batch.contradicting]
    assert [(request_id(3), 429)] == [(refused.request_id, refused.status) for refused in batch.refusals]


FINAL = {"seen": "final", "input": 3, "output": 5}
RUNNING = {"seen": "running", "input": 3, "output": 4}
FRAMES = {"seen": "none", "frames": 4}
NOTHING = {"seen": "none", "frames": 0}
STREAM = {"dialect": "openai.chat", "model": "tiny", "prompt_bytes": "77", "started_at": "1.0", "stream": True}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"usage": FINAL | {"frames": 9}}, ("reported", 3, 5)),
        ({"usage": RUNNING | {"frames": 9}}, ("running", 3, 4)),
        ({"usage": FRAMES, "engine": "vllm"}, ("counted", 20, 4)),
        ({"usage": FRAMES, "engine": "dynamo", "flags": "DC"}, ("counted", 20, 4)),
        # Nothing to count: bytes are all there is.
        ({"usage": {"seen": "none"}, "engine": "vllm"}, ("estimated", 20, 90)),
        ({"usage": FRAMES, "engine": "trtllm"}, ("estimated", 20, 4)),
        ({"usage": FRAMES, "engine": "openai"}, ("estimated", 20, 4)),
        # A stream that held an error and nothing else; of an engine whose text may look otherwise, or unread, bytes count.
        ({"usage": NOTHING, "request": STREAM, "engine": "dynamo"}, ("none", 0, 0)),
        ({"usage": NOTHING, "request": STREAM, "engine": "openai"}, ("estimated", 20, 90)),
        ({"usage": NOTHING | {"anomaly": "encoded"}, "request": STREAM, "engine": "dynamo"}, ("estimated", 20, 90)),
        ({"usage": NOTHING, "engine": "dynamo"}, ("estimated", 20, 90)),
        # Records from before the engine was in them.
        ({"usage": FRAMES}, ("estimated", 20, 4)),
        ({"usage": {"seen": "none"}, "flags": "UF", "status": 503, "engine": "vllm"}, ("none", 0, 0)),
    ],
)
def test_each_basis_goes_before_the_next(facts: dict[str, Any], expected: tuple[str, int, int]) -> None:
    """reported > running > counted > estimated > none."""
    event = usage_event(parse(end(1, **facts).rstrip()))

    assert expected == (event.basis, event.input_tokens, event.output_tokens)


@pytest.mark.parametrize("usage", [RUNNING, FRAMES])
def test_what_was_heard_of_a_lost_exchange_is_a_checkpoint(usage: dict[str, Any]) -> None:
    """Even if it was counted or running: the engine may have said more that nobody heard."""
    event = lost_event(parse(end(1, type="DownstreamPeriodic", usage=usage, engine="vllm").rstrip()))

    assert ("lost", "checkpoint", 4) == (event.outcome, event.basis, event.output_tokens)


def test_files_are_read_oldest_first_and_the_live_one_last(live: Path) -> None:
    """By our numbers; other files of the directory are not ours."""
    for name in ("journal-000010.jsonl", "journal-000009.jsonl", "journal.jsonl", "journal.jsonl.gz", "closed", "other.jsonl"):
        write(live.with_name(name), [end(1)])

    assert ["journal-000009.jsonl", "journal-000010.jsonl", "journal.jsonl"] == [path.name for path in list_files(live)]


def test_a_rotation_by_somebody_else_is_followed(live: Path) -> None:
    """logrotate's names."""
    write(live, [end(1)])
    live.rename(live.with_name("journal.jsonl.1"))
    write(live, [end(2)])

    assert ["journal.jsonl.1", "journal.jsonl"] == [path.name for path in list_files(live)]


def test_what_is_no_regular_file_is_left_alone(live: Path) -> None:
    """A device has no end, and reading a pipe waits for its writer."""
    write(live.with_name("journal-000001.jsonl"), [end(1)])
    live.symlink_to("/dev/zero")
    live.with_name("starts.jsonl").mkdir()

    assert ["journal-000001.jsonl"] == [file.path.name for file in look(live)]
    assert [{request_id(1)}] == [set(reading.batch.events) for reading in read_on(live, {}) if reading.pieces]


def read_all(live: Path, places: dict[str, Place]) -> bytes:
    data = b""
    while (piece := next_piece(live, places)) is not None:
        places[piece.place.file_id] = piece.place
        data += piece.data + b"\n"
    return data


def test_pieces_are_whole_lines_of_bounded_size_and_together_the_file(live: Path) -> None:
    """Larger than one batch."""
    record = end(1)
    count = BATCH_BYTES_MAX // len(record) + 100
    write(live, [record] * count)
    first = next_piece(live, {})

    assert first is not None
    assert BATCH_BYTES_MAX - len(record) < len(first.data) <= BATCH_BYTES_MAX
    assert live.read_bytes() == read_all(live, {})


def test_a_file_is_the_same_after_its_rename_and_another_one_in_its_inode_is_not(live: Path) -> None:
    """Known by its first line."""
    places: dict[str, Place] = {}
    write(live, [end(1)])
    read_all(live, places)
    live.rename(live.with_name("journal-000001.jsonl"))
    assert b"" == read_all(live, places)

    # The same inode, emptied and written anew.
    with live.with_name("journal-000001.jsonl").open("r+b") as file:
        file.truncate()
        file.write(end(2) + end(3))

    assert end(2) + end(3) == read_all(live, places)


@pytest.mark.parametrize("length", [BATCH_BYTES_MAX - 1, BATCH_BYTES_MAX, BATCH_BYTES_MAX + 1, 2 * BATCH_BYTES_MAX + 1])
def test_a_run_without_line_end_is_held_up_to_a_batch_and_given_up_once_it_ends(live: Path, length: int) -> None:
    """Around the bound: never more than a batch in memory; until its end comes, nothing moves."""
    places: dict[str, Place] = {}
    write(live, [end(1)])
    read_all(live, places)
    write(live, [b"x" * length])
    assert None is next_piece(live, places)

    write(live, [b"\n", end(2)])
    piece = next_piece(live, places)

    assert piece is not None
    assert len(piece.data) <= BATCH_BYTES_MAX
    assert (len(end(1)), len(end(1)) + length + 1) == (piece.start, piece.place.offset)
    assert (length >= BATCH_BYTES_MAX) == piece.endless
    places[piece.place.file_id] = piece.place
    assert end(2) == read_all(live, places)


def rotation(live: Path, reopen: Callable[[], bool] = lambda: True) -> Rotation:
    return Rotation(live=live, bytes_max=100, reopen=reopen)


@pytest.mark.parametrize(("size", "renamed"), [(0, False), (99, False), (100, True), (101, True)])
def test_the_live_file_is_renamed_at_its_bound(live: Path, size: int, renamed: bool) -> None:
    """Not before."""
    live.write_bytes(b"x" * size)

    rotation(live).rotate()

    assert renamed == live.with_name("journal-000001.jsonl").exists() != live.exists()


def test_envoy_is_asked_until_it_confirms(live: Path) -> None:
    """And not again before the next rename."""
    answers = [False, True]
    asked = rotation(live, reopen=lambda: answers.pop(0))
    live.write_bytes(b"x" * 100)

    for _ in range(4):
        asked.rotate()

    assert [] == answers
    assert asked.released


def test_numbers_go_on_after_old_files_are_gone(live: Path) -> None:
    """A number is never given twice while a file has it."""
    live.with_name("journal-000041.jsonl").touch()
    live.write_bytes(b"x" * 100)

    rotation(live).rotate()

    assert live.with_name("journal-000042.jsonl").exists()


def test_only_read_files_beyond_the_kept_ones_are_superfluous(live: Path) -> None:
    """The oldest first."""
    for number in (1, 2, 3):
        write(live.with_name(f"journal-{number:06d}.jsonl"), exchanges(2, first=10 * number))
    one, two, three = look(live)
    places = {file.file_id: Place(file.file_id, file.path.name, file.size) for file in (one, three)}
    places[two.file_id] = Place(two.file_id, two.path.name, two.size - 1)

    assert [one] == rotation(live).superfluous([one, two, three], places, kept_files=1)
    assert [one, three] == rotation(live).superfluous([one, two, three], places, kept_files=0)
    assert [] == rotation(live).superfluous([one, two, three], places, kept_files=2)


def test_the_starts_follow_once_envoy_has_let_go(live: Path) -> None:
    """Under the same number: then no start of a newer file has its end in an older one."""
    answers = [False, True]
    asked = rotation(live, reopen=lambda: answers.pop(0))
    write_apart(live, [start(1), end(1)])
    asked.rotate()
    assert {"journal-000001.jsonl", "starts.jsonl"} == {path.name for path in live.parent.iterdir()}

    asked.rotate()
    write_apart(live, [start(2)])
    asked.rotate()

    names = {"journal-000001.jsonl", "starts-000001.jsonl", "starts.jsonl", "journal.jsonl"}
    assert names == {path.name for path in live.parent.iterdir()}


def test_starts_go_with_the_ends_of_their_number(live: Path) -> None:
    """Not before, or a replay would take what ended for lost; read or not is asked of each."""
    for number in (1, 2, 3):
        for stem, line in (("starts", start), ("journal", end)):
            write(live.with_name(f"{stem}-{number:06d}.jsonl"), [line(number)])
    done = look(live)
    places = {file.file_id: Place(file.file_id, file.path.name, file.size) for file in done}

    def gone(kept: int) -> list[str]:
        return sorted(file.path.name for file in rotation(live).superfluous(done, places, kept_files=kept))

    assert [] == gone(3)
    assert ["journal-000001.jsonl", "starts-000001.jsonl"] == gone(2)
    assert 6 == len(gone(0))
    del places[done[0].file_id]
    assert ["journal-000001.jsonl"] == gone(2)


@pytest.mark.parametrize(("policy", "marked"), [(WhenFull.REFUSE, True), (WhenFull.ALLOW, False)])
def test_a_full_disk_closes_the_road_if_the_policy_says_so(
    live: Path, monkeypatch: pytest.MonkeyPatch, policy: WhenFull, marked: bool
) -> None:
    """And it opens again only when there is room."""
    mark = live.with_name("closed")
    disk = Disk(directory=live.parent, closed_mark=mark, when_full=policy)
    seen = []
    for free in (21, 20, 6, 5, 6, 20, 21):
        status = os.statvfs_result((4096, 4096, 100, free, free, 10, 10, 10, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _, status=status: status)
        seen.append((disk.look(), mark.exists()))

    fine, warn, act = (Level.FINE, False), (Level.WARN, False), (Level.ACT, marked)
    assert [fine, warn, warn, act, act, act, fine] == seen


@pytest.mark.parametrize(
    ("stopped", "flags", "outcome", "basis"),
    [
        ("running", "-", "budget_exhausted", "running"),
        ("counted", "-", "budget_exhausted", "counted"),
        # Whoever left in the moment of the end left; what was delivered is known all the same.
        ("counted", "DC", "client_closed", "counted"),
        ("made up", "-", "ok", "reported"),
        (7, "-", "ok", "reported"),
    ],
)
def test_a_stream_that_the_gateway_ended_says_so_and_how_its_tokens_are_known(
    stopped: object, flags: str, outcome: str, basis: str
) -> None:
    """Its closing usage is the gateway's own and not reported by the engine."""
    usage = {"input": 3, "output": 5, "seen": "final", "total": 8, "stopped": stopped}

    event = usage_event(parse(end(1, usage=usage, flags=flags)))

    assert (outcome, basis, 3, 5) == (event.outcome, event.basis, event.input_tokens, event.output_tokens)


def test_starts_whose_end_was_read_are_left_out_and_nothing_is_different() -> None:
    """Open exchanges, lives of Envoy and defects are the same as if each had been read."""
    whole = exchanges(200)
    starts = [line for line in whole if line.startswith(b'{"type":"Start"')]
    starts[50:50] = [start(9001, epoch="life-2"), start(9002, epoch="life-2")]
    starts[120:120] = [b'{"type":"Start","request_id":"' + request_id(3).encode() + b'","torn\n', b"no record\n"]
    ends = [parse(line.rstrip(b"\n")) for line in whole if b'"type":"DownstreamEnd"' in line][:-20]
    data = b"".join(starts).rstrip(b"\n")
    over = {entry.request_id for entry in ends}

    all_of_them, defects, _ = lines.read(data, offset=7)
    few, same_defects, _ = lines.read(data, offset=7, is_over=over.__contains__)

    expected, found = fold(ends, starts=all_of_them), fold(ends, starts=few)
    assert len(few) < 40 < len(all_of_them)
    assert defects == same_defects
    assert (expected.events, expected.open, expected.lives) == (found.events, found.open, found.lives)
    assert {request_id(9001), request_id(9002)} < found.open.keys()


METERED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], tuple[Any, ...]]] = {
    # dialect and quantity that was asked for; usage; other facts; meter, quantity, tokens, basis and anomaly
    "images with tokens": (
        {"dialect": "openai.images", "quantity": "2"}, {"seen": "final", "input": 3, "output": 32, "quantity": 2}, {},
        ("images", 2, 35, "reported", None),
    ),
    "images alone": ({"dialect": "openai.images", "quantity": "2"}, {"seen": "none", "quantity": 2}, {}, ("images", 2, 0, "counted", None)),
    "no image": ({"dialect": "openai.images", "quantity": "2"}, {"seen": "none", "quantity": 0}, {}, (None, 0, 0, "counted", None)),
    "more images than asked for": (
        {"dialect": "openai.images", "quantity": "2"}, {"seen": "none", "quantity": 9}, {}, ("images", 2, 0, "counted", "more_than_asked"),
    ),
    "images that nobody could read": (
        {"dialect": "openai.images", "quantity": "2"}, {"seen": "none", "anomaly": "encoded"}, {}, ("images", 2, 0, "estimated", "encoded"),
    ),
    "images that nobody could read, as the gate says it": (
        {"dialect": "openai.images", "quantity": "2"}, {"seen": "none", "anomaly": "encoded", "quantity": 2}, {},
        ("images", 2, 0, "estimated", "encoded"),
    ),
    "images left within the second": (
        {"dialect": "openai.images", "quantity": "3"}, {"seen": "none", "quantity": 2}, {"flags": "DC"}, ("images", 2, 0, "counted", None),
    ),
    "images that broke within": (
        {"dialect": "openai.images", "quantity": "3"}, {"seen": "none", "quantity": 2}, {"flags": "UR"}, (None, 0, 0, "none", None),
    ),
    "images refused": ({"dialect": "openai.images", "quantity": "3"}, {"seen": "none"}, {"status": 400}, (None, 0, 0, "none", None)),
    "speech": ({"dialect": "openai.speech", "quantity": "11"}, {"seen": "none", "quantity": 11}, {}, ("characters", 11, 0, "counted", None)),
    "searches": ({"dialect": "rerank", "quantity": "1"}, {"seen": "none", "quantity": 3}, {}, ("searches", 3, 0, "reported", None)),
    "searches below zero": (
        {"dialect": "rerank", "quantity": "1"}, {"seen": "none", "quantity": -1}, {}, ("searches", 1, 0, "reported", "impossible_count"),
    ),
    "a rerank of which nothing was said": (
        {"dialect": "rerank", "quantity": "1", "prompt_bytes": "80"}, {"seen": "none"}, {}, (None, 0, 20, "estimated", None),
    ),
    "a chat that says a quantity": ({"dialect": "openai.chat"}, {"seen": "final", "input": 3, "output": 4, "quantity": 7}, {}, (None, 0, 7, "reported", None)),
}


@pytest.mark.parametrize("name", METERED)
def test_what_a_dialect_is_metered_by_besides_tokens(name: str) -> None:
    """What was delivered, at most what was asked for; nothing of an answer that broke."""
    request, usage, facts, expected = METERED[name]

    row = usage_event(parse(end(1, request={"started_at": "1.0", **request}, usage=usage, **facts).rstrip()))

    assert expected == (row.meter, row.quantity, row.input_tokens + row.output_tokens, row.basis, row.anomaly)


def test_an_exchange_lost_with_its_envoy_is_billed_the_images_that_were_told() -> None:
    """None of which nobody has told."""
    asked = {"started_at": "1.0", "dialect": "openai.images", "quantity": "3"}

    told = lost_event(parse(end(1, type="DownstreamPeriodic", request=asked, usage={"seen": "none", "quantity": 1}).rstrip()))
    untold = lost_event(parse(end(1, type="DownstreamPeriodic", request=asked, usage={"seen": "none"}).rstrip()))

    assert ("images", 1, "checkpoint") == (told.meter, told.quantity, told.basis)
    assert (None, 0, "checkpoint") == (untold.meter, untold.quantity, untold.basis)
