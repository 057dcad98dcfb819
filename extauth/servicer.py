# SPDX-License-Identifier: Apache-2.0
"""
Answer Envoy's ext_authz: from a CheckRequest to a decision and back.

What Envoy does with the answers: status OK lets the request on and puts our metadata under
envoy.filters.http.ext_authz; any other status ends it with the denied response. A call that
fails or takes over 500 ms becomes 503 (failure_mode_allow: false in envoy.yaml).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

import grpc
import orjson
import structlog

from chassis import contract
from chassis.errors import Unavailable
from chassis.models import ModelCatalogue
from chassis.refusals import Refusal, render
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.directory import Directory
from extauth.core import decision

log = structlog.get_logger()

METHOD = "/envoy.service.auth.v3.Authorization/Check"

_PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED.value[0]
_CANNOT_DECIDE = Refusal(
    status=503, code="service_unavailable", message="The gateway cannot decide right now. Try again."
)


class Servicer:
    """Wires the decision to the directory; one per process."""

    def __init__(
        self,
        directory: Directory,
        *,
        peppers: Mapping[int, bytes],
        catalogue: Callable[[], ModelCatalogue],
        clock: Callable[[], datetime],
    ) -> None:
        self._directory = directory
        self._peppers = peppers
        self._catalogue = catalogue
        self._clock = clock

    def check(self, request: wire.CheckRequest, context: grpc.ServicerContext) -> wire.CheckResponse:
        """Decide one request."""
        del context
        headers = list(_headers(request.attributes.request.http))
        request_id = _request_id(headers)
        facts = request.attributes.metadata_context.filter_metadata.get(contract.NS_REQUEST)
        if facts is None:
            # gate.lua did not run to its end: nothing about this request is known.
            log.error("gate_missing", request_id=request_id)
            return _denied(_CANNOT_DECIDE, dialect="", request_id=request_id)
        dialect = facts.fields[contract.REQ_DIALECT].string_value
        model = facts.fields[contract.REQ_MODEL].string_value or None
        answer = self._answer(headers, model)
        if isinstance(answer, Refusal):
            log.info("denied", request_id=request_id, code=answer.code, dialect=dialect)
            return _denied(answer, dialect=dialect, request_id=request_id)
        return self._allowed(answer, dialect)

    def _answer(
        self, headers: list[tuple[str, bytes]], model: str | None
    ) -> decision.Principal | Refusal:
        parsed = decision.find_key(headers)
        if isinstance(parsed, Refusal):
            return parsed
        try:
            state = self._directory.find(parsed.key_id)
        except Unavailable:
            return _CANNOT_DECIDE
        return decision.decide(
            parsed,
            state,
            peppers=self._peppers,
            served=self._catalogue().served,
            model=model,
            now=self._clock(),
        )

    def _allowed(self, principal: decision.Principal, dialect: str) -> wire.CheckResponse:
        response = wire.CheckResponse()
        response.ok_response.SetInParent()
        fields = response.dynamic_metadata.fields
        fields[contract.ID_TENANT].string_value = principal.tenant_id
        fields[contract.ID_PROJECT].string_value = principal.project_id
        fields[contract.ID_KEY].string_value = principal.key_id
        fields[contract.ID_CACHE_MS].number_value = 5000
        if dialect == "openai.models":
            fields[contract.ID_MODELS_BODY].string_value = self._models_body(principal)
        return response

    def _models_body(self, principal: decision.Principal) -> str:
        names = decision.usable_models(principal, self._catalogue().served)
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "peaje"} for name in names]
        return orjson.dumps({"object": "list", "data": models}).decode()


def _headers(http: wire.AttributeContext.HttpRequest) -> Iterator[tuple[str, bytes]]:
    # encode_raw_headers is on: each header as it came, one entry per occurrence.
    for header in http.header_map.headers:
        yield header.key, header.raw_value or header.value.encode()
    for key, value in http.headers.items():
        yield key, value.encode()


def _request_id(headers: list[tuple[str, bytes]]) -> str:
    # Envoy mints it; the client's own never gets here.
    value = next((value for name, value in headers if name == contract.REQUEST_ID_HEADER), b"")
    return value.decode("ascii", "replace")


def _denied(refusal: Refusal, *, dialect: str, request_id: str) -> wire.CheckResponse:
    response = wire.CheckResponse()
    response.status.code = _PERMISSION_DENIED
    denied = response.denied_response
    denied.status.code = refusal.status  # type: ignore[assignment] - the enum's numbers are the HTTP codes
    denied.body = render(refusal, dialect=dialect, request_id=request_id)
    headers = {"content-type": "application/json"}
    if refusal.status == 401:
        headers["www-authenticate"] = 'Bearer realm="peaje"'
    if refusal.status == 503:
        headers["retry-after"] = "1"
    for key, value in headers.items():
        option = denied.headers.add(append_action="OVERWRITE_IF_EXISTS_OR_ADD")
        option.header.key, option.header.value = key, value
    return response
