# SPDX-License-Identifier: Apache-2.0
"""What a server of a pool is sent, and which server: the real gate and a real Envoy, in front of servers that remember."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from chassis.errors import Invalid
from chassis.models import ModelCatalogue
from control.apply import judge
from control.envoy_resources import render_all
from tests.integration.behind_envoy import Road, road_behind
from tests.waiting import until

SECRET = "upstream-0123456789-abcdefghijklmnopq"


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """Envoy with the gate and the router, nobody who is asked."""
    with road_behind(tmp_path_factory.mktemp("pools")) as road:
        yield road


def test_an_alias_is_its_model_and_each_server_has_its_own_name_for_it(road: Road) -> None:
    """Only the name differs; who asks for another model is not served by the alias' pools."""
    road.serve({"name": "org/m", "aliases": ["default"], "pools": [road.pool("main", 0, model='m"2"')]})

    answers = [road.ask(name, stream=False) for name in ("default", "org/m")]

    assert ["first", "first"] == [answer.text for answer in answers]
    assert [{"model": 'm"2"', "prompt": "hi", "stream": False}] * 2 == [body for _, body in road.servers[0].seen]
    assert 404 == road.ask('m"2"').status_code
    assert 404 == road.ask("Default").status_code


def test_a_large_body_is_named_as_well(road: Road) -> None:
    """Larger than what one connection may buffer."""
    road.serve({"name": "m", "aliases": ["a"], "pools": [road.pool("main", 0)]})

    assert 200 == road.ask("a", "x" * 5_000_000).status_code

    [(headers, body)] = road.servers[0].seen
    assert ("m", 5_000_000) == (body["model"], len(body["prompt"]))
    assert int(headers["content-length"]) == len(json.dumps(body, separators=(",", ":")))


def test_a_credential_goes_to_its_own_pool_and_is_shown_nowhere(road: Road) -> None:
    """Also where both are one chain; a new one is taken when it is applied."""
    file = road.desk.places.home / "secrets/rented"
    file.write_text(SECRET)
    file.chmod(0o600)
    model = {
        "name": "m",
        "pools": [road.pool("main", 0), road.pool("rented", 1, fallback=True, credential_file="secrets/rented", model="theirs")],
    }
    road.serve(model)
    own, rented, _ = road.servers

    assert "first" == road.ask("m").text
    own.stop()
    until(lambda: road.ask("m").text == "second")
    file.write_text(f"{SECRET[::-1]}\n")  # as an editor leaves it
    road.serve(model)
    assert "second" == road.ask("m").text

    assert "Bearer " + SECRET[::-1] == rented.seen[-1][0]["authorization"]
    assert {"theirs"} == {body["model"] for _, body in rented.seen}
    own.start()
    until(lambda: road.ask("m").text == "first")
    assert own.seen
    assert [] == [headers for headers, _ in own.seen if "authorization" in headers]
    assert [] == [name for headers, _ in own.seen + rented.seen for name in headers if name.startswith("x-peaje-")]
    shown = [httpx.get(f"{road.desk.admin.url}/{page}").text for page in ("config_dump?include_eds", "stats", "clusters")]  # type: ignore[union-attr]
    shown += [path.read_text() for path in (road.desk.places.home / "envoy").rglob("*.yaml")]
    assert [] == [text for text in shown if SECRET in text or SECRET[::-1] in text]


@pytest.mark.parametrize("affinity", [{"header": "x-session-id"}, {"prefix_bytes": 64}], ids=["session", "prompt"])
def test_what_belongs_together_stays_at_one_server(road: Road, affinity: dict[str, Any]) -> None:
    """Also over the weights of pools; what does not is spread over all. No server sees how that is decided."""
    road.serve({"name": "m", "affinity": affinity, "pools": [road.pool("main", 0, 1, weight=2), road.pool("canary", 2)]})

    def ask(number: int, turn: int) -> str:
        prompt = (f"conversation {number} " + "." * 100)[:80] + f" turn {turn}"
        return road.ask("m", prompt, headers={"x-session-id": f"s{number}"} if "header" in affinity else {}).text

    answers = {number: {ask(number, turn) for turn in range(3)} for number in range(30)}

    assert {1} == {len(names) for names in answers.values()}
    assert {"first", "second", "third"} == set().union(*answers.values())
    assert [] == [name for server in road.servers for headers, _ in server.seen for name in headers if name.startswith("x-peaje-")]


