# SPDX-License-Identifier: Apache-2.0
"""
Turn the models document into the two files that Envoy watches: clusters.yaml and routes.yaml.

One cluster per model (its pool of servers) and one route table that chooses the pool by what
the gate read from the body. The route table is the allow-list: each path of the contract, and
after them a 404 for everything else. Envoy's own typed messages build the resources, so a field
that Envoy does not know cannot be written.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import betterproto2
import yaml
from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as http
from envoy_data_plane.envoy.service.discovery import v3 as discovery
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf

from chassis import contract
from chassis.errors import Invalid, Unavailable
from chassis.models import Endpoint, Model, ModelCatalogue, supports_continuous_usage

CLUSTERS_FILE: Final = "clusters.yaml"
ROUTES_FILE: Final = "routes.yaml"
#: `rds.route_config_name` in envoy.yaml.
ROUTE_TABLE: Final = "tenants"

#: A server on the same network that takes longer to accept is not there.
CONNECT_TIMEOUT: Final = timedelta(seconds=1)
#: No limit on the whole answer: a long generation is not a fault. Silence is: see IDLE_TIMEOUT.
ANSWER_TIMEOUT: Final = timedelta(0)
#: Between two pieces of an answer; must exceed the slowest first token.
IDLE_TIMEOUT: Final = timedelta(seconds=600)
#: An idle connection is closed before the server closes it (uvicorn, and so vLLM: after 5 s);
#: otherwise a request now and then meets a connection that is just going away.
KEEP_ALIVE: Final = timedelta(seconds=4)
#: Bytes held per connection before the other side is slowed down.
CONNECTION_BUFFER_BYTES: Final = 1 << 20
#: The largest request body; the gate reads it whole.
REQUEST_BODY_BYTES_MAX: Final = 16 << 20
#: Envoy's own default of 1024 would refuse requests that limits have admitted. Admission is
#: ratelimit's decision, so this is far above it and only bounds a runaway.
POOL_MAX: Final = 10000
#: Only what cannot have reached a model: nothing is generated, or billed, twice.
RETRY_ON: Final = "connect-failure,refused-stream,reset-before-request"
#: The caller's credential is for us, not for the model server; a compressed answer could not be metered.
NOT_FORWARDED: Final = (contract.AUTHORIZATION_HEADER, contract.API_KEY_HEADER, "accept-encoding")

_MODELS_PATH: Final = "/v1/models"
_TYPE_PREFIX: Final = "type.googleapis.com/"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_HEADER: Final = "# Built from models.yaml; a change here is overwritten.\n"
#: Where systems keep the certificates that they trust, when Python's own place is empty.
_TRUSTED_CERTIFICATES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


def publish(models_path: Path, directory: Path) -> None:
    """
    Read the models document and swap both files below *directory*; refuse in one line, writing nothing.

    Envoy notices a file that is renamed into place, so it never reads half of one.
    """
    catalogue = ModelCatalogue.load(models_path)
    clusters = render([model_cluster(model) for model in catalogue.models])
    routes = render([route_table(catalogue.models)])
    # Clusters first: a route must not lead to a pool that Envoy has not heard of.
    _replace(directory / CLUSTERS_FILE, clusters)
    _replace(directory / ROUTES_FILE, routes)


#: The pool of a request that names no served model. Never defined.
NO_POOL: Final = "no-pool"


def cluster_name(model: str) -> str:
    """Name the pool of *model*."""
    return f"model/{model}"


def model_cluster(model: Model) -> cluster.Cluster:
    """Build the pool of one model."""
    is_static = all(_is_address(server.host) for server in model.endpoints)
    uses_tls = model.endpoints[0].scheme == "https"
    return cluster.Cluster(
        name=cluster_name(model.name),
        # In each journal record: which engine answered decides what its frames are worth.
        metadata=core.Metadata(filter_metadata={
            contract.POOL_NAMESPACE: protobuf.Struct.from_dict({contract.POOL_ENGINE: model.engine})
        }),
        type=cluster.ClusterDiscoveryType.STATIC if is_static else cluster.ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=CONNECT_TIMEOUT,
        # A server that also has an IPv6 name often listens on IPv4 only (localhost, for one).
        dns_lookup_family=cluster.ClusterDnsLookupFamily.V4_PREFERRED,
        # Generations differ a hundredfold in length: taking turns would queue behind the long ones.
        lb_policy=cluster.ClusterLbPolicy.LEAST_REQUEST,
        per_connection_buffer_limit_bytes=CONNECTION_BUFFER_BYTES,
        circuit_breakers=cluster.CircuitBreakers(
            thresholds=[
                cluster.CircuitBreakersThresholds(
                    max_connections=POOL_MAX, max_pending_requests=POOL_MAX, max_requests=POOL_MAX, max_retries=POOL_MAX
                )
            ]
        ),
        upstream_connection_options=cluster.UpstreamConnectionOptions(
            # A server that vanished without a word is noticed during a long silence.
            tcp_keepalive=core.TcpKeepalive(keepalive_probes=3, keepalive_time=30, keepalive_interval=10)
        ),
        typed_extension_protocol_options={_HTTP_OPTIONS: _pack(_http_options())},
        transport_socket=_tls_socket(model) if uses_tls else None,
        load_assignment=endpoint.ClusterLoadAssignment(
            cluster_name=cluster_name(model.name),
            endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=[_server(server) for server in model.endpoints])],
        ),
    )


def route_table(models: Iterable[Model]) -> route.RouteConfiguration:
    """Build the allow-list: each path to each model's pool, a 404 for another model, a 404 for another path."""
    by_name = sorted(models, key=lambda model: model.name)
    routes: list[route.Route] = []
    for path, dialect in contract.PATHS.items():
        if path == _MODELS_PATH:
            # tap.lua answers before the router; this is what a broken tap leaves.
            routes.append(_refusal(dialect, route.RouteMatch(path=path), "not_found", "The list of models is not available."))
            continue
        routes.extend(_forward(path, dialect, model) for model in by_name)
        routes.append(_unrouted(path, dialect))
    routes.append(_refusal("not-found", route.RouteMatch(prefix="/"), "not_found", "Unknown path."))
    return route.RouteConfiguration(
        name=ROUTE_TABLE,
        virtual_hosts=[
            route.VirtualHost(
                name=ROUTE_TABLE, domains=["*"], request_body_buffer_limit=REQUEST_BODY_BYTES_MAX, routes=routes
            )
        ],
    )


