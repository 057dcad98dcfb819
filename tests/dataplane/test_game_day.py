# SPDX-License-Identifier: Apache-2.0
"""
The game day: cause a fault, see its alerts fire on what was scraped, type the runbook's first line, mend it, see them clear.

Time is told in lapse (tests/lapse.py); values, processes and commands are real. Some of it runs always, all of it with
--chaos. Each alert's bound is judged on made-up samples in tests/house/test_rules.py besides.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from chassis.keys import mint
from control.laptop.places import MARKER
from control.monitoring.rules import alerts, section
from tests.dataplane.installation import REPOSITORY, VISIBLE_SECONDS, Installation, Tenant, chat, free_ports, running
from tests.house.test_rules import runbook
from tests.lapse import Lapse, until, wanted_by

ALERTS = {alert.name: alert for alert in alerts()}
#: Of a decision that is late.
_STANDS_SECONDS = 0.15
#: Longer than usage may take to be visible, and than a change may.
_ROW_WAITS_SECONDS, _CHANGE_WAITS_SECONDS = 5.5, 1.5
#: Of a disk of its own; what a collector and Envoy write meanwhile is a small part.
_DISK_MIB = 64


@dataclass(slots=True)
class Stage:
    """An installation under watch, and callers of each kind."""

    road: Installation
    lapse: Lapse
    #: Asked each time: a limit that is never lent.
    limited: Tenant
    usual: Tenant
    notes: dict[str, Any] = field(default_factory=dict)

    def serve(self) -> None:
        """One request as usual, whatever comes of it."""
        with contextlib.suppress(httpx.HTTPError):
            self.road.post(self.usual, json=chat())

    def count(self) -> None:
        """One request that needs the counter store."""
        with contextlib.suppress(httpx.HTTPError):
            self.road.post(self.limited, json=chat())

    def ask_as_nobody(self) -> None:
        """One request whose key is whole and unknown: extauth must read Postgres."""
        key = mint("live", secrets.token_bytes).key
        with contextlib.suppress(httpx.HTTPError):
            self.road.post(None, json=chat(), headers={"authorization": f"Bearer {key}"})


#: What shows metrics.
PARTS = ("extauth", "ratelimit", "metering", "collector", "beacon", "events")
Cause = Callable[[Stage], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One fault."""

    #: What must fire.
    alerts: tuple[str, ...]
    cause: Cause
    #: Traffic between two scrapes.
    traffic: Callable[[Stage], None]
    #: A word that the runbook's first command must say while the fault is there.
    said: str
    #: Minutes of quiet after which nothing of it fires.
    clears_minutes: float = 2.0
    is_short: bool = False
    #: Traffic between two scrapes once it is mended.
    mended: Callable[[Stage], None] = Stage.serve

    def __str__(self) -> str:
        return self.alerts[0]


