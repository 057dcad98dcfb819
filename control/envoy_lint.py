# SPDX-License-Identifier: Apache-2.0
"""
Find what Envoy accepts in silence and an operator would regret.

Envoy validates that a configuration can be loaded. This looks for what it leaves open:
a filter on a default timeout or failure mode, an identity header that a client may send,
a route that forwards without a meter. Pure: parsed YAML in, findings out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any, Final

from chassis import contract
from control.finding import Finding
from control.located_yaml import Mapping, walk

Rule = Callable[[Mapping, str], Iterator[Finding]]

_AUTHZ: Final = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"
_RATELIMIT: Final = "envoy.extensions.filters.http.ratelimit.v3.RateLimit"
_EXT_PROC: Final = "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
_CONNECTION_MANAGER: Final = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_HEADER_MUTATION: Final = "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
_METADATA_INPUT: Final = "envoy.extensions.matching.common_inputs.network.v3.DynamicMetadataInput"
_DOWNSTREAM_TLS: Final = "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
_CLUSTER: Final = "envoy.config.cluster.v3.Cluster"
_ROUTES: Final = "envoy.config.route.v3.RouteConfiguration"

#: What makes a path mean the same to the decision and to the router, and an address mean nothing.
_HYGIENE: Final[tuple[tuple[tuple[str, ...], tuple[Any, ...]], ...]] = (
    (("use_remote_address",), (True,)),
    (("normalize_path",), (True,)),
    (("merge_slashes",), (True,)),
    (("path_with_escaped_slashes_action",), ("REJECT_REQUEST", "UNESCAPE_AND_REDIRECT")),
    (("common_http_protocol_options", "headers_with_underscores_action"), ("REJECT_REQUEST",)),
)
#: A slow client is cut after these; Envoy's own are off or five minutes.
_CLIENT_TIMEOUTS: Final = ("request_headers_timeout", "request_timeout", "stream_idle_timeout")
_OUR_PREFIX: Final = "peaje."
_OUR_NAMESPACES: Final = (contract.NS_REQUEST, contract.NS_USAGE, contract.POOL_NAMESPACE)
#: Each of these decides whether a request passes at all.
_ASKING: Final = {_AUTHZ: "ext_authz", _RATELIMIT: "ratelimit", _EXT_PROC: "ext_proc"}


def lint(document: Mapping, file: str) -> list[Finding]:
    """Return all that is wrong in one file of Envoy's configuration: a bootstrap, or clusters or routes as served."""
    found: list[Finding] = []
    if "admin" in document:
        found.extend(_admin(document, file))
    for mapping in walk(document):
        for rule in _RULES.get(_type_of(mapping), ()):
            found.extend(rule(mapping, file))
        found.extend(_namespaces(mapping, file))
        if "route_config" in mapping and isinstance(mapping["route_config"], Mapping):
            found.extend(_routes(mapping["route_config"], file))
        if "exact_match_map" in mapping:
            found.extend(_matcher_tree(mapping, file))
    for cluster in (document.at("static_resources") or Mapping()).mappings("clusters"):
        found.extend(_cluster(cluster, file))
    return sorted(set(found), key=lambda finding: (finding.file, finding.line, finding.what))


def _namespaces(mapping: Mapping, file: str) -> Iterator[Finding]:
    """Metadata of ours that nobody writes: what asks for it is never true, or always."""
    for name in ("filter", "key"):
        value = mapping.get(name)
        if isinstance(value, str) and value.startswith(_OUR_PREFIX) and value not in _OUR_NAMESPACES:
            yield Finding(
                file=file, line=mapping.line, what=f"nobody writes the metadata {value}.",
                mend=f"Write one of {', '.join(_OUR_NAMESPACES)}.",
            )  # fmt: skip


def _type_of(mapping: Mapping) -> str:
    return str(mapping.get("@type", "")).rpartition("/")[2]


def _required(mapping: Mapping, file: str, *, of: str, paths: tuple[tuple[str, ...], ...]) -> Iterator[Finding]:
    for path in paths:
        if mapping.at(*path) is None:
            name = ".".join(path)
            yield Finding(file=file, line=mapping.line, what=f"{of} leaves {name} to Envoy's default.", mend=f"Write {name} out.")


