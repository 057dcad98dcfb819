# SPDX-License-Identifier: Apache-2.0
"""Envoy's scripts and the services say no in the same words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chassis.refusals import Refusal, render
from tests.conformance.road import module, runtime, text

STATUSES = (400, 401, 403, 404, 429, 503)
DIALECTS = ("openai.chat", "openai.completions", "openai.embeddings", "openai.responses", "anthropic.messages", "openai", "")


def lua_refusal(dialect: str, denial: dict[str, Any], request_id: str) -> tuple[dict[str, str], Any]:
    """Give the headers and the parsed body that reply.lua makes."""
    fields = {key.encode(): value.encode() if isinstance(value, str) else value for key, value in denial.items()}
    denied = runtime().table_from({key: value for key, value in fields.items() if value is not None})
    headers, body = module("reply")[b"refusal"](dialect.encode(), denied, request_id.encode())
    return {text(key): text(value) for key, value in headers.items()}, json.loads(body)


@pytest.mark.parametrize("param", [None, "model"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("status", STATUSES)
def test_both_write_the_same_body(status: int, dialect: str, param: str | None) -> None:
    """For every shared status and dialect the two bodies are equal JSON."""
    denial = {"status": status, "code": "invalid_request", "message": 'No "\\" \t here.', "param": param}

    headers, body = lua_refusal(dialect, denial, "request-1")

    expected = render(Refusal(**denial), dialect=dialect, request_id="request-1")
    assert json.loads(expected) == body
    assert (str(status), "application/json") == (headers[":status"], headers["content-type"])


@pytest.mark.parametrize("status", [405, 413, 415])
@pytest.mark.parametrize("dialect", ["openai.chat", "anthropic.messages"])
def test_statuses_of_the_scripts_alone_have_a_type(status: int, dialect: str) -> None:
    """What only a script answers has the dialect's shape as well."""
    _, body = lua_refusal(dialect, {"status": status, "code": "invalid_request", "message": "No."}, "request-1")

    assert isinstance(body["error"]["type"], str)
    assert body["error"]["code"] == "invalid_request"


def test_a_missing_credential_is_asked_for_and_a_wrong_method_told() -> None:
    """401 says how to authenticate, 405 which method there is."""
    missing, _ = lua_refusal("openai", {"status": 401, "code": "missing_credential", "message": "No."}, "r")
    wrong, _ = lua_refusal("openai", {"status": 405, "code": "invalid_request", "message": "No.", "allow": "POST"}, "r")

    assert missing["www-authenticate"] == 'Bearer realm="peaje"'
    assert wrong["allow"] == "POST"


@pytest.mark.parametrize("hostile", ["\x00", "\x1f", "\x7f", '"', "\\", "</script>", "\r\n"], ids=repr)
def test_no_text_breaks_out_of_its_string(hostile: str) -> None:
    """Control characters, quotes and backslashes stay inside the string."""
    _, body = lua_refusal("openai", {"status": 400, "code": "invalid_request", "message": hostile}, hostile)

    assert (hostile, hostile) == (body["error"]["message"], body["error"]["request_id"])
