# SPDX-License-Identifier: Apache-2.0
"""
What all processes count, and where they show it.

A label is never a tenant, a key, a path or anything else that a caller chooses. What only one service counts is in
its own adapters: a process shows no series that another one fills, or a zero would speak for the wrong one.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Gauge, Histogram, start_http_server

#: Seconds, around the promise that a change acts within one.
_HEARD_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

#: The written failure policy that acts now (docs/operations.md has all of them).
FAILURE_MODE: Final = Gauge(
    "peaje_failure_mode_in_force", "1 while a decision's dependency is away and its written mode acts, else 0.", ["dependency", "mode"]
)
LISTENER_HEARD_SECONDS: Final = Histogram(
    "peaje_listener_heard_seconds",
    "From a notification of Postgres to its hearing, by pulses that each listener sends to itself: so fast do changes act.",
    ["listener"], buckets=_HEARD_BUCKETS,
)  # fmt: skip
LISTENER_SILENT_SECONDS: Final = Gauge(
    "peaje_listener_silent_seconds", "Since a listener last heard its own pulse; it sends one every three seconds.", ["listener"]
)
#: A models document is watched by every service.
MODELS_REFUSED: Final = Gauge(
    "peaje_models_refused", "1 while the models document is faulty and the last good one is in force, else 0."
)


def serve(port: int, *, host: str = "127.0.0.1") -> None:
    """Show the metrics, on loopback if nothing else is said; Envoy's listener never leads there."""
    start_http_server(port, addr=host)