def _authz(filter_: Mapping, file: str) -> Iterator[Finding]:
    server = ("http_service", "server_uri", "timeout") if "http_service" in filter_ else ("grpc_service", "timeout")
    yield from _required(filter_, file, of="ext_authz", paths=(server, ("failure_mode_allow",), ("status_on_error",)))
    yield from _retries(filter_.at("grpc_service"), file)
    if filter_.get("failure_mode_allow") is True:
        yield Finding(
            file=file, line=filter_.line,
            what="ext_authz lets everybody pass when extauth is away.",
            mend="Write failure_mode_allow: false; authentication never fails open.",
        )  # fmt: skip


def _ratelimit(filter_: Mapping, file: str) -> Iterator[Finding]:
    yield from _required(filter_, file, of="ratelimit", paths=(("timeout",), ("failure_mode_deny",), ("rate_limit_service", "grpc_service")))
    if filter_.get("failure_mode_deny") is True:
        yield from _required(filter_, file, of="ratelimit", paths=(("status_on_error",),))
    yield from _retries(filter_.at("rate_limit_service", "grpc_service"), file)
    # Without a descriptor there is no admission; without one at the stream's end there is nothing to settle.
    admitting = [entry for entry in filter_.mappings("rate_limits") if not entry.get("apply_on_stream_done")]
    for entry in admitting:
        for action in entry.mappings("actions"):
            metadata = action.get("metadata")
            if isinstance(metadata, Mapping) and "default_value" not in metadata:
                yield Finding(
                    file=file, line=metadata.line,
                    what="without this metadata Envoy drops the descriptor and nothing is limited.",
                    mend=f'Write default_value: "{contract.DESC_ABSENT}".',
                )  # fmt: skip


def _retries(service: Any, file: str) -> Iterator[Finding]:
    """Each try of a gRPC call gets max_interval and no more, whatever the timeout (Envoy 1.40, tried live)."""
    policy = service.get("retry_policy") if isinstance(service, Mapping) else None
    if not isinstance(policy, Mapping):
        return
    timeout, longest = _seconds(service.get("timeout")), _seconds(policy.at("retry_back_off", "max_interval"))
    if timeout is not None and (longest is None or longest < timeout):
        yield Finding(
            file=file, line=policy.line,
            what=f"each try is given up after retry_back_off.max_interval, {_say(policy.at('retry_back_off', 'max_interval'))}, before the timeout.",
            mend=f"Write max_interval: {service['timeout']} or more.",
        )  # fmt: skip


def _seconds(duration: Any) -> float | None:
    """Read protobuf's JSON form of a duration; None for what is none, of which Envoy itself complains."""
    try:
        return float(str(duration).removesuffix("s"))
    except ValueError:
        return None


def _ext_proc(filter_: Mapping, file: str) -> Iterator[Finding]:
    modes = (("processing_mode", "request_header_mode"), ("processing_mode", "response_header_mode"))
    yield from _required(
        filter_, file, of="ext_proc",
        paths=(("grpc_service", "timeout"), ("message_timeout",), ("failure_mode_allow",), *modes),
    )  # fmt: skip


def _connection_manager(manager: Mapping, file: str) -> Iterator[Finding]:
    yield from _required(manager, file, of="the connection manager", paths=tuple((name,) for name in _CLIENT_TIMEOUTS))
    for path, accepted in _HYGIENE:
        if manager.at(*path) not in accepted:
            name = ".".join(path)
            yield Finding(
                file=file, line=manager.line, what=f"{name} is {_say(manager.at(*path))}.", mend=f"Write {name}: {_say(accepted[0])}."
            )
    if not (manager.at("internal_address_config") or Mapping()).mappings("cidr_ranges"):
        yield Finding(
            file=file, line=manager.line,
            what="internal_address_config names no range, so Envoy trusts what callers from private addresses say in x-envoy-*.",
            mend="Name one that nobody has: cidr_ranges: [{address_prefix: 255.255.255.255, prefix_len: 32}].",
        )  # fmt: skip
    if manager.get("preserve_external_request_id"):
        yield Finding(
            file=file, line=manager.line,
            what="a client's own request id is kept, and it would become a billing id.",
            mend="Write preserve_external_request_id: false.",
        )  # fmt: skip
    yield from _stripping(manager, file)
    yield from _filters(manager, file)


