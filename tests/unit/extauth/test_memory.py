# SPDX-License-Identifier: Apache-2.0
"""What is remembered: for how long, of how many, and until which news."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from extauth.core.cache import FRESH_FOR, GRACE_FOR, UNKNOWN_FOR, Remembered
from extauth.core.uses import WRITE_EVERY, Uses

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
INSTANT = timedelta(microseconds=1)


def test_answers_are_fresh_and_then_stale_and_then_gone() -> None:
    """Each bound is exclusive."""
    table: Remembered[str] = Remembered()
    table.put("k", "v", NOW)
    table.put("none", None, NOW)

    assert table.fresh("k", NOW + FRESH_FOR - INSTANT) is not None
    assert table.fresh("k", NOW + FRESH_FOR) is None
    assert table.stale("k", NOW + GRACE_FOR - INSTANT) is not None
    assert table.stale("k", NOW + GRACE_FOR) is None
    assert table.fresh("none", NOW + UNKNOWN_FOR - INSTANT) is not None
    assert table.fresh("none", NOW + UNKNOWN_FOR) is None
    assert table.stale("none", NOW) is None


def test_a_flood_of_unknown_ids_pushes_out_no_known_one() -> None:
    """The two kinds are bounded apart, each by its own number."""
    table: Remembered[str] = Remembered(known_count_max=2, unknown_count_max=3)
    table.put("k", "v", NOW)

    for number in range(100):
        table.put(f"garbage-{number}", None, NOW)

    assert 1 + 3 == len(table)
    assert table.fresh("k", NOW) is not None


def test_what_once_was_is_remembered_as_no_strangers_however_old_and_what_never_was_while_it_is_believed() -> None:
    """Nobody guesses an id that exists; an id that is known not to costs no read."""
    table: Remembered[str] = Remembered()
    table.put("k", "v", NOW)
    table.put("none", None, NOW)
    table.mark("k", NOW + INSTANT)

    assert (True, True, False) == tuple(table.has(key, NOW + 2 * INSTANT) for key in ("k", "none", "new"))
    assert (True, False) == tuple(table.has(key, NOW + 10 * GRACE_FOR) for key in ("k", "none"))


def test_the_least_recently_used_goes_first() -> None:
    """A use counts, not only a write."""
    table: Remembered[str] = Remembered(known_count_max=2)
    table.put("a", "1", NOW)
    table.put("b", "2", NOW)
    table.fresh("a", NOW)

    table.put("c", "3", NOW)

    assert [True, False, True] == [table.fresh(key, NOW) is not None for key in "abc"]


def test_a_change_that_is_heard_while_the_answer_is_under_way_wins() -> None:
    """Asked before the change, remembered after it: not used, not even in an outage."""
    table: Remembered[str] = Remembered()
    table.mark("k", NOW + INSTANT)

    table.put("k", "old", NOW, owner="acme")

    assert table.fresh("k", NOW + 2 * INSTANT) is None
    assert table.stale("k", NOW + 2 * INSTANT) is None


def test_a_change_of_the_tenant_touches_its_own_keys_and_no_others() -> None:
    """One tenant's change is not everybody's read."""
    table: Remembered[str] = Remembered()
    table.put("a", "1", NOW, owner="acme")
    table.put("b", "2", NOW, owner="other")

    table.mark("acme", NOW + INSTANT)

    assert table.fresh("a", NOW + 2 * INSTANT) is None
    assert table.fresh("b", NOW + 2 * INSTANT) is not None


def test_after_a_gap_everything_asks_again_but_the_grace_holds() -> None:
    """A lost connection to Postgres must not refuse keys that were good."""
    table: Remembered[str] = Remembered()
    table.put("k", "v", NOW)

    table.expire_all(NOW + INSTANT)

    assert table.fresh("k", NOW + 2 * INSTANT) is None
    assert table.stale("k", NOW + 2 * INSTANT) is not None


def test_more_changes_than_can_be_remembered_make_every_answer_outdated() -> None:
    """Never a revoked key because its mark was pushed out, not even in an outage; but nobody becomes a stranger by it."""
    table: Remembered[str] = Remembered(marks_count_max=3)
    table.put("k", "v", NOW)
    for number in range(4):
        table.mark(f"key-{number}", NOW + INSTANT)

    assert (None, None, True) == (table.fresh("k", NOW + 2 * INSTANT), table.stale("k", NOW + 2 * INSTANT), table.has("k", NOW))
    table.put("late", "v", NOW)
    assert table.fresh("late", NOW + 2 * INSTANT) is None
    table.put("k", "v", NOW + 2 * INSTANT)
    assert table.fresh("k", NOW + 3 * INSTANT) is not None


def test_a_key_is_written_at_most_once_a_minute() -> None:
    """The first use at once, later ones together when the minute is over."""
    uses = Uses()
    uses.add("k", NOW)
    assert ["k"] == [use.key_id for use in uses.take_due(NOW, 10)]

    for second in range(1, 60):
        uses.add("k", NOW + timedelta(seconds=second), after_rotation_count=1)

    assert [] == uses.take_due(NOW + WRITE_EVERY - INSTANT, 10)
    (use,) = uses.take_due(NOW + WRITE_EVERY, 10)
    assert (NOW + timedelta(seconds=59), 59) == (use.last_used_at, use.after_rotation_count)
    assert 0 == len(uses)


def test_uses_are_bounded_and_what_is_dropped_is_counted() -> None:
    """A Postgres that stays away costs no memory."""
    uses = Uses(pending_count_max=2)
    for key in "abcd":
        uses.add(key, NOW)

    assert (2, 2) == (len(uses), uses.lost_count)


def test_what_could_not_be_written_is_due_again_with_its_counts() -> None:
    """Nothing is lost by one failed batch."""
    uses = Uses()
    uses.add("k", NOW, after_rotation_count=2)
    taken = uses.take_due(NOW, 10)
    uses.add("k", NOW + INSTANT, after_rotation_count=1)

    uses.give_back(taken)

    (use,) = uses.take_due(NOW + INSTANT, 10)
    assert (NOW + INSTANT, 3) == (use.last_used_at, use.after_rotation_count)
