# SPDX-License-Identifier: Apache-2.0
"""
Say no in the caller's own dialect.

The same bodies as `envoy/lua/reply.lua`; a conformance test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from chassis import contract

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "api_error",
}
#: OpenAI's clients know these two under other names.
_OPENAI_TYPES = {404: "invalid_request_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """What a caller is told: an HTTP status, a stable machine code, a sentence."""

    status: int
    code: str
    message: str
    param: str | None = None
    #: OpenAI tells a request limit from a token limit by `type`; None takes the status's own type.
    type: str | None = None
    #: Whole seconds after which it may be tried again; None where that would change nothing.
    retry_after: int | None = None

    def __post_init__(self) -> None:
        if self.code not in contract.ERROR_CODES:
            raise ValueError(f"{self.code!r} is not on the closed list of error codes")


def render(refusal: Refusal, *, dialect: str, request_id: str) -> str:
    """Write the JSON body of *refusal* in *dialect*; an unknown dialect reads OpenAI's."""
    kind = _TYPES[refusal.status]
    if dialect == "anthropic.messages":
        document: dict[str, object] = {
            "type": "error",
            "error": {"type": kind, "code": refusal.code, "message": refusal.message},
            "request_id": request_id,
        }
    else:
        document = {
            "error": {
                "message": refusal.message,
                "type": refusal.type or _OPENAI_TYPES.get(refusal.status, kind),
                "param": refusal.param,
                "code": refusal.code,
                "request_id": request_id,
            }
        }
    return orjson.dumps(document).decode()
