# SPDX-License-Identifier: Apache-2.0
"""
Ask the engine for usage in a streamed request whose own `stream_options` hold more than usage.

The tap asks by itself where a splice will do (envoy/lua/shape.lua); a conformance suite holds both
to the same result. Changes nothing else: Dynamo and TensorRT-LLM refuse fields they do not know, so
nothing of our own goes in.
"""

from __future__ import annotations

import json
from enum import Enum


class Running(Enum):
    """Whether the engine is asked for usage in every chunk, or only in the last."""

    ASK = True
    LEAVE = False


def ask_for_usage(body: bytes, running: Running) -> bytes:
    """
    *body*, asking for usage; raises ValueError if it is no JSON object.

    The standard library's parser, because it keeps whole numbers of any size as they are.

    >>> ask_for_usage(b'{"stream":true,"stream_options":{"vendor":1}}', Running.LEAVE)
    b'{"stream":true,"stream_options":{"vendor":1,"include_usage":true}}'
    """
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - a body, not a type, is wrong
    options = document.get("stream_options")
    if options is not None and not isinstance(options, dict):
        # The engine's own error is clearer than any of ours.
        return body
    wanted = {"include_usage": True} | ({"continuous_usage_stats": True} if running is Running.ASK else {})
    if options is not None and all(options.get(name) is True for name in wanted):
        return body
    document["stream_options"] = {**(options or {}), **wanted}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
