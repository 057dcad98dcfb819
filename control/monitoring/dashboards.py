# SPDX-License-Identifier: Apache-2.0
"""
What people look at: one dashboard for who runs it, one for who bills by it, one for a tenant.

Each panel is its questions and its unit; Grafana's own library writes the JSON. Ours, Envoy's and the model servers'
series stand side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from control.monitoring.rules import SLOS

DIRECTORY: Final = "charts/monitoring/dashboards"
#: Grafana puts in what fits its scrapes and its width.
_RATE: Final = "[$__rate_interval]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One question, or several of one unit."""

    title: str
    unit: str
    #: Expression and legend; of SQL the query alone.
    queries: tuple[tuple[str, str], ...]
    #: Asked of Postgres, by the role that reads views only.
    is_sql: bool = False
    #: A number instead of a line.
    is_stat: bool = False
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """Rows of panels."""

    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    #: Name and query of a variable.
    variable: tuple[str, str] | None = None


def _quantiles(histogram: str, *, by: str = "", where: str = "") -> tuple[tuple[str, str], ...]:
    legend = f"{{{{{by}}}}} " if by else ""
    group = f"le, {by}" if by else "le"
    return tuple(
        (f"histogram_quantile({quantile}, sum by ({group}) (rate({histogram}_bucket{where}{_RATE})))", f"{legend}p{round(quantile * 100)}")
        for quantile in (0.5, 0.99)
    )


