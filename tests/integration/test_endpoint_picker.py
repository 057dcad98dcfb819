# SPDX-License-Identifier: Apache-2.0
"""Pools whose server somebody else chooses: a real Envoy, the road's own filter, a picker over gRPC."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.dataplane.installation import free_ports
from tests.integration.behind_envoy import Road, road_behind, road_filter
from tests.picker import Picker, picking
from tests.waiting import until


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """Envoy with the gate and the filter that asks pickers."""
    with road_behind(tmp_path_factory.mktemp("picked"), road_filter("picker")) as road:
        yield road


@pytest.fixture
def picker() -> Iterator[Picker]:
    """One that answers at once."""
    [port] = free_ports(1)
    with picking(port) as picker:
        yield picker


def picked(road: Road, picker: Picker, *servers: int, when_away: str = "open", **more: object) -> dict[str, object]:
    """A model whose only pool is chosen from by *picker*."""
    asked = {"address": picker.address, "when_away": when_away}
    return {"name": "m", "pools": [road.pool("main", *servers, endpoint_picker=asked, slow_start_seconds=0, **more)]}


def test_a_picker_chooses_the_server_of_each_request(road: Road, picker: Picker) -> None:
    """It reads the body and among whom it may choose; the server gets all of the body and nothing of who chose."""
    road.serve(picked(road, picker, 0, 1, 2))
    prompt = "x" * 3_000_000

    answers = []
    for number in (2, 0, 2, 1):
        picker.names = road.endpoint(number)
        answers.append(road.ask("m", prompt, headers={"x-gateway-destination-endpoint": road.endpoint(1)}).text)

    assert ["third", "first", "third", "second"] == answers
    assert {tuple(map(road.endpoint, range(3)))} == {tuple(asked.among or ()) for asked in picker.asked}
    assert {len(prompt)} == {len(body["prompt"]) for server in road.servers for _, body in server.seen}
    assert b'"model":"m"' in picker.asked[0].body.replace(b" ", b"")


def test_a_picker_cannot_lead_out_of_its_pool(road: Road, picker: Picker) -> None:
    """Whatever address it names: it is no choice, and the pool's own balancing chooses."""
    road.serve(picked(road, picker, 0, 1))

    answers = Counter[str]()
    for names in (road.endpoint(2), "169.254.169.254:80", "nonsense", f"{road.endpoint(2)},{road.endpoint(1)}"):
        picker.names = names
        answers[road.ask("m").text] += 1

    assert 4 == answers["first"] + answers["second"]
    assert [] == road.servers[2].seen


def test_the_next_of_a_list_is_tried_where_the_first_is_gone(road: Road, picker: Picker) -> None:
    """In its order; the caller hears nothing of it."""
    road.serve(picked(road, picker, 0, 1, 2, health_path="/up"))
    road.servers[0].stop()
    try:
        picker.names = f"{road.endpoint(0)},{road.endpoint(2)}"

        assert {"third"} == {road.ask("m").text for _ in range(5)}
    finally:
        road.servers[0].start()


def test_no_credential_and_no_name_of_ours_reaches_a_picker_and_no_header_of_its_a_server(road: Road, picker: Picker) -> None:
    """It is somebody else's program that reads prompts, and nothing more."""
    road.serve(picked(road, picker, 0) | {"aliases": ["a"]})
    picker.names = road.endpoint(0)

    assert "first" == road.ask("a", headers={"x-api-key": "callers-own-too", "x-session-id": "7"}).text

    [asked], [(headers, _)] = picker.asked, road.servers[0].seen
    assert "7" == asked.headers["x-session-id"]
    assert [] == [name for name in asked.headers if name in ("authorization", "x-api-key") or name.startswith("x-peaje-")]
    assert [] == [name for name in headers if "destination-endpoint" in name or name.startswith("x-peaje-")]


@pytest.mark.parametrize(("when_away", "status"), [("open", 200), ("close", 503)])
def test_what_becomes_of_requests_while_the_picker_is_away_is_the_documents_word(road: Road, when_away: str, status: int) -> None:
    """Nobody waits for it; when it is back it is asked again."""
    [port] = free_ports(1)
    with picking(port) as picker:
        road.serve(picked(road, picker, 0, 1, when_away=when_away))
        picker.names = road.endpoint(1)
        assert "second" == road.ask("m").text

    away = [road.ask("m").status_code for _ in range(6)]

    assert {status} == set(away)
    with picking(port) as picker:
        picker.names = road.endpoint(1)
        until(lambda: road.ask("m").text == "second" and picker.asked)


@pytest.mark.parametrize("fault", ["silent", "breaks"])
@pytest.mark.parametrize(("when_away", "status"), [("open", 200), ("close", 503)])
def test_a_picker_that_does_not_answer_is_away(road: Road, picker: Picker, fault: str, when_away: str, status: int) -> None:
    """Also one that has taken the whole body and then says nothing, or breaks off."""
    road.serve(picked(road, picker, 0, 1, when_away=when_away))
    picker.breaks = fault == "breaks"
    if fault == "silent":
        picker.answers.clear()

    answer = road.ask("m", "x" * 3_000_000)

    assert status == answer.status_code
    if status == 200:
        [(_, body)] = road.servers[0].seen + road.servers[1].seen
        assert 3_000_000 == len(body["prompt"])


@pytest.mark.parametrize("status", [429, 503])
def test_a_picker_may_refuse(road: Road, picker: Picker, status: int) -> None:
    """No server is asked."""
    road.serve(picked(road, picker, 0))
    picker.refuses = status

    answer = road.ask("m")

    assert (status, "1") == (answer.status_code, answer.headers["retry-after"])
    assert "upstream_unavailable" == answer.json()["error"]["code"]
    assert [] == road.servers[0].seen


def test_an_answer_may_take_longer_than_a_picker(road: Road, picker: Picker) -> None:
    """It has chosen; how long the server takes is not its business."""
    road.serve(picked(road, picker, 0, when_away="close"))
    picker.names = road.endpoint(0)
    first = road.servers[0]
    first.goes_on.clear()
    threading.Timer(2.5, first.goes_on.set).start()

    assert "first" == road.ask("m").text


def test_each_pool_by_weight_has_its_own_picker(road: Road, picker: Picker) -> None:
    """Or none; and a fallback answers whatever a picker named in a pool that is dead."""
    [port] = free_ports(1)
    with picking(port) as other:
        pools = [
            road.pool("a", 0, weight=1, endpoint_picker={"address": picker.address}),
            road.pool("b", 1, weight=1, endpoint_picker={"address": other.address}),
            road.pool("c", 2, fallback=True),
        ]
        road.serve({"name": "m", "pools": pools})
        picker.names, other.names = road.endpoint(0), road.endpoint(1)

        answers = Counter(road.ask("m").text for _ in range(60))
        assert (len(picker.asked), len(other.asked)) == (answers["first"], answers["second"])
        assert {"first", "second"} == set(answers)

        road.servers[0].stop()
        road.servers[1].stop()
        try:
            until(lambda: road.ask("m").text == "third")
        finally:
            road.servers[0].start()
            road.servers[1].start()
