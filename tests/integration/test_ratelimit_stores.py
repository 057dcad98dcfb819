# SPDX-License-Identifier: Apache-2.0
"""What only real stores can show of ratelimit: a cluster, a wiped or broken store, truth from Postgres."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from chassis import contract
from chassis.errors import Unavailable
from chassis.stores.postgres import read_pool
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters.counters import StoredCounters, StoreRefused, connect
from ratelimit.adapters.doubts import Doubts
from ratelimit.adapters.limits_source import LimitsSource
from ratelimit.adapters.loans import Loans
from ratelimit.adapters.local import FAILURES_TO_OPEN, Breaker, LocalCounters
from ratelimit.core.decide import Verdict
from ratelimit.core.demand import Counter, Demand, Kind
from ratelimit.core.estimate import Estimates
from ratelimit.core.limits import Period, Unit
from ratelimit.core.usage import Report, Usage
from ratelimit.servicer import Servicer
from tests.integration.stores import PATIENCE_SECONDS, store_server

NOW = datetime(2030, 3, 14, 12, tzinfo=UTC)
OK, OVER = wire.RateLimitResponse.OK, wire.RateLimitResponse.OVER_LIMIT
_NUMBERS = itertools.count()


def demand(tenant: str, *, amount: int, kinds: tuple[Kind, ...] = (Kind.BUCKET, Kind.QUOTA, Kind.LEASES)) -> Demand:
    """A request that takes ten tokens of a minute's and a month's, and a slot."""
    units = {Kind.BUCKET: Unit.TOKENS, Kind.QUOTA: Unit.TOKENS, Kind.LEASES: Unit.CONCURRENCY}
    periods = {Kind.BUCKET: Period.MINUTE, Kind.QUOTA: Period.CALENDAR_MONTH, Kind.LEASES: Period.NOW}
    return Demand(
        tenant_id=tenant, request_id=f"r{next(_NUMBERS)}", full=Usage(input=4, output=6), lean=Usage(input=4, output=6),
        counters=tuple(
            Counter(
                name=f"peaje:{{{tenant}}}:{kind.value}", limit_id=1, kind=kind, unit=units[kind], period=periods[kind],
                amount=amount, burst=amount, full=1 if kind is Kind.LEASES else 10, lean=1 if kind is Kind.LEASES else 10,
                ends_us=4_000_000_000_000_000 if kind is Kind.QUOTA else 0,
            )
            for kind in kinds
        ),
    )  # fmt: skip


def seeds(asked: Demand) -> dict[str, int]:
    """Nothing was used before."""
    return {counter.name: 0 for counter in asked.counters if counter.kind is Kind.QUOTA}


@pytest.mark.parametrize("tenant", ["a", "acme-inc", "b", "zeta"])
def test_all_keys_of_a_decision_live_in_one_slot_of_a_cluster(counter_cluster: str, tenant: str) -> None:
    """Admission, refusal and settle on three nodes; the tenants fall on different ones."""
    stored = StoredCounters(connect(counter_cluster, cluster=True))
    first, second = demand(tenant, amount=15), demand(tenant, amount=15)

    assert Verdict.FULL is stored.take(first, seeds(first)).verdict
    assert Verdict.REFUSED is stored.take(second, {}).verdict
    assert stored.settle(tenant_id=tenant, request_id=first.request_id, report=Report(input=1, output=1))
    assert not stored.settle(tenant_id=tenant, request_id=first.request_id, report=Report(input=1, output=1))
    after = stored.take(second, {})

    assert Verdict.FULL is after.verdict
    # Two used by the first, ten held by the second.
    assert 3 == after.readings[1].remaining


def test_two_hundred_at_once_with_room_for_one(counter_store: str) -> None:
    """Of all that ask at the same moment one is admitted; nothing is left of the others."""
    store = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    stored = StoredCounters(store)
    asked = [demand("race", amount=10, kinds=(Kind.QUOTA, Kind.LEASES)) for _ in range(200)]

    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(lambda one: stored.take(one, seeds(one)).verdict, asked))

    assert 1 == sum(verdict is not Verdict.REFUSED for verdict in verdicts)
    assert b"10" == store.hget("peaje:{race}:quota", "held")
    assert 1 == store.zcard("peaje:{race}:open")


def test_ten_thousand_random_requests_leave_nothing_held(counter_store: str) -> None:
    """All settled, some twice, in any order: used is the sum of the actuals, held is nothing."""
    store = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    stored = StoredCounters(store)

    def live(number: int) -> int:
        asked = demand("sums", amount=10**9, kinds=(Kind.QUOTA,))
        stored.take(asked, seeds(asked))
        report = Report(input=number % 7, output=number % 50)
        for _ in range(1 + number % 3):
            stored.settle(tenant_id="sums", request_id=asked.request_id, report=report)
        return number % 7 + number % 50

    with ThreadPoolExecutor(8) as pool:
        used = sum(pool.map(live, range(10_000)))

    assert [str(used).encode(), b"0"] == store.hmget("peaje:{sums}:quota", "used", "held")
    assert 0 == store.zcard("peaje:{sums}:quota:held") + store.zcard("peaje:{sums}:open")


def test_every_key_ends_by_itself(counter_store: str) -> None:
    """A store that never evicts must not fill up with what nobody comes back for."""
    store = connect(counter_store, cluster=False, timeout_seconds=PATIENCE_SECONDS)
    asked = demand("ends", amount=100)
    StoredCounters(store).take(asked, seeds(asked))

    lives = {key: store.pttl(key) for key in store.scan_iter("peaje:{ends}:*")}

    assert 6 == len(lives)
    assert all(life > 0 for life in lives.values()), lives


@pytest.fixture
def own_store() -> Iterator[str]:
    """A store of the test's own, to break."""
    with store_server() as url:
        yield url


