# SPDX-License-Identifier: Apache-2.0
"""Each alert has a runbook that begins with a command that exists; each expression reads what exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer
import yaml

from control.cli import app
from control.monitoring.catalogue import read_catalogue
from control.monitoring.rules import CAUSES, RULES_PATH, RUNBOOK, SLOS, alerts, inlined, section
from tests.promql import Samples, evaluate, names

_SECTION = re.compile(r"^### (Peaje\w+)\n(.*?)(?=^#{1,3} |\Z)", re.MULTILINE | re.DOTALL)
_FIRST_COMMAND = re.compile(r"\A\n```\n\./peaje ([^\n]+)\n")
#: What Prometheus makes itself.
_PROMETHEUS_OWN = {"up"}


def runbook(repository: Path) -> dict[str, str]:
    """The first command of each section, without `./peaje`, by the alert's name."""
    found = {}
    for name, text in _SECTION.findall((repository / RUNBOOK).read_text("utf-8")):
        command = _FIRST_COMMAND.match(text)
        found[name] = command[1] if command else ""
    return found


def test_every_alert_has_its_section_and_every_section_its_alert(repository: Path) -> None:
    """By the name that the alert's annotation leads to."""
    assert {section(alert) for alert in alerts()} == set(runbook(repository))


def test_every_section_begins_with_a_command_that_exists(repository: Path) -> None:
    """At night the first line is typed before the second is read."""
    for name, command in runbook(repository).items():
        found = typer.main.get_command(app)
        for word in shlex.split(command):
            inner = getattr(found, "commands", {}).get(word)
            if inner is None:
                break
            found = inner
        assert found is not typer.main.get_command(app), f"{name}: {command}"
        assert not getattr(found, "commands", None), f"{name}: {command} is not whole"


def test_the_rules_file_says_what_the_code_says(repository: Path) -> None:
    """Every alert is in it, with somebody to hear it and where to read on."""
    rules = [rule for group in yaml.safe_load((repository / RULES_PATH).read_text("utf-8"))["groups"] for rule in group["rules"]]
    written = {rule["alert"]: rule for rule in rules if "alert" in rule}

    assert [alert.name for alert in alerts()] == list(written)
    for rule in written.values():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook"].startswith(f"{RUNBOOK}#peaje")
    assert len(SLOS) * 2 + len(CAUSES) == len(written)


def test_every_expression_reads_our_metrics_or_envoys() -> None:
    """Ours by the catalogue; Envoy's are looked for on the running road."""
    ours = {name for metric in read_catalogue() for name in metric.series}

    for alert in alerts():
        read = names(inlined(alert.expr))
        assert read
        assert set() == {name for name in read - ours - _PROMETHEUS_OWN if not name.startswith("envoy_")}, alert.name


def test_labels_that_expressions_name_exist() -> None:
    """A selector by a label that no series has matches nothing, for ever, in silence."""
    labels = {name: {*metric.labels, "le"} for metric in read_catalogue() for name in metric.series}
    selector = re.compile(r"(peaje_\w+)\{([^}]*)\}")

    for alert in alerts():
        for name, inside in selector.findall(inlined(alert.expr)):
            assert set(re.findall(r"(\w+)=", inside)) <= labels[name], f"{alert.name}: {name}"


def test_bounds_that_expressions_name_are_buckets() -> None:
    """`le` is a text: a bound that is no bucket matches nothing."""
    buckets = {f"{metric.name}_bucket": metric.buckets for metric in read_catalogue()}

    for slo in SLOS:
        for name, bound in re.findall(r'(peaje_\w+)\{le="([^"]+)"\}', slo.failed):
            assert bound in buckets[name], name


def counter(values: Sequence[float]) -> Samples:
    """One series `x_total`, a value each half minute."""
    samples = Samples()
    for number, value in enumerate(values):
        samples.add(number * 30.0, "x_total", {"a": "b"}, value)
    return samples


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        ("sum(increase(x_total[2m]))", 4.0), ("sum(rate(x_total[2m]))", 4 / 120), ("max(x_total) > 5", 6.0),
        ("x_total / 2 + 1", 4.0), ("sum(nothing) or vector(7)", 7.0), ("sum(x_total) unless vector(1) < 0", 6.0),
    ],
)  # fmt: skip
def test_the_evaluator_of_the_tests_knows_what_it_says(expr: str, expected: float) -> None:
    """A counter that grows by one each half minute, asked between two samples."""
    [value] = evaluate(expr, counter([0, 1, 2, 3, 4, 5, 6]), 195.0).values()

    assert expected == pytest.approx(value)


def test_a_counter_that_starts_anew_has_grown_by_what_it_shows() -> None:
    """A restart of a process is no negative growth."""
    [value] = evaluate("increase(x_total[2m])", counter([100, 102, 1, 3, 5]), 135.0).values()

    assert 0 < value < 12


def test_what_the_evaluator_does_not_know_it_refuses() -> None:
    """Never an answer that Prometheus would not give."""
    with pytest.raises(NotImplementedError):
        evaluate("deriv(x_total[5m])", counter([1, 2]), 45.0)


def promtool() -> str | None:
    """PEAJE_PROMTOOL, or the one on PATH."""
    return os.environ.get("PEAJE_PROMTOOL") or shutil.which("promtool")


