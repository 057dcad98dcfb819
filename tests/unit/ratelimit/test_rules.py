# SPDX-License-Identifier: Apache-2.0
"""Generic rules: the table of examples, the edges of windows, what callers and Envoy are told, all in memory."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from prometheus_client import REGISTRY

from chassis import contract
from chassis.errors import Invalid, Unavailable
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.adapters import rule_metrics
from ratelimit.adapters.rule_counters import Count
from ratelimit.core.rls import document, fields, rules, verdict
from ratelimit.core.rls.rules import Match, Rule, Unit
from ratelimit.core.rls.verdict import HITS_MAX, Reading, Stat
from ratelimit.generic import DESCRIPTORS_MAX, ENTRIES_MAX, Options, WhenUnavailable, by_domain
from tests.ratelimit_rules import (
    OK,
    OVER,
    MemoryCounters,
    ask,
    context,
    differences,
    examples,
    request,
    rules_of,
    serving,
    shown,
)
from tests.ratelimit_rules.model import Model
from tests.ratelimit_rules.strategies import REQUESTS, as_asked, levels, said

_DOMAINS = (f"unit-{number}" for number in itertools.count())


def limited(count: int, unit: str = "minute", **fields: Any) -> dict[str, Any]:
    """A domain `d` with one key `a`."""
    return {"domain": "d", "descriptors": [{"key": "a", "rate_limit": {"unit": unit, "requests_per_unit": count}, **fields}]}


def hits(domain: str, descriptor: str, stat: str) -> float:
    """What the metric says; 0 if it was never counted."""
    labels = {"domain": domain, "descriptor": descriptor, "stat": stat}
    return REGISTRY.get_sample_value("peaje_ratelimit_rule_hits_total", labels) or 0.0


class AwayCounters:
    """A store that does not answer."""

    def __init__(self) -> None:
        self.calls = 0

    def take(self, counts: Sequence[Count]) -> tuple[int, list[Reading]]:
        self.calls += 1
        raise Unavailable("away")


@pytest.mark.parametrize("module", [rules, verdict, fields])
def test_examples_in_the_docs_are_true(module: object) -> None:
    """They are what a reader tries first."""
    assert 0 == doctest.testmod(module).failed  # type: ignore[arg-type]


@pytest.mark.parametrize("example", examples(), ids=lambda example: str(example["name"]))
def test_every_example_is_answered_as_written_and_measured(example: Any) -> None:
    """The same table runs on a real store and on a cluster."""
    domain = next(_DOMAINS)
    servicer = serving(rules_of({"domain": domain, **example["rules"]}), MemoryCounters())

    assert [] == differences(example, domain, lambda made: ask(servicer, made))
    for descriptor, stat, count in example.get("metrics", ()):
        assert count == hits(domain, descriptor.format(domain=domain), stat), (descriptor, stat)


@pytest.mark.parametrize("unit", [unit.value for unit in Unit])
def test_a_window_begins_at_a_multiple_of_its_length(unit: str) -> None:
    """The last second belongs to it, the next begins another, and the reset says how far that is."""
    length = rules.LENGTHS_SECONDS[Unit(unit)]
    counters = MemoryCounters(now=length * 1_000_000)
    servicer = serving(rules_of(limited(2, unit)), counters)

    said = []
    for now in (length * 1_000_000, length * 1_000_001 - 1, length * 1_000_001 - 1, length * 1_000_001):
        counters.now = now
        status = ask(servicer, request("d", ["a=x"])).statuses[0]
        said.append((status.code, status.limit_remaining, status.duration_until_reset.seconds))

    assert [(OK, 1, length), (OK, 0, 1), (OVER, 0, 1), (OK, 1, length)] == said


def test_only_what_is_counted_asks_the_store_and_a_request_asks_it_once() -> None:
    """Unknown, unlimited, of another domain: answered here."""
    counters = MemoryCounters()
    servicer = serving(
        rules_of({"domain": "d", "descriptors": [
            {"key": "u", "rate_limit": {"unlimited": True}}, {"key": "a", "rate_limit": {"unit": "hour", "requests_per_unit": 1}},
        ]}), counters,
    )  # fmt: skip

    ask(servicer, request("d", ["u=x", "none=x"]))
    unknown = ask(servicer, request("elsewhere", ["a=x"]))
    assert (OK, ["ok"], 0) == (unknown.overall_code, [shown(status) for status in unknown.statuses], counters.calls)

    ask(servicer, request("d", ["a=x", "a=y", "u=x"]))
    assert 1 == counters.calls


def test_callers_are_told_of_the_descriptor_that_refuses_or_is_closest() -> None:
    """Only where the setting asks for it; the last that refuses, else the least that is left."""
    made = rules_of(
        {"domain": "d", "descriptors": [
            {"key": "wide", "rate_limit": {"unit": "day", "requests_per_unit": 9}},
            {"key": "tight", "rate_limit": {"unit": "hour", "requests_per_unit": 2}},
        ]}
    )  # fmt: skip
    servicer = serving(made, MemoryCounters(now=86_400 * 10 + 600), Options(headers=True))

    def told(*descriptors: str) -> dict[str, str]:
        return {header.key: header.value for header in ask(servicer, request("d", descriptors)).response_headers_to_add}

    expected = {"ratelimit-limit": "2", "ratelimit-remaining": "1", "ratelimit-reset": "3000"}
    assert expected == told("wide=x", "tight=x", "none=x")
    assert expected | {"ratelimit-remaining": "0"} == told("tight=x", "wide=x")
    assert expected | {"ratelimit-remaining": "0"} == told("tight=x", "wide=x")
    assert {} == told("none=x")
    assert not ask(serving(made, MemoryCounters()), request("d", ["wide=x"])).response_headers_to_add


def test_global_shadow_mode_lets_everything_pass_and_says_so_per_descriptor() -> None:
    """Statuses stay what they are; the whole is OK, and counted."""
    before = REGISTRY.get_sample_value("peaje_ratelimit_rule_global_shadow_total") or 0
    servicer = serving(rules_of(limited(0)), MemoryCounters(), Options(shadow_mode=True))

    answer = ask(servicer, request("d", ["a=x"]))

    assert (OK, OVER) == (answer.overall_code, answer.statuses[0].code)
    assert before + 1 == REGISTRY.get_sample_value("peaje_ratelimit_rule_global_shadow_total")


def test_a_shadow_rule_measures_what_it_would_have_refused() -> None:
    """In total, over and in shadow."""
    domain = next(_DOMAINS)
    servicer = serving(rules_of(limited(2, shadow_mode=True) | {"domain": domain}), MemoryCounters())

    ask(servicer, request(domain, ["a=x"], hits=5))

    said = {stat.value: hits(domain, f"{domain}.a", stat.value) for stat in Stat}
    assert {"total_hits": 5, "within_limit": 0, "near_limit": 1, "over_limit": 3, "shadow_mode": 3} == said


@pytest.mark.parametrize(
    ("mode", "code", "statuses"),
    [
        (WhenUnavailable.ALLOW, OK, [OK, OK, OK]),
        (WhenUnavailable.DENY, OVER, [OVER, OK, OK]),
        (WhenUnavailable.ERROR, None, []),
    ],
)
def test_without_the_store_a_request_gets_what_the_setting_says(mode: WhenUnavailable, code: Any, statuses: list[int]) -> None:
    """A shadow rule refuses nobody then either; after three failures the store is not asked any more."""
    descriptors = [*limited(5)["descriptors"], {"key": "s", "shadow_mode": True, "rate_limit": {"unit": "day", "requests_per_unit": 1}}]
    counters = AwayCounters()
    servicer = serving(rules_of({"domain": "d", "descriptors": descriptors}), counters, Options(when_unavailable=mode))

    for _ in range(5):
        if mode is WhenUnavailable.ERROR:
            with pytest.raises(Unavailable):
                servicer.should_rate_limit(request("d", ["a=x", "s=x", "none=x"]), context())
        else:
            answer = ask(servicer, request("d", ["a=x", "s=x", "none=x"]))
            assert (code, statuses) == (answer.overall_code, [status.code for status in answer.statuses])

    assert 3 == counters.calls
    # What needs no count is answered as ever.
    assert OK == ask(servicer, request("d", ["none=x"])).overall_code


def test_dynamic_metadata_holds_what_was_asked_and_what_passed() -> None:
    """Of two values for a name the first stays; inner mappings are merged; what is over adds nothing."""
    made = rules_of(
        {"domain": "d", "descriptors": [
            {"key": "a", "rate_limit": {"unit": "day", "requests_per_unit": 9}, "metadata": {"pool": {"name": "one"}, "n": 1}},
            {"key": "b", "rate_limit": {"unit": "day", "requests_per_unit": 9}, "metadata": {"pool": {"name": "two", "size": [1, "x"]}}},
            {"key": "c", "rate_limit": {"unit": "day", "requests_per_unit": 0}, "metadata": {"refused": True}},
        ]}
    )  # fmt: skip
    servicer = serving(made, MemoryCounters(), Options(dynamic_metadata=True))

    told = wire_dict(ask(servicer, request("d", ["a=x", "b=y, z=1", "b=y", "c=z"], hits=2)))

    assert {
        "domain": "d", "hitsAddend": 2.0,
        "descriptors": [{"entries": ["a=x"]}, {"entries": ["b=y", "z=1"]}, {"entries": ["b=y"]}, {"entries": ["c=z"]}],
        "metadata": {"n": 1.0, "pool": {"name": "one", "size": [1.0, "x"]}},
    } == told  # fmt: skip
    # What was merged is not the rule's own.
    assert {"n": 1.0, "pool": {"name": "one"}} == wire_dict(ask(servicer, request("d", ["a=x"])))["metadata"]


def wire_dict(answer: wire.RateLimitResponse) -> Any:
    """A Struct as Python has it."""
    from google.protobuf import json_format  # noqa: PLC0415

    return json_format.MessageToDict(answer.dynamic_metadata)


def test_what_no_envoy_sends_is_refused_and_counts_nothing() -> None:
    """C06, and the bounds of a request at their edges."""
    counters = MemoryCounters()
    servicer = serving(rules_of(limited(5)), counters)
    deep = ", ".join(["a=x"] * (ENTRIES_MAX + 1))
    no_unit = request("d", ["a=x"])
    no_unit.descriptors[0].limit.requests_per_unit = 5
    bad = [
        request("", ["a=x"]), request("d", []), request("d", ["a=x"] * (DESCRIPTORS_MAX + 1)), request("d", ["a=x", deep]),
        request("d", ["a=x"], own_hits=HITS_MAX + 1), request("d", ["a=x"], own_hits=2**63),
        request("d", ["a=x"], own_hits=-(2**64 - 1)), no_unit,
    ]  # fmt: skip

    for made in bad:
        with pytest.raises(Invalid):
            servicer.should_rate_limit(made, context())
    assert 0 == counters.calls

    ask(servicer, request("d", ["a=x"] * DESCRIPTORS_MAX, own_hits=HITS_MAX))
    assert OK == ask(servicer, request("d", [", ".join(["b=x"] * ENTRIES_MAX)])).overall_code


def test_without_rules_every_domain_but_peajes_own_is_refused() -> None:
    """And Peaje's own is never an operator's."""
    generic = serving(rules_of(), MemoryCounters())
    own: list[str] = []

    def admit(made: wire.RateLimitRequest, _context: object) -> Any:
        own.append(made.domain)
        return wire.RateLimitResponse(overall_code=OK)

    answer = by_domain(admit, generic.should_rate_limit)
    answer(request(contract.RLS_DOMAIN, ["a=x"]), context())
    with pytest.raises(Invalid):
        answer(request("d", ["a=x"]), context())

    assert [contract.RLS_DOMAIN] == own
    read = document.read(f"domain: {contract.RLS_DOMAIN}\ndescriptors: [{{key: a}}]\n", file="x.yaml")
    assert ["x.yaml:1: domain 'peaje' is Peaje's own. Choose another; its limits are set with `peaje limits`."] == [
        str(fault) for fault in read.faults
    ]


def test_names_of_counters_have_one_length_and_nothing_of_the_values() -> None:
    """C08: braces, newlines, a MiB, values that imitate another key."""
    nasty = ["{t}", "a:b", "a\nb", "x" * 2**20, "}:held:r1", "", "a\x00", "peaje:{acme}:quota"]
    names = [rules.counter_name("d", [("k", value)], Unit.DAY) for value in nasty]
    split = [rules.counter_name("d", entries, Unit.DAY) for entries in ([("a", "bc")], [("ab", "c")], [("a", "b"), ("c", "")])]

    assert {len("peaje:rls:day:") + 32} == {len(name) for name in names}
    assert len(nasty) + len(split) == len({*names, *split})
    assert not any(set(name) - set("peaj:rlsdy0123456789abcdef") for name in names)


def test_metrics_have_a_bounded_number_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values beyond the bound, and long ones, count for their rule alone; so do rules beyond theirs for all."""
    monkeypatch.setattr(rule_metrics, "DETAILED_MAX", 2)
    monkeypatch.setattr(rule_metrics, "RULES_MAX", 1)
    domain = next(_DOMAINS)
    made = rule_metrics.RuleMetrics()

    def count(path: str, metric: str) -> None:
        rule = Rule(path=f"{domain}.{path}", unit=Unit.DAY, requests_per_unit=1)
        made.add(domain, Match(rule=rule, counter="c", metric=f"{domain}.{metric}"), {Stat.TOTAL_HITS: 1})

    before = hits(rule_metrics.OTHER, rule_metrics.OTHER, "total_hits")
    for value in ("1", "x" * 200, "2\n}", "3", "4", "1"):
        count("a", f"a_{value}")
    count("b", "b")

    said = {name: hits(domain, f"{domain}.{name}", "total_hits") for name in ("a_1", "a_2\n}", "a_3", "a", "b")}
    assert {"a_1": 2, "a_2\n}": 1, "a_3": 0, "a": 3, "b": 0} == said
    assert before + 1 == hits(rule_metrics.OTHER, rule_metrics.OTHER, "total_hits")


@settings(max_examples=80)
@given(descriptors=levels(units=("minute", "day")), asked=REQUESTS)
def test_any_rules_answer_any_requests_as_the_model_does(descriptors: list[dict[str, Any]], asked: list[Any]) -> None:
    """Random trees, values, hits and times that also go back."""
    counters, model = MemoryCounters(), Model(descriptors)
    servicer = serving(rules_of({"domain": "d", "descriptors": descriptors}), counters)
    start = counters.now

    for later, asked_descriptors in asked:
        counters.now = start + later * 7
        answer = ask(servicer, as_asked("d", asked_descriptors))
        assert model.ask(asked_descriptors, counters.now) == said(answer)
