# SPDX-License-Identifier: Apache-2.0
"""metering's side of a stream in slices: what it asks of ratelimit, and what it hands back to Envoy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path as FilePath
from typing import Any

import grpc
import pytest

from chassis import contract
from chassis.errors import Unavailable
from chassis.models import ModelCatalogue
from chassis.wire import ext_proc_pb2 as wire
from chassis.wire import ratelimit_pb2
from metering.adapters.slices import METHOD, Slices
from metering.servicer import Servicer
from tests.conformance.streams import PROMPT_TOKENS, documents, stream
from tests.fake_engine.asks import Path


class Asked:
    """ratelimit as metering sees it: grants *slice_* more than is delivered, up to *limit* in all."""

    def __init__(self, *, slice_: int, limit: int, is_away: bool = False) -> None:
        self.slice, self.limit, self.is_away = slice_, limit, is_away
        self.calls: list[dict[str, Any]] = []

    async def renew(self, **asked: Any) -> int:
        self.calls.append(asked)
        if self.is_away:
            raise Unavailable("ratelimit did not answer.")
        return min(self.limit, asked["output_tokens"] + self.slice)


def opening(
    *, content_type: str = "text/event-stream", status: str = "200", held: int = 10, encoding: str = "identity"
) -> wire.ProcessingRequest:
    """The message with the answer's headers, and what ratelimit and the gate have written."""
    message = wire.ProcessingRequest()
    for key, value in ((":status", status), ("content-type", content_type), ("content-encoding", encoding)):
        message.response_headers.headers.headers.add(key=key, raw_value=value.encode())
    known = message.metadata_context.filter_metadata
    known[contract.NS_REQUEST].fields[contract.REQ_DIALECT].string_value = "openai.chat"
    known[contract.NS_REQUEST].fields[contract.REQ_CHOICES].string_value = "1"
    known[contract.NS_IDENTITY].fields[contract.ID_TENANT].string_value = "acme"
    known[contract.NS_ADMISSION].fields[contract.ADM_SLICE].string_value = "r1"
    known[contract.NS_ADMISSION].fields[contract.ADM_SLICE_TOKENS].number_value = held
    known[contract.NS_ADMISSION].fields[contract.ADM_RESERVED_TOKENS].number_value = held + PROMPT_TOKENS + 3
    return message


def piece(body: bytes, *, is_last: bool = False) -> wire.ProcessingRequest:
    """The message with one piece of the answer."""
    return wire.ProcessingRequest(response_body=wire.HttpBody(body=body, end_of_stream=is_last))


def answers(asked: Asked, *messages: wire.ProcessingRequest) -> list[wire.ProcessingResponse]:
    """What the servicer says to one stream of messages."""

    async def sent() -> AsyncIterator[wire.ProcessingRequest]:
        for message in messages:
            yield message

    async def run() -> list[wire.ProcessingResponse]:
        servicer = Servicer(lambda: ModelCatalogue(models=()), asked)  # type: ignore[arg-type]
        return [answer async for answer in servicer.process(sent(), None)]  # type: ignore[arg-type]

    return asyncio.run(run())


def handed_back(found: list[wire.ProcessingResponse]) -> tuple[bytes, list[bool]]:
    """The body that the client gets, and which pieces were the last."""
    pieces = [a.response_body.response.body_mutation.streamed_response for a in found if a.WhichOneof("response") == "response_body"]
    return b"".join(p.body for p in pieces), [p.end_of_stream for p in pieces]


BODY = stream("vllm", Path.CHAT, usage="running", tokens=40).body


def test_a_slice_is_renewed_before_what_needs_it_passes() -> None:
    """One call a slice, with what the engine has counted; nothing is changed."""
    asked = Asked(slice_=15, limit=1000)

    body, last = handed_back(answers(asked, opening(), piece(BODY[:3000]), piece(BODY[3000:], is_last=True)))

    assert (BODY, [False, True]) == (body, last)
    assert [11, 27] == [call["output_tokens"] for call in asked.calls]
    assert [("acme", "r1", PROMPT_TOKENS)] * 2 == [(c["tenant_id"], c["request_id"], c["input_tokens"]) for c in asked.calls]


def test_what_is_not_granted_ends_the_stream_and_what_comes_after_is_nobody_s() -> None:
    """The last piece says so; the journal is told how the rest is known."""
    found = answers(Asked(slice_=15, limit=20), opening(), piece(BODY[:9000]), piece(BODY[9000:], is_last=True))

    body, last = handed_back(found)
    assert [True] == last
    assert 20 == documents(body)[-1]["usage"]["completion_tokens"]
    assert "insufficient_quota" == documents(body)[-2]["peaje"]["code"]
    assert "running" == found[-1].dynamic_metadata.fields[contract.NS_USAGE].struct_value.fields[contract.USE_STOPPED].string_value


