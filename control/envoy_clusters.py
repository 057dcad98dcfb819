# SPDX-License-Identifier: Apache-2.0
"""
Build what Envoy knows of a model's servers: a cluster a pool, and a chain of pools where there is more than one.

A chain is an aggregate cluster: the first of its pools that has a healthy server answers. Envoy then knows the
pool by the server that it chose, so everything that depends on the pool is in the metadata of each endpoint, and the
filters that read it there are the same on a pool and on a chain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final

import betterproto2
from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.common.mutation_rules import v3 as mutation
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.extensions.clusters.aggregate import v3 as aggregate
from envoy_data_plane.envoy.extensions.common.matching import v3 as matching
from envoy_data_plane.envoy.extensions.filters.common.matcher.action import v3 as action
from envoy_data_plane.envoy.extensions.filters.http.credential_injector import v3 as injector
from envoy_data_plane.envoy.extensions.filters.http.header_mutation import v3 as header_mutation
from envoy_data_plane.envoy.extensions.filters.http.lua import v3 as lua
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec import v3 as codec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as manager
from envoy_data_plane.envoy.extensions.http.injected_credentials.generic import v3 as generic
from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as http
from envoy_data_plane.envoy.type import v3 as kind
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf
from envoy_data_plane.xds.core import v3 as xds_core
from envoy_data_plane.xds.type.matcher import v3 as xds

from chassis import contract
from chassis.errors import Invalid
from chassis.secrets import read_private
from chassis.served import Balance, Endpoint, Model, Pool
from control.envoy_choice import balance, picker_cluster
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

#: An idle connection is closed before the server closes it (uvicorn, and so vLLM: after 5 s);
#: otherwise a request now and then meets a connection that is just going away.
KEEP_ALIVE: Final = timedelta(seconds=4)
#: Bytes held per connection before the other side is slowed down.
CONNECTION_BUFFER_BYTES: Final = 1 << 20

#: What an engine of each kind answers when it can serve; "openai" stands for any server, of which only the
#: port is known. Dynamo's frontend is up without a worker, so its list must name the model.
HEALTH_PATHS: Final = {"vllm": "/health", "trtllm": "/health", "dynamo": "/v1/models"}
HEALTH_EVERY: Final = timedelta(seconds=2)
#: Of a server that was last seen dead, so that it soon has work again.
HEALTH_EVERY_WHILE_DEAD: Final = timedelta(seconds=1)
#: Somebody else's port need not be knocked at so often.
HEALTH_EVERY_OF_OTHERS: Final = timedelta(seconds=10)
#: An engine that computes a long prompt is slow to say that it is well.
HEALTH_TIMEOUT: Final = timedelta(seconds=2)
HEALTH_FAILURES: Final = 3
#: Bytes of a list of models that are looked through.
HEALTH_ANSWER_BYTES: Final = 1 << 16

#: Percent by which healthy servers count for more than they are. So far above 100 that one of them is all:
#: the next pool of a chain is for a pool that is dead, not for one that is short of servers.
_ONE_IS_ENOUGH: Final = 1_000_000

#: Where Envoy finds its filters, from the state directory.
_POOL_SCRIPT: Final = "envoy/pool.lua"
_LOAD_SCRIPT: Final = "envoy/load.lua"
CREDENTIALS_DIRECTORY: Final = "credentials"

#: What Envoy is told of each credential, by its file.
Secrets = Mapping[Path, tls.Secret]


def pool_name(model: Model, pool: Pool) -> str:
    """Name the cluster of a pool; in each usage row that one of its servers answered."""
    # The pool first: it has no slash, a model's name may.
    return f"pool/{pool.name}/{model.name}"


def target_name(model: Model, pool: Pool) -> str:
    """Name the cluster that requests go to whose turn it is to be answered by *pool*."""
    return pool_name(model, pool) if len(model.pools) == 1 else f"chain/{pool.name}/{model.name}"


def chain(model: Model, pool: Pool) -> tuple[Pool, ...]:
    """Pools in the order in which they answer for *pool*: itself, those with weights, then fallbacks."""
    others = sorted((other for other in model.pools if other is not pool), key=lambda other: -other.weight)
    return (pool, *others)


def model_clusters(model: Model, secrets: Secrets) -> list[cluster.Cluster]:
    """Build the pools of one model, the chains that begin with each that has a weight, and who is asked to choose."""
    built = [_pool_cluster(model, pool, secrets) for pool in model.pools]
    built += [picker_cluster(model, pool) for pool in model.pools if pool.endpoint_picker is not None]
    if len(model.pools) > 1:
        built += [_chain_cluster(model, pool, secrets) for pool in model.pools if not pool.is_fallback]
    return built


def credentials(models: Iterable[Model], home: Path) -> Secrets:
    """
    What Envoy is told of each credential: where it is, never what it is. Raises `Invalid` for a file that is not fit.

    A file that was written anew has another name there: Envoy then builds the pool anew, and reads it.
    """
    found: dict[Path, tls.Secret] = {}
    for file in sorted({pool.credential_file for model in models for pool in model.pools if pool.credential_file}):
        if not read_private(home / file):
            raise Invalid(f"The secret {home / file} is empty.")
        written = f"{file} {(home / file).stat().st_mtime_ns}"
        name = hashlib.sha256(written.encode()).hexdigest()[:16]
        found[file] = tls.Secret(name=name, generic_secret=tls.GenericSecret(secret=core.DataSource(filename=str(file))))
    return found


def _pool_cluster(model: Model, pool: Pool, secrets: Secrets) -> cluster.Cluster:
    is_static = all(is_address(server.host) for server in pool.endpoints)
    facts = {
        contract.POOL_NAME: pool_name(model, pool),
        contract.POOL_ENGINE: pool.engine,
        contract.POOL_MODEL: model.engine_name(pool),
    }
    return cluster.Cluster(
        name=pool_name(model, pool),
        alt_stat_name=stat_name(pool_name(model, pool)),
        type=cluster.ClusterDiscoveryType.STATIC if is_static else cluster.ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=CONNECT_TIMEOUT,
        # A server that also has an IPv6 name often listens on IPv4 only (localhost, for one).
        dns_lookup_family=cluster.ClusterDnsLookupFamily.V4_PREFERRED,
        per_connection_buffer_limit_bytes=CONNECTION_BUFFER_BYTES,
        circuit_breakers=breakers(pool.requests_max or POOL_MAX),
        health_checks=[_health_check(model, pool)],
        outlier_detection=outliers(percent_max=99),  # never the last one: whether that is dead its health check says
        # Without a healthy server the chain goes on, or the caller hears it at once.
        common_lb_config=cluster.ClusterCommonLbConfig(healthy_panic_threshold=kind.Percent(value=0)),
        upstream_connection_options=cluster.UpstreamConnectionOptions(
            # A server that vanished without a word is noticed during a long silence.
            tcp_keepalive=core.TcpKeepalive(keepalive_probes=3, keepalive_time=30, keepalive_interval=10)
        ),
        typed_extension_protocol_options=_http_options(model, (pool,), secrets),
        transport_socket=tls_socket("http/1.1") if pool.endpoints[0].scheme == "https" else None,
        load_assignment=endpoint.ClusterLoadAssignment(
            cluster_name=pool_name(model, pool),
            policy=endpoint.ClusterLoadAssignmentPolicy(overprovisioning_factor=_ONE_IS_ENOUGH),
            endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=[_server(server, facts) for server in pool.endpoints])],
        ),
        **balance(model, pool),
    )


def _chain_cluster(model: Model, first: Pool, secrets: Secrets) -> cluster.Cluster:
    pools = chain(model, first)
    return cluster.Cluster(
        name=target_name(model, first),
        alt_stat_name=stat_name(target_name(model, first)),
        connect_timeout=CONNECT_TIMEOUT,
        lb_policy=cluster.ClusterLbPolicy.CLUSTER_PROVIDED,
        cluster_type=cluster.ClusterCustomClusterType(
            name="envoy.clusters.aggregate",
            typed_config=pack(aggregate.ClusterConfig(clusters=[pool_name(model, pool) for pool in pools])),
        ),
        circuit_breakers=breakers(POOL_MAX),
        # Envoy runs the filters of the cluster that a route names, not of the one that the server is from.
        typed_extension_protocol_options=_http_options(model, pools, secrets),
    )


def _health_check(model: Model, pool: Pool) -> core.HealthCheck:
    path = pool.health_path or HEALTH_PATHS.get(pool.engine)
    every = HEALTH_EVERY if path else HEALTH_EVERY_OF_OTHERS
    check = core.HealthCheck(
        timeout=HEALTH_TIMEOUT,
        interval=every,
        # Envoy's own is a minute: what is hardly used would be found dead by a caller.
        no_traffic_interval=every,
        unhealthy_interval=HEALTH_EVERY_WHILE_DEAD,
        unhealthy_threshold=HEALTH_FAILURES,
        healthy_threshold=1,
    )
    if path is None:
        check.tcp_health_check = core.HealthCheckTcpHealthCheck()
        return check
    check.http_health_check = core.HealthCheckHttpHealthCheck(path=path)
    if pool.engine == "dynamo" and pool.health_path is None:
        named = json.dumps(model.engine_name(pool)).encode()
        check.http_health_check.receive = [core.HealthCheckPayload(text=named.hex())]
        check.http_health_check.response_buffer_size = HEALTH_ANSWER_BYTES
    return check


def _http_options(model: Model, pools: Sequence[Pool], secrets: Secrets) -> dict[str, protobuf.Any]:
    options = http.HttpProtocolOptions(
        common_http_protocol_options=core.HttpProtocolOptions(idle_timeout=KEEP_ALIVE),
        explicit_http_config=http.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions()),
        http_filters=_filters(model, pools, secrets),
    )
    return {HTTP_OPTIONS: pack(options)}


def _filters(model: Model, pools: Sequence[Pool], secrets: Secrets) -> list[manager.HttpFilter]:
    """
    What a request still needs once its server is chosen; nothing, for most models.

    They run again for each attempt, so that one that goes to another pool is written for that one.
    """
    named = any(model.engine_name(pool) != model.name for pool in pools) or bool(model.aliases)
    closed = [pool for pool in pools if pool.credential_file is not None]
    added: dict[str, str] = {}
    if named:
        added[contract.ENGINE_MODEL_HEADER] = _of_server(contract.POOL_MODEL)
    if closed:
        added[contract.POOL_HEADER] = _of_server(contract.POOL_NAME)
    reporting = any(pool.balance is Balance.ORCA for pool in pools)
    hidden = [contract.POOL_HEADER] if closed else []
    if model.affinity is not None and model.affinity.prefix_bytes:
        hidden.append(contract.PREFIX_HEADER)

    filters: list[manager.HttpFilter] = []
    if reporting:
        # Engines report their load to those who ask (vLLM, for one).
        added[contract.LOAD_FORMAT_HEADER] = "TEXT"
        filters.append(_filter("load", lua.Lua(default_source_code=core.DataSource(filename=_LOAD_SCRIPT), stat_prefix="load")))
    if added:
        filters.append(_mutations("server", [_set(name, value) for name, value in added.items()]))
    filters += [_credential(model, pool, secrets) for pool in closed]
    if named:
        script = core.DataSource(filename=_POOL_SCRIPT)
        filters.append(_filter("model", lua.Lua(default_source_code=script, stat_prefix="pool")))
    if hidden:
        filters.append(_mutations("hidden", [mutation.HeaderMutation(remove=name) for name in hidden]))
    if filters:
        filters.append(_filter("envoy.filters.http.upstream_codec", codec.UpstreamCodec()))
    return filters


def _of_server(key: str) -> str:
    return f"%METADATA(UPSTREAM_HOST:{contract.POOL_NAMESPACE}:{key})%"


def _filter(name: str, config: betterproto2.Message) -> manager.HttpFilter:
    return manager.HttpFilter(name=name, typed_config=pack(config))


def _mutations(name: str, mutations: list[mutation.HeaderMutation]) -> manager.HttpFilter:
    return _filter(name, header_mutation.HeaderMutation(mutations=header_mutation.Mutations(request_mutations=mutations)))


def _set(name: str, value: str) -> mutation.HeaderMutation:
    return mutation.HeaderMutation(
        append=core.HeaderValueOption(
            header=core.HeaderValue(key=name, value=value),
            append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
        )
    )


def _credential(model: Model, pool: Pool, secrets: Secrets) -> manager.HttpFilter:
    """The credential of *pool*, for its own servers and for no other's in the chain."""
    assert pool.credential_file is not None
    name = secrets[pool.credential_file].name
    directory = f"envoy/{CREDENTIALS_DIRECTORY}"
    injected = injector.CredentialInjector(
        overwrite=True,
        credential=core.TypedExtensionConfig(
            name="envoy.http.injected_credentials.generic",
            typed_config=pack(
                generic.Generic(
                    header=contract.AUTHORIZATION_HEADER,
                    header_value_prefix="Bearer ",
                    credential=tls.SdsSecretConfig(
                        name=name,
                        sds_config=core.ConfigSource(
                            resource_api_version=core.ApiVersion.V3,
                            path_config_source=core.PathConfigSource(
                                path=f"{directory}/{name}.yaml", watched_directory=core.WatchedDirectory(path=directory)
                            ),
                        ),
                    ),
                )
            ),
        ),
    )
    is_its_server = xds.MatcherMatcherListPredicate(
        single_predicate=xds.MatcherMatcherListPredicateSinglePredicate(
            input=xds_core.TypedExtensionConfig(
                name="pool", typed_config=pack(matcher.HttpRequestHeaderMatchInput(header_name=contract.POOL_HEADER))
            ),
            value_match=xds.StringMatcher(exact=pool_name(model, pool)),
        )
    )
    skip = xds.MatcherOnMatch(action=xds_core.TypedExtensionConfig(name="skip", typed_config=pack(action.SkipFilter())))
    return _filter(
        f"credential/{pool.name}",
        matching.ExtensionWithMatcher(
            extension_config=core.TypedExtensionConfig(name="envoy.filters.http.credential_injector", typed_config=pack(injected)),
            xds_matcher=xds.Matcher(
                matcher_list=xds.MatcherMatcherList(
                    matchers=[
                        xds.MatcherMatcherListFieldMatcher(
                            predicate=xds.MatcherMatcherListPredicate(not_matcher=is_its_server), on_match=skip
                        )
                    ]
                )
            ),
        ),
    )


def _server(server: Endpoint, facts: dict[str, str]) -> endpoint.LbEndpoint:
    hostname = host_name(server)
    return endpoint.LbEndpoint(
        endpoint=endpoint.Endpoint(
            hostname=hostname,
            address=socket_address(server),
            health_check_config=endpoint.EndpointHealthCheckConfig(hostname=hostname),
        ),
        # In each journal record: which engine answered decides what its frames are worth.
        metadata=core.Metadata(filter_metadata={contract.POOL_NAMESPACE: protobuf.Struct.from_dict(facts)}),
    )
