# SPDX-License-Identifier: Apache-2.0
"""Write dashboards as Grafana reads them, by its own library; only for who makes the files, so it is not installed with Peaje."""

from __future__ import annotations

import itertools
from typing import Any, Final

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import builder as cog_builder
from grafana_foundation_sdk.cog import variants
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

from control.monitoring.dashboards import Dashboard, Panel

#: Chosen by whoever looks, among the data sources that are there.
_PROMETHEUS: Final = DataSourceRef(type_val="prometheus", uid="${prometheus}")
_POSTGRES: Final = DataSourceRef(type_val="grafana-postgresql-datasource", uid="${postgres}")
_COLUMNS, _HEIGHT = 24, 7


class _Sql(variants.Dataquery):
    """A query of the Postgres data source, for which the library has no words."""

    def __init__(self, sql: str) -> None:
        self._sql = sql

    def to_json(self) -> dict[str, Any]:
        """As the data source reads it."""
        return {"refId": "A", "datasource": _POSTGRES, "format": "table", "rawQuery": True, "rawSql": self._sql}


class _SqlBuilder(cog_builder.Builder[variants.Dataquery]):
    def __init__(self, sql: str) -> None:
        self._sql = sql

    def build(self) -> variants.Dataquery:
        """The query."""
        return _Sql(self._sql)


def as_grafana(one: Dashboard) -> str:
    """The JSON of a dashboard."""
    made = (
        dashboard.Dashboard(one.title).uid(one.uid).tags(["peaje"]).refresh("30s").time("now-6h", "now").timezone("utc")
        .tooltip(DashboardCursorSync.CROSSHAIR).editable()
        .with_variable(dashboard.DatasourceVariable("prometheus").type("prometheus"))
    )  # fmt: skip
    if any(panel.is_sql for _, row in one.rows for panel in row):
        made = made.with_variable(dashboard.DatasourceVariable("postgres").type("grafana-postgresql-datasource"))
    if one.variable is not None:
        name, query = one.variable
        made = made.with_variable(dashboard.QueryVariable(name).datasource(_PROMETHEUS).query(query))
    ids = itertools.count(1)
    for title, row in one.rows:
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in row:
            made = made.with_panel(_panel(panel).id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> Any:
    made: Any
    if panel.is_sql:
        made = table.Panel().span(_COLUMNS // 2).datasource(_POSTGRES)
    elif panel.is_stat:
        made = stat.Panel().span(_COLUMNS // 3).datasource(_PROMETHEUS).color_mode(BigValueColorMode.BACKGROUND)
        made = made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        made = timeseries.Panel().span(_COLUMNS // 3).datasource(_PROMETHEUS).fill_opacity(10)
        made = made.legend(common.VizLegendOptions().show_legend(True))  # noqa: FBT003 - the library's own
    made = made.title(panel.title).unit(panel.unit).height(_HEIGHT)
    if panel.says:
        made = made.description(panel.says)
    for number, (query, legend) in enumerate(panel.queries):
        made = made.with_target(
            _SqlBuilder(query) if panel.is_sql
            else prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + number))
        )  # fmt: skip
    return made
