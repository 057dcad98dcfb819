# SPDX-License-Identifier: Apache-2.0
"""The waterfall's steps are Envoy's own configuration with fewer parts; its table and chart say what was measured."""

from __future__ import annotations

import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from bench.peers import by_command, litellm
from bench.steps import STEPS, Step, bootstrap
from bench.waterfall import PARTS, Measured, chart, middle, prepare, table
from tests.conformance.road import ROOT


def measured(envoy: float, *, services: float = 0.0, failures: int = 0, p99: float = 2.0) -> Measured:
    """One measurement."""
    parts = dict.fromkeys(PARTS, 0.0) | {"Envoy": envoy, "services": services}
    return Measured(parts=parts, upstream=30.0, generator=90.0, p50=1.0, p99=p99, failures=failures, resident_mib=60.0)


@cache
def _whole() -> Any:
    return yaml.load((ROOT / "envoy/envoy.yaml").read_text(), yaml.CSafeLoader)


def manager(step: Step) -> dict[str, Any]:
    """The connection manager of *step*."""
    made = bootstrap(_whole(), step, port=1, admin=2, upstream=3)
    [listener] = made["static_resources"]["listeners"]
    assert listener["address"]["socket_address"]["port_value"] == 1
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def test_each_step_has_all_that_the_one_before_has() -> None:
    """Of filters and logs, in the order and with the settings of envoy.yaml; the last has all of it."""
    made = [manager(step) for step in STEPS]

    for before, after in pairwise(made):
        for what in ("http_filters", "access_log"):
            assert [one for one in after.get(what, []) if one in before.get(what, [])] == before.get(what, [])
    complete = _whole()["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert complete == made[-1] == made[-2]


def test_what_works_for_a_step_is_counted_and_only_that() -> None:
    """From the first decision on those who decide, later the collector; at the end every process that there is."""
    assert all(before.uses <= after.uses for before, after in pairwise(STEPS))
    assert [0, 0, 0] == [len(step.uses) for step in STEPS[:3]]
    assert {name for names in PARTS.values() for name in names} == STEPS[-1].uses


def test_bare_envoy_has_nothing_of_ours() -> None:
    """A router, and one route to the upstream."""
    assert {"@type", "stat_prefix", "route_config", "http_filters"} == set(manager(STEPS[0]))


@pytest.mark.parametrize(("what", "step"), [("filter", Step(name="x", without=frozenset({"gone"}))), ("access_log", Step(name="x", logs=frozenset({"gone"})))])
def test_a_part_that_envoy_yaml_no_longer_has_is_named(what: str, step: Step) -> None:
    """Rather than a step that costs nothing because its control is spelled otherwise by now."""
    with pytest.raises(ValueError, match=f"no {what} named gone"):
        manager(step)


@pytest.mark.parametrize("step", [STEPS[2], STEPS[-1]], ids=["own journal", "collected"])
def test_a_steps_envoy_has_the_installation_around_it(tmp_path: Path, step: Step) -> None:
    """The services' sockets, another model server, and a journal that is read or that is nobody's."""
    home, place = tmp_path / "home", tmp_path / "runs/step"
    for name in ("run", "journal", "envoy"):
        (home / name).mkdir(parents=True)
    (home / "run/extauth.sock").touch()
    (home / "envoy/clusters.yaml").write_text("address: 127.0.0.1\nport_value: 37225\nname: pool/main/tiny\n")
    shutil.copyfile(ROOT / "envoy/envoy.yaml", home / "envoy/envoy.yaml")

    prepare(home, step, place, port=1, admin=2, upstream=3)

    assert (place / "run/extauth.sock").exists()
    assert "address: 127.0.0.1\nport_value: 3\nname: pool/main/tiny\n" == (place / "envoy/clusters.yaml").read_text()
    assert "37225" in (home / "envoy/clusters.yaml").read_text()
    (place / "journal/journal.jsonl").touch()
    assert step.is_collected == (home / "journal/journal.jsonl").exists()
    assert 2 == yaml.load((place / "step.yaml").read_text(), yaml.CSafeLoader)["admin"]["address"]["socket_address"]["port_value"]


def test_the_table_says_what_each_step_adds_and_who_was_left_out() -> None:
    """By the step before it, and as a multiple of bare Envoy; a peer that is not installed has its reason."""
    found = {"small": {"bare": measured(100), "+ gate": measured(250), "+ all": measured(260, services=40, failures=3)}}

    lines = table(found, [litellm(None)]).splitlines()

    assert "| small | + gate | 250 | 0 | 0 | 0 | 250 | 2.5× | +150 | 1.0 / 2.0 | 60 | 30 | 90 | 0 |" in lines
    assert "| small | + all | 260 | 40 | 0 | 0 | 300 | 3.0× | +50 | 1.0 / 2.0 | 60 | 30 | 90 | 3 |" in lines
    assert lines[-1].startswith("| small | LiteLLM: no environment was named")
    assert {line.count("|") for line in lines} == {15}


def test_runs_are_told_by_their_medians_and_failures_by_their_sum() -> None:
    """One run that a busy machine spoiled changes nothing; one failure is not lost."""
    one = middle([measured(100, p99=2), measured(900, p99=50, failures=1), measured(110, p99=3)])

    assert (110, 3, 1) == (one.parts["Envoy"], one.p99, one.failures)


def test_the_chart_is_well_formed_and_to_scale() -> None:
    """Twice the cost is a bar of twice the length, whatever stands in a name."""
    tree = ET.fromstring(chart({"<small>": {"bare & bald": measured(100), "+ gate": measured(150, services=50)}}))  # noqa: S314 - ours

    widths = [float(one.attrib["width"]) for one in tree.iter("{http://www.w3.org/2000/svg}rect") if one.attrib.get("height") == "16"]
    assert [1, 1.5, 0.5] == [pytest.approx(width / widths[0], abs=0.01) for width in widths]
    texts = [one.text for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<small>", "bare & bald", "200 µs, 2.0×"} <= set(texts)


def test_a_peer_is_a_command_in_front_of_the_upstream(tmp_path: Path) -> None:
    """LiteLLM's from the environment that is named, if it is there; any other with both ports in it."""
    program = tmp_path / "bin/litellm"
    assert litellm(tmp_path).missing == "not installed in the environment that --litellm names"
    program.parent.mkdir()
    program.touch()

    peer = litellm(tmp_path)

    assert peer.missing is None
    assert [str(program), "--config"] == peer.command(1, 2, tmp_path)[:2]
    assert "http://127.0.0.1:1/v1" in (tmp_path / "litellm.yaml").read_text()
    assert ["p", "2", "1"] == by_command("x=p {port} {upstream}").command(1, 2, tmp_path)


@pytest.mark.parametrize("text", ["", "x", "=p {port} {upstream}", "x=p {port}", "x=p {upstream}"])
def test_a_peer_without_its_ports_is_refused(text: str) -> None:
    """It would be measured in front of something else."""
    with pytest.raises(ValueError, match="is not NAME=COMMAND"):
        by_command(text)
