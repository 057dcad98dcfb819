# SPDX-License-Identifier: Apache-2.0
"""
Build what chooses among the servers of a pool: Envoy itself, the load that servers report, or an endpoint picker.

A picker is the other side of the Gateway API Inference Extension's endpoint picker protocol: it is asked by picker.lua,
whose answer is in the metadata namespace `envoy.lb`. It may choose a server of the pool and nothing else: Envoy takes an
address that it does not know for no choice.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import betterproto2
from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.extensions.filters.http.lua import v3 as lua
from envoy_data_plane.envoy.extensions.load_balancing_policies.client_side_weighted_round_robin import v3 as weighted
from envoy_data_plane.envoy.extensions.load_balancing_policies.common import v3 as balancing
from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request import v3 as least_request
from envoy_data_plane.envoy.extensions.load_balancing_policies.maglev import v3 as maglev
from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import v3 as override_host
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as http
from envoy_data_plane.envoy.type import v3 as kind
from envoy_data_plane.envoy.type.metadata import v3 as metadata
from envoy_data_plane.google import protobuf

from chassis import contract
from chassis.served import Balance, Model, Pool
from control.envoy_parts import (
    CONNECT_TIMEOUT,
    HTTP_OPTIONS,
    POOL_MAX,
    breakers,
    host_name,
    is_address,
    outliers,
    pack,
    socket_address,
    stat_name,
    tls_socket,
)

#: A server may have so many percent of the average load before what belongs to it goes to its neighbour.
_AFFINITY_LOAD_PERCENT: Final = 150
#: What envoy.yaml calls picker.lua among the filter's scripts.
_SCRIPT: Final = "ask"
#: A server must have reported for so long before its weight counts; one whose last report is older has none.
REPORTING_SINCE: Final = timedelta(seconds=1)
REPORT_HOLDS: Final = timedelta(seconds=30)


def balance(model: Model, pool: Pool) -> dict[str, Any]:
    """What chooses the server, as fields of the pool's cluster."""
    if model.affinity is not None:
        # Bounded: what many prompts begin with must not be one server's alone.
        hashing = balancing.ConsistentHashingLbConfig(hash_balance_factor=_AFFINITY_LOAD_PERCENT)
        return _policy("maglev", maglev.Maglev(consistent_hashing_lb_config=hashing))
    if pool.endpoint_picker is not None:
        return _policy("override_host", _picked(pool))
    if pool.balance is Balance.ORCA:
        return _policy("client_side_weighted_round_robin", _by_reports(pool))
    # Generations differ a hundredfold in length: taking turns would queue behind the long ones.
    warming = timedelta(seconds=pool.slow_start_seconds)
    slow_start = cluster.ClusterSlowStartConfig(slow_start_window=warming) if warming else None
    return {
        "lb_policy": cluster.ClusterLbPolicy.LEAST_REQUEST,
        "least_request_lb_config": cluster.ClusterLeastRequestLbConfig(slow_start_config=slow_start),
    }


def picker_name(model: Model, pool: Pool) -> str:
    """Name the cluster of a pool's endpoint picker."""
    return f"picker/{pool.name}/{model.name}"


def picker_cluster(model: Model, pool: Pool) -> cluster.Cluster:
    """Where the endpoint picker of *pool* is. Nobody is asked whether it is well: its health is on another port, if it has one."""
    assert pool.endpoint_picker is not None
    address = pool.endpoint_picker.address
    http2 = http.HttpProtocolOptions(
        explicit_http_config=http.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=core.Http2ProtocolOptions())
    )
    return cluster.Cluster(
        name=picker_name(model, pool),
        alt_stat_name=stat_name(picker_name(model, pool)),
        type=cluster.ClusterDiscoveryType.STATIC if is_address(address.host) else cluster.ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=CONNECT_TIMEOUT,
        dns_lookup_family=cluster.ClusterDnsLookupFamily.V4_PREFERRED,
        circuit_breakers=breakers(POOL_MAX),
        # One that is away is left out, also the last one: who asks hears it at once and not after a timeout.
        outlier_detection=outliers(percent_max=100),
        common_lb_config=cluster.ClusterCommonLbConfig(healthy_panic_threshold=kind.Percent(value=0)),
        typed_extension_protocol_options={HTTP_OPTIONS: pack(http2)},
        transport_socket=tls_socket("h2") if address.scheme == "https" else None,
        load_assignment=endpoint.ClusterLoadAssignment(
            cluster_name=picker_name(model, pool),
            endpoints=[
                endpoint.LocalityLbEndpoints(
                    lb_endpoints=[endpoint.LbEndpoint(endpoint=endpoint.Endpoint(hostname=host_name(address), address=socket_address(address)))]
                )
            ],
        ),
    )


def asking(model: Model, pool: Pool) -> dict[str, protobuf.Any]:
    """What a route to *pool* says to picker.lua: whom to ask, and what if it is away; nothing where nobody is asked."""
    picker = pool.endpoint_picker
    if picker is None:
        return {}
    context: dict[str, Any] = {
        "cluster": picker_name(model, pool),
        "host": f"{host_name(picker.address)}:{picker.address.port}",
        "when_away": picker.when_away.value,
    }
    # Servers are named by address; what DNS will find is not known here, and a picker then chooses among all that it knows.
    if all(is_address(server.host) for server in pool.endpoints):
        context["among"] = [f"{host_name(server)}:{server.port}" for server in pool.endpoints]
    return {contract.PICKER_FILTER: pack(lua.LuaPerRoute(name=_SCRIPT, filter_context=protobuf.Struct.from_dict(context)))}


def _picked(pool: Pool) -> override_host.OverrideHost:
    key = metadata.MetadataKey(key=contract.NS_PICKED, path=[metadata.MetadataKeyPathSegment(key=contract.PICKED_ENDPOINT)])
    fallback = least_request.LeastRequest(slow_start_config=_slow_start(pool))
    return override_host.OverrideHost(
        # By metadata alone: a header would reach the server, and might be somebody else's.
        override_host_sources=[override_host.OverrideHostOverrideHostSource(metadata=key)],
        fallback_policy=cluster.LoadBalancingPolicy(policies=[_named("least_request", fallback)]),
    )


def _by_reports(pool: Pool) -> weighted.ClientSideWeightedRoundRobin:
    return weighted.ClientSideWeightedRoundRobin(
        blackout_period=REPORTING_SINCE,
        weight_expiration_period=REPORT_HOLDS,
        slow_start_config=_slow_start(pool),
    )


def _slow_start(pool: Pool) -> balancing.SlowStartConfig | None:
    warming = timedelta(seconds=pool.slow_start_seconds)
    return balancing.SlowStartConfig(slow_start_window=warming) if warming else None


def _policy(name: str, config: betterproto2.Message) -> dict[str, Any]:
    return {"load_balancing_policy": cluster.LoadBalancingPolicy(policies=[_named(name, config)])}


def _named(name: str, config: betterproto2.Message) -> cluster.LoadBalancingPolicyPolicy:
    extension = core.TypedExtensionConfig(name=f"envoy.load_balancing_policies.{name}", typed_config=pack(config))
    return cluster.LoadBalancingPolicyPolicy(typed_extension_config=extension)
