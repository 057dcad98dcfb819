# SPDX-License-Identifier: Apache-2.0
"""What happens in a second, from two readings of sums that only grow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What one tenant has had since some hours ago."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one tenant had in a second."""

    tenant: str
    requests: float
    input_tokens: float
    output_tokens: float
    refused: float


_NOTHING = Sums()


def rates(before: Mapping[str, Sums], after: Mapping[str, Sums], *, seconds: float) -> list[Rates]:
    """
    Every tenant that had anything in between, who had most tokens first.

    A sum that fell is one whose oldest hour has just left it: nothing is said of that tenant this time.

    >>> [one] = rates({"acme": Sums(requests=1)}, {"acme": Sums(requests=5), "bolt": Sums()}, seconds=2.0)
    >>> one.tenant, one.requests
    ('acme', 2.0)
    """
    found = []
    for tenant, now in after.items():
        was = before.get(tenant, _NOTHING)
        grown = [
            now.requests - was.requests, now.input_tokens - was.input_tokens,
            now.output_tokens - was.output_tokens, now.refused - was.refused,
        ]  # fmt: skip
        if any(grown) and min(grown) >= 0:
            each = [count / seconds for count in grown]
            found.append(Rates(tenant=tenant, requests=each[0], input_tokens=each[1], output_tokens=each[2], refused=each[3]))
    return sorted(found, key=lambda one: (-one.input_tokens - one.output_tokens, -one.requests, -one.refused, one.tenant))