def frozen(part: str) -> Cause:
    """Stop a part and all its children where they stand."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[None]:
        pids = _family(stage.road.pid(part))
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            _wait_well(stage)

    return cause


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def _wait_well(stage: Stage) -> None:
    deadline = time.monotonic() + 2 * VISIBLE_SECONDS
    while not stage.road.is_healthy() or stage.road.post(stage.limited, json=chat()).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def _slow_ratelimit(stage: Stage) -> Iterator[None]:
    stage.notes["pid"] = stage.road.pid("ratelimit")
    yield


def _ask_while_ratelimit_stands(stage: Stage) -> None:
    """Shorter than Envoy waits for a decision, longer than is promised."""
    os.kill(stage.notes["pid"], signal.SIGSTOP)
    caller = threading.Thread(target=stage.count)
    try:
        caller.start()
        time.sleep(_STANDS_SECONDS)
    finally:
        os.kill(stage.notes["pid"], signal.SIGCONT)
    caller.join()


@contextmanager
def _contradicted(stage: Stage) -> Iterator[None]:
    """A second record of the same request, with another count, is in the journal."""
    stage.serve()
    [row] = stage.road.rows(stage.usual, 1)[-1:]
    journal = stage.road.home / "journal/journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if row["request_id"] in line and '"DownstreamEnd"' in line]
    record = json.loads(lines[-1])
    record["usage"]["output"] += 1
    with journal.open("a") as file:
        file.write(json.dumps(record, separators=(",", ":")) + "\n")
    yield
    for one in stage.road.cli("reconcile", "list", "--state", "open")["exceptions"]:
        stage.road.cli("reconcile", "explain", str(one["exception_id"]), "--note", "a game day")


@contextmanager
def _damaged(stage: Stage) -> Iterator[None]:
    with (stage.road.home / "journal/starts.jsonl").open("a") as file:
        file.write("no record\n")
    yield


@contextmanager
def _bad_rules(stage: Stage) -> Iterator[None]:
    path = stage.road.home / "ratelimit.d/game-day.yaml"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text("domain: [\n")
    try:
        yield
    finally:
        path.unlink()


@contextmanager
def _bad_identity(stage: Stage) -> Iterator[None]:
    path = stage.road.home / "identity.yaml"
    before = path.read_text()
    path.write_text("issuers: nonsense\n")
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def _locked_ledger(stage: Stage) -> Iterator[None]:
    """A lock on the table of rows, as a migration by hand takes it."""
    with stage.road.database() as connection:
        stage.notes["lock"] = connection
        _lock(stage)
        yield
        connection.execute("rollback")


def _lock(stage: Stage) -> None:
    stage.notes["lock"].execute("begin")
    stage.notes["lock"].execute("lock table usage_event in share row exclusive mode")


def _serve_while_locked(stage: Stage) -> None:
    """A row comes late, and another one waits."""
    before = len(stage.road.rows(stage.usual, 0))
    stage.serve()
    time.sleep(_ROW_WAITS_SECONDS)
    stage.notes["lock"].execute("rollback")
    assert len(stage.road.rows(stage.usual, before + 1)) > before
    _lock(stage)
    stage.serve()
    time.sleep(_ROW_WAITS_SECONDS)


@contextmanager
def _stalling_postgres(stage: Stage) -> Iterator[None]:
    """It answers for a moment only, again and again."""
    stage.notes["pids"] = _family(stage.road.pid("postgres"))
    _signal(stage, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(stage, signal.SIGCONT)
        _wait_well(stage)


def _wait_for_stalled_pulses(stage: Stage) -> None:
    time.sleep(_CHANGE_WAITS_SECONDS)
    _signal(stage, signal.SIGCONT)
    time.sleep(1.0)
    stage.notes["pids"] = _family(stage.road.pid("postgres"))
    _signal(stage, signal.SIGSTOP)


def _signal(stage: Stage, number: signal.Signals) -> None:
    for pid in stage.notes["pids"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def _past_the_gateway(stage: Stage) -> Iterator[None]:
    """Somebody has found the model server's own port."""
    [model] = yaml.safe_load((stage.road.home / "envoy/models.yaml").read_text())["models"]
    stage.notes["engine"] = f"http://{model['endpoints'][0]}/v1/chat/completions"
    yield


def _ask_the_engine_itself(stage: Stage) -> None:
    httpx.post(stage.notes["engine"], json=chat(), timeout=30).raise_for_status()
    # A quiet moment takes two seconds, and is looked for each twenty.
    time.sleep(8)


@contextmanager
def _unknown_issuer(stage: Stage) -> Iterator[None]:
    """An issuer whose keys cannot be fetched."""
    path = stage.road.home / "identity.yaml"
    before = path.read_text()
    document = yaml.safe_load(before)
    [port] = free_ports(1)
    document["issuers"].append({
        "name": "gone", "kind": "jwt", "issuer": f"http://127.0.0.1:{port}", "jwks_url": f"http://127.0.0.1:{port}/keys",
        "audiences": ["peaje"], "algorithms": ["ES256"], "tenants": ["acme"], "tenant": "acme",
    })  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def _failing_tap(stage: Stage) -> Iterator[None]:
    """Somebody has edited a script, and Envoy was started with it."""
    path = stage.road.home / "envoy/tap.lua"
    before = path.read_text()
    path.write_text(re.sub(r"(?<=^function envoy_on_request\(handle\)$)", "\n  local nothing = nil\n  nothing()", before, count=1, flags=re.MULTILINE))
    assert path.read_text() != before
    _start_envoy_again(stage)
    try:
        yield
    finally:
        path.write_text(before)
        _start_envoy_again(stage)


