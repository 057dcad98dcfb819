# SPDX-License-Identifier: Apache-2.0
"""
What all tests share: which of them run, and the installations that they run against.

Long ones are asked for: `./peaje test --chaos` adds the kill storms, `--soak` what takes an hour, `--images` whole
builds of the images. What is true of a request whether or not Envoy's workers remember who called runs on an installation
with the express lane, and again on one without. `--express off` runs every installation without it, and leaves out what
tests the lane itself. What is deselected is said at the end of the run.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import httpx._transports.default
import pytest
import structlog
from hypothesis import settings

from bench.revocation import SEVERAL
from chassis.contract import EXPRESS_ENVIRONMENT
from tests.chaos.storm import REQUESTS_PER_ENVOY_DEATH
from tests.dataplane.installation import Installation, Tenant, free_ports, running
from tests.hostile.guessing import UNKNOWN_PER_MINUTE
from tests.otlp import collecting_traces

#: Marker and option of the tests that only run when asked for, and what they are.
ON_REQUEST = {"chaos": "kill storms", "soak": "hours of load", "images": "whole builds of the images, as root"}
#: Fixtures of installations that many files share. One process has each, in this order; of a test that needs two, the first is its group.
SHARED = ("road", "fleet", "small", "dynamo")
#: Marker and option: `express("on", "off")` is run with the express lane and again without, bare `express` as the option says.
LANE = "express"
_LANE_TESTS = "what only the express lane does"
#: In which the head of a request has to come to `small`, and twice that for the whole of it.
SENDING_SECONDS = 3
#: Settings of whoever runs the tests that say where programs are; all others would change what is tested.
_KEPT_SETTINGS = ("PEAJE_ENV", "PEAJE_PYTHON", "PEAJE_ENVOY_BIN", "PEAJE_VALKEY_BIN", "PEAJE_POSTGRES_BIN", "PEAJE_PROMTOOL")
_LEFT_OUT = pytest.StashKey[dict[str, int]]()

# Events of what runs in this process, also from threads of a test that is over, never mix with what a test reads.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))

# Each client that is made reads the machine's 140 certificates, 30 ms of a processor; nearly all speak to loopback in clear.
httpx._transports.default.create_ssl_context = functools.cache(httpx._transports.default.create_ssl_context)  # type: ignore[attr-defined]

# A busy machine is no failure: no example is judged by its time.
settings.register_profile("peaje", deadline=None)
settings.load_profile("peaje")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `./peaje test` take --chaos, --soak and --express."""
    group = parser.getgroup("peaje")
    for name, what in ON_REQUEST.items():
        group.addoption(f"--{name}", action="store_true", help=f"also run the tests marked {name}: {what}")
    group.addoption("--storm-requests", type=int, default=1_000_000, help="requests of the longest kill storm")
    group.addoption(
        "--storm-requests-per-envoy-death", type=int, default=REQUESTS_PER_ENVOY_DEATH, help="how rarely Envoy is killed in it"
    )
    group.addoption("--wiped-requests", type=int, default=100_000, help="requests while the counter store is wiped")
    group.addoption("--delivered-exchanges", type=int, default=1_000_000, help="exchanges that are delivered again and again")
    group.addoption("--storm-seed", type=int, default=1, help="what chooses its deaths and misbehaviour")
    group.addoption("--soak-seconds", type=int, default=600, help="how long memory is looked at; keys and garbage are as many as fit")
    group.addoption(f"--{LANE}", choices=("on", "off"), default="on", help="whether Envoy's workers remember decisions")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers, and forget the settings of whoever runs the tests."""
    for name, what in ON_REQUEST.items():
        config.addinivalue_line("markers", f"{name}: {what}; only with --{name}")
    config.addinivalue_line("markers", f"{LANE}(*lanes): with the express lane on, off, or with each in turn; with none named, as --{LANE} says")
    for name in [name for name in os.environ if name.startswith("PEAJE_") and name not in _KEPT_SETTINGS]:
        del os.environ[name]
    if config.getoption(LANE) == "off":
        os.environ[EXPRESS_ENVIRONMENT] = "off"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each lane that its marker names; the first has the name of the test itself."""
    if "express_lane" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker(LANE)
        chosen = metafunc.config.getoption(LANE)
        first, *others = marker.args if marker and marker.args and chosen == "on" else (chosen,)
        lanes = [pytest.param(first, id=pytest.HIDDEN_PARAM), *(pytest.param(other, id=f"lane {other}") for other in others)]
        metafunc.parametrize("express_lane", lanes, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook as well
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what was not asked for, and remember how many of each."""
    left_out: dict[str, int] = {}
    kept: list[pytest.Item] = []
    deselected: list[pytest.Item] = []
    for item in items:
        missing = [name for name in ON_REQUEST if item.get_closest_marker(name) and not config.getoption(name)]
        marker = item.get_closest_marker(LANE)
        if marker and marker.args == ("on",) and config.getoption(LANE) == "off":
            missing.append(LANE)
        for name in missing:
            left_out[name] = left_out.get(name, 0) + 1
        (deselected if missing else kept).append(item)
    items[:] = sorted(kept, key=_turn)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    config.stash[_LEFT_OUT] = left_out
    if deselected:
        config.hook.pytest_deselected(items=deselected)


def _shared(item: pytest.Item) -> str | None:
    """The first of the installations that many share which it needs, or that `place` names. A module may have its own of that name."""
    names, module = {*getattr(item, "fixturenames", ()), _parameters(item).get("place")}, getattr(item, "module", None)
    return next((name for name in SHARED if name in names and not hasattr(module, name)), None)


def _parameters(item: pytest.Item) -> Mapping[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_without_lane(item: pytest.Item) -> bool:
    return _parameters(item).get("express_lane") == "off"


def _turn(item: pytest.Item) -> tuple[int, bool]:
    """Those on shared installations come first, all of one together: they take longest."""
    shared = _shared(item)
    return len(SHARED) if shared is None else SHARED.index(shared), _is_without_lane(item)


def _group(item: pytest.Item) -> str:
    """What one process runs: what says so itself, everything on a shared installation, or one file."""
    if marker := item.get_closest_marker("xdist_group"):
        return str(marker.args[0])
    return (_shared(item) or item.location[0]) + (" without the lane" if _is_without_lane(item) else "")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Groups that are not heard of cost each process its own installations, and nothing else would tell."""
    if session.config.getoption("loadgroup", False) and not all(item.nodeid.endswith(f"@{_group(item)}") for item in session.items):
        raise pytest.UsageError("pytest-xdist does not see the groups of tests; see `pytest` in pyproject.toml.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """End a shared installation after its last test: at rest each takes a tenth of a processor from all that follows."""
    yield
    if nextitem is not None and _shared(item) != _shared(nextitem):
        for name in set(SHARED) - set(getattr(nextitem, "fixturenames", ())):
            for definition in item.session._fixturemanager.getfixturedefs(name, item) or ():
                definition.finish(item._request)  # type: ignore[attr-defined]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that started this one what was left out; each has left out the same."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, {})


def pytest_testnodedown(node: Any) -> None:
    """Hear what was left out from one of several processes."""
    node.config.stash[_LEFT_OUT] = node.workeroutput.get("left_out", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say at the end what was left out, and how to run it."""
    for name, count in config.stash.get(_LEFT_OUT, {}).items():
        what, option = (_LANE_TESTS, f"--{LANE} on") if name == LANE else (ON_REQUEST[name], f"--{name}")
        terminalreporter.write_line(f"{count} {name} tests left out ({what}): {option} runs them")


@pytest.fixture(scope="session")
def express_lane(request: pytest.FixtureRequest) -> str:
    """Whether Envoy's workers remember decisions, `on` or `off`: what the installations that ask for it are started with."""
    return request.param


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory, express_lane: str) -> Iterator[Installation]:
    """Everything real but the model server, which is the instrument."""
    # Most tests wait for rows: they are to come soon, at a price that nobody measures here.
    settings = {"PEAJE_COLLECTOR_IDLE_SECONDS": "0.1", "PEAJE_EXTAUTH_UNKNOWN_PER_MINUTE": str(UNKNOWN_PER_MINUTE)}
    settings |= {EXPRESS_ENVIRONMENT: express_lane}
    ports = dict(zip(("extauth", "ratelimit", "metering", "collector", "beacon", "events"), free_ports(6), strict=True))
    settings |= {f"PEAJE_{part.upper()}_METRICS_PORT": str(port) for part, port in ports.items()}
    [port] = free_ports(1)
    with collecting_traces(port) as traces, running(
        tmp_path_factory.mktemp("road"), "--engine", "fake", environment=settings | {"PEAJE_TRACES_URL": traces.url}
    ) as installation:
        installation.metrics_ports, installation.traces = ports, traces
        yield installation
        # After everything that the tests have done to it: no secret lies about, and the ledger still holds.
        assert [] == installation.leaks()
        verified = installation.cli("ledger", "verify")
        assert verified["ok"], verified


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """As `road`, with a journal that is rotated at 10 kB, so that a few requests fill several files, and less patience with slow callers."""
    settings = {
        "PEAJE_COLLECTOR_ROTATE_BYTES": "10000", "PEAJE_COLLECTOR_CONSERVATION_SECONDS": "1",
        "PEAJE_COLLECTOR_SILENT_SECONDS": "5", "PEAJE_METERING_RECONCILE_SECONDS": "1",
        "PEAJE_EVENTS_LOOPBACK_ALLOWED": "true", "PEAJE_EVENTS_THRESHOLD_SECONDS": "0.5",
    }
    home = tmp_path_factory.mktemp("small")
    with running(home, "--engine", "fake", environment=settings, sending_seconds=SENDING_SECONDS) as installation:
        yield installation


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """As `road`, with several processes of each service that decides, and two Envoy workers."""
    home = tmp_path_factory.mktemp("fleet")
    # A process of Envoy's that was taken over from ends soon, or the next restart would wait for it.
    settings = SEVERAL | {"PEAJE_ENVOY_OLD_SERVES_SECONDS": "12"}
    with running(home, "--engine", "fake", "--concurrency", "2", environment=settings) as installation:
        yield installation
        assert [] == installation.leaks()


@pytest.fixture(scope="session")
def dynamo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Everything real: what `./peaje up` starts by itself."""
    with running(tmp_path_factory.mktemp("dynamo")) as installation:
        yield installation


@pytest.fixture
def tenant(road: Installation) -> Tenant:
    """A tenant without limits on the fake engine's road."""
    return road.new_tenant()
