# SPDX-License-Identifier: Apache-2.0
"""
Judge how full the journal's disk is, and what follows from it.

The journal is the buffer while Postgres is away, so a full disk is the end of what can be
recorded. Envoy drops what it cannot write without a word; so the road is closed to new requests
while there is still room for the end records of those under way.
"""

from __future__ import annotations

from enum import Enum

#: Percent. Somebody should look; nothing is refused.
WARN_PERCENT = 80
#: Percent. The policy acts, and reopens below `WARN_PERCENT`: no flapping at the mark.
ACT_PERCENT = 95


class WhenFull(Enum):
    """What happens to new requests beyond `ACT_PERCENT`: a setting."""

    #: They get 503: what cannot be recorded may not pass.
    REFUSE = "refuse"
    #: They pass until a start record cannot be written; end records of others may be lost before that.
    ALLOW = "allow"


class Level(Enum):
    """How full the disk is."""

    FINE = "fine"
    WARN = "warn"
    ACT = "act"


def level(used_percent: float, before: Level) -> Level:
    """
    The level at *used_percent*, coming from *before*. At a mark counts as beyond it.

    >>> level(95, Level.FINE), level(90, Level.ACT), level(90, Level.WARN), level(79.9, Level.ACT)
    (<Level.ACT: 'act'>, <Level.ACT: 'act'>, <Level.WARN: 'warn'>, <Level.FINE: 'fine'>)
    """
    if used_percent >= ACT_PERCENT:
        return Level.ACT
    if used_percent < WARN_PERCENT:
        return Level.FINE
    return Level.ACT if before is Level.ACT else Level.WARN
