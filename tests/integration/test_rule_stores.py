# SPDX-License-Identifier: Apache-2.0
"""Generic rules on real stores, over gRPC: the table of examples, hostile requests, reload under load, a million values."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from prometheus_client import REGISTRY, generate_latest

from chassis.serving import _guarded
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters import counters
from ratelimit.adapters.rule_counters import RuleCounters
from ratelimit.adapters.rule_files import RuleFiles
from ratelimit.adapters.rule_metrics import DETAILED_MAX
from ratelimit.core.rls.rules import Rules, Unit, counter_name
from ratelimit.generic import GenericServicer
from ratelimit.servicer import METHOD
from tests.integration.stores import store_server
from tests.ratelimit_rules import OK, Ask, ask, context, differences, examples, request, rules_of, serving
from tests.ratelimit_rules.model import Model
from tests.ratelimit_rules.strategies import REQUESTS, as_asked, levels, said

_DOMAINS = (f"real-{number}" for number in itertools.count())
#: A change acts within a second; a busy machine may take longer to look.
_WAIT_SECONDS_MAX = 20.0


def limited(domain: str, count: int, unit: str = "year", **fields: Any) -> dict[str, Any]:
    """A domain with one key `a`."""
    return {"domain": domain, "descriptors": [{"key": "a", "rate_limit": {"unit": unit, "requests_per_unit": count}, **fields}]}


@contextmanager
def on_a_socket(servicer: GenericServicer, directory: Path) -> Iterator[Ask]:
    """The servicer as Envoy meets it: errors translated, on a Unix socket."""
    server = grpc.server(ThreadPoolExecutor(4))
    _, service, method = METHOD.split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        _guarded(METHOD, servicer.should_rate_limit), request_deserializer=wire.RateLimitRequest.FromString,
        response_serializer=wire.RateLimitResponse.SerializeToString,
    )  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"unix:{directory}/s.sock")
    server.start()
    with grpc.insecure_channel(f"unix:{directory}/s.sock") as channel:
        call = channel.unary_unary(
            METHOD, request_serializer=wire.RateLimitRequest.SerializeToString,
            response_deserializer=wire.RateLimitResponse.FromString,
        )  # fmt: skip
        try:
            yield lambda made: call(made, timeout=10)
        finally:
            server.stop(None).wait()


def steady(url: str, *, cluster: bool = False) -> redis.Redis:
    """A client that waits for a busy machine; the service's own gives up after a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counters, "STORE_TIMEOUT_SECONDS", _WAIT_SECONDS_MAX)
        return counters.connect(url, cluster=cluster)


@pytest.fixture(params=["valkey", "cluster"])
def store(request: pytest.FixtureRequest) -> redis.Redis:
    """One server, and three that share the slots."""
    if request.param == "cluster":
        return steady(request.getfixturevalue("counter_cluster"), cluster=True)
    return steady(request.getfixturevalue("counter_store"))


def test_every_example_is_answered_as_written(store: redis.Redis) -> None:
    """On a server in one round trip, on a cluster slot by slot, the same."""
    wrong = []
    for example in examples():
        domain = next(_DOMAINS)
        servicer = serving(rules_of({"domain": domain, **example["rules"]}), RuleCounters(store))
        wrong += differences(example, domain, lambda made, servicer=servicer: ask(servicer, made))  # type: ignore[misc]

    assert [] == wrong


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(descriptors=levels(units=("month", "year")), asked=REQUESTS)
def test_any_rules_answer_any_requests_as_the_model_does(store: redis.Redis, descriptors: list[Any], asked: list[Any]) -> None:
    """Each example under a domain of its own; what the model keeps in a dictionary the script keeps in the store."""
    domain, model = next(_DOMAINS), Model(descriptors)
    servicer = serving(rules_of({"domain": domain, "descriptors": descriptors}), RuleCounters(store))

    for _, asked_descriptors in asked:
        answer = ask(servicer, as_asked(domain, asked_descriptors))
        assert model.ask(asked_descriptors, 0) == said(answer)


def test_two_hundred_at_once_pass_exactly_the_limit(store: redis.Redis) -> None:
    """Two descriptors each, of one counter that all share and one of their own."""
    domain = next(_DOMAINS)
    servicer = serving(rules_of(limited(domain, 50, value="*", share_threshold=True)), RuleCounters(store))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: ask(servicer, request(domain, [f"a={n}"])).overall_code, range(200)))

    assert 50 == answers.count(OK)


def test_every_key_ends_with_its_window(counter_store: str) -> None:
    """At most a second after; no value of a caller is in its name or in it."""
    store = steady(counter_store)
    domain = next(_DOMAINS)
    servicer = serving(rules_of(limited(domain, 5, "hour")), RuleCounters(store))

    ask(servicer, request(domain, ["a=secret-value"]))

    key = counter_name(domain, [("a", "secret-value")], Unit.HOUR)
    assert 0 < store.pttl(key) <= 3_601_000
    assert b"secret" not in (store.get(key) or b"secret")


