# SPDX-License-Identifier: Apache-2.0
"""
Counters of generic rules in Valkey or Redis: one script for all descriptors of a request.

A counter is one key, so a Redis Cluster spreads those of a domain over its nodes: a request whose
counters lie in several slots sends the script to each, in one batch per node.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import redis
from redis.exceptions import RedisClusterException

from chassis.errors import Unavailable
from ratelimit.core.rls.rules import LENGTHS_SECONDS, Unit
from ratelimit.core.rls.verdict import Reading

_SCRIPT: Final = Path(__file__).parent / "windows.lua"

#: A counter's name, its unit, the hits to add.
Count = tuple[str, Unit, int]


class RuleCounters:
    """Counters in the store; raises `Unavailable`."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        self._text = _SCRIPT.read_text()
        self._script = store.register_script(self._text)

    def take(self, counts: Sequence[Count]) -> tuple[int, list[Reading]]:
        """Add the hits to their counters; the store's time in seconds, and a reading for each in order."""
        groups = self._by_slot(counts)
        try:
            answers = [self._script(*_arguments(groups[0]))] if len(groups) == 1 else self._batch(groups)
        except (redis.RedisError, RedisClusterException) as exc:
            raise Unavailable("The counter store did not answer.") from exc
        readings: dict[int, Reading] = {}
        for group, (_, *numbers) in zip(groups, answers, strict=True):
            for (index, (_, _, hits)), before, after in zip(group, numbers[::2], numbers[1::2], strict=True):
                readings[index] = Reading(hits=hits, before=before, after=after)
        return int(answers[0][0]), [readings[index] for index in range(len(counts))]

    def _by_slot(self, counts: Sequence[Count]) -> list[list[tuple[int, Count]]]:
        if not isinstance(self._store, redis.RedisCluster):
            return [list(enumerate(counts))]
        slots: dict[int, list[tuple[int, Count]]] = {}
        for index, one in enumerate(counts):
            slots.setdefault(self._store.keyslot(one[0]), []).append((index, one))
        return list(slots.values())

    def _batch(self, groups: Sequence[Sequence[tuple[int, Count]]]) -> list[Any]:
        # By its text and as a plain command: the client keeps scripts out of a cluster's batches otherwise.
        batch = self._store.pipeline(transaction=False)
        for group in groups:
            keys, arguments = _arguments(group)
            batch.execute_command("EVAL", self._text, len(keys), *keys, *arguments)  # type: ignore[no-untyped-call]
        return batch.execute()


def _arguments(group: Sequence[tuple[int, Count]]) -> tuple[list[str], list[int]]:
    keys = [name for _, (name, _, _) in group]
    return keys, [number for _, (_, unit, hits) in group for number in (LENGTHS_SECONDS[unit], hits)]
