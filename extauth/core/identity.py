# SPDX-License-Identifier: Apache-2.0
"""
What a decision is about: a request, and whoever has been recognised as its caller.

Every kind of credential (key, token, certificate) ends in the same `Identity`, so the rules
of the decision exist once.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from chassis.refusals import Refusal
from extauth.core.patterns import NOTHING, Patterns

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Phase(StrEnum):
    """The five phases of a decision, in order."""

    CREDENTIAL = "credential"
    IDENTITY = "identity"
    STATE = "state"
    POLICY = "policy"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """A no: where it was said, by which rule, and what the caller is told."""

    phase: Phase
    #: Names the rule for operators; finer than the caller's code (a revoked key and an unknown one read the same).
    rule: str
    refusal: Refusal


class Ask(NamedTuple):
    """One request, as far as decisions depend on it. One is made for each; a tuple is made in a fifth of the time."""

    dialect: str
    #: None for requests that name none (the list of models).
    model: str | None
    path: str
    host: str
    #: The client's, as Envoy tells it, as text; empty when it has none.
    address: str
    now: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the directory says of a project and its tenant."""

    tenant_active: bool
    project_active: bool
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who calls and what they may; None for scopes, models or networks means every."""

    tenant_id: str
    project_id: str
    #: What usage is booked on: a key's id, a service account's, or a name made from an issuer and a subject.
    key_id: str
    standing: Standing
    scopes: frozenset[str] | None = None
    models: Patterns | None = None
    denied_models: Patterns = NOTHING
    networks: tuple[Network, ...] | None = None
    is_active: bool = True
    account_active: bool = True
    #: It has a successor: its uses are counted until it ends.
    is_rotated: bool = False
    #: The first moment at which it is over.
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    #: When the directory was asked; None where nothing was read.
    known_at: datetime | None = None
    #: A token's claims, for policies; empty for keys and certificates.
    claims: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyState:
    """What the directory knows of an API key."""

    identity: Identity
    key_hash: bytes
    pepper_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountState:
    """What the directory knows of a service account."""

    tenant_id: str
    project_id: str
    is_active: bool
    scopes: frozenset[str] | None
    models: Patterns | None
    denied_models: Patterns
    standing: Standing


def is_within(address: str, networks: tuple[Network, ...]) -> bool:
    """Whether *address* lies in one of *networks*; what is no address lies nowhere."""
    parsed = parse_address(address)
    return parsed is not None and any(parsed in network for network in networks if network.version == parsed.version)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address, None for what is none; an IPv4 address that arrives on an IPv6 socket is the IPv4 address it is."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed if mapped is None else mapped