def test_a_store_that_forgot_the_scripts_is_told_again(own_store: str) -> None:
    """NOSCRIPT costs a round trip, never an answer."""
    store = connect(own_store, cluster=False)
    stored = StoredCounters(store)
    one, two = demand("t", amount=100), demand("t", amount=100)
    stored.take(one, seeds(one))
    store.script_flush()

    assert Verdict.FULL is stored.take(two, {}).verdict


@pytest.mark.parametrize(
    "break_it",
    [
        lambda store: store.config_set("maxmemory", "1"),
        lambda store: store.execute_command("REPLICAOF", "127.0.0.1", "1"),
    ],
    ids=["OOM", "READONLY"],
)
def test_a_store_that_takes_no_writes_counts_as_away(own_store: str, break_it: Any) -> None:
    """It answers pings, and is of no use all the same."""
    store = connect(own_store, cluster=False)
    stored = StoredCounters(store)
    asked = demand("t", amount=100, kinds=(Kind.LEASES,))
    break_it(store)

    with pytest.raises(Unavailable) as refused:
        stored.take(asked, {})

    assert not isinstance(refused.value, StoreRefused)
    assert not stored.probe()


def test_one_damaged_counter_is_one_tenant_s_trouble(own_store: str) -> None:
    """A wrong type says so, and the next tenant is served."""
    store = connect(own_store, cluster=False)
    stored = StoredCounters(store)
    store.set("peaje:{bad}:leases", "no sorted set")

    with pytest.raises(StoreRefused):
        stored.take(demand("bad", amount=5, kinds=(Kind.LEASES,)), {})

    assert Verdict.FULL is stored.take(demand("good", amount=5, kinds=(Kind.LEASES,)), {}).verdict


# --- The servicer on real stores ------------------------------------------------------------------------


class Call:
    """What Envoy's call has beside its message: its life, if somebody named it."""

    epoch: str | None = "life"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """As gRPC has it."""
        return () if self.epoch is None else ((contract.EPOCH_CALL_METADATA, self.epoch),)


