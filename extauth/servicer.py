# SPDX-License-Identifier: Apache-2.0
"""
Answer Envoy's ext_authz: from a CheckRequest to a decision and back.

What Envoy does with the answers: status OK lets the request on and puts our metadata under
envoy.filters.http.ext_authz; any other status ends it with the denied response. A call that
fails or takes over 500 ms becomes 503 (failure_mode_allow: false in envoy.yaml).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final

import grpc
import orjson
import structlog
from google.protobuf.struct_pb2 import Struct

from chassis import contract
from chassis.keys import ParsedKey
from chassis.models import ModelCatalogue
from chassis.refusals import Refusal, render
from chassis.telemetry import traces
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters import metrics
from extauth.adapters.identities import Identities
from extauth.core import decision
from extauth.core.credential import find_credential
from extauth.core.identity import Ask, Denial, Identity, Phase

log = structlog.get_logger()

#: Callers whose admission is kept encoded, a few hundred bytes each.
ADMISSIONS_MAX: Final = 50_000

METHOD = "/envoy.service.auth.v3.Authorization/Check"

_PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED.value[0]
_GATE_MISSING = Denial(phase=Phase.CREDENTIAL, rule="gate_missing", refusal=decision.CANNOT_DECIDE)
_MILLISECOND = timedelta(milliseconds=1)
_ALLOWED = metrics.DECISIONS.labels("ok")


class Servicer:
    """Wires the decision to whoever knows the callers; one per process."""

    def __init__(
        self, identities: Identities, *, catalogue: Callable[[], ModelCatalogue], clock: Callable[[], datetime]
    ) -> None:
        self._identities = identities
        self._catalogue = catalogue
        self._clock = clock
        self._latest = decision.Rules(served=catalogue().served, policies=identities.policies)

    def check(self, request: wire.CheckRequest, context: grpc.ServicerContext) -> wire.CheckResponse:
        """Decide one request."""
        began = time.perf_counter()
        http = request.attributes.request.http
        headers = _headers(http)
        # gate.lua may not have run to its end; then nothing about this request is known.
        facts = request.attributes.metadata_context.filter_metadata.get(contract.NS_REQUEST)
        dialect = "" if facts is None else facts.fields[contract.REQ_DIALECT].string_value
        remember_ms = 0
        if facts is None:
            decided: Identity | Denial = _GATE_MISSING
        else:
            ask = Ask(
                dialect=dialect,
                model=facts.fields[contract.REQ_MODEL].string_value or None,
                path=http.path.partition("?")[0],
                host=http.host,
                address=_address(request, context),
                now=self._clock(),
            )
            decided, remember_ms = self._decide(ask, headers, _certificate_names(request, facts))
        response = (
            self._denied(decided, dialect=dialect, request_id=_request_id(headers))
            if isinstance(decided, Denial)
            else self._allowed(decided, dialect, remember_ms=remember_ms)
        )
        metrics.DECISION_SECONDS.observe(time.perf_counter() - began)
        return response

    def _decide(self, ask: Ask, headers: list[tuple[str, bytes]], names: Sequence[str]) -> tuple[Identity | Denial, int]:
        credential = find_credential(headers, names=names)
        identity = (
            credential
            if isinstance(credential, Denial)
            else self._identities.identify(credential, ask, names=names)
        )
        rules = self._rules()
        decided = decision.decide(ask, credential, identity, rules)
        if isinstance(decided, Identity) and not isinstance(credential, Denial):
            self._identities.admitted(credential, decided, ask.now)
            # Only keys: what a token says ends by its issuer's word, and a certificate is not in the lane's memory.
            if isinstance(credential, ParsedKey) and not names:
                return decided, decision.memorable_for(ask, decided, rules) // _MILLISECOND
        return decided, 0

    def _rules(self) -> decision.Rules:
        # The same object until a document changes: to make one for each request would cost more than to ask it.
        rules, served, policies = self._latest, self._catalogue().served, self._identities.policies
        if rules.served is not served or rules.policies is not policies:
            rules = self._latest = decision.Rules(served=served, policies=policies)
        return rules

    def _allowed(self, identity: Identity, dialect: str, *, remember_ms: int) -> wire.CheckResponse:
        _ALLOWED.inc()
        response = wire.CheckResponse()
        response.ParseFromString(_admission(identity.tenant_id, identity.project_id, identity.key_id))
        response.dynamic_metadata.fields[contract.ID_CACHE_MS].number_value = remember_ms
        if dialect == "openai.models":
            response.dynamic_metadata.fields[contract.ID_MODELS_BODY].string_value = self._models_body(identity)
        return response

    def _models_body(self, identity: Identity) -> str:
        catalogue = self._catalogue()
        names = decision.usable_models(identity, catalogue.served)
        usable = set(names)
        # Who may use a model may call it by any of its names.
        names += sorted(alias for alias, model in catalogue.aliases.items() if model in usable)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "peaje"} for name in names]
        return orjson.dumps({"object": "list", "data": models}).decode()

    @staticmethod
    def _denied(denial: Denial, *, dialect: str, request_id: str) -> wire.CheckResponse:
        refusal = denial.refusal
        traces.refused(refusal.code)
        for counter in metrics.denial(refusal.code, denial.phase, denial.rule):
            counter.inc()
        log.info(
            "denied", request_id=request_id, code=refusal.code, phase=denial.phase, rule=denial.rule, dialect=dialect
        )
        return _refused(refusal, dialect=dialect, request_id=request_id)


@lru_cache(maxsize=ADMISSIONS_MAX)
def _admission(tenant_id: str, project_id: str, key_id: str) -> bytes:
    """An admission as far as it depends on the caller alone: building one costs more than the decision does."""
    response = wire.CheckResponse()
    response.ok_response.SetInParent()
    fields = response.dynamic_metadata.fields
    fields[contract.ID_TENANT].string_value = tenant_id
    fields[contract.ID_PROJECT].string_value = project_id
    fields[contract.ID_KEY].string_value = key_id
    return bytes(response.SerializeToString())


def _headers(http: wire.AttributeContext.HttpRequest) -> list[tuple[str, bytes]]:
    # encode_raw_headers is on: each header as it came, one entry per occurrence.
    headers = [(header.key, header.raw_value or header.value.encode()) for header in http.header_map.headers]
    headers += [(key, value.encode()) for key, value in http.headers.items()] if http.headers else []
    return headers


def _address(request: wire.CheckRequest, call: grpc.ServicerContext) -> str:
    """The client's: Envoy tells it with the call, since it names as the source the last proxy before it."""
    said = next((value for name, value in call.invocation_metadata() if name == contract.ADDRESS_CALL_METADATA), "")
    return str(said or request.attributes.source.address.socket_address.address)


