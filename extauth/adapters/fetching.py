# SPDX-License-Identifier: Apache-2.0
"""
Ask an identity provider over HTTP, bounded in every way: one host, no redirects, few bytes, little time.

The host is the one of the URL that the identity document names; nothing that a token says gets here.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from chassis.errors import Unavailable
from extauth.core import strict_json
from extauth.core.issuers import is_loopback

#: A set of fifty RSA keys has about 40 KiB, with certificates.
ANSWER_BYTES_MAX: Final = 256 << 10
_CHUNK_BYTES: Final = 16 << 10


class Fetcher:
    """Asks one URL; safe to use from several threads."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
            raise AssertionError("the identity document lets no such URL through")
        self._url = url
        self._timeout_seconds = timeout_seconds
        # The platform's trust, or what SSL_CERT_FILE names; no proxy of the environment.
        context: ssl.SSLContext | bool = ssl.create_default_context() if parts.scheme == "https" else False
        self._client = httpx.Client(
            timeout=timeout_seconds, follow_redirects=False, trust_env=False, verify=context,
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "peaje"},
        )

    def get(self) -> dict[str, Any]:
        """The JSON object at the URL; raises `Unavailable` with a reason that holds nothing of the answer."""
        return self._ask("GET")

    def post(self, form: Mapping[str, str], *, user: str, password: str) -> dict[str, Any]:
        """The JSON object that answers *form*, sent with HTTP Basic credentials."""
        return self._ask("POST", data=dict(form), auth=httpx.BasicAuth(user, password))

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout_seconds
        try:
            with self._client.stream(method, self._url, **arguments) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise Unavailable(f"it answers {answer.status_code}")
                if answer.headers.get("content-encoding", "identity") != "identity":
                    raise Unavailable("it answers in an encoding that nobody asked for")
                body = bytearray()
                for chunk in answer.iter_raw(_CHUNK_BYTES):
                    body += chunk
                    if len(body) > ANSWER_BYTES_MAX:
                        raise Unavailable(f"its answer has more than {ANSWER_BYTES_MAX} bytes")
                    # The client's own timeout is per read: one byte at a time would never end.
                    if time.monotonic() > deadline:
                        raise Unavailable("it answers too slowly")
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as exc:
            raise Unavailable(f"it does not answer ({type(exc).__name__})") from exc
        document = strict_json.read_object(bytes(body))
        if document is None:
            raise Unavailable("its answer is not one JSON object")
        return document