def _rates(counter: str, by: str, *, where: str = "") -> tuple[tuple[str, str], ...]:
    return ((f"sum by ({by}) (rate({counter}{where}{_RATE}))", " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))),)


def _classes(queries: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Envoy says 5 where people say 5xx."""
    return tuple((query, legend.replace("{{envoy_response_code_class}}", "{{envoy_response_code_class}}xx")) for query, legend in queries)


def _above_zero(queries: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Of many lines only those that are not nothing."""
    return tuple((f"{query} > 0", legend) for query, legend in queries)


_PROMISES: Final = tuple(
    Panel(
        title=slo.alert.removeprefix("Peaje"), unit="percentunit", queries=((slo.recorded("1h"), "failed in an hour"),), is_stat=True,
        says=f"Budget: {slo.budget:g}.",
    )
    for slo in SLOS
)  # fmt: skip

SRE: Final = Dashboard(
    uid="peaje-sre", title="Peaje / road",
    rows=(
        ("Promises", (
            *_PROMISES,
            Panel(title="Usage disputed", unit="short", queries=(("max(peaje_reconciliation_exceptions_open)", "open"),), is_stat=True),
            Panel(title="Failure modes in force", unit="short", queries=(("max by (dependency, mode) (peaje_failure_mode_in_force)", "{{dependency}} {{mode}}"),)),
        )),
        ("Requests", (
            Panel(title="Answers", unit="reqps", queries=_classes(_rates("envoy_http_downstream_rq_xx", "envoy_response_code_class", where='{envoy_http_conn_manager_prefix="tenants"}'))),
            Panel(title="Under way", unit="short", queries=(('sum(envoy_http_downstream_rq_active{envoy_http_conn_manager_prefix="tenants"})', "requests"),)),
            Panel(title="Refusals of known callers", unit="reqps", queries=_rates("peaje_gateway_refusals_total", "status")),
            Panel(title="Denials", unit="reqps", queries=_rates("peaje_extauth_denials_total", "phase, rule")),
            Panel(title="Who was asked", unit="reqps", queries=_rates("peaje_gateway_lanes_total", "lane")),
            Panel(title="Lookups of callers", unit="reqps", queries=_rates("peaje_extauth_directory_lookups_total", "source")),
        )),
        ("Time", (
            Panel(title="The gateway adds", unit="s", queries=_quantiles("peaje_gateway_added_seconds")),
            Panel(title="extauth decides in", unit="s", queries=_quantiles("peaje_extauth_decision_seconds")),
            Panel(title="ratelimit decides in", unit="s", queries=_quantiles("peaje_ratelimit_decision_seconds")),
            Panel(title="The counter store answers in", unit="s", queries=_quantiles("peaje_ratelimit_store_seconds", by="call")),
            Panel(title="Changes are heard in", unit="s", queries=_quantiles("peaje_listener_heard_seconds", by="listener")),
        )),
        ("Limits", (
            Panel(title="Decisions", unit="reqps", queries=_rates("peaje_ratelimit_decisions_total", "outcome")),
            Panel(title="Refusals by limit", unit="reqps", queries=_above_zero(_rates("peaje_ratelimit_refusals_total", "kind, unit"))),
            Panel(title="Refused falsely", unit="percentunit", queries=(
                (f'sum(rate(peaje_ratelimit_refusals_judged_total{{judgement="false"}}{_RATE})) / sum(rate(peaje_ratelimit_refusals_judged_total{{judgement!="unknown"}}{_RATE}))', "of those that could be judged"),
            ), says="What stood in their way did not use what it held."),
            Panel(title="Held", unit="short", queries=(
                ("sum(peaje_ratelimit_reservations_total) - sum(peaje_ratelimit_settled_total)", "reservations"),
                ("max(peaje_ratelimit_reservations_held_long)", "longer than 30 s"),
            )),
            Panel(title="Estimates", unit="short", queries=(
                (f"sum(rate(peaje_ratelimit_excess_tokens_total{_RATE}))", "too low: overshoot"),
                (f"sum(rate(peaje_ratelimit_returned_tokens_total{_RATE}))", "too high: returned"),
            )),
            Panel(title="Without the store", unit="reqps", queries=_rates("peaje_ratelimit_without_store_total", "mode")),
        )),
        ("Ledger", (
            Panel(title="Behind", unit="s", queries=(("max by (journal) (peaje_collector_lag_seconds)", "{{journal}}"),)),
            Panel(title="Rows come after", unit="s", queries=_quantiles("peaje_collector_row_delay_seconds")),
            Panel(title="Rows by basis", unit="reqps", queries=_rates("peaje_collector_rows_total", "basis")),
            Panel(title="Journal's disk", unit="percent", queries=(("max by (journal) (peaje_collector_disk_used_percent)", "{{journal}}"),)),
        )),
        ("Models", (
            Panel(title="First token", unit="s", queries=_quantiles("peaje_model_first_token_seconds", by="model")),
            Panel(title="Between tokens", unit="s", queries=_quantiles("peaje_model_between_tokens_seconds", by="model")),
            Panel(title="Tokens a second of a stream", unit="short", queries=_quantiles("peaje_model_tokens_per_second", by="model")),
            Panel(title="Model servers' answers, as Envoy sees them", unit="reqps", queries=_classes(_rates("envoy_cluster_upstream_rq_xx", "envoy_cluster_name, envoy_response_code_class", where='{envoy_cluster_name=~"pool/.*"}'))),
            Panel(title="Under way at the engines, by their own word", unit="short", queries=(
                ("sum by (model_name) (vllm:num_requests_running)", "{{model_name}} running"),
                ("sum by (model_name) (vllm:num_requests_waiting)", "{{model_name}} waiting"),
                ("sum by (model) (dynamo_frontend_inflight_requests)", "{{model}} running"),
                ("sum by (model) (dynamo_frontend_queued_requests)", "{{model}} waiting"),
            )),
        )),
    ),
)  # fmt: skip

BILLING: Final = Dashboard(
    uid="peaje-billing", title="Peaje / billing",
    rows=(
        ("May it be billed?", (
            Panel(title="Exceptions open", unit="short", queries=(("max(peaje_reconciliation_exceptions_open)", "open"),), is_stat=True),
            Panel(title="Drift to the engines", unit="short", queries=(("max by (model, kind) (abs(peaje_conservation_drift_tokens))", "{{model}} {{kind}}"),)),
            Panel(title="How tokens are known", unit="reqps", queries=_rates("peaje_collector_rows_total", "basis, outcome")),
            Panel(title="Defects, orphans", unit="short", queries=(
                ("sum(increase(peaje_collector_defects_total[1h]))", "defects"), ("sum(increase(peaje_collector_orphans_closed_total[1h]))", "orphans"),
            )),
        )),
        ("Ledger", (
            Panel(title="This month by tenant", unit="short", is_sql=True, queries=((
                "select tenant, currency, sum(request_count) as requests, sum(input_tokens + output_tokens) as tokens, sum(amount_nano) / 1e9 as amount from billing_usage_hourly_v1 where hour >= date_trunc('month', now()) group by 1, 2 order by 5 desc nulls last", ""),)),
            Panel(title="By day and model", unit="short", is_sql=True, queries=((
                "select day, model, sum(input_tokens) as input, sum(output_tokens) as output, sum(amount_nano) / 1e9 as amount from billing_usage_daily_v1 where day > now() - interval '31 days' group by 1, 2 order by 1 desc, 2", ""),)),
            Panel(title="Adjustments", unit="short", is_sql=True, queries=((
                "select period, tenant, model, currency, sum(amount_nano) / 1e9 as amount from billing_adjustments_v1 group by 1, 2, 3, 4 order by 1 desc limit 100", ""),)),
            Panel(title="Exceptions", unit="short", is_sql=True, queries=(("select * from billing_reconciliation_v1 order by 1 desc limit 100", ""),)),
        )),
    ),
)  # fmt: skip

TENANT: Final = Dashboard(
    uid="peaje-tenant", title="Peaje / tenant", variable=("tenant", "label_values(peaje_tenant_requests_total, tenant)"),
    rows=(
        ("$tenant", (
            Panel(title="Requests by what became of them", unit="reqps", queries=_rates("peaje_tenant_requests_total", "outcome", where='{tenant="$tenant"}')),
            Panel(title="Tokens", unit="short", queries=_rates("peaje_tenant_tokens_total", "kind", where='{tenant="$tenant"}')),
            Panel(title="Refused, of all", unit="percentunit", queries=((
                f'sum(rate(peaje_tenant_requests_total{{tenant="$tenant",outcome="refused"}}{_RATE})) / sum(rate(peaje_tenant_requests_total{{tenant="$tenant"}}{_RATE}))',
                "refused"),)),
            Panel(title="Tokens of the last day", unit="short", is_stat=True, queries=(('sum by (kind) (increase(peaje_tenant_tokens_total{tenant="$tenant"}[1d]))', "{{kind}}"),)),
        )),
        ("The models, for everybody", (
            Panel(title="First token", unit="s", queries=_quantiles("peaje_model_first_token_seconds", by="model")),
            Panel(title="Between tokens", unit="s", queries=_quantiles("peaje_model_between_tokens_seconds", by="model")),
        )),
    ),
)  # fmt: skip

ALL: Final = (SRE, BILLING, TENANT)


def panels() -> list[Panel]:
    """Every panel."""
    return [panel for dashboard in ALL for _, row in dashboard.rows for panel in row]


def concrete(expr: str) -> str:
    """*expr* with something in the place of what Grafana puts in."""
    return expr.replace("$__rate_interval", "5m").replace("$tenant", "any")
