# SPDX-License-Identifier: Apache-2.0
"""
`python -m tests.chaos.garbage HOME POSTGRES_URL COUNT`: keys that nobody has, each another, to extauth's servicer itself.

In a process of its own and without gRPC, which would take an hour for ten million. Real caches on a real Postgres. Half
of the keys are no keys by their checksum, half are, and a thousand come from one address. Writes a line for each
hundredth: how many were refused, and its own memory in MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bench.cpu import anonymous_mib
from bench.extauth import request_of
from chassis import keys
from chassis.clock import utc_now
from chassis.models import ModelCatalogue
from chassis.secrets import load_peppers
from chassis.stores.postgres import read_pool
from chassis.telemetry.log import configure
from chassis.wire import ext_authz_pb2 as wire
from extauth.adapters.directory import Directory
from extauth.adapters.identities import Identities
from extauth.adapters.key_writes import KeyWrites
from extauth.core.strangers import Strangers
from extauth.servicer import Servicer
from tests.identities import Call

_MODELS = ModelCatalogue.parse({"models": [{"name": "tiny", "engine": "openai", "endpoints": ["127.0.0.1:1"]}]}, source="soak")


def garbage(first: int, count: int) -> Iterator[str]:
    """Keys that look like keys and are nobody's; every other one has a wrong checksum."""
    for number in range(first, first + count):
        body = f"peaje_live_G{number:011}_{number:032}"
        yield body + (keys.checksum(body) if number % 2 else "000000")


def main() -> None:
    """Refuse them all; fails at the first one that is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("home", type=Path)
    parser.add_argument("url")
    parser.add_argument("count", type=int)
    asked = parser.parse_args()
    # As served, each denial is a line of JSON; here it goes nowhere.
    with contextlib.redirect_stderr(Path(os.devnull).open("w")):
        configure("soak")
    peppers = load_peppers(asked.home)
    with read_pool(asked.url, name="soak", connections=1) as pool:
        pool.wait()
        identities = Identities(
            Directory(pool, clock=utc_now), peppers=peppers, home=asked.home, control_url="http://127.0.0.1:1",
            writes=KeyWrites(asked.url, clock=utc_now, newest_pepper=max(peppers)), strangers=Strangers(),
        )  # fmt: skip
        servicer = Servicer(identities, catalogue=lambda: _MODELS, clock=utc_now)
        template, every = request_of("?" * len(next(garbage(0, 1))), "tiny"), max(1, asked.count // 100)
        for number, key in enumerate(garbage(0, asked.count), 1):
            request = wire.CheckRequest.FromString(template.replace(b"?" * len(key), key.encode()))
            network = number >> 10
            request.attributes.source.address.socket_address.address = f"2001:db8:{network >> 16:x}:{network & 0xFFFF:x}::1"
            assert servicer.check(request, Call()).WhichOneof("http_response") == "denied_response", number
            if number % every == 0:
                print(number, f"{anonymous_mib(os.getpid()):.1f}", flush=True)


if __name__ == "__main__":
    main()
