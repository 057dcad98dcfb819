# SPDX-License-Identifier: Apache-2.0
"""
Randomised clients of several ratelimit processes, and what must be true of the counters when they are done.

Each request is admitted by one process, used, and settled by another, a third of them twice; processes
are killed meanwhile. A request whose admission nobody heard of never reaches a model server: the ledger
gives it back whole, and so does the storm.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import grpc
import psycopg

from chassis import contract
from chassis.wire import ratelimit_pb2 as wire
from tests.proof.servers import Servers

#: Tenant → what its limit counts. Each binds long before the storm is over.
UNITS: Final = {
    "requests": ("requests", "calendar_day"),
    "rate": ("requests", "hour"),
    "concurrency": ("concurrency", "now"),
    "tokens": ("tokens", "calendar_month"),
    "money": ("money", "calendar_month"),
}
#: Nano-units of each token, so that an amount of money is a number of tokens.
_NANO_PER_TOKEN: Final = 1000
_ROUNDS_MAX: Final = 20


@dataclass(slots=True)
class Account:
    """What the clients of one tenant know of what they were given."""

    limit: int
    admitted: int = 0
    refused: int = 0
    unknown: int = 0
    under_way: int = 0
    under_way_max: int = 0
    #: Tokens that the engine counted for what was admitted.
    used: int = 0
    #: Tokens by which prompts were longer than what was reserved for them.
    excess: int = 0
    #: What each request that was or may have been admitted has used, for whoever settles it last.
    usage: dict[str, tuple[int, int]] = field(default_factory=dict)


class Storm:
    """*requests* requests from *clients* clients, on whose way *deaths* processes die."""

    _servers: Servers

    def __init__(self, *, requests: int, clients: int, deaths: int, seed: int) -> None:
        self._requests, self._clients, self._deaths, self.seed = requests, clients, deaths, seed
        self._lock = threading.Lock()
        self._sent = 0
        each = requests // len(UNITS)
        self.accounts = {
            "requests": Account(limit=each // 2),
            "rate": Account(limit=each // 2),
            "concurrency": Account(limit=max(1, clients // 6)),
            "tokens": Account(limit=each * 400),
            "money": Account(limit=each * 400),
        }
        self.began = self.ended = 0.0

    def set_limits(self, postgres_url: str) -> None:
        """Write tenants, limits and a price; before the processes start."""
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "insert into rate_card (model, currency, input_nano, output_nano, cached_nano, reasoning_nano, effective, "
                "created_at) values ('m', 'USD', %(p)s, %(p)s, %(p)s, %(p)s, tstzrange('2020-01-01', null), now())",
                {"p": _NANO_PER_TOKEN * 1_000_000},
            )
            for name, account in self.accounts.items():
                unit, period = UNITS[name]
                connection.execute("insert into tenant values (%(t)s, %(t)s, 'active', now())", {"t": name})
                connection.execute(
                    "insert into rate_limit (tenant_id, unit, period, amount, currency, on_store_error, updated_at) "
                    # A store that a busy machine keeps for too long is no reason to count alone: here only exact answers count.
                    "values (%s, %s, %s, %s, %s, 'deny', now())",
                    (name, unit, period, self._amount(name, account.limit), "USD" if unit == "money" else None),
                )

    def run(self, servers: Servers) -> None:
        """Send all to *servers*."""
        self._servers = servers
        self.began = time.monotonic()
        with ThreadPoolExecutor(self._clients) as pool:
            dying = threading.Thread(target=self._kill)
            dying.start()
            list(pool.map(self._live, range(self._requests)))
            dying.join()
        self.ended = time.monotonic()

    def settle_rest(self, store: Any) -> int:
        """Settle what is open, again and again until nothing is; how many a settle had been lost of."""
        late = 0
        for _ in range(_ROUNDS_MAX):
            still = [(name, one.decode()) for name in self.accounts for one in store.zrange(f"peaje:{{{name}}}:open", 0, -1)]
            if not still:
                return late
            late = max(late, len(still))
            for name, request_id in still:
                self._settle(name, request_id, Random(request_id), times=1)
        raise AssertionError(f"{len(still)} reservations stay open: {self.report()}")

    def report(self) -> str:
        """Seed and counts, as one line of JSON."""
        return json.dumps(
            {
                "seed": self.seed, "requests": self._requests, "clients": self._clients, "processes": len(self._servers),
                "deaths": self._deaths, "seconds": round(self.ended - self.began, 1),
                "tenants": {
                    name: {
                        "limit": a.limit, "admitted": a.admitted, "refused": a.refused, "unheard": a.unknown,
                        "under_way_max": a.under_way_max, "tokens": a.used, "excess": a.excess,
                    }
                    for name, a in self.accounts.items()
                },
            }
        )  # fmt: skip

    def check(self, store: Any) -> None:
        """What must hold, whoever died when."""
        found, told = self.accounts, self.report()
        hours = (self.ended - self.began) / 3600
        assert found["requests"].admitted <= found["requests"].limit, told
        assert found["rate"].admitted <= found["rate"].limit * (1 + hours), told
        assert found["concurrency"].under_way_max <= found["concurrency"].limit, told
        for name in ("tokens", "money"):
            assert found[name].used <= found[name].limit + found[name].excess, told
        assert all(account.admitted and account.refused for account in found.values()), told
        for name, account in found.items():
            assert 0 == store.zcard(f"peaje:{{{name}}}:open"), told
            keys = [key.decode() for key in store.scan_iter(f"peaje:{{{name}}}:*")]
            assert 0 == sum(store.zcard(key) for key in keys if store.type(key) == b"zset"), told
            quotas = [store.hmget(key, "used", "held") for key in keys if store.type(key) == b"hash" and store.hexists(key, "used")]
            if name in ("tokens", "money"):
                assert [[str(self._amount(name, account.used)).encode(), b"0"]] == quotas, told
            if name == "requests":
                [(used, held)] = quotas
                assert (b"0", account.limit) == (held, int(used)), told
                assert account.limit - account.unknown <= account.admitted <= account.limit, told

    def _live(self, number: int) -> None:
        order = Random(f"{self.seed}:{number}")
        name = order.choice(list(self.accounts))
        account, request_id = self.accounts[name], f"storm-{self.seed}-{number}"
        prompt_bytes, named, choices = order.randrange(20, 2000), order.choice([0, 1, 64, 500, 32_000]), order.choice([1, 1, 2])
        ask = {
            "phase": "admit", "request_id": request_id, "tenant": name, "project": "default", "key_id": "k", "model": "m",
            "dialect": "openai.chat", "prompt_bytes": str(prompt_bytes), "output_tokens_max": str(named), "choices": str(choices),
        }  # fmt: skip
        with self._lock:
            self._sent += 1
        try:
            answer = self._servers.ask(order.randrange(len(self._servers)), _request(ask))
        except grpc.RpcError:
            with self._lock:
                account.unknown += 1
                account.usage[request_id] = (0, 0)
            return self._settle(name, request_id, order, times=1)
        if answer.overall_code != wire.RateLimitResponse.OK:
            with self._lock:
                account.refused += 1
            return None
        told = answer.dynamic_metadata.fields
        reserved = int(told[contract.ADM_RESERVED_TOKENS].number_value)
        cap = int(told[contract.ADM_OUTPUT_CAP].number_value) * choices if contract.ADM_OUTPUT_CAP in told else 0
        estimate = max(0, reserved - cap) if cap else prompt_bytes // 4
        # One prompt in ten has more tokens than was thought; no answer has more than was promised.
        prompt = estimate + order.randrange(1, 20) if order.random() < 0.1 else order.randrange(estimate // 2, estimate + 1)
        output = order.randrange((cap or 200) + 1) if order.random() < 0.9 else cap
        with self._lock:
            account.admitted += 1
            account.used += prompt + output
            account.excess += max(0, prompt - estimate)
            account.usage[request_id] = (prompt, output)
            account.under_way += 1
            account.under_way_max = max(account.under_way_max, account.under_way)
        time.sleep(order.uniform(0, 0.01))  # what the model server takes
        with self._lock:
            account.under_way -= 1
        return self._settle(name, request_id, order, times=order.choice([1, 1, 2]))

    def _settle(self, name: str, request_id: str, order: Random, *, times: int) -> None:
        prompt, output = self.accounts[name].usage[request_id]
        entries = {
            "phase": "settle", "request_id": request_id, "tenant": name, "model": "m", "prompt_bytes": "0", "hold": "yes",
            "input": str(prompt), "output": str(output), "cached": "0", "frames": "0", "seen": "final",
        }  # fmt: skip
        for _ in range(times):
            # Lost, as Envoy's may be: the ledger is the second side.
            with contextlib.suppress(grpc.RpcError):
                self._servers.ask(order.randrange(len(self._servers)), _request(entries))

    def _kill(self) -> None:
        order = Random(self.seed)
        for death in range(1, self._deaths + 1):
            while self._sent < death * self._requests // (self._deaths + 1):
                time.sleep(0.01)
            number = order.randrange(len(self._servers))
            self._servers.kill(number)
            # One at a time: what is shown is that the others hold the limit.
            self._servers.wait_ready(number)

    def _amount(self, name: str, tokens: int) -> int:
        return tokens * _NANO_PER_TOKEN if name == "money" else tokens


def _request(entries: Mapping[str, str]) -> wire.RateLimitRequest:
    request = wire.RateLimitRequest(domain=contract.RLS_DOMAIN)
    descriptor = request.descriptors.add()
    for key, value in entries.items():
        descriptor.entries.add(key=key, value=value)
    return request