class Desk:
    """A servicer with its stores, asked as Envoy asks."""

    def __init__(self, postgres_url: str, store_url: str) -> None:
        self.store = connect(store_url, cluster=False, timeout_seconds=PATIENCE_SECONDS)
        self.opened = 0
        self.call: Any = Call()
        self.tenant = f"t{next(_NUMBERS)}-{abs(hash(postgres_url)) % 10_000}"
        self.connection = psycopg.connect(postgres_url, autocommit=True)
        self.connection.execute("insert into tenant values (%s, %s, 'active', now())", (self.tenant, self.tenant))
        self.connection.execute(
            "insert into project (tenant_id, project_id, created_at) values (%s, 'default', now())", (self.tenant,)
        )
        self.postgres_url = postgres_url

    def limit(self, unit: str, period: str, amount: int, **columns: Any) -> None:
        row = {"tenant_id": self.tenant, "unit": unit, "period": period, "amount": amount, "updated_at": NOW} | columns
        names = ", ".join(row)
        self.connection.execute(
            f"insert into rate_limit ({names}) values ({', '.join(['%s'] * len(row))})", list(row.values())
        )  # type: ignore[call-overload]

    def open(self) -> Desk:
        self.pool = read_pool(self.postgres_url, name="test", connections=1)
        self.breaker = Breaker(clock=lambda: 0.0, opened=self._opened)
        self.doubts = Doubts(StoredCounters(self.store), self.pool)
        self.loans = Loans(StoredCounters(self.store), self.pool)
        self.servicer = Servicer(
            LimitsSource(self.pool), StoredCounters(self.store), LocalCounters(share=0.5), self.breaker, Estimates(),
            clock=lambda: NOW, output_cap=100, slice_tokens=20, draft_headers=True, doubts=self.doubts, loans=self.loans,
        )  # fmt: skip
        return self

    def _opened(self) -> None:
        self.opened += 1

    def admit(self, request_id: str, **values: str) -> wire.RateLimitResponse:
        return self._ask(
            {
                "phase": "admit", "request_id": request_id, "tenant": self.tenant, "project": "default", "key_id": "k",
                "model": "m", "dialect": "openai.chat", "prompt_bytes": "25", "output_tokens_max": "10", "choices": "1",
                "stream": "no", "lease": "0",
            }
            | values
        )  # fmt: skip

    def renew(self, request_id: str, *, output: int, input_: int = 0) -> int:
        answer = self._ask(
            {"phase": "renew", "request_id": request_id, "tenant": self.tenant, "input": str(input_), "output": str(output)}
        )
        return int(answer.dynamic_metadata.fields[contract.ADM_SLICE_TOKENS].number_value)

    def settle(self, request_id: str, **values: str) -> None:
        self._ask(
            {
                "phase": "settle", "request_id": request_id, "tenant": self.tenant, "model": "m", "prompt_bytes": "25",
                "hold": "yes", "input": "5", "output": "3", "cached": "0", "frames": "0", "seen": "final",
            }
            | values
        )  # fmt: skip

    def _ask(self, entries: dict[str, str]) -> wire.RateLimitResponse:
        request = wire.RateLimitRequest(domain=contract.RLS_DOMAIN)
        descriptor = request.descriptors.add()
        for key, value in entries.items():
            descriptor.entries.add(key=key, value=value)
        return self.servicer.should_rate_limit(request, self.call)

    def close(self) -> None:
        self.pool.close()
        self.connection.close()


@pytest.fixture
def desk(postgres_url: str, own_store: str) -> Iterator[Desk]:
    """A desk on stores of its own."""
    made = Desk(postgres_url, own_store)
    yield made
    made.close()


def header(answer: wire.RateLimitResponse, name: str) -> str:
    return {option.key: option.value for option in answer.response_headers_to_add}[name]


def spend(desk: Desk, *, tokens: int, at: datetime) -> None:
    desk.connection.execute(
        "insert into usage_hour (hour, tenant_id, project_id, key_id, model, request_count, input_tokens, output_tokens, "
        "cached_tokens, reasoning_tokens) values (%s, %s, 'default', 'k', 'm', 1, %s, 0, 0, 0)",
        (at, desk.tenant, tokens),
    )


def test_a_quota_starts_from_what_the_ledger_has(desk: Desk) -> None:
    """Of its own calendar month only; and again after the store was wiped, never on top."""
    desk.limit("tokens", "calendar_month", 1000)
    spend(desk, tokens=400, at=datetime(2030, 3, 1, tzinfo=UTC))
    spend(desk, tokens=777, at=datetime(2030, 2, 28, 23, tzinfo=UTC))
    desk.open()

    first = desk.admit("one")
    desk.settle("one")
    second = desk.admit("two")
    desk.store.flushall()
    wiped = desk.admit("three")

    # Ten of prompt and ten of output are held; five and three were used.
    assert ["580", "572", "580"] == [header(a, "x-ratelimit-remaining-tokens") for a in (first, second, wiped)]


