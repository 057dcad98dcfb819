# SPDX-License-Identifier: Apache-2.0
"""No limit is passed by several processes that share a store, while some of them are killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ratelimit.adapters.counters import connect
from tests.integration.stores import store_server
from tests.proof.servers import Servers
from tests.proof.storm import Storm

_PROCESSES = 3


@pytest.fixture
def storm(postgres_url: str) -> Iterator[Callable[..., tuple[Storm, Any]]]:
    """A function that lets a storm pass over three processes and settles what it left; the storm and the store."""
    opened: list[Servers] = []

    def blow(**numbers: int) -> tuple[Storm, Any]:
        made = Storm(**numbers)
        made.set_limits(postgres_url)
        opened.append(Servers(Path(directory), _PROCESSES, postgres_url=postgres_url, redis_url=url))
        made.run(opened[0])
        store = connect(url, cluster=False)
        made.settle_rest(store)
        return made, store

    with TemporaryDirectory(prefix="peaje-proof-") as directory, store_server() as url:
        yield blow
        for servers in opened:
            servers.close()


def test_no_limit_is_passed_while_processes_die(storm: Callable[..., tuple[Storm, Any]]) -> None:
    """Requests and concurrency exactly, tokens and money by no more than prompts exceeded their estimates; nothing stays held."""
    blown, store = storm(requests=1500, clients=24, deaths=2, seed=20_261_125)

    blown.check(store)


@pytest.mark.chaos
@pytest.mark.timeout(3000)
def test_no_limit_is_passed_by_a_hundred_thousand_requests(
    storm: Callable[..., tuple[Storm, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same for minutes, with a death every few seconds and a seed of the day."""
    blown, store = storm(requests=100_000, clients=48, deaths=60, seed=int(time.time()))

    blown.check(store)
    with capsys.disabled():
        print(f"\n{blown.report()}")