def _certificate_names(request: wire.CheckRequest, facts: Struct) -> Sequence[str]:
    """All names of the peer's certificate, if Envoy has verified one; it says the first, the gate the others."""
    principal = request.attributes.source.principal
    if not principal:
        return ()
    names = (value.string_value for value in facts.fields[contract.REQ_CERTIFICATE_NAMES].list_value.values)
    return tuple(dict.fromkeys((principal, *names)))


def _request_id(headers: list[tuple[str, bytes]]) -> str:
    # Envoy mints it; the client's own never gets here.
    value = next((value for name, value in headers if name == contract.REQUEST_ID_HEADER), b"")
    return value.decode("ascii", "replace")


def _refused(refusal: Refusal, *, dialect: str, request_id: str) -> wire.CheckResponse:
    response = wire.CheckResponse()
    response.status.code = _PERMISSION_DENIED
    denied = response.denied_response
    denied.status.code = refusal.status  # type: ignore[assignment]  # the enum's numbers are the HTTP codes
    denied.body = render(refusal, dialect=dialect, request_id=request_id)
    headers = {"content-type": "application/json"}
    if refusal.status == 401:
        headers["www-authenticate"] = 'Bearer realm="peaje"'
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    for key, value in headers.items():
        option = denied.headers.add(append_action="OVERWRITE_IF_EXISTS_OR_ADD")
        option.header.key, option.header.value = key, value
    return response