def test_a_hard_quota_promises_a_cap_and_near_its_end_a_smaller_one(desk: Desk) -> None:
    """Whoever names no maximum is held at the operator's cap; where that does not fit, at the usual answer."""
    desk.limit("output_tokens", "calendar_month", 150)
    desk.open()
    for number in range(40):
        desk.settle(f"past{number}", output="20", hold="no")

    first = desk.admit("one", output_tokens_max="0")
    second = desk.admit("two", output_tokens_max="0")

    caps = [answer.dynamic_metadata.fields[contract.ADM_OUTPUT_CAP].number_value for answer in (first, second)]
    assert [100, 20] == caps
    assert ["50", "30"] == [header(a, "x-ratelimit-remaining-output-tokens") for a in (first, second)]


def test_a_caller_without_history_is_capped_to_what_is_left_of_a_quota(desk: Desk) -> None:
    """What the operator assumes of an answer is more than the quota: the answer is held to the rest of it."""
    desk.limit("tokens", "calendar_month", 60)
    desk.open()

    first = desk.admit("one", output_tokens_max="0")
    refused = desk.admit("two", output_tokens_max="0")
    desk.settle("one", input="10", output="20")
    second = desk.admit("three", output_tokens_max="0")
    desk.settle("three", input="10", output="4")
    too_late = desk.admit("four", output_tokens_max="0")

    caps = [answer.dynamic_metadata.fields[contract.ADM_OUTPUT_CAP].number_value for answer in (first, second)]
    assert [50, 20] == caps
    # 16 are left, ten of them for the prompt.
    assert [OVER, OVER] == [refused.overall_code, too_late.overall_code]
    assert [b"44", b"0"] == desk.store.hmget(f"peaje:{{{desk.tenant}}}:1:2030-03", "used", "held")


def test_streams_share_the_last_tokens_slice_by_slice(desk: Desk) -> None:
    """Each is given a slice and then the next, until there is none; together they never hold more than there is."""
    desk.limit("tokens", "calendar_month", 95)
    desk.open()

    admitted = [desk.admit(name, output_tokens_max="90", stream="yes") for name in ("one", "two")]
    fields = [answer.dynamic_metadata.fields for answer in admitted]
    held = [desk.renew("two", output=21), desk.renew("one", output=21), desk.renew("two", output=42)]
    before = desk.store.hmget(f"peaje:{{{desk.tenant}}}:1:2030-03", "used", "held")
    for name, output in (("one", 34), ("two", 41)):
        desk.settle(name, input="10", output=str(output))

    # The model server may go on to what was asked for; what is held goes with the stream.
    assert [("one", 20, 90), ("two", 20, 90)] == [
        (f[contract.ADM_SLICE].string_value, f[contract.ADM_SLICE_TOKENS].number_value, f[contract.ADM_OUTPUT_CAP].number_value)
        for f in fields
    ]  # fmt: skip
    # A whole slice, what is left of one, nothing: 41 are still what it has.
    assert [41, 34, 41] == held
    assert [b"0", b"95"] == before
    assert [b"95", b"0"] == desk.store.hmget(f"peaje:{{{desk.tenant}}}:1:2030-03", "used", "held")
    assert 0 == desk.renew("one", output=35)


def test_a_slice_corrects_the_estimate_of_the_prompt(desk: Desk) -> None:
    """As soon as the engine has said what the prompt really has, that is what is held."""
    desk.limit("tokens", "calendar_month", 40)
    desk.open()
    desk.admit("one", output_tokens_max="90", stream="yes")

    longer = desk.renew("one", output=1, input_=25)
    too_long = desk.renew("one", output=1, input_=40)

    assert (15, 15) == (longer, too_long)
    assert b"40" == desk.store.hget(f"peaje:{{{desk.tenant}}}:1:2030-03", "held")