# --- Bad input, over gRPC --------------------------------------------------------------------------------------------


def status_of(answer: Ask, made: wire.RateLimitRequest) -> str:
    """OK, OVER_LIMIT or the error's code."""
    try:
        return str(wire.RateLimitResponse.Code.Name(answer(made).overall_code))
    except grpc.RpcError as exc:
        return str(exc.code().name)


def test_c06_spoofed_tenants_and_absurd_hits_reach_no_counter_but_their_own(counter_store: str, tmp_path: Path) -> None:
    """An addend of 2^63 is refused, 0 takes nothing; what looks like Peaje's own descriptor is a descriptor like any."""
    store = steady(counter_store)
    store.set("peaje:{acme}:quota", "of peaje's own")
    domain = next(_DOMAINS)
    made = rules_of({"domain": domain, "descriptors": [
        {"key": "a", "rate_limit": {"unit": "year", "requests_per_unit": 2}},
        {"key": "phase", "descriptors": [{"key": "tenant", "rate_limit": {"unit": "year", "requests_per_unit": 2}}]},
    ]})  # fmt: skip
    before = set(store.scan_iter("peaje:*"))

    with on_a_socket(serving(made, RuleCounters(store)), tmp_path) as answer:
        refused = [status_of(answer, request(domain, ["a=x"], own_hits=hits)) for hits in (2**63, 2**64 - 1, 2**32, -(2**63))]
        nothing = [status_of(answer, request(domain, ["a=x"], own_hits=0)) for _ in range(3)]
        spoofed = [status_of(answer, request(domain, ["phase=admit, tenant=acme"])) for _ in range(3)]
        after = answer(request(domain, ["a=x"])).statuses[0].limit_remaining

    assert ["INVALID_ARGUMENT"] * 4 == refused
    assert ["OK"] * 3 == nothing
    assert ["OK", "OK", "OVER_LIMIT"] == spoofed
    assert 1 == after
    assert b"of peaje's own" == store.get("peaje:{acme}:quota")
    assert {key.split(b":")[1] for key in set(store.scan_iter("peaje:*")) - before} == {b"rls"}
    store.delete("peaje:{acme}:quota")


def test_c08_values_that_imitate_keys_lines_and_labels_stay_values(counter_store: str, tmp_path: Path) -> None:
    """Braces, colons, newlines, quotes, a MiB: keys of one length, metrics that parse, no more names than allowed."""
    store = steady(counter_store)
    domain = next(_DOMAINS)
    nasty = ["{x}", "a:b", "a\nb", 'a"} 1\n# HELP x', "\x00", "}:held:r", "x" * 2**20, "", "ü" * 1000]
    before = set(store.scan_iter("peaje:rls:*"))

    with on_a_socket(serving(rules_of(limited(domain, 1, detailed_metric=True)), RuleCounters(store)), tmp_path) as answer:
        first = [status_of(answer, request(domain, [f"a={value}"])) for value in nasty]
        second = [status_of(answer, request(domain, [f"a={value}"])) for value in nasty]
        too_large = status_of(answer, request(domain, ["a=" + "x" * (5 << 20)]))

    assert ["OK"] * len(nasty) == first
    assert ["OVER_LIMIT"] * len(nasty) == second
    assert "RESOURCE_EXHAUSTED" == too_large
    made = set(store.scan_iter("peaje:rls:*")) - before
    assert len(nasty) == len(made)
    assert {len(b"peaje:rls:year:") + 32} == {len(key) for key in made}
    lines = [line for line in generate_latest(REGISTRY).decode().splitlines() if domain in line]
    assert all(line.startswith("peaje_ratelimit_rule_hits_") for line in lines)
    assert max(map(len, lines)) < 1000


@pytest.fixture
def own_store() -> Iterator[str]:
    """A store that a test may break."""
    with store_server() as url:
        yield url


def test_c09_a_store_in_trouble_costs_counts_or_an_error_never_a_crash(own_store: str, tmp_path: Path) -> None:
    """Wiped, scripts forgotten, a wrong type: counted anew. Read-only and full: the error that the setting says."""
    store = steady(own_store)
    admin = redis.Redis.from_url(own_store)
    key = counter_name("d", [("a", "x")], Unit.YEAR)
    servicer = serving(rules_of(limited("d", 2)), RuleCounters(store))

    with on_a_socket(servicer, tmp_path) as answer:

        def asked() -> str:
            # Each trouble alone: three failures in a row would open the breaker.
            servicer._breaker.close()
            return status_of(answer, request("d", ["a=x"]))

        assert ["OK", "OK", "OVER_LIMIT"] == [asked() for _ in range(3)]
        admin.flushall()
        assert ["OK", "OK", "OVER_LIMIT"] == [asked() for _ in range(3)]
        admin.script_flush()
        assert "OVER_LIMIT" == asked()
        admin.delete(key)
        admin.lpush(key, "damaged")
        assert ["OK", "OK", "OVER_LIMIT"] == [asked() for _ in range(3)]

        admin.config_set("maxmemory", 1)
        assert "UNAVAILABLE" == asked()
        admin.config_set("maxmemory", 0)
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")  # type: ignore[no-untyped-call]
        assert "UNAVAILABLE" == asked()
        admin.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
        assert "OVER_LIMIT" == asked()