def _stripping(manager: Mapping, file: str) -> Iterator[Finding]:
    mutations = [
        mutation
        for extension in manager.mappings("early_header_mutation_extensions")
        if isinstance(config := extension.get("typed_config"), Mapping) and _type_of(config) == _HEADER_MUTATION
        for mutation in config.mappings("mutations")
    ]
    removed = {str(mutation.get("remove", "")).lower() for mutation in mutations}
    prefixes = [str(mutation.at("remove_on_match", "key_matcher", "prefix") or "").lower() for mutation in mutations]
    if contract.REQUEST_ID_HEADER not in removed:
        yield Finding(
            file=file, line=manager.line,
            what=f"a client's {contract.REQUEST_ID_HEADER} is not removed, so it would choose the billing id.",
            mend=f"Add remove: {contract.REQUEST_ID_HEADER} to early_header_mutation_extensions.",
        )  # fmt: skip
    if contract.FAIRNESS_ID_HEADER not in removed:
        yield Finding(
            file=file, line=manager.line,
            what=f"a client's {contract.FAIRNESS_ID_HEADER} is not removed, so it could take another tenant's turn.",
            mend=f"Add remove: {contract.FAIRNESS_ID_HEADER} to early_header_mutation_extensions.",
        )  # fmt: skip
    if not any(prefix and contract.OWN_HEADER_PREFIX.startswith(prefix) for prefix in prefixes):
        yield Finding(
            file=file, line=manager.line,
            what=f"a client's {contract.OWN_HEADER_PREFIX}* headers are not removed.",
            mend=f"Add remove_on_match with key_matcher prefix {contract.OWN_HEADER_PREFIX} to early_header_mutation_extensions.",
        )  # fmt: skip


def _filters(manager: Mapping, file: str) -> Iterator[Finding]:
    order: list[str] = []
    for filter_ in manager.mappings("http_filters"):
        kinds = [_ASKING[kind] for inner in walk(filter_) if (kind := _type_of(inner)) in _ASKING]
        order.extend(kinds)
        yield from _made_on_a_match(filter_, file)
        for switch in ("disabled", "is_optional"):
            if kinds and filter_.get(switch):
                yield Finding(
                    file=file, line=filter_.line, what=f"{kinds[0]} is {switch}: Envoy would go on without it.", mend=f"Remove {switch}."
                )
    if "ext_authz" not in order:
        yield Finding(
            file=file, line=manager.line, what="there is no ext_authz filter: nobody is asked who is calling.", mend="Add it before ratelimit."
        )
    elif order[0] != "ext_authz":
        yield Finding(
            file=file, line=manager.line, what=f"{order[0]} comes before ext_authz and so before the identity.", mend="Put ext_authz first."
        )


def _made_on_a_match(filter_: Mapping, file: str) -> Iterator[Finding]:
    """Of a composite, what no matcher names is nothing: a request that is not what somebody thought of would pass."""
    for inner in walk(filter_.at("typed_config", "xds_matcher", "matcher_list")):
        kind = _type_of(inner)
        if kind in {_AUTHZ, _RATELIMIT}:
            yield Finding(
                file=file, line=inner.line, what=f"{_ASKING[kind]} is made only where a matcher says so; without one, everybody passes.",
                mend="Put it into on_no_match, and have a matcher skip it where it is not needed.",
            )  # fmt: skip


