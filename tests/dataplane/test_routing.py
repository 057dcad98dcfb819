# SPDX-License-Identifier: Apache-2.0
"""Models with several pools, on one installation with three engines: who answers, and what a caller sees while that changes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from chassis.contract import EXPRESS_ENVIRONMENT
from chassis.errors import Invalid
from control.apply import Desk, apply, diff
from control.envoy_admin import Admin
from control.laptop.binaries import find_envoy
from control.laptop.places import Places
from tests.dataplane.installation import REPOSITORY, Installation, Tenant, chat, free_ports, running
from tests.picker import picking
from tests.waiting import until

#: How seldom a correct canary may fail its test.
FALSE_ALARM = 1e-9


@dataclass(slots=True)
class Engine:
    """One fake engine, which can be killed and started again on its port."""

    name: str
    kind: str
    port: int
    truth_file: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.fake_engine", "--port", str(self.port), "--engine", self.kind,
                "--model", "tiny", "--model", "tiny-next", "--truth", str(self.truth_file),
            ],
            cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        until(self.answers, f"engine {self.name}")

    def answers(self) -> bool:
        """Whether it takes connections."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/v1/models", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """End it without warning, with all that it is at."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def truth(self) -> list[dict[str, Any]]:
        """What it did, oldest first."""
        return [json.loads(line) for line in self.truth_file.read_text().splitlines()] if self.truth_file.exists() else []


@dataclass(slots=True)
class Site:
    """The installation, its engines, and its models document."""

    road: Installation
    reader: Tenant
    engines: dict[str, Engine]
    document: Path
    desk: Desk

    def endpoint(self, name: str) -> str:
        """Where an engine listens."""
        return f"127.0.0.1:{self.engines[name].port}"

    def write(self, *models: dict[str, Any]) -> None:
        """Write a document of these models, and nothing else."""
        self.document.write_text(yaml.safe_dump({"models": list(models)}, sort_keys=False))

    def serving(self, *models: dict[str, Any]) -> None:
        """Put these models into force, as `peaje apply FILE` does: when it returns, each name is served."""
        self.write(*models)
        apply(self.desk, self.document)
        names = {name for model in models for name in (model["name"], *model.get("aliases", ()))}
        assert names <= self.listed()

    def listed(self) -> set[str]:
        """What extauth tells a caller of models."""
        answer = httpx.get(f"{self.road.url}/v1/models", headers={"authorization": f"Bearer {self.reader.key}"}, timeout=30)
        return {model["id"] for model in answer.raise_for_status().json()["data"]}

    def healthy(self, pool: str) -> int:
        """How many servers of a pool Envoy would choose now."""
        lines = httpx.get(f"http://127.0.0.1:{self.road.admin_port}/clusters", timeout=10).text.splitlines()
        flags = [line.rpartition("::")[2] for line in lines if line.startswith(f"{pool}::") and "::health_flags::" in line]
        return sum(flag == "healthy" for flag in flags)


    def under_way(self, pool: str) -> list[int]:
        """Requests under way at each server of a pool."""
        lines = httpx.get(f"http://127.0.0.1:{self.road.admin_port}/clusters", timeout=10).text.splitlines()
        return [int(line.rpartition("::")[2]) for line in lines if line.startswith(f"{pool}::") and "::rq_active::" in line]


def pool(site: Site, name: str, *engines: str, **more: Any) -> dict[str, Any]:
    """A pool of engines that call the model tiny."""
    fields = {"name": name, "engine": site.engines[engines[0]].kind, "endpoints": [site.endpoint(one) for one in engines]}
    return fields | {"model": "tiny"} | more


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two vLLM-like engines and one Dynamo-like."""
    directory = tmp_path_factory.mktemp("routing")
    ports = free_ports(3)
    engines = {
        name: Engine(name=name, kind=kind, port=port, truth_file=directory / f"{name}.jsonl")
        for (name, kind), port in zip((("a", "vllm"), ("b", "vllm"), ("c", "dynamo")), ports, strict=True)
    }
    try:
        for engine in engines.values():
            engine.start()
        document = directory / "models.yaml"
        first = {"name": "tiny", "engine": "vllm", "endpoints": [f"127.0.0.1:{ports[0]}"]}
        document.write_text(f"# Written by hand.\n{yaml.safe_dump({'models': [first]})}")
        environment = {"PEAJE_COLLECTOR_IDLE_SECONDS": "0.1", "PEAJE_MODELS": str(document)}
        with running(directory / "home", environment=environment) as road:
            admin = Admin(f"http://127.0.0.1:{road.admin_port}")
            yield Site(road, road.new_tenant("reader"), engines, document, Desk(places=Places(road.home), envoy=find_envoy(os.environ), admin=admin))
            assert [] == road.leaks()
            verified = road.cli("ledger", "verify")
            assert verified["ok"], verified
    finally:
        for engine in engines.values():
            if engine.process is not None:
                engine.process.kill()
                engine.process.wait()


