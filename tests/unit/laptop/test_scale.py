# SPDX-License-Identifier: Apache-2.0
"""How many processes a service has, and that no two of them meet."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from control.laptop.errors import Trouble
from control.laptop.parts import service_parts
from control.laptop.places import Ports
from control.laptop.processes import PortNeed, check_ports, free_port
from control.laptop.scale import PROCESSES_MAX, SERVICES, Scale, read_scale

_PORTS = Ports(tenants=10000, control=10001, admin=9901)


def test_by_default_each_service_is_one_process_on_the_socket_that_envoy_yaml_names() -> None:
    """Under its own name, and without metrics."""
    processes = [process for service in SERVICES for process in read_scale({}).processes(service)]

    assert ["extauth", "ratelimit", "metering"] == [process.name for process in processes]
    assert ["run/extauth.sock", "run/ratelimit.sock", "run/metering.sock"] == [process.socket for process in processes]
    assert {0} == {process.metrics_port for process in processes}


def test_each_process_has_a_name_a_socket_and_a_metrics_port_of_its_own() -> None:
    """Ports count up from the one that is set."""
    processes = read_scale({"PEAJE_EXTAUTH_PROCESSES": "3", "PEAJE_EXTAUTH_METRICS_PORT": "9100"}).processes("extauth")

    assert [("extauth", "run/extauth.sock", 9100), ("extauth-2", "run/extauth-2.sock", 9101), ("extauth-3", "run/extauth-3.sock", 9102)] == [
        (process.name, process.socket, process.metrics_port) for process in processes
    ]
    assert {"PEAJE_EXTAUTH_SOCKET": "run/extauth-2.sock", "PEAJE_EXTAUTH_METRICS_PORT": "9101"} == processes[1].settings()
    assert {"PEAJE_DRAIN_SECONDS"} == processes[1].defaults().keys()


def test_every_process_is_a_part_that_is_told_its_own_socket() -> None:
    """The environment of a part says what `up`'s own says of all of them, and differs where they must."""
    env = {"PEAJE_RATELIMIT_PROCESSES": "2", "PEAJE_RATELIMIT_SOCKET": "run/other.sock"}

    parts = {part.name: part for part in service_parts(env, _PORTS, read_scale(env), stores=())}

    assert {"extauth", "ratelimit", "ratelimit-2", "metering"} <= parts.keys()
    assert ["run/ratelimit.sock", "run/ratelimit-2.sock"] == [
        parts[name].env["PEAJE_RATELIMIT_SOCKET"] for name in ("ratelimit", "ratelimit-2")
    ]
    # Each of them counts half of a limit while the store is away.
    assert {"2"} == {parts[name].env["PEAJE_RATELIMIT_PROCESSES"] for name in ("ratelimit", "ratelimit-2")}


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("text", ["0", str(PROCESSES_MAX + 1), "-1", "two", "1.5", "²", " 2"])
def test_what_is_no_number_of_processes_is_refused(service: str, text: str) -> None:
    """By the name of the setting, with what it may be."""
    variable = f"PEAJE_{service.upper()}_PROCESSES"

    with pytest.raises(Trouble, match=rf"^{variable}={text} is no number of processes\. Give a number from 1 to 16\.$"):
        read_scale({variable: text})


@pytest.mark.parametrize(("text", "count"), [("-1", 1), ("port", 1), ("65536", 1), ("65535", 2)])
def test_metrics_ports_that_do_not_exist_are_refused(text: str, count: int) -> None:
    """Also where only the last process's is none."""
    with pytest.raises(Trouble, match=rf"^PEAJE_EXTAUTH_METRICS_PORT={text} is not a port\."):
        read_scale({"PEAJE_EXTAUTH_METRICS_PORT": text, "PEAJE_EXTAUTH_PROCESSES": str(count)})


def test_the_bounds_themselves_are_taken() -> None:
    """Sixteen processes, and the last port."""
    scale = read_scale({"PEAJE_EXTAUTH_PROCESSES": str(PROCESSES_MAX), "PEAJE_EXTAUTH_METRICS_PORT": str(65536 - PROCESSES_MAX)})

    assert ("extauth-16", 65535) == (scale.processes("extauth")[-1].name, scale.processes("extauth")[-1].metrics_port)


def test_a_scale_survives_the_way_to_a_supervisor_in_the_background() -> None:
    """As JSON."""
    scale = read_scale({"PEAJE_METERING_PROCESSES": "2", "PEAJE_EXTAUTH_METRICS_PORT": "9100"})

    assert scale == Scale(**json.loads(json.dumps(asdict(scale))))


def test_a_port_that_is_wanted_twice_is_refused_before_anything_starts() -> None:
    """Both purposes are named."""
    port = free_port()
    needs = [
        PortNeed(number=port, purpose="the control API", option="--control-port"),
        PortNeed(number=port, purpose="extauth-2's metrics", option="PEAJE_EXTAUTH_METRICS_PORT"),
    ]

    with pytest.raises(Trouble, match=rf"^Port {port} is wanted twice: for the control API and for extauth-2's metrics\."):
        check_ports(needs)