@pytest.mark.skipif(promtool() is None, reason="promtool is not here: the grammar has judged the rules, not Prometheus itself")
def test_prometheus_itself_takes_the_rules_and_agrees_with_the_evaluator(repository: Path, tmp_path: Path) -> None:
    """`promtool check rules`, and every operator that rules use, on a counter with a gap and a restart."""
    program = promtool()
    assert program is not None
    values = [0, 3, 9, 9, 10, 2, 5, 5, 6, 30, 31, 31, 35]
    exprs = [
        "sum(rate(x_total[5m]))", "sum by (a) (increase(x_total[3m]))", "max(x_total) > 5", "min by (a) (x_total) == 35",
        "sum(x_total) or vector(1)", "sum(nothing) or vector(1)", "(sum(rate(x_total[2m])) > 0.01 and sum(rate(x_total[5m])) > 0.01)",
        "abs(x_total - 40)", "sum(rate(x_total[5m])) / (sum(rate(x_total[5m])) > 0)",
    ]  # fmt: skip
    tests: list[dict[str, Any]] = [
        {"expr": expr, "eval_time": f"{at}s", "exp_samples": [
            {"labels": "{" + ", ".join(f'{name}="{value}"' for name, value in sorted(labels) if name != "__name__") + "}", "value": value}
            for labels, value in evaluate(expr, counter(values), float(at)).items()
        ]}
        for at in (135, 255, 375) for expr in exprs
    ]  # fmt: skip
    for test in tests:
        # To a millionth: Prometheus adds in another order.
        test["expr"] = f"round({test['expr']}, 0.000001)"
        for sample in test["exp_samples"]:
            sample["value"] = round(sample["value"] * 1_000_000) / 1_000_000
    document = {"evaluation_interval": "30s", "tests": [{"interval": "30s", "input_series": [
        {"series": 'x_total{a="b"}', "values": " ".join(map(str, values))}], "promql_expr_test": tests}]}  # fmt: skip
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))

    for arguments in (["check", "rules", str(repository / RULES_PATH)], ["test", "rules", str(tmp_path / "tests.yaml")]):
        answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert 0 == answer.returncode, answer.stdout + answer.stderr
    assert all(promql_parser.parse(inlined(alert.expr)) for alert in alerts())


#: Alerts whose bound no game day meets exactly: by the metric, its labels, values that must fire and values that must not.
BOUNDS: dict[str, tuple[str, dict[str, str], list[float], list[float]]] = {
    "PeajeUsageLate": ("rows", {}, [], []),
    "PeajeUsageLateSlowly": ("rows", {}, [], []),
    "PeajeChangesLate": ("pulses", {}, [], []),
    "PeajeChangesLateSlowly": ("pulses", {}, [], []),
    "PeajeLedgerDrifts": ("peaje_conservation_drift_tokens", {"model": "tiny", "kind": "input"}, [-1] * 30, [0] * 30),
    "PeajeRoadClosed": ("peaje_collector_road_closed", {"journal": "local"}, [1] * 30, [0] * 30),
    "PeajeDiskFills": ("peaje_collector_disk_used_percent", {"journal": "local"}, [80.1] * 30, [80.0] * 30),
    "PeajeKeySetsOld": ("peaje_extauth_jwks_age_seconds", {"issuer": "own"}, [float("inf")] * 30, [3600.0] * 30),
    "PeajeScriptFails": ("envoy_http_lua_tap_errors", {}, [*([0.0] * 25), *([1.0] * 5)], [1.0] * 30),
    "PeajeWitnessDeaf": ("peaje_metering_sightings_dropped_total", {}, [*([0.0] * 20), *([1.0] * 10)], [7.0] * 30),
}
#: Series that an expression adds to another: Prometheus has both from the start.
_BESIDE = {"PeajeScriptFails": "envoy_http_lua_gate_errors", "PeajeWitnessDeaf": "envoy_access_logs_open_telemetry_access_log_logs_dropped"}
_HISTOGRAMS = {"rows": ("peaje_collector_row_delay_seconds", "5.0"), "pulses": ("peaje_listener_heard_seconds", "1.0")}


def judged(name: str, samples: Samples, count: int) -> bool:
    """Whether an alert fires after *count* samples, and has for its minutes."""
    [alert] = [alert for alert in alerts() if alert.name == name]
    expr, last = inlined(alert.expr), (count - 1) * 30.0 + 15.0
    return all(evaluate(expr, samples, last - minute * 60.0) for minute in range(alert.minutes + 1))


@pytest.mark.parametrize("name", [name for name, (metric, *_) in BOUNDS.items() if metric not in _HISTOGRAMS])
def test_an_alert_fires_at_its_bound_and_not_below(name: str) -> None:
    """On samples that are made up."""
    metric, labels, bad, good = BOUNDS[name]
    for values, expected in ((bad, True), (good, False)):
        samples = Samples()
        for number, value in enumerate(values):
            samples.add(number * 30.0, metric, labels, value)
            if name in _BESIDE:
                samples.add(number * 30.0, _BESIDE[name], {}, 0.0)

        assert expected == judged(name, samples, len(values)), values


@pytest.mark.parametrize("name", [name for name, (metric, *_) in BOUNDS.items() if metric in _HISTOGRAMS])
@pytest.mark.parametrize(("late", "expected"), [(0.009, False), (0.2, True)])
def test_a_promise_pages_when_its_budget_burns_and_not_within_it(name: str, late: float, expected: bool) -> None:
    """Seven hours: nine late of a thousand last the month, one of five does not last two days."""
    metric, bound = _HISTOGRAMS[BOUNDS[name][0]]
    samples, count = Samples(), 840
    for number in range(count):
        samples.add(number * 30.0, f"{metric}_count", {}, number * 1000.0)
        samples.add(number * 30.0, f"{metric}_bucket", {"le": bound}, number * 1000.0 * (1 - late))

    assert expected == judged(name, samples, count)
