# SPDX-License-Identifier: Apache-2.0
"""
`python -m bench.extauth`: CPU of one decision in extauth's own process, without gRPC and Postgres.

What is measured is what a worker thread does for a request whose key is in memory, for one that is
refused by its form, and for one whose secret is wrong.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import structlog

from chassis import keys
from chassis.clock import utc_now
from chassis.models import Endpoint, Model, ModelCatalogue
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.directory import Directory
from extauth.adapters.identities import Identities
from extauth.adapters.key_writes import KeyWrites
from extauth.core.identity import Identity, KeyState, Standing
from extauth.servicer import Servicer

ROUNDS: Final = 30
CALLS: Final = 1000
_PEPPERS: Final = {1: b"p" * 32}


def request(key: str) -> bytes:
    """A CheckRequest as Envoy sends it."""
    check = wire.CheckRequest()
    http = check.attributes.request.http
    http.path, http.host, http.method = "/v1/chat/completions", "localhost", "POST"
    for name, value in (("authorization", f"Bearer {key}"), ("x-request-id", "0b6bd2f4-2f3c-4b2e-9f3e-1d1f0f6f0a11")):
        http.header_map.headers.add(key=name, raw_value=value.encode())
    check.attributes.source.address.socket_address.address = "127.0.0.1"
    facts = check.attributes.metadata_context.filter_metadata["peaje.request"]
    facts.fields["dialect"].string_value, facts.fields["model"].string_value = "openai.chat", "tiny"
    return check.SerializeToString()


def main() -> None:
    """Print microseconds of CPU per decision, parsing and writing included."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    now = utc_now()
    minted = keys.mint("live", secrets.token_bytes)
    identity = Identity(
        tenant_id="acme", project_id="default", key_id=minted.key_id,
        standing=Standing(tenant_active=True, project_active=True), known_at=now,
    )  # fmt: skip
    state = KeyState(identity=identity, key_hash=keys.hash_key(_PEPPERS[1], minted.key), pepper_version=1)
    # No pool: what is asked is in memory, dated ahead so that it stays so for the whole measurement.
    directory = Directory(None, clock=utc_now)  # type: ignore[arg-type]
    directory._remembered.put(minted.key_id, state, now + timedelta(hours=1))  # noqa: SLF001
    catalogue = ModelCatalogue(
        models=(Model(name="tiny", engine="openai", endpoints=(Endpoint(scheme="http", host="127.0.0.1", port=1),)),)
    )
    with tempfile.TemporaryDirectory() as home:
        identities = Identities(
            directory, peppers=_PEPPERS, writes=KeyWrites("", clock=utc_now, newest_pepper=1), home=Path(home),
            control_url="http://127.0.0.1:1",
        )  # fmt: skip
    servicer = Servicer(identities, catalogue=lambda: catalogue, clock=utc_now)
    wrong = f"peaje_live_{minted.key_id}_{'A' * keys.SECRET_LENGTH}"
    for name, key in (("hit", minted.key), ("malformed", "nonsense"), ("wrong secret", wrong + keys.checksum(wrong))):
        raw = request(key)
        print(f"{name:14}{_microseconds(lambda raw=raw: _once(servicer, raw)):8.1f} us")


def _once(servicer: Servicer, raw: bytes) -> None:
    servicer.check(wire.CheckRequest.FromString(raw), None).SerializeToString()  # type: ignore[arg-type]


def _microseconds(call: Callable[[], None]) -> float:
    # The least of several rounds: what other processes on the machine cost is not ours.
    return min(_round(call) for _ in range(ROUNDS))


def _round(call: Callable[[], None]) -> float:
    began = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - began) / CALLS * 1e6


if __name__ == "__main__":
    main()