def render(resources: Sequence[betterproto2.Message]) -> str:
    """Write *resources* as the file that Envoy reads: the same text for the same resources."""
    answer = discovery.DiscoveryResponse(resources=[_pack(resource) for resource in resources])
    answer.version_info = hashlib.sha256(bytes(answer)).hexdigest()[:16]
    document = answer.to_dict(casing=betterproto2.Casing.SNAKE)
    return _HEADER + yaml.safe_dump(document, sort_keys=False, width=120)


def _forward(path: str, dialect: str, model: Model) -> route.Route:
    chosen = matcher.MetadataMatcher(
        filter=contract.NS_REQUEST,
        path=[matcher.MetadataMatcherPathSegment(key=contract.REQ_MODEL)],
        value=matcher.ValueMatcher(string_match=matcher.StringMatcher(exact=model.name)),
    )
    facts = protobuf.Struct.from_dict({contract.ROUTE_RUNNING_USAGE: supports_continuous_usage(model.engine)})
    return route.Route(
        name=dialect,
        match=route.RouteMatch(path=path, dynamic_metadata=[chosen]),
        metadata=core.Metadata(filter_metadata=dict.fromkeys(contract.ROUTE_NAMESPACES, facts)),
        route=route.RouteAction(
            cluster=cluster_name(model.name),
            timeout=ANSWER_TIMEOUT,
            idle_timeout=IDLE_TIMEOUT,
            # The model server sees its own name, not one that a client chose.
            auto_host_rewrite=True,
            retry_policy=route.RetryPolicy(retry_on=RETRY_ON, num_retries=1),
        ),
        request_headers_to_remove=list(NOT_FORWARDED),
        request_headers_to_add=[_fairness_id()],
    )