def test_a_full_pool_refuses_at_once_and_the_next_pool_is_not_its_overflow(road: Road) -> None:
    """`requests_max` under way, and the next one hears it; when they are answered there is room."""
    road.serve({"name": "m", "pools": [road.pool("main", 0, requests_max=2), road.pool("rented", 1, fallback=True)]})
    first = road.servers[0]
    first.goes_on.clear()

    with ThreadPoolExecutor(2) as callers:
        under_way = [callers.submit(road.ask, "m") for _ in range(2)]
        until(lambda: len(first.seen) == 2)
        refused = road.ask("m")
        first.goes_on.set()

    assert 503 == refused.status_code
    assert ["first", "first"] == [one.result().text for one in under_way]
    assert Counter({"first": 5}) == Counter(road.ask("m").text for _ in range(5))


def test_more_output_than_the_engines_generate_is_refused_before_anybody_is_asked(road: Road) -> None:
    """At the bound, and one above."""
    road.serve({"name": "m", "output_tokens_max": 100, "aliases": ["a"], "pools": [road.pool("main", 0)]})

    assert (200, 200, 400) == tuple(road.ask("a", max_tokens=most).status_code for most in (1, 100, 101))
    error = road.ask("m", max_tokens=101).json()["error"]
    assert ("invalid_request", "This model generates at most 100 tokens.") == (error["code"], error["message"])
    assert 2 == len(road.servers[0].seen)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("clusters", "consecutive_gateway_failure:", "consecutive_gateway_failures:"), ("routes", "pool/main/m", "pool/main/n")],
    ids=["a field that Envoy would ignore", "a route to no pool"],
)
def test_envoy_judges_what_its_own_check_never_opens(road: Road, file: str, old: str, new: str) -> None:
    """The files that it watches, as strictly as its bootstrap."""
    models = ModelCatalogue.parse({"models": [{"name": "m", "engine": "vllm", "endpoints": ["127.0.0.1:1"]}]}, source="x")
    rendered = render_all(models, road.desk.places.home)

    judge(road.desk.envoy, road.desk.places, rendered)
    with pytest.raises(Invalid, match=r"^Envoy refuses what the models document means: "):
        judge(road.desk.envoy, road.desk.places, replace(rendered, **{file: getattr(rendered, file).replace(old, new)}))


def test_servers_get_as_much_as_they_say_they_have_room_for(road: Road) -> None:
    """By load reports, vLLM's and whole ones: who is three times as full gets a third; callers read none of it."""
    road.serve({"name": "m", "pools": [road.pool("main", 0, 1, balance="orca", slow_start_seconds=0)]})
    reports = ("TEXT named_metrics.num_requests_waiting=0, named_metrics.kv_cache_usage_perc=%s", "TEXT application_utilization=%s, rps_fractional=10")

    shares = []
    for report in reports:
        for full, other in ((0, 1), (1, 0)):
            road.servers[full].headers["endpoint-load-metrics"] = report % 0.9
            road.servers[other].headers["endpoint-load-metrics"] = report % 0.3
            until(lambda: _share(road, full) <= 0.32)
            shares.append(_share(road, full))

    assert min(shares) > 0.15
    answer = road.ask("m")
    assert "endpoint-load-metrics" not in answer.headers
    asked = {headers.get("endpoint-load-metrics-format") for server in road.servers[:2] for headers, _ in server.seen}
    assert {"TEXT"} == asked
    for server in road.servers:
        server.headers.clear()


def _share(road: Road, server: int) -> float:
    """What part of forty requests this server answers."""
    answers = [road.ask("m").text for _ in range(40)]
    return answers.count(road.servers[server].name) / len(answers)