@pytest.fixture(autouse=True)
def all_alive(site: Site) -> None:
    """Whatever the test before has killed."""
    for engine in site.engines.values():
        if not engine.answers():
            engine.start()


def ask_many(site: Site, tenant: Tenant, model: str, count: int, **fields: Any) -> list[httpx.Response]:
    """Ask so many times, eight at a time."""
    headers = {"authorization": f"Bearer {tenant.key}"}
    with httpx.Client(base_url=site.road.url, headers=headers, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: client.post("/v1/chat/completions", json=chat("hi", model=model, max_tokens=1, **fields)), range(count)))


def rows(site: Site, tenant: Tenant, count: int) -> list[dict[str, Any]]:
    """The tenant's rows with the pool that answered, once there are so many."""
    found: list[dict[str, Any]] = []

    def are_there() -> bool:
        found[:] = site.road.sql("select request_id, model, upstream, status, outcome, input_tokens, output_tokens from usage_event where tenant_id = %s", tenant.tenant_id)
        return len(found) >= count

    until(are_there, f"{count} rows")
    return found


def bounds(count: int, share: float) -> tuple[int, int]:
    """The least and the most of *count* that a share may get, but for a false alarm on either side."""
    chances = [
        math.exp(math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * math.log(share) + (count - k) * math.log1p(-share))
        for k in range(count + 1)
    ]
    below, least = 0.0, 0
    while below + chances[least] < FALSE_ALARM:
        below, least = below + chances[least], least + 1
    above, most = 0.0, count
    while above + chances[most] < FALSE_ALARM:
        above, most = above + chances[most], most - 1
    return least, most


def test_a_canary_gets_its_share_and_rows_say_who_answered(site: Site) -> None:
    """One in ten of a thousand, by what rows say and by what the engine itself saw; all are rows of one model."""
    site.serving({"name": "split", "pools": [pool(site, "stable", "a", "b", weight=90), pool(site, "canary", "c", weight=10, model="tiny-next")]})
    tenant = site.road.new_tenant("canary")
    before = {name: len(engine.truth()) for name, engine in site.engines.items()}

    answers = ask_many(site, tenant, "split", 1000)

    assert {200} == {answer.status_code for answer in answers}
    found = rows(site, tenant, 1000)
    answered = Counter(row["upstream"] for row in found)
    least, most = bounds(1000, 0.1)
    assert least <= answered["pool/canary/split"] <= most
    assert {"split"} == {row["model"] for row in found}
    news = {name: engine.truth()[before[name] :] for name, engine in site.engines.items()}
    assert (answered["pool/canary/split"], answered["pool/stable/split"]) == (len(news["c"]), len(news["a"]) + len(news["b"]))
    # Each server was asked for the model by the name that it has for it.
    assert ({"tiny-next"}, {"tiny"}) == ({one["model"] for one in news["c"]}, {one["model"] for one in news["a"] + news["b"]})
    assert min(len(news["a"]), len(news["b"])) > 300


def test_a_pool_that_is_dead_is_503_in_the_dialect_and_costs_nothing(site: Site) -> None:
    """With retry-after; nothing is held of the tenant's tokens afterwards, and its requests are rows of no tokens."""
    site.serving({"name": "tiny", "pools": [pool(site, "only", "c")]}, {"name": "other", "pools": [pool(site, "only", "a")]})
    tenant = site.road.new_tenant("dead")
    # Of a month, so that nothing comes back by itself.
    limited = site.road.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json={"monthly_tokens": 10_000})
    assert limited.is_success, limited.text
    until(lambda: _remaining(site, tenant) is not None, "the limit acts")
    site.engines["c"].kill()
    until(lambda: site.healthy("pool/only/tiny") == 0, "the pool is found dead")

    openai = site.road.post(tenant, json=chat(model="tiny", max_tokens=3000))
    anthropic = site.road.post(tenant, "/v1/messages", json=chat(model="tiny", max_tokens=3000))

    assert (503, 503) == (openai.status_code, anthropic.status_code)
    assert ("1", "1") == (openai.headers["retry-after"], anthropic.headers["retry-after"])
    assert "upstream_unavailable" == openai.json()["error"]["code"]
    assert ("error", "upstream_unavailable") == (anthropic.json()["type"], anthropic.json()["error"]["code"])
    until(lambda: (_remaining(site, tenant) or 0) > 9_000, "what was held is given back")
    refused = [row for row in rows(site, tenant, 4) if row["model"] == "tiny"]
    assert [(503, 0, 0, None)] * 2 == [(row["status"], row["input_tokens"], row["output_tokens"], row["upstream"]) for row in refused]
    site.engines["c"].start()
    until(lambda: site.road.post(tenant, json=chat(model="tiny")).status_code == 200, "the pool is back")


