# SPDX-License-Identifier: Apache-2.0
"""
What wakes somebody: the promises as burn rates over several windows, and causes that are known by name.

A promise of so much in a hundred has a budget of failures. A page says that it burns fast enough to be gone in two
days (14.4 times) or in five (6 times) and still does; a ticket, that it will not last the month. What has no budget (lost
usage) fires at one. Each alert has a section of its name in docs/operations.md, whose first command tells more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import yaml

RULES_PATH: Final = "charts/monitoring/rules/peaje.yaml"
RUNBOOK: Final = "docs/operations.md"
_HEAD: Final = """\
# SPDX-License-Identifier: Apache-2.0
# Made by `python -m control.monitoring --write` from control/monitoring/rules.py; change it there.
# Jobs are named peaje-<process> and peaje-envoy: charts/monitoring/prometheus.yaml.
"""
_WINDOWS: Final = ("5m", "30m", "1h", "6h", "3d")
#: Long window, short window, how many times the budget; and who hears of it.
_BURNS: Final = ((("1h", "5m", 14.4), ("6h", "30m", 6.0)), (("3d", "6h", 1.0),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A promise that a share of events keeps."""

    alert: str
    #: Stem of the recorded ratio.
    name: str
    #: The share that may fail.
    budget: float
    #: Failed events a second, over a window written `$w`; nothing when none has ever failed.
    failed: str
    #: All of them.
    total: str
    summary: str

    def recorded(self, window: str) -> str:
        """The name of the share that failed in *window*."""
        return f"peaje:{self.name}:ratio_rate{window}"

    def ratio(self, window: str) -> str:
        """The share that failed in *window*; nothing while nothing happens."""
        return f"({self.failed}) / ({self.total})".replace("$w", window)

    def burns(self, pairs: tuple[tuple[str, str, float], ...]) -> str:
        """Whether the budget burns as fast as any of *pairs* says, in both of its windows."""
        return " or ".join(
            f"({self.recorded(long)} > {times} * {self.budget} and {self.recorded(short)} > {times} * {self.budget})"
            for long, short, times in pairs
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert."""

    name: str
    expr: str
    #: Minutes that it must hold.
    minutes: int
    #: `page` wakes somebody, `ticket` waits for the morning.
    severity: str
    summary: str


def _late(histogram: str, bound: str) -> str:
    return f'sum(rate({histogram}_count[$w])) - sum(rate({histogram}_bucket{{le="{bound}"}}[$w]))'


SLOS: Final = (
    Slo(
        alert="PeajeDecisionsFail", name="decisions_failed", budget=0.0001,
        failed="(sum(rate(envoy_http_ext_authz_error[$w])) or vector(0)) + (sum(rate(envoy_cluster_ratelimit_error[$w])) or vector(0))"
        ' + (sum(rate(peaje_extauth_decisions_total{code="service_unavailable"}[$w])) or vector(0))',
        # Requests that no service was asked about were decided as well.
        total='sum(rate(envoy_http_downstream_rq_total{envoy_http_conn_manager_prefix="tenants"}[$w])) > 0',
        summary="More than one request in ten thousand is not decided",
    ),
    Slo(
        alert="PeajeAddsLatency", name="added_late", budget=0.01, failed=_late("peaje_gateway_added_seconds", "0.05"),
        total="sum(rate(peaje_gateway_added_seconds_count[$w])) > 0",
        summary="More than one request in a hundred waits 50 ms or longer in the gateway",
    ),
    Slo(
        alert="PeajeUsageLate", name="usage_late", budget=0.01, failed=_late("peaje_collector_row_delay_seconds", "5.0"),
        total="sum(rate(peaje_collector_row_delay_seconds_count[$w])) > 0",
        summary="More than one row in a hundred is in the ledger later than 5 s after its exchange",
    ),
    Slo(
        alert="PeajeChangesLate", name="changes_late", budget=0.01, failed=_late("peaje_listener_heard_seconds", "1.0"),
        total="sum(rate(peaje_listener_heard_seconds_count[$w])) > 0",
        summary="A change, such as a revoked key, is heard later than 1 s after it was made",
    ),
)

CAUSES: Final = (
    Alert(
        name="PeajeUsageDisputed", expr="max(peaje_reconciliation_exceptions_open) > 0", minutes=0, severity="page",
        summary="Two sources say different things of an exchange: a row may be lost or wrong",
    ),
    Alert(
        name="PeajeJournalDamaged", expr="sum by (journal) (increase(peaje_collector_defects_total[10m])) > 0", minutes=0,
        severity="page", summary="Bytes of a journal are no record",
    ),
    Alert(
        name="PeajeLedgerDrifts", expr="max by (model, kind) (abs(peaje_conservation_drift_tokens)) > 0", minutes=0,
        severity="ticket", summary="An engine counted other tokens than the ledger has",
    ),
    Alert(
        name="PeajeUsageInexact",
        expr='sum(rate(peaje_collector_rows_total{basis=~"counted|estimated|checkpoint"}[10m]))'
        " / sum(rate(peaje_collector_rows_total[10m])) > 0.001",
        minutes=1, severity="ticket", summary="More than one row in a thousand is not what the engine reported",
    ),
    Alert(
        name="PeajeCollectorBehind", expr="max by (journal) (peaje_collector_lag_seconds) > 5", minutes=1, severity="page",
        summary="A journal is not read to its end",
    ),
    Alert(
        name="PeajeRoadClosed", expr='max(peaje_collector_road_closed) == 1 or max(peaje_failure_mode_in_force{dependency="disk"}) == 1',
        minutes=0, severity="page", summary="The journal's disk is full: new requests are refused, or their usage may be lost",
    ),
    Alert(
        name="PeajeDiskFills", expr="max by (journal) (peaje_collector_disk_used_percent) > 80", minutes=5, severity="ticket",
        summary="The journal's disk is 80 % full",
    ),
    Alert(
        name="PeajePostgresAway", expr='max by (job, mode) (peaje_failure_mode_in_force{dependency="postgres"}) == 1', minutes=1,
        severity="page", summary="Postgres does not answer: callers who are not remembered get 503",
    ),
    Alert(
        name="PeajeStoreAway", expr='max by (mode) (peaje_failure_mode_in_force{dependency="store"}) == 1 or max(peaje_ratelimit_store_away) == 1',
        minutes=1, severity="page", summary="The counter store is away: each limit follows its written mode",
    ),
    Alert(
        name="PeajeListenerDeaf", expr="max by (job, listener) (peaje_listener_silent_seconds) > 10", minutes=0, severity="page",
        summary="A process hears of no change: what it remembers ends by its own time only",
    ),
    Alert(
        name="PeajeServiceDown", expr='min by (envoy_cluster_name) (envoy_cluster_membership_healthy{envoy_cluster_name=~"extauth|ratelimit|metering"}) == 0',
        minutes=0, severity="page", summary="Envoy has no healthy process of a service that it asks",
    ),
    Alert(
        name="PeajeProcessSilent", expr='up{job=~"peaje-.*"} == 0', minutes=1, severity="ticket",
        summary="A process shows no metrics",
    ),
    Alert(
        name="PeajeEngineFails",
        expr='sum by (envoy_cluster_name) (rate(envoy_cluster_upstream_rq_xx{envoy_cluster_name=~"pool/.*",envoy_response_code_class="5"}[5m]))'
        ' / sum by (envoy_cluster_name) (rate(envoy_cluster_upstream_rq_total{envoy_cluster_name=~"pool/.*"}[5m])) > 0.05',
        minutes=1, severity="page", summary="A model's servers fail more than one request in twenty",
    ),
    Alert(
        name="PeajeRulesRefused", expr="min(peaje_ratelimit_rules_current) == 0", minutes=1, severity="ticket",
        summary="A file in ratelimit.d has a fault; the last good rules act",
    ),
    Alert(
        name="PeajeIdentityRefused", expr='sum(increase(peaje_extauth_identity_reloads_total{outcome="refused"}[10m])) > 0',
        minutes=0, severity="ticket", summary="A new identity.yaml was refused; the last good one acts",
    ),
    Alert(
        name="PeajeKeySetsOld", expr="max by (issuer) (peaje_extauth_jwks_age_seconds) > 3600", minutes=5, severity="page",
        summary="An issuer's key set could not be fetched for an hour",
    ),
    Alert(
        name="PeajeScriptFails", expr="sum(increase(envoy_http_lua_gate_errors[5m])) + sum(increase(envoy_http_lua_tap_errors[5m])) > 0",
        minutes=0, severity="page", summary="A script in Envoy failed: a failing gate refuses, a failing tap bills by estimate",
    ),
    Alert(
        name="PeajeWitnessDeaf",
        expr="sum(increase(peaje_metering_sightings_dropped_total[10m])) + sum(increase(envoy_access_logs_open_telemetry_access_log_logs_dropped[10m])) > 0",
        minutes=0, severity="ticket", summary="Some exchanges could not be compared with the second witness; no bill changes",
    ),
    Alert(
        name="PeajeMeteringSkipped", expr="sum(increase(envoy_http_ext_proc_failure_mode_allowed[10m])) > 0", minutes=0,
        severity="ticket", summary="Streams passed without metering: those whose engine was not asked are billed by estimate",
    ),
)  # fmt: skip


def alerts() -> list[Alert]:
    """Every alert: of the promises a page and a ticket each, then the causes."""
    return [*(alert for slo in SLOS for alert in _of(slo)), *CAUSES]


def inlined(expr: str) -> str:
    """*expr* with what recorded names stand for in their place."""
    for slo in SLOS:
        for window in _WINDOWS:
            expr = re.sub(rf"{re.escape(slo.recorded(window))}\b", f"({slo.ratio(window)})", expr)
    return expr


def as_rules() -> str:
    """The rules file that Prometheus reads."""
    groups = {
        "groups": [
            {
                "name": "peaje-promises",
                "rules": [{"record": slo.recorded(window), "expr": slo.ratio(window)} for slo in SLOS for window in _WINDOWS],
            },
            {"name": "peaje-alerts", "rules": [_rule(alert) for alert in alerts()]},
        ]
    }
    return _HEAD + yaml.safe_dump(groups, sort_keys=False, width=140)


def _of(slo: Slo) -> Iterator[Alert]:
    for severity, pairs in zip(("page", "ticket"), _BURNS, strict=True):
        name = slo.alert if severity == "page" else f"{slo.alert}Slowly"
        yield Alert(name=name, expr=slo.burns(pairs), minutes=0, severity=severity, summary=slo.summary)


def section(alert: Alert) -> str:
    """The heading of its runbook: both alerts of a promise have one."""
    return alert.name.removesuffix("Slowly")


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        **({"for": f"{alert.minutes}m"} if alert.minutes else {}),
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook": f"{RUNBOOK}#{section(alert).lower()}"},
    }