def test_c09_a_stalled_store_is_left_alone_after_three_failures(own_store: str, tmp_path: Path) -> None:
    """No storm of waiting calls: the breaker that Peaje's own limits use answers for it."""
    servicer = serving(rules_of(limited("d", 2)), RuleCounters(counters.connect(own_store, cluster=False)))
    admin = redis.Redis.from_url(own_store)

    with on_a_socket(servicer, tmp_path) as answer:
        assert "OK" == status_of(answer, request("d", ["a=x"]))
        admin.execute_command("CLIENT", "PAUSE", "5000", "ALL")  # type: ignore[no-untyped-call]
        assert ["UNAVAILABLE"] * 20 == [status_of(answer, request("d", ["a=x"])) for _ in range(20)]

    assert servicer._breaker.is_open


# --- Reload, and many values ---------------------------------------------------------------------------------------


def test_a_reload_under_load_fails_no_call_and_is_seen_by_all(counter_store: str, tmp_path: Path) -> None:
    """Eight callers, good and bad files in turn, watched as in the service: each answer is of one whole set of rules."""
    directory, domain = tmp_path / "rules", next(_DOMAINS)
    directory.mkdir()

    def write(count: int) -> None:
        # Both rules change together; a mixture would show as two different limits in one answer.
        limit = f"rate_limit: {{unit: year, requests_per_unit: {count}}}"
        new = directory / ".new"
        new.write_text(f"domain: {domain}\ndescriptors:\n- {{key: a, {limit}}}\n- {{key: b, {limit}}}\n")
        os.replace(new, directory / "rules.yaml")

    write(1_000_000)
    files = RuleFiles(directory)
    files.watch()
    servicer = GenericServicer(lambda: files.current, RuleCounters(steady(counter_store)), _breaker(), _options())
    stop, failed, seen = threading.Event(), [], set()

    with on_a_socket(servicer, tmp_path) as answer:

        def call() -> None:
            while not stop.is_set():
                try:
                    answered = answer(request(domain, ["a=x", "b=x"]))
                except grpc.RpcError as exc:
                    failed.append(str(exc))
                    return
                seen.add(tuple(status.current_limit.requests_per_unit for status in answered.statuses))

        callers = [threading.Thread(target=call) for _ in range(8)]
        for caller in callers:
            caller.start()
        try:
            for number in range(1, 4):
                (directory / "bad.yaml").write_text("domain: [")
                _until(lambda: REGISTRY.get_sample_value("peaje_ratelimit_rules_current") == 0)
                (directory / "bad.yaml").unlink()
                write(1_000_000 + number)
                _until(lambda number=number: (1_000_000 + number,) * 2 in seen)  # type: ignore[misc]
        finally:
            stop.set()
            for caller in callers:
                caller.join()

    assert [] == failed
    assert {(1_000_000 + number,) * 2 for number in range(4)} == seen


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS_MAX
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _breaker() -> Any:
    return serving(Rules({}), RuleCounters(redis.Redis()))._breaker


def _options() -> Any:
    return serving(Rules({}), RuleCounters(redis.Redis()))._options


@pytest.mark.parametrize("values", [20_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_distinct_values_keep_memory_bounded_and_end_in_the_store(own_store: str, values: int) -> None:
    """With detailed metrics, which would be a name for each; a hundred descriptors a request."""
    store = steady(own_store)
    domain = next(_DOMAINS)
    servicer = serving(rules_of(limited(domain, 5, "second", detailed_metric=True)), RuleCounters(store))

    def send(first: int, last: int) -> None:
        for start in range(first, last, 100):
            made = request(domain, [f"a=user-{number}" for number in range(start, start + 100)])
            servicer.should_rate_limit(made, context())

    send(0, 10_000)  # everything is loaded, and the metrics have all the names that they may have
    warm = _resident_bytes()
    send(10_000, 10_000 + values)
    grown = _resident_bytes() - warm

    # A metric for each of 20,000 values is 60 MB, a million texts kept 100; what an allocator keeps of garbage is a few.
    assert grown < 16 << 20, grown
    assert len(servicer._metrics._detailed) == DETAILED_MAX
    _until(lambda: store.dbsize() == 0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


