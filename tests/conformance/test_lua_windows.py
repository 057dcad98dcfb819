# SPDX-License-Identifier: Apache-2.0
"""The script of generic rules under a clock that a test moves, on a store of one dictionary."""

from __future__ import annotations

from typing import Any

import pytest
from lupa import lua51

from ratelimit.adapters import rule_counters
from ratelimit.core.rls.verdict import COUNT_MAX

_SCRIPT = rule_counters._SCRIPT.read_text()


class Store:
    """As much of Redis as the script uses; a key of another type is an error to GET, as there."""

    def __init__(self) -> None:
        self.now = 0
        self.keys: dict[str, str | list[str]] = {}
        self.lives_ms: dict[str, int] = {}
        self._lua: Any = lua51.LuaRuntime()
        self._lua.globals().redis = self._lua.table(call=self._call, pcall=self._call)

    def add(self, key: str, length: int, hits: int) -> tuple[int, int]:
        """Before and after."""
        globals_ = self._lua.globals()
        globals_.KEYS, globals_.ARGV = self._lua.table(key), self._lua.table(str(length), str(hits))
        said = self._lua.execute(_SCRIPT)
        assert said[1] == self.now
        return int(said[2]), int(said[3])

    def _call(self, command: str, *arguments: Any) -> Any:
        match command, arguments:
            case "TIME", ():
                return self._lua.table(str(self.now), "0")
            case "GET", (key,):
                found = self.keys.get(key, False)
                return self._lua.table(err="WRONGTYPE") if isinstance(found, list) else found
            case "SET", (key, value, "PX", life_ms):
                self.keys[key], self.lives_ms[key] = value, int(life_ms)
                return "OK"
        raise AssertionError(command)


@pytest.fixture
def store() -> Store:
    """An empty one."""
    return Store()


def test_a_count_belongs_to_its_window(store: Store) -> None:
    """Up to the last second; it lives a second longer, so that the window's end and the store's never differ."""
    store.now = 1_000_000_020
    assert (0, 2) == store.add("k", 60, 2)
    assert 61_000 == store.lives_ms["k"]
    store.now = 1_000_000_079
    assert (2, 3) == store.add("k", 60, 1)
    assert 2_000 == store.lives_ms["k"]
    store.now = 1_000_000_080
    assert (0, 1) == store.add("k", 60, 1)


def test_a_clock_that_jumps_begins_a_window_and_never_carries_a_count_over(store: Store) -> None:
    """Back and forward: nobody is refused for what was counted at another time."""
    for now in (2_000_000_000, 1_999_999_000, 2_000_000_000, 2_100_000_000, 0):
        store.now = now
        assert (0, 5) == store.add("k", 60, 5)


def test_hits_of_none_write_nothing_and_those_given_back_end_at_none(store: Store) -> None:
    """A look costs the store no memory."""
    assert (0, 0) == store.add("k", 60, 0)
    assert {} == store.keys
    store.add("k", 60, 3)
    assert (3, 3) == store.add("k", 60, 0)
    assert (3, 0) == store.add("k", 60, -5)


def test_a_count_stays_exact_and_ends_at_its_bound(store: Store) -> None:
    """Doubles would round beyond."""
    store.add("k", 60, COUNT_MAX - 1)
    assert (COUNT_MAX - 1, COUNT_MAX) == store.add("k", 60, 1)
    assert (COUNT_MAX, COUNT_MAX) == store.add("k", 60, 2**32)


@pytest.mark.parametrize("damage", ["", "x", "0", "0 ", "0 1 2", "0 -1", "0 1e3", ["a list"]])
def test_what_is_no_counter_counts_for_nothing_and_is_written_over(store: Store, damage: str | list[str]) -> None:
    """C09: a wrong type, or a text of somebody else's."""
    store.keys["k"] = damage

    assert (0, 1) == store.add("k", 60, 1)
    assert (1, 2) == store.add("k", 60, 1)