def test_what_is_not_streamed_or_takes_a_quarter_of_what_is_left_is_not_sliced(desk: Desk) -> None:
    """Only what can be ended before its end, and only near the limit; a token more, and it is."""
    desk.limit("tokens", "calendar_month", 400 + 110)
    desk.open()

    answers = [
        desk.admit("whole", output_tokens_max="100"),
        desk.admit("quarter", output_tokens_max="90", stream="yes"),
        desk.admit("more", output_tokens_max="90", stream="yes"),
    ]

    assert [100, 90, 90] == [a.dynamic_metadata.fields[contract.ADM_OUTPUT_CAP].number_value for a in answers]
    assert [False, False, True] == [contract.ADM_SLICE in a.dynamic_metadata.fields for a in answers]


def test_a_dead_store_is_left_alone_and_each_limit_follows_its_mode(desk: Desk) -> None:
    """Local gives out its share; after three failures the store is not asked again."""
    desk.limit("requests", "minute", 4)
    desk.open()
    desk.store = connect("redis://127.0.0.1:1", cluster=False)
    desk.servicer._stored = StoredCounters(desk.store)

    codes = [desk.admit(f"r{number}").overall_code for number in range(FAILURES_TO_OPEN + 3)]

    assert [OK, OK, OVER, OVER, OVER, OVER] == codes
    assert (True, 1) == (desk.breaker.is_open, desk.opened)


@pytest.mark.parametrize(("mode", "served"), [("allow", True), ("deny", False)])
def test_a_dead_store_with_a_limit_that_allows_or_denies(desk: Desk, mode: str, served: bool) -> None:
    """Allow lets all pass, deny is an error that Envoy answers with 503."""
    desk.limit("requests", "minute", 1, on_store_error=mode)
    desk.open()
    desk.servicer._stored = StoredCounters(connect("redis://127.0.0.1:1", cluster=False))

    if served:
        assert [OK, OK, OK] == [desk.admit(f"r{number}").overall_code for number in range(3)]
    else:
        with pytest.raises(Unavailable):
            desk.admit("r")


def test_a_hard_quota_without_its_store_counts_on_from_what_was_last_said(desk: Desk) -> None:
    """Half of what was left is this process's share; what was never heard of is not guessed."""
    desk.limit("tokens", "calendar_month", 100)
    desk.open()
    with pytest.raises(Unavailable):
        desk.servicer._local.take(
            demand("t", amount=10, kinds=(Kind.QUOTA,)), now_us=0, away_seconds=0.0
        )
    desk.admit("one")
    desk.servicer._stored = StoredCounters(connect("redis://127.0.0.1:1", cluster=False))

    codes = [desk.admit(f"r{number}").overall_code for number in range(3)]

    # 80 were left, 40 are ours, each holds 20.
    assert [OK, OK, OVER] == codes


def test_a_reservation_knows_the_life_of_the_envoy_that_made_it(desk: Desk) -> None:
    """Whose journal is to be waited for; what is settled waits for none."""
    desk.limit("tokens", "calendar_month", 1000)
    desk.open()
    desk.admit("one")
    desk.admit("two")
    desk.settle("two")
    for request_id, epoch in (("unnamed", "-"), ("silent", None)):
        desk.call.epoch = epoch
        desk.admit(request_id)

    epochs = StoredCounters(desk.store).epochs(desk.tenant, ["one", "two", "unnamed", "silent", "never"])

    assert {"one": "life", "unnamed": "", "silent": ""} == epochs


def test_draft_headers_name_quota_window_and_what_is_left(desk: Desk) -> None:
    """As draft-10 writes them."""
    desk.limit("requests", "minute", 60)
    desk.open()

    answer = desk.admit("one")

    assert '"requests-minute";q=60;w=60' == header(answer, "ratelimit-policy")
    assert '"requests-minute";r=59;t=1' == header(answer, "ratelimit")


def test_an_absent_postgres_is_not_an_absent_store(desk: Desk) -> None:
    """A quota that nobody can seed is not decided; the limits beside it are counted in the store as ever."""
    desk.limit("tokens", "calendar_month", 1000, model="m")
    desk.limit("requests", "minute", 5)
    desk.open()
    desk.pool.close()

    for number in range(FAILURES_TO_OPEN + 1):
        with pytest.raises(Unavailable):
            desk.admit(f"r{number}")
    other = desk.admit("other", model="n")

    assert (OK, "4") == (other.overall_code, header(other, "x-ratelimit-remaining-requests"))
    assert not desk.breaker.is_open
