# SPDX-License-Identifier: Apache-2.0
"""One trace of a request from Envoy through the services and their stores to the model server."""

from __future__ import annotations

import contextlib
import secrets
import time

import httpx

from chassis.keys import mint
from tests.dataplane.installation import VISIBLE_SECONDS, Installation, Tenant, chat
from tests.otlp import Collected, Span

#: Of a million, as many are sampled: one of a hundred, unless set.
_SAMPLED = 10_000
#: The span of whoever calls.
_CALLER = "00000000000000aa"
_PROMPT = "a prompt that nobody may read"


def trace_id(*, is_sampled: bool) -> str:
    """An id that no other test has; Envoy samples by its first eight bytes, the lowest first, of a million."""
    place = secrets.randbelow(_SAMPLED) if is_sampled else _SAMPLED + secrets.randbelow(900_000)
    return place.to_bytes(8, "little").hex() + secrets.token_hex(8)


def send(road: Installation, tenant: Tenant | None, trace: str, *, key: str = "", **fields: object) -> int:
    """A request whose caller is in the middle of a trace, with a secret in its query."""
    headers = {"traceparent": f"00-{trace}-{_CALLER}-01"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    fault = fields.pop("fault", None)
    return road.post(
        tenant, "/v1/chat/completions?key=secret-in-the-query", json=chat(_PROMPT, **fields), headers=headers, fault=fault
    ).status_code


def traces_of(road: Installation) -> Collected:
    """What its spans went to."""
    assert road.traces is not None
    return road.traces


def is_whole(spans: list[Span]) -> bool:
    """Whether every service has spoken, and Envoy of the tokens; and each span stands below another or below the caller."""
    ids = {span.span_id for span in spans} | {_CALLER}
    return (
        {"peaje-envoy", "peaje-extauth", "peaje-ratelimit", "peaje-metering"} <= {span.service for span in spans}
        and any("gen_ai.usage.output_tokens" in span.attributes for span in spans)
        and all(span.parent_id in ids for span in spans)
    )


def by_service(spans: list[Span]) -> dict[str, list[Span]]:
    """Spans of each service."""
    return {service: [span for span in spans if span.service == service] for service in {span.service for span in spans}}


def test_a_request_is_one_trace_from_its_caller_to_the_model_server(road: Installation) -> None:
    """Envoy's span has the model, the tokens as the ledger has them, and the tenant; each child's parent is in the trace."""
    collected, tenant, trace = traces_of(road), road.new_tenant("traced"), trace_id(is_sampled=True)
    road.control("PUT", f"/v1/tenants/{tenant.tenant_id}/limits", json={"monthly_tokens": 1_000_000}).raise_for_status()
    time.sleep(1.0)  # the promise is one second

    # Metering is asked too: its options hold more than usage.
    assert 200 == send(road, tenant, trace, stream=True, stream_options={"include_usage": False, "chunk_size": 1})
    spans = collected.wait(trace, is_whole)

    found = by_service(spans)
    [gateway] = [span for span in found["peaje-envoy"] if span.parent_id == _CALLER]
    [row] = road.rows(tenant, 1)
    assert ("chat", "tiny", tenant.tenant_id) == tuple(
        gateway.attributes[name] for name in ("gen_ai.operation.name", "gen_ai.request.model", "peaje.tenant")
    )
    assert (row["input_tokens"], row["output_tokens"]) == tuple(
        gateway.attributes[f"gen_ai.usage.{kind}_tokens"] for kind in ("input", "output")
    )
    assert row["request_id"] == gateway.attributes["guid:x-request-id"]
    assert "select postgresql" in {span.name for span in found["peaje-extauth"]}
    assert "take redis" in {span.name for span in found["peaje-ratelimit"]}
    assert trace == road.truth()[row["request_id"]]["traceparent"].split("-")[1]


def test_a_refusal_that_is_not_sampled_is_told_of_all_the_same(road: Installation) -> None:
    """By the service that refused, in the caller's own trace; what is neither refused nor sampled leaves nothing."""
    collected = traces_of(road)
    refused, limited, served = (trace_id(is_sampled=False) for _ in range(3))
    tenant, full = road.new_tenant("unsampled"), road.new_tenant("full")
    road.control("PUT", f"/v1/tenants/{full.tenant_id}/limits", json={"requests_per_day": 1}).raise_for_status()
    road.post(full, json=chat())

    assert 200 == send(road, tenant, served)
    assert 401 == send(road, None, refused, key=mint("live", secrets.token_bytes).key)
    statuses = {send(road, full, limited) for _ in range(3)}

    assert 429 in statuses
    [denial] = collected.wait(refused, bool)
    assert ("peaje-extauth", "invalid_api_key") == (denial.service, denial.attributes["peaje.refused"])
    limits = collected.wait(limited, bool)
    assert {("peaje-ratelimit", "rate_limit_exceeded")} == {(one.service, one.attributes["peaje.refused"]) for one in limits}
    assert [] == collected.of(served)


def test_a_failure_at_the_model_server_that_is_not_sampled_is_told_of_by_the_collector(road: Installation) -> None:
    """One span, with what the ledger has of it; what the engine refuses and what goes well leaves nothing."""
    collected, tenant = traces_of(road), road.new_tenant("failing")
    failing, broken, refused, served = (trace_id(is_sampled=False) for _ in range(4))

    assert 500 == send(road, tenant, failing, fault={"error_before": 500})
    with contextlib.suppress(httpx.HTTPError):
        send(road, tenant, broken, stream=True, fault={"reset_after": 2})
    assert 400 == send(road, tenant, refused, fault={"error_before": 400})
    assert 200 == send(road, tenant, served)
    rows = {row["status"] if row["outcome"] != "ok" else 0: row for row in road.rows(tenant, 4)}

    for trace, status in ((failing, 500), (broken, 200)):
        [span] = collected.wait(trace, bool)
        row = rows[status]
        assert ("peaje-collector", "chat tiny", True) == (span.service, span.name, span.is_error)
        assert ("upstream_error", status, tenant.tenant_id, row["request_id"], row["output_tokens"]) == tuple(
            span.attributes[name] for name in
            ("error.type", "http.response.status_code", "peaje.tenant", "guid:x-request-id", "gen_ai.usage.output_tokens")
        )  # fmt: skip
    assert [] == collected.of(refused) == collected.of(served)


def test_the_collectors_own_work_names_the_requests_that_are_sampled(road: Installation) -> None:
    """By links: one batch is the work of many requests."""
    collected, tenant, trace = traces_of(road), road.new_tenant("collected"), trace_id(is_sampled=True)

    assert 200 == send(road, tenant, trace)

    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (found := [span for span in list(collected.spans) if trace in span.links]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [span] = found
    assert ("peaje-collector", "collect", "") == (span.service, span.name, span.parent_id)
    assert "local" == span.attributes["peaje.journal"]
    assert 1 <= span.attributes["peaje.rows"]


def test_no_secret_and_no_prompt_is_in_any_span(road: Installation) -> None:
    """Of all that tests have sent: neither keys, nor bodies, nor the query of an address."""
    collected = traces_of(road)
    text = b"".join(collected.raw)

    assert collected.spans
    for secret in (*road.issued, _PROMPT, "secret-in-the-query", (road.home / "secrets/postgres-password").read_text().strip()):
        assert secret.encode() not in text
