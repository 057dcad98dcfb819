# SPDX-License-Identifier: Apache-2.0
"""
Counters in Valkey or Redis: one script and one round trip for each admission and each settle.

The store's time is the only clock, so replicas agree. All keys of one decision have the
tenant's hash tag, so they share a slot of a Redis Cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import Any, Final

import orjson
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from chassis.errors import Unavailable
from ratelimit.core.decide import DONE_US, LEASE_US, Outcome, Renewal, Verdict, outcome
from ratelimit.core.demand import Counter, Demand, Kind, pool_place, slots_key
from ratelimit.core.doubt import Hold
from ratelimit.core.lease import HELD_US, LENGTH_US, Lease
from ratelimit.core.limits import Effect, Period, Unit
from ratelimit.core.usage import Price, Report, Tier, Usage, holds

#: Well below Envoy's 500 ms for the whole decision, well above what a busy host delays a reply.
STORE_TIMEOUT_SECONDS: Final = 0.1
#: How long the store keeps a calendar quota beyond its window: what was admitted in it may settle later.
_QUOTA_KEPT_MS: Final = 2 * LEASE_US // 1000

#: Open reservations of a tenant that are looked at at once: a kilobyte each.
HOLDS_MAX: Final = 200

_SCRIPTS = Path(__file__).parent
_UNSEEDED: Final = -1
#: Counters that have a second key beside the one that they are named by.
_BESIDE: Final = {Kind.QUOTA: "held", Kind.BUCKET: "leases", Kind.SLOTS: "by", Kind.BACKLOG: "ends"}


class Unseeded(Exception):
    """The store knows nothing of a quota, and no seed was given: nothing was taken."""


class StoreRefused(Unavailable):
    """The store is well, and this one decision cannot be made with it. No reason to leave it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What came of a settle."""

    #: Tokens used beyond what was held for them; less than 0: held and not used.
    excess_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loan:
    """A lease of quotas that is not repaid: the life of the Envoy that has it, and what each quota counts."""

    epoch: str
    #: Counter name to its unit and, of a budget, its currency ("" if it has none).
    units: Mapping[str, tuple[Unit, str]]


@dataclass(frozen=True, slots=True)
class _Script:
    text: str
    sha: str


def connect(url: str, *, cluster: bool, timeout_seconds: float = STORE_TIMEOUT_SECONDS) -> redis.Redis:
    """A client for one server, or for a Redis Cluster of which *url* names a node; connects when first used."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "client_name": "peaje-ratelimit",
    }
    if cluster:
        return redis.RedisCluster.from_url(url, retry=Retry(NoBackoff(), 1), **options)  # type: ignore[return-value]
    return redis.Redis.from_url(url, retry=None, **options)