def _remaining(site: Site, tenant: Tenant) -> int | None:
    """What is left of the tenant's tokens, by an answer that costs two; None while no limit acts."""
    answer = site.road.post(tenant, json=chat("hi", model="other", max_tokens=1))
    assert 200 == answer.status_code, answer.text
    told = answer.headers.get("x-ratelimit-remaining-tokens")
    return None if told is None else int(told)


def test_a_fallback_answers_while_the_pool_is_dead_and_no_longer(site: Site) -> None:
    """From the first request after the death; one row each, which names who answered."""
    site.serving({"name": "tiny", "pools": [pool(site, "main", "a"), pool(site, "rented", "c", model="tiny-next", fallback=True)]})
    tenant = site.road.new_tenant("fallback")
    assert 200 == site.road.post(tenant, json=chat(model="tiny")).status_code
    site.engines["a"].kill()

    answers = ask_many(site, tenant, "tiny", 50)

    assert {200} == {answer.status_code for answer in answers}
    answered = Counter(row["upstream"] for row in rows(site, tenant, 51))
    assert {"pool/main/tiny": 1, "pool/rented/tiny": 50} == answered
    site.engines["a"].start()
    until(lambda: site.healthy("pool/main/tiny") == 1, "the pool is back")
    assert {200} == {answer.status_code for answer in ask_many(site, tenant, "tiny", 10)}
    assert 11 == Counter(row["upstream"] for row in rows(site, tenant, 61))["pool/main/tiny"]


