# SPDX-License-Identifier: Apache-2.0
"""
The steps of the waterfall: Envoy's own configuration with fewer parts. Pure: a parsed bootstrap in, another one out.

Each step has all that the one before has. What is left of `envoy/envoy.yaml` is as it is there, so that a step costs
what the part costs and not what a copy of it would.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

_TENANTS: Final = "tenants"
_ROUTER: Final = "envoy.filters.http.router"
_DECISIONS: Final = frozenset({"envoy.filters.http.ext_authz", "envoy.filters.http.ratelimit"})
#: Made for requests that need more than a plain chat request does (decision 41); there from the first decision on.
_METERING: Final = frozenset({"metering"})


class Caller(Enum):
    """Whose requests a step is measured with."""

    UNLIMITED = "no limits"
    FAR = "far from limits"
    ASKED = "a limit on concurrency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One control more than the step before it."""

    name: str
    caller: Caller = Caller.UNLIMITED
    #: Access logs that are written.
    logs: frozenset[str] = frozenset()
    #: Filters that are left out; None: all but the router.
    without: frozenset[str] | None = None
    #: Processes beside Envoy that work for it; what the others do meanwhile is not its price.
    uses: frozenset[str] = frozenset()
    #: Whether the gate remembers decisions.
    is_express: bool = True

    @property
    def is_collected(self) -> bool:
        """Whether the collector reads this step's journal."""
        return "collector" in self.uses


_ASKED: Final = frozenset({"extauth", "ratelimit", "valkey", "postgres"})
_RECORDED: Final = _ASKED | {"collector"}
STEPS: Final = (
    Step(name="bare Envoy"),
    Step(name="+ journal", logs=frozenset({"journal"})),
    Step(name="+ gate: body, usage, start record", logs=frozenset({"journal"}), without=_DECISIONS | _METERING, is_express=False),
    Step(name="+ identity, remembered", logs=frozenset({"journal"}), without=frozenset(), uses=_ASKED),
    Step(name="+ limits, far: leases", logs=frozenset({"journal"}), without=frozenset(), caller=Caller.FAR, uses=_ASKED),
    Step(name="+ collector and ledger", logs=frozenset({"journal"}), without=frozenset(), caller=Caller.FAR, uses=_RECORDED),
    Step(
        name="+ second witness: everything", logs=frozenset({"journal", "witness"}), without=frozenset(), caller=Caller.FAR,
        uses=_RECORDED | {"metering"},
    ),
    Step(
        name="asked each time: a limit on concurrency", logs=frozenset({"journal", "witness"}), without=frozenset(), caller=Caller.ASKED,
        uses=_RECORDED | {"metering"},
    ),
)  # fmt: skip


def bootstrap(whole: dict[str, Any], step: Step, *, port: int, admin: int, upstream: int) -> dict[str, Any]:
    """Cut *whole* down to what *step* has; raises `ValueError` if a log or filter that it names is not there."""
    made = copy.deepcopy(whole)
    made["admin"]["address"]["socket_address"]["port_value"] = admin
    listeners = made["static_resources"]["listeners"] = [
        one for one in made["static_resources"]["listeners"] if one["name"] == _TENANTS
    ]
    listeners[0]["address"]["socket_address"]["port_value"] = port
    manager = listeners[0]["filter_chains"][0]["filters"][0]["typed_config"]
    _keep(manager, "access_log", step.logs)
    names = {one["name"] for one in manager["http_filters"]}
    without = names - {_ROUTER} if step.without is None else step.without
    if without - names:
        raise ValueError(f"envoy.yaml has no filter named {', '.join(sorted(without - names))}")
    _keep(manager, "http_filters", names - without)
    if step.without is None:
        # Without the gate nobody knows the model, so there is one route, to the one server there is.
        _route_to(made, manager, upstream)
    if not step.logs:
        _bare(manager)
    return made


def _keep(manager: dict[str, Any], what: str, names: frozenset[str] | set[str]) -> None:
    kept = [one for one in manager.get(what, []) if one["name"] in names]
    if {one["name"] for one in kept} != names:
        raise ValueError(f"envoy.yaml has no {what} named {', '.join(sorted(names - {one['name'] for one in kept}))}")
    manager[what] = kept


def _route_to(made: dict[str, Any], manager: dict[str, Any], upstream: int) -> None:
    del manager["rds"], made["dynamic_resources"]
    route = {"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}
    manager["route_config"] = {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]}
    address = {"socket_address": {"address": "127.0.0.1", "port_value": upstream}}
    made["static_resources"]["clusters"] = [
        {
            "name": "upstream", "type": "STATIC",
            "load_assignment": {"cluster_name": "upstream", "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
        }
    ]  # fmt: skip


def _bare(manager: dict[str, Any]) -> None:
    """What Envoy is without a line of ours."""
    kept = {"@type", "stat_prefix", "route_config", "http_filters"}
    for name in set(manager) - kept:
        del manager[name]
