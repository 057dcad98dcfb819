# SPDX-License-Identifier: Apache-2.0
"""On whose behalf a use case runs, over which tenants, for which request, and when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final


class _AllTenants(Enum):
    ALL = "*"


#: Every tenant at once. Never a default: who means all says so.
ALL_TENANTS: Final = _AllTenants.ALL


@dataclass(frozen=True, slots=True)
class OneTenant:
    """One tenant and nothing else."""

    tenant_id: str

    def __post_init__(self) -> None:
        if not self.tenant_id or self.tenant_id == ALL_TENANTS.value:
            raise ValueError("a scope of one tenant names one")


Scope = OneTenant | _AllTenants


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """What every use case is told first; `actor` is an operator's id or the name of a road without one."""

    actor: str
    scope: Scope
    request_id: str
    now: datetime

    @property
    def tenant_id(self) -> str | None:
        """The tenant of the scope; None if it is all of them."""
        return self.scope.tenant_id if isinstance(self.scope, OneTenant) else None
