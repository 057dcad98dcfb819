# SPDX-License-Identifier: Apache-2.0
"""
Where an event may be sent: the rules for a URL when it is written down, and for an address when it is connected to.

Names are resolved when a connection is made, and the very address that was judged is connected to, so
that a name which answers differently the second time gains nothing.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from chassis.errors import Invalid

URL_LENGTH_MAX: Final = 2000
_PORTS: Final = {"https": 443, "http": 80}
_LOCALHOST: Final = "localhost"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A URL that may be sent to, taken apart."""

    url: str
    scheme: str
    host: str
    port: int


def target(url: str, *, loopback_allowed: bool) -> Target:
    """
    Take *url* apart; raises `Invalid` for one that events never go to.

    Only https. For a receiver on this very machine, if the installation allows it, http too.

    >>> target("https://example.com/hook", loopback_allowed=False).port
    443
    """
    if not 1 <= len(url) <= URL_LENGTH_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise Invalid(f"A webhook's URL has 1 to {URL_LENGTH_MAX} printable ASCII characters.", mend="Write a name beyond ASCII in its xn-- form.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as exc:
        raise Invalid("The webhook's URL cannot be read.") from exc
    if parts.scheme not in _PORTS or not host or port == 0:
        raise Invalid("A webhook's URL begins with https:// and names a host.")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise Invalid("A webhook's URL has no user, no password and no fragment.", mend="Give what the receiver asks for as its token.")
    literal = _literal(host)
    if parts.scheme == "http" and not (loopback_allowed and (host == _LOCALHOST or (literal and literal.is_loopback))):
        raise Invalid("Events are sent by https only.", mend="Use an https:// URL.")
    if literal is not None and not may_connect(literal, scheme=parts.scheme, loopback_allowed=loopback_allowed):
        raise Invalid("Events are not sent to addresses that are not public.")
    return Target(url=url, scheme=parts.scheme, host=host, port=port or _PORTS[parts.scheme])


def may_connect(address: Address, *, scheme: str, loopback_allowed: bool) -> bool:
    """
    Whether events may go to *address*: a public one, and no other's in disguise.

    >>> may_connect(ipaddress.ip_address("169.254.169.254"), scheme="https", loopback_allowed=True)
    False
    >>> may_connect(ipaddress.ip_address("93.184.215.14"), scheme="https", loopback_allowed=False)
    True
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.sixtofour is not None or address.teredo is not None or address.scope_id is not None or address.is_site_local:
            return False
    if address.is_loopback:
        return loopback_allowed
    if scheme == "http":
        return False
    # `is_reserved` has NAT64 and IPv4-compatible addresses, behind which any IPv4 address may be.
    return address.is_global and not address.is_multicast and not address.is_reserved


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
