# SPDX-License-Identifier: Apache-2.0
"""What the second witness counts. In a module of its own: the collector shows none of it."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

SIGHTINGS: Final = Counter("peaje_metering_sightings_total", "Exchanges that the second witness has told of.")
SIGHTINGS_DROPPED: Final = Counter(
    "peaje_metering_sightings_dropped_total", "Exchanges that could not be kept to be compared: Postgres is away too long."
)
JOURNALS_BEHIND_SECONDS: Final = Gauge(
    "peaje_metering_journals_behind_seconds", "Since the slowest of all journals was read to its end; one that nobody reads is among them."
)