class StoredCounters:
    """Counters in the store; raises `Unavailable`."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        shared = "".join((_SCRIPTS / name).read_text() for name in ("counters.lua", "fairshare.lua"))
        self._raise = _script((_SCRIPTS / "raise.lua").read_text())
        self._admit, self._renew, self._settle, self._repay = (
            _script(shared + (_SCRIPTS / f"{name}.lua").read_text()) for name in ("admit", "renew", "settle", "repay")
        )

    def take(
        self, demand: Demand, seeds: Mapping[str, int], *, lease: Lease | None = None, back: Lease | None = None
    ) -> Outcome:
        """
        Take all of *demand* or nothing; raises `Unseeded` for a quota that neither the store nor *seeds* know.

        A seed is only for a quota that the store does not know: one that it knows stays. *back* is what is
        left of a lease, given back whatever the verdict; *lease* is taken on top if there is plenty.
        """
        return self._take(demand, seeds, place=demand.tenant_id, lease=lease, back=back)

    def settle(self, *, tenant_id: str, request_id: str, report: Report, model: str = "") -> Settled | None:
        """
        Charge what *report* says in place of what was reserved; None if there is nothing (any more) to settle.

        *model* is the request's if its pool is shared; where all is in one place it is not asked for.
        """
        del model
        return self._settled(tenant_id, request_id, report)

    def _take(
        self, demand: Demand, seeds: Mapping[str, int], *, place: str, lease: Lease | None = None, back: Lease | None = None
    ) -> Outcome:
        keys = _keys(demand, place)
        if lease is not None and lease.each:
            keys += [lent_key(place, lease.lease_id), lent_index_key(place)]
        answer = self._call(self._admit, keys, [_document(demand, place, lease, back), orjson.dumps(dict(seeds))])
        if answer[0] == _UNSEEDED:
            raise Unseeded
        values, held = [float(level) for level in answer[4::4]], [int(part) for part in answer[5::4]]
        rooms, waits = answer[6::4], [float(wait) for wait in answer[7::4]]
        over = frozenset(c.name for c, room in zip(demand.counters, rooms, strict=True) if not room)
        return outcome(
            demand, Verdict(answer[0]), values, int(answer[1]), lent=int(answer[2]), output=int(answer[3]), held=held,
            waits=waits, over=over,
        )  # fmt: skip

    def renew(self, *, tenant_id: str, request_id: str, renewal: Renewal) -> int:
        """Output tokens held for a stream after *renewal*, as `ratelimit.core.decide.renew` has it."""
        numbers = (-1 if renewal.input is None else renewal.input, renewal.output, renewal.more)
        return int(self._call(self._renew, [reservation_key(tenant_id, request_id)], numbers))

    def _settled(self, place: str, request_id: str, report: Report) -> Settled | None:
        numbers = (-1 if report.input is None else report.input, report.output, report.cached, DONE_US // 1000)
        keys = [reservation_key(place, request_id), open_key(place)]
        settled, excess = self._call(self._settle, keys, [*numbers, request_id, report.quantity, report.reasoning, int(report.happened)])
        return Settled(excess_tokens=int(excess)) if settled else None

    def lent_before(self, tenant_id: str, moment_us: int, *, most: int) -> list[tuple[str, int]]:
        """Leases of a tenant's quotas that were given before *moment_us* and are not repaid, oldest first, with when they were."""
        return self._oldest(lent_index_key(tenant_id), moment_us, most=most)

    def lent(self, tenant_id: str, lease_ids: Sequence[str]) -> dict[str, Loan]:
        """What is to be known of each of these leases to repay it; none for what is repaid."""
        try:
            found: Any = self._store.mget([lent_key(tenant_id, lease_id) for lease_id in lease_ids])
        except redis.RedisError as exc:
            raise _translated(exc) from exc
        return {lease_id: _loan(stored) for lease_id, stored in zip(lease_ids, found, strict=True) if stored}

    def repay(self, tenant_id: str, lease_id: str, used: Mapping[str, int]) -> bool:
        """Replace what a lease holds of each quota by what was *used* of it; False if it was repaid before."""
        # As text: a number that large would be rounded on its way.
        said = orjson.dumps({name: str(hits) for name, hits in used.items()})
        return int(self._call(self._repay, [lent_key(tenant_id, lease_id), lent_index_key(tenant_id)], [lease_id, said])) > 0

    def raise_used(self, name: str, spent: int) -> bool:
        """Let a quota that the store knows have at least *spent* used; whether it had less."""
        return int(self._call(self._raise, [name], [spent])) > 0

    def opened_before(self, tenant_id: str, moment_us: int, *, most: int) -> list[tuple[str, int]]:
        """Requests of a tenant that were admitted before *moment_us* and are not settled, with when they were."""
        return self._oldest(open_key(tenant_id), moment_us, most=most)

    def epochs(self, tenant_id: str, request_ids: Sequence[str]) -> dict[str, str]:
        """The Envoy life that each open reservation was made for; none for what is settled or does not know it."""
        try:
            found: Any = self._store.mget([reservation_key(tenant_id, request_id) for request_id in request_ids])
        except redis.RedisError as exc:
            raise _translated(exc) from exc
        return {request_id: _epoch(stored) for request_id, stored in zip(request_ids, found, strict=True) if stored}

    def holds(self, tenant_id: str, counters: Sequence[Counter]) -> list[tuple[Hold, ...]] | None:
        """What each open reservation of a tenant holds of each of *counters*; None if they are more than `HOLDS_MAX`."""
        try:
            ids: Any = self._store.zrange(open_key(tenant_id), 0, HOLDS_MAX)
            if len(ids) > HOLDS_MAX:
                return None
            names = [request_id.decode() for request_id in ids]
            found: Any = self._store.mget([reservation_key(tenant_id, name) for name in names]) if names else []
        except redis.RedisError as exc:
            raise _translated(exc) from exc
        held = [(name, _held(stored)) for name, stored in zip(names, found, strict=True) if stored]
        return [
            tuple(Hold(request_id=name, hits=hits[counter.name]) for name, hits in held if counter.name in hits) for counter in counters
        ]

    def under_way(self, model: str) -> list[str]:
        """Tenants that have a slot of *model*'s pool."""
        try:
            found: Any = self._store.hkeys(f"{slots_key(model)}:by")
        except redis.RedisError as exc:
            raise _translated(exc) from exc
        return [name.decode().removeprefix("n:") for name in found if name.startswith(b"n:")]

    def probe(self) -> bool:
        """Whether the store takes a write: one that only answers is of no use."""
        try:
            self._store.set("peaje:probe", b"", px=1000)
        except redis.RedisError:
            return False
        return True

    def _oldest(self, index: str, moment_us: int, *, most: int) -> list[tuple[str, int]]:
        """Names in an index that are older than *moment_us*, with when they came into it."""
        try:
            found: Any = self._store.zrangebyscore(index, "-inf", moment_us, start=0, num=most, withscores=True)
        except redis.RedisError as exc:
            raise _translated(exc) from exc
        return [(name.decode(), int(since_us)) for name, since_us in found]

    def _call(self, script: _Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        try:
            try:
                return self._store.evalsha(script.sha, len(keys), *keys, *arguments)
            except NoScriptError:
                # A restarted or flushed store knows no scripts; sent whole, it remembers.
                return self._store.eval(script.text, len(keys), *keys, *arguments)
        except redis.RedisError as exc:
            raise _translated(exc) from exc


class ClusterCounters(StoredCounters):
    """
    Counters in a Redis Cluster, where a pool and a tenant live on different nodes.

    One script cannot touch both, so a request to a shared pool asks the pool first and gives back what it
    took if the tenant's own limits refuse. Each alone is as exact as ever; in between, for one round trip,
    the pool looks fuller than it is. What a pool holds is settled and swept at the pool's own place.
    """

    def take(
        self, demand: Demand, seeds: Mapping[str, int], *, lease: Lease | None = None, back: Lease | None = None
    ) -> Outcome:
        """Take from the pool, then from the tenant's own counters; raises `Unseeded` as `StoredCounters` does."""
        shared = tuple(counter for counter in demand.counters if counter.is_shared)
        own = tuple(counter for counter in demand.counters if not counter.is_shared)
        if not shared:
            return super().take(demand, seeds, lease=lease, back=back)
        place = pool_place(shared[0].scope)
        of_pool = self._take(replace(demand, counters=shared), {}, place=place)
        if not own or not of_pool.admitted:
            return of_pool
        admitted = False
        try:
            outcome = super().take(replace(demand, counters=own), seeds, back=back)
            admitted = outcome.admitted
        finally:
            if not admitted:
                self._settled(place, demand.request_id, Report(input=0, output=0))
        return replace(outcome, readings=outcome.readings + of_pool.readings)

    def settle(self, *, tenant_id: str, request_id: str, report: Report, model: str = "") -> Settled | None:
        """Settle at the tenant's place and, if *model* has a pool, at the pool's."""
        own = self._settled(tenant_id, request_id, report)
        of_pool = self._settled(pool_place(model), request_id, report) if model else None
        return own or of_pool


def reservation_key(place: str, request_id: str) -> str:
    """Where a reservation waits to be settled; *place* is its tenant's id, or a pool's place."""
    return f"peaje:{{{place}}}:held:{request_id}"


def lent_key(place: str, lease_id: str) -> str:
    """Where a lease of quotas waits to be repaid."""
    return f"peaje:{{{place}}}:lent:{lease_id}"


def lent_index_key(place: str) -> str:
    """The index of a place's leases that are not repaid, by when they were given."""
    return f"peaje:{{{place}}}:lent"


def open_key(place: str) -> str:
    """The index of a place's open reservations, by when they were made."""
    return f"peaje:{{{place}}}:open"


def _epoch(reservation: bytes) -> str:
    # Before the demand stand digits and signs only.
    return str(orjson.loads(reservation[reservation.index(b"{") :]).get("e", ""))


def _held(reservation: bytes) -> dict[str, int]:
    """Hits that a reservation holds, by counter: of the full ask, or of what of the lean one was granted."""
    head, text = reservation[: (begin := reservation.index(b"{"))].decode(), reservation[begin:]
    demand = orjson.loads(text)
    verdict, rest = Verdict(int(head[0])), head[1:]
    taken, _, granted = rest.partition("=")
    output, _, input_ = granted.partition(",")
    found = {}
    for counter, is_taken in zip(demand["c"], taken, strict=True):
        if is_taken == "0":
            continue
        is_hard = counter["k"] == Kind.QUOTA.value and counter["e"] == Effect.REFUSE.value
        if verdict is Verdict.FULL:
            found[counter["n"]] = counter["f"]
        elif is_hard and output:
            usage = Usage(input=int(input_), output=int(output), quantity=demand["q"])
            found[counter["n"]] = holds(Unit(counter["u"]), usage, _price(counter["c"]))
        else:
            found[counter["n"]] = counter["l"]
    return found


def _price(numbers: Sequence[Any] | None) -> Price | None:
    if numbers is None:
        return None
    input_, output, cached, minimum, each, reach, tiers, reasoning = numbers
    return Price(
        currency="", input_nano=input_, output_nano=output, cached_nano=cached, minimum_nano=minimum, each_nano=each, reach=reach,
        reasoning_nano=reasoning,
        tiers=tuple(
            Tier(input_nano=it[0], output_nano=it[1], cached_nano=it[2], above_tokens=it[3], reasoning_nano=it[4]) for it in tiers
        ),
    )  # fmt: skip


def _script(text: str) -> _Script:
    # The store names scripts by this hash; nothing rests on its strength.
    return _Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def _keys(demand: Demand, place: str) -> list[str]:
    keys = [reservation_key(place, demand.request_id), open_key(place)]
    for counter in demand.counters:
        keys.append(counter.name)
        if counter.kind in _BESIDE:
            keys.append(f"{counter.name}:{_BESIDE[counter.kind]}")
    return keys


def _loan(reservation: bytes) -> Loan:
    document = orjson.loads(reservation[reservation.index(b"{") :])
    return Loan(epoch=document["e"], units={c["n"]: (Unit(c["u"]), c["cu"]) for c in document["c"]})


def _document(demand: Demand, place: str, lease: Lease | None, back: Lease | None) -> bytes:
    # Without a hard limit both asks hold the usual.
    full = demand.full if demand.is_capped else demand.lean
    document: dict[str, Any] = {
        "t": demand.tenant_id, "r": demand.request_id, "s": demand.settles, "d": LEASE_US, "in": demand.lean.input,
        "q": demand.lean.quantity, "e": demand.epoch,
        "w": demand.room_for, "o": [demand.output_least, demand.lean.output, demand.full.output],
        "ft": full.input + full.output, "lt": demand.lean.input + demand.lean.output,
        "c": [_counter_document(counter) for counter in demand.counters],
    }  # fmt: skip
    if lease is not None:
        document["g"] = {"i": lease.lease_id, "n": lease.requests, "t": lease.tokens // lease.requests, "d": LENGTH_US}
        if lease.each:
            document["g"] |= {
                "e": lease.each, "h": HELD_US, "w": _loan_document(demand, lease),
                "r": lent_key(place, lease.lease_id), "x": lent_index_key(place),
            }  # fmt: skip
    if back is not None:
        document["b"] = {"i": back.lease_id, "n": back.requests, "t": back.tokens}
    return orjson.dumps(document)


def _loan_document(demand: Demand, lease: Lease) -> str:
    quotas = [
        {
            "n": counter.name, "u": counter.unit.value, "f": hits,
            "cu": counter.price.currency if counter.price is not None else "",
        }
        for counter, hits in zip(demand.counters, lease.each, strict=True) if counter.kind is Kind.QUOTA
    ]  # fmt: skip
    return orjson.dumps({"r": lease.lease_id, "e": demand.epoch, "c": quotas}).decode()


def _counter_document(counter: Counter) -> dict[str, Any]:
    price = counter.price
    return {
        "k": counter.kind.value, "n": counter.name, "u": counter.unit.value, "e": counter.effect.value,
        "a": counter.amount, "p": counter.period_us, "b": counter.burst, "f": counter.full, "l": counter.lean,
        "x": _forgotten_ms(counter), "w": counter.weight,
        "c": None if price is None else [
            price.input_nano, price.output_nano, price.cached_nano, price.minimum_nano, price.each_nano, price.reach,
            [[it.input_nano, it.output_nano, it.cached_nano, it.above_tokens, it.reasoning_nano] for it in price.tiers],
            price.reasoning_nano,
        ],
    }  # fmt: skip


def _forgotten_ms(counter: Counter) -> int:
    """When a quota may be forgotten; 0 for what never ends: renewed with each use."""
    return 0 if counter.period in (Period.EVER, Period.NOW) else counter.ends_us // 1000 + _QUOTA_KEPT_MS


def _translated(exc: redis.RedisError) -> Unavailable:
    # A wrong type is one damaged key; a full, read-only or loading store is everybody's trouble.
    if "WRONGTYPE" in str(exc):
        return StoreRefused("A counter is damaged.")
    return Unavailable("The counter store did not answer.")
