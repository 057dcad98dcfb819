# SPDX-License-Identifier: Apache-2.0
"""
Turn the models document into the files that Envoy watches: clusters.yaml, routes.yaml, and where credentials are.

One route table chooses the model by what the gate read from the body, its weights the pool
(control/envoy_clusters.py). The table is the allow-list: each path of the contract, and
after them a 404 for everything else. Envoy's own typed messages build the resources, so a field
that Envoy does not know cannot be written.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import betterproto2
import yaml
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.route import v3 as route
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts import v3 as previous_hosts
from envoy_data_plane.envoy.extensions.retry.priority.previous_priorities import v3 as previous_priorities
from envoy_data_plane.envoy.service.discovery import v3 as discovery
from envoy_data_plane.envoy.type.matcher import v3 as matcher
from envoy_data_plane.google import protobuf

from chassis import contract
from chassis.errors import Unavailable
from chassis.models import ModelCatalogue
from chassis.served import Balance, Model, Pool, Retry
from chassis.telemetry import traces
from control.envoy_choice import asking
from control.envoy_clusters import CREDENTIALS_DIRECTORY, credentials, model_clusters, target_name
from control.envoy_parts import pack

CLUSTERS_FILE: Final = "clusters.yaml"
ROUTES_FILE: Final = "routes.yaml"
#: `rds.route_config_name` in envoy.yaml.
ROUTE_TABLE: Final = "tenants"

#: No limit on the whole answer: a long generation is not a fault. Silence is: see IDLE_TIMEOUT.
ANSWER_TIMEOUT: Final = timedelta(0)
#: Between two pieces of an answer; must exceed the slowest first token.
IDLE_TIMEOUT: Final = timedelta(seconds=600)
#: The largest request body; the gate reads it whole.
REQUEST_BODY_BYTES_MAX: Final = 16 << 20
#: Never after the first byte of an answer: Envoy cannot take back what it has passed on.
RETRY_ON: Final = {
    Retry.UNSENT: "connect-failure,refused-stream,reset-before-request",
    Retry.UNANSWERED: "connect-failure,refused-stream,reset",
}
#: A pool that dies whole is noticed by its health checks within seconds; until then the second goes to the next one.
RETRIES: Final = 2
#: Tries at one that has not failed this request yet; the dead one is the least busy of all.
_HOSTS_TRIED: Final = 10
#: The caller's credential is for us, not for the model server; a compressed answer could not be metered.
NOT_FORWARDED: Final = (contract.AUTHORIZATION_HEADER, contract.API_KEY_HEADER, "accept-encoding")

_MODELS_PATH: Final = "/v1/models"
#: `consecutive_5xx` comes out of betterproto2 as `consecutive_5_xx`.
_SPLIT_NUMBER: Final = re.compile(r"(_\d)_(xx)\b")
_HEADER: Final = "# Built from models.yaml; a change here is overwritten.\n"

#: The pool of a request that names no served model. Never defined.
NO_POOL: Final = "no-pool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What a models document means to Envoy: its files as text."""

    clusters: str
    routes: str
    #: By file name, below `CREDENTIALS_DIRECTORY`; the names of secrets' files, never what is in them.
    credentials: dict[str, str]


def render_all(catalogue: ModelCatalogue, home: Path) -> Rendered:
    """Build every file; *home* is where files of credentials are looked for. Raises `Invalid` for one that is not fit."""
    secrets = credentials(catalogue.models, home)
    return Rendered(
        clusters=render([one for model in catalogue.models for one in model_clusters(model, secrets)]),
        routes=render([route_table(catalogue.models)]),
        credentials={f"{secret.name}.yaml": render([secret]) for secret in secrets.values()},
    )


def publish(models_path: Path, directory: Path, *, home: Path | None = None) -> None:
    """
    Read the models document and swap all files below *directory*; refuse in one line, writing nothing.

    Envoy notices a file that is renamed into place, so it never reads half of one. For an Envoy that is not running
    yet: control/apply.py knows what a running one needs. *home* is the state directory, unless it is above *directory*.
    """
    write(render_all(ModelCatalogue.load(models_path), home or directory.parent), directory)


def write(rendered: Rendered, directory: Path) -> None:
    """Swap all files below *directory*, each whole."""
    write_credentials(rendered, directory)
    # Clusters first: a route must not lead to a pool that Envoy has not heard of.
    replace(directory / CLUSTERS_FILE, rendered.clusters)
    replace(directory / ROUTES_FILE, rendered.routes)


def write_credentials(rendered: Rendered, directory: Path) -> None:
    """Tell Envoy where secrets are, before a cluster asks; what no cluster asks for any more does not harm."""
    if rendered.credentials:
        (directory / CREDENTIALS_DIRECTORY).mkdir(mode=0o700, exist_ok=True)
    for name, text in rendered.credentials.items():
        replace(directory / CREDENTIALS_DIRECTORY / name, text)


def route_table(models: Iterable[Model]) -> route.RouteConfiguration:
    """Build the allow-list: each path to each model's pools, a 404 for another model, a 404 for another path."""
    by_name = sorted(models, key=lambda model: model.name)
    routes: list[route.Route] = []
    for path, dialect in contract.PATHS.items():
        if path == _MODELS_PATH:
            # tap.lua answers before the router; this is what a broken tap leaves.
            routes.append(_refusal(dialect, route.RouteMatch(path=path), "not_found", "The list of models is not available."))
            continue
        routes.extend(_forward(path, dialect, model) for model in by_name)
        routes.extend(_alias(path, dialect, model, alias) for model in by_name for alias in model.aliases)
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
    answer = discovery.DiscoveryResponse(resources=[pack(resource) for resource in resources])
    answer.version_info = hashlib.sha256(bytes(answer)).hexdigest()[:16]
    document = _respelled(answer.to_dict(casing=betterproto2.Casing.SNAKE))
    return _HEADER + yaml.safe_dump(document, sort_keys=False, width=120)


