# SPDX-License-Identifier: Apache-2.0
"""Bad inputs through real Envoy, with everything behind it."""

from __future__ import annotations

import http.client
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from chassis import keys
from chassis.clock import utc_now
from chassis.secrets import load_peppers
from extauth.core.cache import FRESH_FOR
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant
from tests.hostile import callers as every
from tests.hostile.callers import Caller
from tests.hostile.guessing import GUESSERS, GUESSES_BEYOND, REFUSED, UNKNOWN_PER_MINUTE, UNSEEN, Said, ask, guess
from tests.hostile.http import Answer, send_http1, send_http2
from tests.hostile.rows import Row, load

pytestmark = pytest.mark.express("on", "off")

#: Of this machine as well; what is guessed from here is on nobody else's account.
_GUESSING_FROM = "127.0.0.9"


@pytest.fixture(scope="module")
def callers(road: Installation) -> dict[str, Caller]:
    """All of them, in the installation's own Postgres."""
    made, peppers = every.make(), load_peppers(road.home)
    with road.database() as connection:
        for caller in made.values():
            caller.insert(connection, peppers, utc_now())
    return made


@pytest.fixture(scope="module", autouse=True)
def _one_envoy(road: Installation) -> Iterator[None]:
    """Fail where a row ended the process, also if another took its place at once."""
    before = road.pid("envoy")
    yield
    assert before == road.pid("envoy")


@pytest.fixture(scope="module")
def spellings(road: Installation, callers: dict[str, Caller]) -> dict[str, str]:
    """What rows write in braces."""
    peppers = load_peppers(road.home)
    stored = keys.hash_key(peppers[max(peppers)], callers["good"].key).hex()
    return every.spellings(callers) | {"stored_hash": stored}


def send(road: Installation, row: Row, spellings: dict[str, str]) -> Answer:
    """As the row says: bytes of HTTP/1.1, or frames of HTTP/2."""
    if row.h2 is not None:
        return send_http2(road.port, row.exchange(spellings))
    return send_http1(road.port, row.request_bytes(spellings))


def row_of(road: Installation, answer: Answer, caller: Caller) -> dict[str, Any]:
    """The billing row of a request that passed; over HTTP/2, whose headers are not read, the caller's latest."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        request_id = answer.headers.get("x-request-id")
        found = road.sql(
            "select * from billing_usage_v1 where request_id = coalesce(%s, request_id) and key_id = coalesce(%s, key_id) "
            "order by started_at desc limit 1",
            request_id, None if request_id else caller.key_id,
        )  # fmt: skip
        if found:
            return found[0]
        time.sleep(0.1)
    pytest.fail("a request that passed has no row")


@pytest.mark.parametrize("row", load("envoy"), ids=lambda row: row.id)
def test_envoy_gives_each_bad_input_what_it_must_get(
    road: Installation, callers: dict[str, Caller], spellings: dict[str, str], row: Row
) -> None:
    """Who is let through is billed as who they are; of the others nothing reaches a model server, and Envoy lives on."""
    expected = row.expected["envoy"]
    before = set(road.truth())

    answer = send(road, row, spellings)

    assert answer.status in expected.status, (row.title, answer)
    assert b"" == answer.more, "two answers to one request"
    if answer.status == 200 or expected.by_engine:
        caller = callers[expected.caller or ""]
        billed = row_of(road, answer, caller)
        assert (caller.tenant, caller.key_id) == (billed["tenant"], billed["key_id"])
        assert expected.billed == {name: billed[name] for name in expected.billed}
        # The id is Envoy's, never the one that a caller sent.
        assert billed["request_id"] not in row.request_bytes(spellings).decode("latin-1")
    else:
        assert before == set(road.truth())
    if expected.code is not None and answer.status != 200:
        assert expected.code == json.loads(answer.body)["error"]["code"]
    assert 200 == httpx.get(f"{road.url}/health").status_code


def test_made_up_keys_cost_postgres_so_many_reads_and_a_key_from_the_same_address_nothing(road: Installation, tenant: Tenant) -> None:
    """K04: each has a right checksum and an id that nobody has; beyond the turns of their address they are refused unseen."""
    connection = http.client.HTTPConnection("127.0.0.1", road.port, timeout=60, source_address=(_GUESSING_FROM, 0))
    assert (200, None) == ask(connection, tenant.key)
    before, began, meanwhile = reads_of_postgres(road), time.monotonic(), Counter[Said]()

    with ThreadPoolExecutor(1) as pool:
        made_up = [keys.mint("live", secrets.token_bytes).key for _ in range(UNKNOWN_PER_MINUTE + GUESSES_BEYOND)]
        guessed = pool.submit(guess, road.port, made_up, address=_GUESSING_FROM)
        while not guessed.done():
            meanwhile[ask(connection, tenant.key)] += 1
    answers, minutes = guessed.result(), (time.monotonic() - began) / 60

    # Beside the turns: guesses under way together are not counted yet, and the key in use is read again now and then.
    read_again = 1 + minutes * 60 / FRESH_FOR.total_seconds()
    assert reads_of_postgres(road) - before <= UNKNOWN_PER_MINUTE * (1 + minutes) + GUESSERS + read_again
    assert {(200, None)} == set(meanwhile)
    # On a busy machine one may not be judged in time, which is a refusal too.
    assert {REFUSED, UNSEEN} <= set(answers) <= {REFUSED, UNSEEN, (503, "service_unavailable")}
    assert UNKNOWN_PER_MINUTE <= answers.total() - answers[UNSEEN]
    assert 'denials_total{phase="identity",rule="too_many_unknown"}' in road.scrape("extauth")
    # Nobody else has guessed.
    assert REFUSED == ask(http.client.HTTPConnection("127.0.0.1", road.port, timeout=60), made_up[-1])


def reads_of_postgres(road: Installation) -> int:
    """How often extauth has asked it about somebody."""
    line = re.search(r'^peaje_extauth_directory_lookups_total\{source="postgres"\} (\S+)$', road.scrape("extauth"), re.MULTILINE)
    assert line is not None
    return int(float(line[1]))


def test_no_key_is_in_any_log_or_journal(road: Installation, callers: dict[str, Caller], spellings: dict[str, str]) -> None:
    """Also not of those who sent theirs where it does not belong."""
    del callers
    secret = {name: text for name, text in spellings.items() if text.startswith("peaje_")}
    files = [path for place in ("log", "journal") for path in (road.home / place).iterdir() if path.is_file()]

    found = [(path.name, name) for path in files for name, text in secret.items() if text.encode("latin-1") in path.read_bytes()]

    assert [] == found