@dataclass(slots=True)
class Load:
    """Callers who ask one after the other until told to stop."""

    site: Site
    tenant: Tenant
    #: What they call the model, which may change while they ask.
    model: str
    failures: list[str] = field(default_factory=list)
    count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Begin, with four."""
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, with every answer heard."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self, more: int = 40) -> None:
        """Wait until so many more are answered."""
        wanted = self.count + more
        until(lambda: self.count >= wanted, "callers are answered")

    def _ask(self) -> None:
        with httpx.Client(base_url=self.site.road.url, headers={"authorization": f"Bearer {self.tenant.key}"}, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json=chat("hi", model=self.model, max_tokens=1))
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                except httpx.HTTPError as exc:
                    self.failures.append(repr(exc))
                with self._lock:
                    self.count += 1


@dataclass(slots=True)
class Stream:
    """A stream under way: its lines as they come."""

    lines: list[str] = field(default_factory=list)
    error: str | None = None
    _thread: threading.Thread | None = None

    @classmethod
    def begin(cls, site: Site, tenant: Tenant, model: str, *, tokens: int, chunk_ms: int) -> Stream:
        """Begin it, and wait for its first piece."""
        stream = cls()
        stream._thread = threading.Thread(target=stream._read, args=(site, tenant, model, tokens, chunk_ms))
        stream._thread.start()
        until(lambda: bool(stream.lines) or stream.error is not None, "the stream begins")
        return stream

    @property
    def is_whole(self) -> bool:
        """Whether it came to its end."""
        return self.error is None and "data: [DONE]" in self.lines

    def end(self) -> Stream:
        """Wait for its end, whichever."""
        assert self._thread is not None
        self._thread.join(timeout=60)
        return self

    def _read(self, site: Site, tenant: Tenant, model: str, tokens: int, chunk_ms: int) -> None:
        headers = {"authorization": f"Bearer {tenant.key}", "x-fake-engine": json.dumps({"chunk_ms": chunk_ms})}
        body = chat("hi", model=model, max_tokens=tokens, stream=True)
        try:
            with httpx.stream("POST", f"{site.road.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
                if answer.status_code != 200:
                    self.error = str(answer.status_code)
                for line in answer.iter_lines():
                    self.lines.append(line)
        except httpx.HTTPError as exc:
            self.error = repr(exc)


def test_a_killed_engine_breaks_its_own_streams_and_nothing_else(site: Site) -> None:
    """What was sent to it and not answered is answered by the other; it gets work again when it is back; one row each."""
    model = {"name": "tiny", "retry": "unanswered", "pools": [pool(site, "main", "a", "b", slow_start_seconds=0)]}
    site.serving(model)
    tenant = site.road.new_tenant("killed")
    streams: list[Stream] = []
    while min(site.under_way("pool/main/tiny")) < 2:
        streams.append(Stream.begin(site, tenant, "tiny", tokens=200, chunk_ms=50))

    with Load(site, tenant, "tiny") as load:
        load.goes_on()
        site.engines["b"].kill()
        load.goes_on()
        until(lambda: site.healthy("pool/main/tiny") == 1, "the dead engine is left out")
        site.engines["b"].start()
        until(lambda: site.healthy("pool/main/tiny") == 2, "the engine is back")
        before = len(site.engines["b"].truth())
        until(lambda: len(site.engines["b"].truth()) > before + 10, "the engine has work again")

    ended = [stream.end() for stream in streams]
    assert [] == load.failures
    whole = sum(stream.is_whole for stream in ended)
    assert 2 <= whole <= len(streams) - 2
    count = load.count + len(streams)
    found = rows(site, tenant, count)
    assert count == len(found) == len({row["request_id"] for row in found})
    assert len(streams) - whole == sum(row["outcome"] != "ok" for row in found)


def test_an_alias_is_renamed_and_moved_live_while_streams_go_on(site: Site) -> None:
    """No request fails: the new name is served when `apply` returns, and the old one until callers have left it."""
    first = {"name": "first", "aliases": ["quick"], "pools": [pool(site, "main", "a")]}
    second = {"name": "second", "pools": [pool(site, "main", "c", model="tiny-next")]}
    site.serving(first, second)
    tenant = site.road.new_tenant("alias")
    stream = Stream.begin(site, tenant, "quick", tokens=300, chunk_ms=50)

    with Load(site, tenant, "quick") as load:
        load.goes_on()
        site.serving(first | {"aliases": ["quick", "fast"]}, second)
        load.model = "fast"
        load.goes_on()
        # Its pool is made anew as well: other settings, the same servers.
        first["pools"] = [pool(site, "main", "a", slow_start_seconds=5)]
        site.serving(first | {"aliases": ["fast"]}, second)
        load.goes_on()
        # To another model, whose pools were not changed; then the first model goes, with its pool and a stream on it.
        site.serving(first | {"aliases": []}, second | {"aliases": ["fast"]})
        load.goes_on()
        site.serving(second | {"aliases": ["fast"]})
        load.goes_on()

    assert [] == load.failures
    assert 404 == site.road.post(tenant, json=chat(model="quick")).status_code
    assert "model_not_found" == site.road.post(tenant, json=chat(model="first")).json()["error"]["code"]
    assert stream.end().is_whole, stream.error
    answered = Counter((row["model"], row["upstream"]) for row in rows(site, tenant, load.count + 1) if row["outcome"] == "ok")
    assert {("first", "pool/main/first"), ("second", "pool/main/second")} == set(answered)
    listed = httpx.get(f"{site.road.url}/v1/models", headers={"authorization": f"Bearer {tenant.key}"}).json()
    assert ["second", "fast"] == [one["id"] for one in listed["data"]]


def test_a_picker_chooses_on_both_lanes_and_what_it_refuses_costs_nothing(site: Site) -> None:
    """Each request is picked for, also one that nobody else is asked about; its body is as the caller and the tap left it."""
    [port] = free_ports(1)
    with picking(port) as picker:
        site.serving({"name": "tiny", "pools": [pool(site, "main", "a", "b", endpoint_picker={"address": picker.address})]})
        tenant = site.road.new_tenant("picked")
        before = {name: len(site.engines[name].truth()) for name in "ab"}
        picker.names = site.endpoint("b")
        asked = site.road.asked_extauth()

        answers = ask_many(site, tenant, "tiny", 40)
        asked = site.road.asked_extauth() - asked
        picker.refuses = 429
        refused = [site.road.post(tenant, path, json=chat(model="tiny", max_tokens=9)) for path in ("/v1/chat/completions", "/v1/messages")]

        assert {200} == {answer.status_code for answer in answers}
        assert (0, 40) == tuple(len(site.engines[name].truth()) - before[name] for name in "ab")
        assert 42 == len(picker.asked)
        assert os.environ.get(EXPRESS_ENVIRONMENT) == "off" or asked < 40
        assert [(429, "1", "upstream_unavailable")] * 2 == [(one.status_code, one.headers["retry-after"], one.json()["error"]["code"]) for one in refused]
        found = rows(site, tenant, 42)
        assert Counter({(200, "pool/main/tiny"): 40, (429, None): 2}) == Counter((row["status"], row["upstream"]) for row in found)
        assert {0} == {row["input_tokens"] + row["output_tokens"] for row in found if row["status"] == 429}


def test_a_stream_outlives_changes_of_all_that_it_began_with(site: Site) -> None:
    """Its route, its pool, its server, its model's name: one row of the model that it asked for, whole to its last token."""
    model = {"name": "long", "pools": [pool(site, "main", "a", "b")]}
    site.serving(model)
    tenant = site.road.new_tenant("long")
    streams = [Stream.begin(site, tenant, "long", tokens=250, chunk_ms=110) for _ in range(4)]
    kept = {"name": "kept", "pools": [pool(site, "main", "c")]}
    changes: list[list[dict[str, Any]]] = [
        [kept],
        [model | {"pools": [pool(site, "main", "a", "b", requests_max=7, slow_start_seconds=0)]}],
        [model | {"aliases": ["longer"], "pools": [pool(site, "other", "c")]}, kept],
        [model | {"retry": "unanswered", "pools": [pool(site, "main", "b"), pool(site, "canary", "c", model="tiny-next")]}],
    ]

    made = 0
    while not any(stream.is_whole for stream in streams):
        site.serving(*changes[made % len(changes)])
        made += 1

    assert [(None, True)] * 4 == [(stream.end().error, stream.is_whole) for stream in streams]
    assert made > len(changes)  # the last one may have come after their end
    found = rows(site, tenant, 4)
    assert [("long", "pool/main/long", "ok", 250)] * 4 == [(row["model"], row["upstream"], row["outcome"], row["output_tokens"]) for row in found]


