# SPDX-License-Identifier: Apache-2.0
"""
Who may do what to the control plane: one table of roles and permissions.

A role is held on one tenant or on all. Some permissions are the platform's own: a tenant that
could raise its own limit, or let itself back in, would have none.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Permission(StrEnum):
    """What a route asks for; each route names exactly one."""

    TENANTS_READ = "tenants:read"
    TENANTS_WRITE = "tenants:write"
    PROJECTS_READ = "projects:read"
    PROJECTS_WRITE = "projects:write"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    SERVICE_ACCOUNTS_READ = "service-accounts:read"
    SERVICE_ACCOUNTS_WRITE = "service-accounts:write"
    LIMITS_READ = "limits:read"
    LIMITS_WRITE = "limits:write"
    LIMITS_CHECK = "limits:check"
    USAGE_READ = "usage:read"
    REQUESTS_READ = "requests:read"
    PRICES_READ = "prices:read"
    PRICES_WRITE = "prices:write"
    INVOICES_READ = "invoices:read"
    RERATE = "prices:rerate"
    PERIODS_READ = "periods:read"
    PERIODS_CLOSE = "periods:close"
    LEDGER_VERIFY = "ledger:verify"
    CREDITS_READ = "credits:read"
    CREDITS_WRITE = "credits:write"
    USAGE_WRITE = "usage:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    OPERATORS_READ = "operators:read"
    OPERATORS_WRITE = "operators:write"
    AUDIT_READ = "audit:read"
    AUDIT_VERIFY = "audit:verify"
    SIGNING_KEYS_READ = "signing-keys:read"
    SIGNING_KEYS_WRITE = "signing-keys:write"


class Role(StrEnum):
    """What an operator is."""

    PLATFORM_ADMIN = "platform-admin"
    TENANT_ADMIN = "tenant-admin"
    DEVELOPER = "developer"
    BILLING_READER = "billing-reader"
    BILLING_ADMIN = "billing-admin"
    AUDITOR = "auditor"


_P = Permission

#: Never an operator's of a tenant, whatever its role.
PLATFORM_ONLY: Final = frozenset({
    _P.TENANTS_WRITE, _P.LIMITS_WRITE, _P.LIMITS_CHECK, _P.AUDIT_VERIFY, _P.SIGNING_KEYS_READ, _P.SIGNING_KEYS_WRITE,
    _P.PRICES_WRITE, _P.RERATE, _P.CREDITS_WRITE, _P.USAGE_WRITE, _P.PERIODS_READ, _P.PERIODS_CLOSE, _P.LEDGER_VERIFY,
})

PERMISSIONS: Final[dict[Role, frozenset[Permission]]] = {
    Role.PLATFORM_ADMIN: frozenset(Permission),
    Role.TENANT_ADMIN: frozenset(Permission) - PLATFORM_ONLY,
    Role.DEVELOPER: frozenset({
        _P.TENANTS_READ, _P.PROJECTS_READ, _P.KEYS_READ, _P.KEYS_WRITE, _P.SERVICE_ACCOUNTS_READ, _P.LIMITS_READ,
        _P.USAGE_READ, _P.REQUESTS_READ,
    }),
    Role.BILLING_READER: frozenset({
        _P.TENANTS_READ, _P.PROJECTS_READ, _P.LIMITS_READ, _P.USAGE_READ, _P.PRICES_READ, _P.INVOICES_READ, _P.PERIODS_READ,
        _P.CREDITS_READ, _P.WEBHOOKS_READ,
    }),
    Role.BILLING_ADMIN: frozenset({
        _P.TENANTS_READ, _P.PROJECTS_READ, _P.LIMITS_READ, _P.USAGE_READ, _P.REQUESTS_READ, _P.PRICES_READ, _P.PRICES_WRITE, _P.RERATE,
        _P.INVOICES_READ, _P.PERIODS_READ, _P.PERIODS_CLOSE, _P.LEDGER_VERIFY, _P.CREDITS_READ, _P.CREDITS_WRITE,
        _P.USAGE_WRITE, _P.WEBHOOKS_READ, _P.WEBHOOKS_WRITE,
    }),
    Role.AUDITOR: frozenset(
        {permission for permission in Permission if permission.endswith(":read")}
        | {_P.LIMITS_CHECK, _P.AUDIT_VERIFY, _P.LEDGER_VERIFY}
    ),
}

#: Roles that make sense without a tenant; the schema holds the same.
_ON_ALL_TENANTS: Final = frozenset({Role.PLATFORM_ADMIN, Role.BILLING_READER, Role.BILLING_ADMIN, Role.AUDITOR})
#: Roles whose work is the platform's.
_ON_ALL_TENANTS_ONLY: Final = frozenset({Role.PLATFORM_ADMIN, Role.BILLING_ADMIN})


def may(role: Role, permission: Permission, *, tenant_id: str | None) -> bool:
    """
    Tell whether *role*, held on *tenant_id* (None: on all), has *permission*.

    >>> may(Role.AUDITOR, Permission.AUDIT_VERIFY, tenant_id=None)
    True
    >>> may(Role.AUDITOR, Permission.AUDIT_VERIFY, tenant_id="acme")
    False
    """
    if tenant_id is not None and permission in PLATFORM_ONLY:
        return False
    return permission in PERMISSIONS[role]


def can_be_held(role: Role, *, tenant_id: str | None) -> bool:
    """Tell whether *role* exists on *tenant_id* (None: on all tenants)."""
    return role in _ON_ALL_TENANTS if tenant_id is None else role not in _ON_ALL_TENANTS_ONLY
