# SPDX-License-Identifier: Apache-2.0
"""
Ask the engine for usage in a streamed request that did not.

Changes nothing else: the body is spliced, not written anew, unless it already has
`stream_options` to be merged with. Dynamo and TensorRT-LLM refuse fields they do not know,
so nothing of our own goes in.
"""

from __future__ import annotations

from enum import Enum

import orjson

_OPTIONS = b'"stream_options"'


class Running(Enum):
    """Whether the engine is asked for usage in every chunk, or only in the last."""

    ASK = True
    LEAVE = False


def ask_for_usage(body: bytes, running: Running) -> bytes:
    """
    *body*, asking for usage; raises ValueError if it is no JSON object.

    >>> ask_for_usage(b'{"stream":true}', Running.LEAVE)
    b'{"stream":true,"stream_options":{"include_usage":true}}'
    """
    wanted: dict[str, bool] = {"include_usage": True}
    if running is Running.ASK:
        wanted["continuous_usage_stats"] = True
    if _OPTIONS not in body:
        return _spliced(body, wanted)
    document = orjson.loads(body)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    options = document.get("stream_options")
    if options is not None and not isinstance(options, dict):
        # The engine's own error is clearer than any of ours.
        return body
    if options is not None and all(options.get(name) is True for name in wanted):
        return body
    document["stream_options"] = {**(options or {}), **wanted}
    return orjson.dumps(document)


def _spliced(body: bytes, wanted: dict[str, bool]) -> bytes:
    head = body.rstrip()
    if not head.endswith(b"}"):
        raise ValueError("not a JSON object")
    head = head[:-1].rstrip()
    comma = b"" if head.endswith(b"{") else b","
    return head + comma + _OPTIONS + b":" + orjson.dumps(wanted) + b"}"