def _fairness_id() -> core.HeaderValueOption:
    # On both lanes the identity is in the same namespace; a client's own value was dropped before anything read it.
    return core.HeaderValueOption(
        header=core.HeaderValue(
            key=contract.FAIRNESS_ID_HEADER, value=f"%DYNAMIC_METADATA({contract.NS_IDENTITY}:{contract.ID_TENANT})%"
        ),
        append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _unrouted(path: str, dialect: str) -> route.Route:
    # What a request matches until the gate has read its body and named the model. It must forward,
    # though to a pool that does not exist: Envoy lets a body grow beyond the connection's buffer
    # (up to request_body_buffer_limit) only for a route that forwards. Without the gate it is a 404.
    return route.Route(
        name=f"{dialect}/no-model",
        match=route.RouteMatch(path=path),
        route=route.RouteAction(
            cluster=NO_POOL,
            cluster_not_found_response_code=route.RouteActionClusterNotFoundResponseCode.NOT_FOUND,
            timeout=ANSWER_TIMEOUT,
            idle_timeout=IDLE_TIMEOUT,
        ),
        request_headers_to_remove=list(NOT_FORWARDED),
    )


def _refusal(name: str, match: route.RouteMatch, code: str, message: str) -> route.Route:
    # The shapes of chassis/refusals.py, with the request id that only Envoy knows here.
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body: dict[str, Any] = {"error": error | {"request_id": "%STREAM_ID%"}}
    return route.Route(
        name=name,
        match=match,
        direct_response=route.DirectResponseAction(
            status=404, body_format=core.SubstitutionFormatString(json_format=protobuf.Struct.from_dict(body))
        ),
        response_headers_to_add=[
            core.HeaderValueOption(
                header=core.HeaderValue(key="content-type", value="application/json"),
                append_action=core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
            )
        ],
    )


def _http_options() -> http.HttpProtocolOptions:
    return http.HttpProtocolOptions(
        common_http_protocol_options=core.HttpProtocolOptions(idle_timeout=KEEP_ALIVE),
        explicit_http_config=http.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions()),
    )


def _server(server: Endpoint) -> endpoint.LbEndpoint:
    return endpoint.LbEndpoint(
        endpoint=endpoint.Endpoint(
            # Becomes the Host header, where an IPv6 address is written in brackets.
            hostname=f"[{server.host}]" if ":" in server.host else server.host,
            address=core.Address(socket_address=core.SocketAddress(address=server.host, port_value=server.port)),
        )
    )


def _tls_socket(model: Model) -> core.TransportSocket:
    if any(_is_address(server.host) for server in model.endpoints):
        raise Invalid(f"Model {model.name!r}: https needs a host name, an address has no certificate to check.")
    context = tls.UpstreamTlsContext(
        # Each server is asked for, and must prove, the name that the document gives it.
        auto_host_sni=True,
        auto_sni_san_validation=True,
        common_tls_context=tls.CommonTlsContext(
            alpn_protocols=["http/1.1"],
            validation_context=tls.CertificateValidationContext(
                trusted_ca=core.DataSource(filename=_trusted_certificates())
            ),
        ),
    )
    return core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=_pack(context))


def _trusted_certificates() -> str:
    places: Iterable[str | None] = (os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *_TRUSTED_CERTIFICATES)
    for place in places:
        if place and Path(place).is_file():
            return place
    raise Invalid("No trusted certificates were found for https.", mend="Name a file of them in SSL_CERT_FILE.")


def _pack(message: betterproto2.Message) -> protobuf.Any:
    return protobuf.Any.pack(message)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                # Readable, not writable, for an Envoy that runs as another user: no secret is in it.
                os.fchmod(file.fileno(), 0o644)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as exc:
        raise Unavailable(f"{path} cannot be written: {exc.strerror}.") from exc
