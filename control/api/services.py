# SPDX-License-Identifier: Apache-2.0
"""What the routes are given: the use cases' dependencies, put together once in `__main__`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from chassis.models import ModelCatalogue
from control.minting import Mint
from control.oauth import Issuer
from control.sign_ins import SignIns
from control.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything a route may need."""

    store: Store
    mint: Mint
    issuer: Issuer
    catalogue: Callable[[], ModelCatalogue]
    clock: Callable[[], datetime]
    #: Removed once the first operator exists.
    bootstrap_token_path: Path
    #: A secret-scanning partner's public keys; None: no partner.
    scanning_keys_path: Path | None
    #: The identity document, whose policies explanations ask; None: there is none.
    identity_path: Path | None = None
    #: Webhooks may go to this machine's loopback, by http too.
    loopback_allowed: bool = False
    sign_ins: SignIns = field(default_factory=SignIns)