def test_a_ratelimit_that_is_away_ends_the_stream_with_its_own_code() -> None:
    """Not decided is not the same as used up."""
    body, last = handed_back(answers(Asked(slice_=1, limit=1, is_away=True), opening(), piece(BODY)))

    assert ("service_unavailable", [True]) == (documents(body)[-2]["peaje"]["code"], last)


def test_an_encoded_stream_is_ended_because_nobody_can_weigh_it() -> None:
    """Nothing of it passes; the client is told in plain events, and the journal that nothing was delivered."""
    asked = Asked(slice_=1000, limit=1000)

    found = answers(asked, opening(encoding="br"), piece(b"\x8b\x02\x80"), piece(b"\x03", is_last=True))

    body, last = handed_back(found)
    assert ["content-length", "content-encoding"] == list(found[0].response_headers.response.header_mutation.remove_headers)
    assert ("upstream_unavailable", [True], []) == (documents(body)[-2]["peaje"]["code"], last, asked.calls)
    assert 0 == documents(body)[-1]["usage"]["completion_tokens"]
    assert "counted" == found[-1].dynamic_metadata.fields[contract.NS_USAGE].struct_value.fields[contract.USE_STOPPED].string_value


@pytest.mark.parametrize("header", [{"content_type": "application/json"}, {"status": "500"}])
def test_an_answer_that_is_no_stream_passes_unread(header: dict[str, str]) -> None:
    """An error of the engine, for one."""
    asked = Asked(slice_=0, limit=0)

    body, last = handed_back(answers(asked, opening(held=0, **header), piece(b"{", is_last=False), piece(b"}", is_last=True)))

    assert (b"{}", [False, True], []) == (body, last, asked.calls)


def test_what_waits_for_the_end_of_its_event_passes_before_the_trailers() -> None:
    """A stream that omits its last blank line loses nothing."""
    trailers = wire.ProcessingRequest(response_trailers=wire.HttpTrailers())

    found = answers(Asked(slice_=50, limit=100), opening(), piece(BODY.rstrip(b"\n")), trailers)

    assert BODY.rstrip(b"\n") == handed_back(found)[0]
    assert "response_trailers" == found[-1].WhichOneof("response")
    nothing_waits = answers(Asked(slice_=50, limit=100), opening(), piece(BODY), trailers)
    assert ["response_headers", "response_body", "response_trailers"] == [a.WhichOneof("response") for a in nothing_waits]


def test_trailers_after_a_stream_that_was_ended_are_nobody_s() -> None:
    """The message is over for the client."""
    trailers = wire.ProcessingRequest(response_trailers=wire.HttpTrailers())

    found = answers(Asked(slice_=1, limit=1), opening(), piece(BODY), trailers)

    assert ["response_headers", "response_body"] == [a.WhichOneof("response") for a in found]


def test_a_ratelimit_that_comes_back_is_asked_again_and_one_that_does_not_is_given_up(tmp_path: FilePath) -> None:
    """The same call, until the patience is over."""
    target = f"unix:{tmp_path}/r.sock"
    seen: list[dict[str, str]] = []

    async def answer(request: ratelimit_pb2.RateLimitRequest, context: grpc.aio.ServicerContext) -> ratelimit_pb2.RateLimitResponse:
        seen.append({entry.key: entry.value for entry in request.descriptors[0].entries})
        if len(seen) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        response = ratelimit_pb2.RateLimitResponse(overall_code=ratelimit_pb2.RateLimitResponse.OK)
        response.dynamic_metadata.fields[contract.ADM_SLICE_TOKENS].number_value = 77
        return response

    async def run() -> int:
        _, service, method = METHOD.split("/")
        handler = grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=ratelimit_pb2.RateLimitRequest.FromString, response_serializer=lambda a: a.SerializeToString()
        )
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        server.add_insecure_port(target)
        await server.start()
        held = await Slices(target).renew(tenant_id="acme", request_id="r1", input_tokens=3, output_tokens=9)
        await server.stop(None)
        return held

    held = asyncio.run(run())
    with pytest.raises(Unavailable):
        asyncio.run(
            Slices(f"unix:{tmp_path}/none.sock", patience_seconds=0.1).renew(
                tenant_id="acme", request_id="r1", input_tokens=3, output_tokens=9
            )
        )

    assert 77 == held
    assert [{"phase": "renew", "request_id": "r1", "tenant": "acme", "input": "3", "output": "9"}] * 2 == seen
