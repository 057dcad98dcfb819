# SPDX-License-Identifier: Apache-2.0
"""
Bound what made-up credentials cost: how many of one address may turn out to be unknown.

Only asking a store or an issuer costs anything, so only credentials that nothing is remembered of come here; and
only a no takes a turn, because an office behind one address may bring a thousand good keys at once. Pure: the time
is an argument.
"""

from __future__ import annotations

import ipaddress
import math
from datetime import datetime, timedelta
from typing import Final

from chassis.attempts import Attempts
from chassis.refusals import Refusal
from extauth.core.identity import parse_address

#: Unknown credentials of one address a minute, as many at once. Far above the dead keys of all the callers who may share
#: a proxy; as reads, not a hundredth of what Postgres can do.
PER_MINUTE: Final = 1000
#: Addresses that are remembered, about 200 bytes each; beyond, the one that was longest good is forgotten and may start anew.
ADDRESSES_MAX: Final = 10_000
#: Who has one IPv6 address has at least the network of this length, and may send from all of it.
_IPV6_PREFIX: Final = 64
_MINUTE: Final = timedelta(minutes=1)


class Strangers:
    """
    Counts the unknown credentials of each address. Not safe for threads by itself.

    >>> from datetime import UTC
    >>> strangers, noon = Strangers(per_minute=1), datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> strangers.turned_away("192.0.2.7", noon)
    >>> strangers.refusal("192.0.2.7", noon).retry_after
    60
    >>> strangers.refusal("192.0.2.8", noon) is None
    True
    """

    def __init__(self, *, per_minute: int = PER_MINUTE, addresses_max: int = ADDRESSES_MAX) -> None:
        """With *per_minute* 0 nobody is refused."""
        self._attempts = Attempts(most=per_minute, per=_MINUTE, names_max=addresses_max) if per_minute else None

    def refusal(self, address: str, now: datetime) -> Refusal | None:
        """What a credential that nothing is remembered of is told instead of being looked up, if *address* has no turn left."""
        wait = self._attempts.wait(place_of(address), now) if self._attempts is not None else None
        if not wait:
            return None
        return Refusal(
            status=429,
            code="too_many_unknown_credentials",
            message="Too many unknown credentials came from this address. Try again.",
            retry_after=math.ceil(wait.total_seconds()),
        )

    def turned_away(self, address: str, now: datetime) -> None:
        """Take a turn: a credential was looked up, and nobody knows it. Those looked up together take more than there were."""
        if self._attempts is not None:
            self._attempts.count(place_of(address), now)

    def __len__(self) -> int:
        return len(self._attempts) if self._attempts is not None else 0


def place_of(address: str) -> str:
    """
    What counts as one address: of IPv6 the whole network that its holder has; what is no address is all one.

    >>> place_of("2001:db8:1:2:3::4") == place_of("2001:db8:1:2::") != place_of("2001:db8:1:3::")
    True
    >>> place_of("::ffff:192.0.2.7"), place_of("run/socket")
    ('192.0.2.7', '')
    """
    parsed = parse_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(parsed), _IPV6_PREFIX), strict=False))
    return "" if parsed is None else str(parsed)