def _respelled(value: Any) -> Any:
    """Put names with a number in them right: of a file that it watches, Envoy ignores a field it does not know."""
    if isinstance(value, dict):
        return {_SPLIT_NUMBER.sub(r"\1\2", str(name)): _respelled(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_respelled(inner) for inner in value]
    return value


def _forward(path: str, dialect: str, model: Model) -> route.Route:
    weighted = _weighted(model)
    return route.Route(
        name=dialect,
        match=_named(path, model.name),
        metadata=_facts(dialect, model),
        route=route.RouteAction(
            timeout=ANSWER_TIMEOUT,
            idle_timeout=IDLE_TIMEOUT,
            # The model server sees its own name, not one that a client chose.
            auto_host_rewrite=True,
            retry_policy=_retries(model),
            hash_policy=_hashed_by(model),
            **_target(model),
        ),
        request_headers_to_remove=list(NOT_FORWARDED),
        request_headers_to_add=[_fairness_id()],
        response_headers_to_remove=[contract.LOAD_HEADER] if any(pool.balance is Balance.ORCA for pool in model.pools) else [],
        typed_per_filter_config=asking(model, weighted[0]) if len(weighted) == 1 else {},
    )


def _alias(path: str, dialect: str, model: Model, alias: str) -> route.Route:
    # Leads nowhere: the gate reads whose name it is, puts that in its place and chooses anew. Should it not, nobody
    # is served who was judged under another name.
    return route.Route(
        name=f"{dialect}/alias",
        match=_named(path, alias),
        # All that the model's own route says: a script reads a route's metadata once.
        metadata=_facts(dialect, model, {contract.ROUTE_MODEL: model.name}),
        route=_to_no_pool(),
        request_headers_to_remove=list(NOT_FORWARDED),
    )


def _named(path: str, name: str) -> route.RouteMatch:
    chosen = matcher.MetadataMatcher(
        filter=contract.NS_REQUEST,
        path=[matcher.MetadataMatcherPathSegment(key=contract.REQ_MODEL)],
        value=matcher.ValueMatcher(string_match=matcher.StringMatcher(exact=name)),
    )
    return route.RouteMatch(path=path, dynamic_metadata=[chosen])


def _facts(dialect: str, model: Model, more: dict[str, Any] | None = None) -> core.Metadata:
    facts: dict[str, Any] = {contract.ROUTE_RUNNING_USAGE: model.sends_running_usage} | (more or {})
    if model.output_tokens_max is not None:
        facts[contract.ROUTE_OUTPUT_TOKENS_MAX] = model.output_tokens_max
    if model.affinity is not None and model.affinity.prefix_bytes:
        facts[contract.ROUTE_PREFIX_BYTES] = model.affinity.prefix_bytes
    return _said(dialect, facts)


def _said(dialect: str, facts: dict[str, Any]) -> core.Metadata:
    facts |= {contract.ROUTE_OPERATION: traces.OPERATIONS[dialect]}
    return core.Metadata(filter_metadata=dict.fromkeys(contract.ROUTE_NAMESPACES, protobuf.Struct.from_dict(facts)))


def _target(model: Model) -> dict[str, Any]:
    weighted = _weighted(model)
    if len(weighted) == 1:
        return {"cluster": target_name(model, weighted[0])}
    clusters = [
        route.WeightedClusterClusterWeight(
            name=target_name(model, pool), weight=pool.weight, typed_per_filter_config=asking(model, pool)
        )
        for pool in weighted
    ]
    # What belongs together stays in one pool as well.
    together = model.affinity is not None
    return {"weighted_clusters": route.WeightedCluster(clusters=clusters, use_hash_policy=True if together else None)}


def _weighted(model: Model) -> list[Pool]:
    return [pool for pool in model.pools if not pool.is_fallback]


def _hashed_by(model: Model) -> list[route.RouteActionHashPolicy]:
    if model.affinity is None:
        return []
    header = model.affinity.header or contract.PREFIX_HEADER
    return [route.RouteActionHashPolicy(header=route.RouteActionHashPolicyHeader(header_name=header))]


def _retries(model: Model) -> route.RetryPolicy:
    policy = route.RetryPolicy(
        retry_on=RETRY_ON[model.retry],
        num_retries=RETRIES,
        retry_host_predicate=[
            route.RetryPolicyRetryHostPredicate(
                name="envoy.retry_host_predicates.previous_hosts", typed_config=pack(previous_hosts.PreviousHostsPredicate())
            )
        ],
        host_selection_retry_max_attempts=_HOSTS_TRIED,
    )
    if len(model.pools) > 1:
        policy.retry_priority = route.RetryPolicyRetryPriority(
            name="envoy.retry_priorities.previous_priorities",
            typed_config=pack(previous_priorities.PreviousPrioritiesConfig(update_frequency=RETRIES)),
        )
    return policy


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
        metadata=_said(dialect, {}),
        route=_to_no_pool(),
        request_headers_to_remove=list(NOT_FORWARDED),
    )


def _to_no_pool() -> route.RouteAction:
    return route.RouteAction(
        cluster=NO_POOL,
        cluster_not_found_response_code=route.RouteActionClusterNotFoundResponseCode.NOT_FOUND,
        timeout=ANSWER_TIMEOUT,
        idle_timeout=IDLE_TIMEOUT,
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


def replace(path: Path, text: str) -> None:
    """Swap the file at *path* for *text*, whole."""
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