def _start_envoy_again(stage: Stage) -> None:
    stage.road.wait_restarted("envoy", stage.road.kill("envoy"))
    _wait_well(stage)


def filled(percent: int) -> Cause:
    """Somebody else's file takes the journal's disk up to *percent*."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[None]:
        path = stage.road.home / "journal/somebody-elses"
        status = os.statvfs(path.parent)
        free = status.f_bavail * status.f_frsize
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - status.f_blocks * status.f_frsize * (100 - percent) // 100)
        try:
            yield
        finally:
            path.unlink()

    return cause


@contextmanager
def _as_it_is(stage: Stage) -> Iterator[None]:
    yield


def _fail_at_the_engine(stage: Stage) -> None:
    stage.road.post(stage.usual, json=chat(), fault={"error_before": 500})


def _without_usage(stage: Stage) -> None:
    stage.road.post(stage.usual, json=chat(stream=True), fault={"usage": "missing"})


def _oddly_shaped(stage: Stage) -> None:
    with contextlib.suppress(httpx.HTTPError):
        stage.road.post(stage.usual, json=chat(stream=True, stream_options={"include_usage": False, "chunk_size": 1}))


SCENES = (
    Scene(alerts=("PeajeStoreAway",), cause=frozen("valkey"), traffic=Stage.count, said="store", is_short=True),
    Scene(alerts=("PeajeUsageDisputed",), cause=_contradicted, traffic=lambda _: time.sleep(0.2), said="conflict", is_short=True),
    Scene(alerts=("PeajeRulesRefused",), cause=_bad_rules, traffic=Stage.serve, said="game-day.yaml", is_short=True),
    # Before the scenes whose usage is estimated: their ledger does differ from the engine.
    Scene(
        alerts=("PeajeLedgerDrifts",), cause=_past_the_gateway, traffic=_ask_the_engine_itself, said="differ in",
        mended=lambda _: time.sleep(8),
    ),
    Scene(
        alerts=("PeajeServiceDown", "PeajeDecisionsFail", "PeajeDecisionsFailSlowly", "PeajeProcessSilent"), cause=frozen("extauth"),
        traffic=Stage.ask_as_nobody, said="extauth", clears_minutes=6 * 60 + 1,
    ),
    Scene(
        alerts=("PeajePostgresAway", "PeajeListenerDeaf", "PeajeCollectorBehind"), cause=frozen("postgres"),
        traffic=Stage.ask_as_nobody, said="Postgres",
    ),
    Scene(
        alerts=("PeajeAddsLatency", "PeajeAddsLatencySlowly"), cause=_slow_ratelimit, traffic=_ask_while_ratelimit_stands,
        said="TENANT", clears_minutes=6 * 60 + 1,
    ),
    Scene(alerts=("PeajeJournalDamaged",), cause=_damaged, traffic=Stage.serve, said="starts", clears_minutes=11),
    Scene(alerts=("PeajeIdentityRefused",), cause=_bad_identity, traffic=Stage.serve, said="identity.yaml", clears_minutes=11),
    Scene(alerts=("PeajeEngineFails",), cause=_as_it_is, traffic=_fail_at_the_engine, said="TENANT", clears_minutes=7),
    Scene(alerts=("PeajeUsageInexact",), cause=_as_it_is, traffic=_without_usage, said="counted", clears_minutes=12),
    Scene(alerts=("PeajeMeteringSkipped",), cause=frozen("metering"), traffic=_oddly_shaped, said="metering", clears_minutes=11),
    Scene(
        alerts=("PeajeUsageLate", "PeajeUsageLateSlowly"), cause=_locked_ledger, traffic=_serve_while_locked, said="Rows wait on disk",
        clears_minutes=6 * 60 + 1,
    ),
    Scene(
        alerts=("PeajeChangesLate", "PeajeChangesLateSlowly"), cause=_stalling_postgres, traffic=_wait_for_stalled_pulses,
        said="Postgres", clears_minutes=6 * 60 + 1,
    ),
    Scene(alerts=("PeajeKeySetsOld",), cause=_unknown_issuer, traffic=lambda _: time.sleep(0.2), said="gone"),
    Scene(alerts=("PeajeScriptFails",), cause=_failing_tap, traffic=Stage.serve, said="tap.lua failed", clears_minutes=6),
    Scene(alerts=("PeajeWitnessDeaf",), cause=frozen("metering"), traffic=Stage.serve, said="metering", clears_minutes=11),
)
#: On an installation whose journal has a small disk of its own.
SCENES_OF_A_DISK = (
    Scene(alerts=("PeajeDiskFills",), cause=filled(85), traffic=Stage.serve, said="85 % used", clears_minutes=0),
    Scene(alerts=("PeajeRoadClosed",), cause=filled(96), traffic=Stage.serve, said="96 % used", clears_minutes=0),
)  # fmt: skip


def play(scene: Scene, road: Installation) -> None:
    """All of one scene."""
    stage = Stage(road=road, lapse=Lapse(road, wanted_by(alerts())), limited=road.new_tenant("limited"), usual=road.new_tenant("usual"))
    limits = {"monthly_tokens": 1_000_000_000}
    road.control("PUT", f"/v1/tenants/{stage.limited.tenant_id}/limits", json=limits).raise_for_status()
    watched = [ALERTS[name] for name in scene.alerts]
    lapse = stage.lapse

    until(lapse, lambda: lapse.count >= 4, between=stage.serve)
    assert [] == [alert.name for alert in watched if lapse.fires(alert)]
    with scene.cause(stage):
        until(lapse, lambda: all(map(lapse.fires, watched)), between=lambda: scene.traffic(stage))
        command = shlex.split(runbook(REPOSITORY)[section(watched[0])])
        said = road.run(*command)
    assert scene.said in said.stdout + said.stderr, said.stdout + said.stderr
    until(lapse, lambda: not any(_stays(lapse, alert.name) for alert in watched), between=lambda: _mended(stage, scene))


def _stays(lapse: Lapse, name: str) -> bool:
    """Whether it fires although its cause is gone; those that look back are asked once their window is over."""
    return bool(lapse.fires(ALERTS[name]))


def _mended(stage: Stage, scene: Scene) -> None:
    """As usual again: what the window still holds is let pass."""
    scene.mended(stage)
    stage.lapse.scrape()
    stage.lapse.quiet(scene.clears_minutes)


def test_every_alert_has_a_scene() -> None:
    """None that nobody has ever seen fire."""
    assert set(ALERTS) == {name for scene in (*SCENES, *SCENES_OF_A_DISK) for name in scene.alerts}


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation whose journal has a disk of its own, of memory."""
    home = tmp_path_factory.mktemp("cramped")
    (home / MARKER).touch()  # a directory is laid into it before the first start
    journal = home / "journal"
    journal.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m,mode=700", "tmpfs", str(journal)], check=True)
    try:
        ports = dict(zip(PARTS, free_ports(len(PARTS)), strict=True))
        settings = {f"PEAJE_{part.upper()}_METRICS_PORT": str(port) for part, port in ports.items()}
        with running(home, "--engine", "fake", environment=settings) as installation:
            installation.metrics_ports = ports
            yield installation
    finally:
        subprocess.run(["umount", str(journal)], check=True)


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene.is_short], ids=str)
def test_a_fault_fires_its_alert_and_its_mending_clears_it(road: Installation, scene: Scene) -> None:
    """Those that take seconds."""
    play(scene, road)


@pytest.mark.chaos
@pytest.mark.parametrize("scene", [scene for scene in SCENES if not scene.is_short], ids=str)
def test_the_whole_game_day(road: Installation, scene: Scene) -> None:
    """Those that stop what others on the road need, or take longer."""
    play(scene, road)


@pytest.mark.chaos
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own can only be mounted by root")
@pytest.mark.parametrize("scene", SCENES_OF_A_DISK, ids=str)
def test_a_disk_that_fills_is_told_of_before_the_road_closes_and_when_it_is(cramped: Installation, scene: Scene) -> None:
    """Both open again by themselves."""
    play(scene, cramped)