def _routes(table: Mapping, file: str) -> Iterator[Finding]:
    for host in table.mappings("virtual_hosts"):
        routes = host.mappings("routes")
        last = routes[-1] if routes else host
        if last.at("match", "prefix") != "/" or last.at("direct_response", "status") != 404:
            yield Finding(
                file=file, line=last.line,
                what="the last route does not answer 404 to every other path.",
                mend='End with match: {prefix: "/"} and direct_response: {status: 404}.',
            )  # fmt: skip
        for route in routes:
            yield from _route(route, file)
    for inner in walk(table):
        if "hits_addend" in inner and "actions" in inner:
            yield Finding(
                file=file, line=inner.line,
                what="Envoy ignores hits_addend in a route's rate_limits: a stream would cost 1.",
                mend="Move the entry to the ratelimit filter's own rate_limits.",
            )  # fmt: skip


def _route(route: Mapping, file: str) -> Iterator[Finding]:
    overrides = route.get("typed_per_filter_config")
    for inner in walk(overrides):
        if inner.get("disabled") is True:
            yield Finding(
                file=file, line=inner.line, what="a route switches a filter off.", mend="Remove the override: no route is without its decisions."
            )
    if "direct_response" in route or "redirect" in route:
        return
    path = route.at("match", "path")
    if path not in contract.PATHS:
        said = route.at("match") or {}
        shown = ", ".join(f"{name} {_say(said[name])}" for name in ("path", "prefix", "path_separated_prefix", "safe_regex") if name in said)
        yield Finding(
            file=file, line=route.line,
            what=f"a route forwards {shown or 'every path'}, which has no meter.",
            mend=f"Match one exact path of: {', '.join(contract.PATHS)}.",
        )  # fmt: skip
    elif isinstance(route.get("route"), Mapping):
        yield from _required(route, file, of=f"the route of {path}", paths=(("route", "timeout"),))


def _matcher_tree(tree: Mapping, file: str) -> Iterator[Finding]:
    if _type_of(tree.at("input", "typed_config") or Mapping()) == _METADATA_INPUT:
        yield Finding(
            file=file, line=tree.line,
            what="exact_match_map never matches dynamic metadata, and Envoy does not say so.",
            mend="Use matcher_list with custom_match envoy.matching.input_matchers.metadata.",
        )  # fmt: skip


def _cluster(cluster: Mapping, file: str) -> Iterator[Finding]:
    yield from _required(cluster, file, of=f"cluster {cluster.get('name', 'without a name')}", paths=(("connect_timeout",),))


def _admin(document: Mapping, file: str) -> Iterator[Finding]:
    admin = document["admin"]
    if not isinstance(admin, Mapping) or admin.at("address", "pipe") is not None or "address" not in admin:
        return
    address = str(admin.at("address", "socket_address", "address") or "")
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = address == "localhost"
    if not is_loopback:
        yield Finding(
            file=file, line=admin.line, what=f"the admin page listens on {address or 'every address'}; it can stop Envoy.", mend="Bind it to 127.0.0.1."
        )


def _downstream_tls(context: Mapping, file: str) -> Iterator[Finding]:
    validation = context.at("common_tls_context", "validation_context")
    if not isinstance(validation, Mapping):
        return  # nobody is asked for a certificate, so none can be believed
    if validation.get("trust_chain_verification") == "ACCEPT_UNTRUSTED":
        yield Finding(
            file=file, line=validation.line,
            what="certificates of anybody are accepted, and their names would become identities.",
            mend="Remove trust_chain_verification.",
        )  # fmt: skip
    if "trusted_ca" not in validation:
        yield Finding(
            file=file, line=validation.line, what="no trusted_ca: certificates are not verified.", mend="Name the clients' CA in trusted_ca."
        )


def _say(value: object) -> str:
    match value:
        case None:
            return "not written"
        case bool():
            return str(value).lower()
        case _:
            return str(value)


_RULES: Final[dict[str, tuple[Rule, ...]]] = {
    _AUTHZ: (_authz,),
    _RATELIMIT: (_ratelimit,),
    _EXT_PROC: (_ext_proc,),
    _CONNECTION_MANAGER: (_connection_manager,),
    _DOWNSTREAM_TLS: (_downstream_tls,),
    _CLUSTER: (_cluster,),
    _ROUTES: (_routes,),
}