def test_what_is_wrong_is_refused_with_its_line_and_changes_nothing(site: Site) -> None:
    """By us, by Envoy; files and traffic are as they were, and `diff` says what was meant."""
    site.serving({"name": "tiny", "pools": [pool(site, "main", "a", "b")]})
    tenant = site.road.new_tenant("refused")
    directory = site.road.home / "envoy"
    before = {path.name: path.read_text() for path in directory.glob("*.yaml")}

    site.write({"name": "tiny", "engine": "vlm", "endpoints": [site.endpoint("a")]})
    unknown = site.road.run("apply", str(site.document))
    with pytest.raises(Invalid, match="secrets/none is missing"):
        site.serving({"name": "tiny", "pools": [pool(site, "main", "a", credential_file="secrets/none")]})

    assert 2 == unknown.returncode
    assert f"{site.document}:3: models[0].engine: must be one of vllm, dynamo, trtllm, openai\n" == unknown.stderr
    assert before == {path.name: path.read_text() for path in directory.glob("*.yaml")}
    assert 200 == site.road.post(tenant, json=chat(model="tiny")).status_code

    assert [] == diff(site.desk, None)
    edited = directory / "models.yaml"
    edited.write_text(before["models.yaml"].replace(site.endpoint("b"), site.endpoint("c")))
    shown = site.road.run("diff", "--json")
    port = "load_assignment.endpoints[0].lb_endpoints[1].endpoint.address.socket_address.port_value"
    assert 1 == shown.returncode
    assert [
        {"resource": "cluster pool/main/tiny", "place": port, "running": str(site.engines["b"].port), "files": str(site.engines["c"].port)}
    ] == json.loads(shown.stdout)["differences"]
    applied = apply(site.desk, None)
    assert ["cluster pool/main/tiny"] == [change.resource for change in applied.changes]
    assert [] == diff(site.desk, None)

    script = directory / "pool.lua"
    script.write_text(script.read_text() + "-- edited\n")
    assert [f"file {script}"] == [one.resource for one in diff(site.desk, None)]
    script.write_text(script.read_text().removesuffix("-- edited\n"))
    assert [] == diff(site.desk, None)
