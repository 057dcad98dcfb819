# SPDX-License-Identifier: Apache-2.0
"""
Service accounts: machines of a project. They sign in with client credentials for short-lived tokens.

The client id is the account's id. The client secret is shown once; only its hash is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from chassis import keys as formats
from chassis.errors import Invalid, NotFound
from chassis.models import ModelCatalogue
from control import audit, projects, tenants
from control.act import Act
from control.core import rights
from control.minting import Mint
from control.store import Connection, Store

State = Literal["active", "suspended"]

ID_PREFIX = "sa_"
NAME_LENGTH_MAX = 100
OVERLAP_MAX = timedelta(days=30)

_COLUMNS = (
    "service_account_id, tenant_id, project_id, name, state, scopes, models, denied_models, created_at, "
    "previous_secret_expires_at"
)
_SELECT = f"select {_COLUMNS} from service_account where service_account_id = %s"
_INSERT = f"""
insert into service_account (service_account_id, tenant_id, project_id, name, scopes, models, denied_models,
                             secret_hash, pepper_version, created_at)
values (%(service_account_id)s, %(tenant_id)s, %(project_id)s, %(name)s, %(scopes)s, %(models)s, %(denied_models)s,
        %(secret_hash)s, %(pepper_version)s, %(created_at)s)
returning {_COLUMNS}
"""
#: The secret that was becomes the previous one; of the one before that nothing stays.
_ROTATE = f"""
update service_account set
    previous_secret_hash = case when %(end)s::timestamptz > %(now)s then secret_hash end,
    previous_pepper_version = case when %(end)s::timestamptz > %(now)s then pepper_version end,
    previous_secret_expires_at = case when %(end)s::timestamptz > %(now)s then %(end)s::timestamptz end,
    secret_hash = %(secret_hash)s, pepper_version = %(pepper_version)s
where service_account_id = %(id)s returning {_COLUMNS}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewServiceAccount(rights.Rights):
    """What is asked of a new service account, as people write it; None means every."""

    name: str
    project: str = tenants.DEFAULT_PROJECT


def create(
    store: Store, act: Act, mint: Mint, tenant: str, asked: NewServiceAccount, *, catalogue: ModelCatalogue
) -> dict[str, Any]:
    """Make a service account; this answer and a rotation's are the only ones that have `client_secret`."""
    row = {
        "name": rights.name(asked.name, what="A service account's", length_max=NAME_LENGTH_MAX),
        **asked.checked(served=catalogue.served),
        "created_at": act.now,
    }
    minted, hashed = mint.token(formats.CLIENT_SECRET)
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve(connection, tenant)["tenant_id"]
        project_id = projects.resolve(connection, tenant_id, asked.project)["project_id"]
        made = connection.execute(
            _INSERT,
            row
            | {
                "service_account_id": ID_PREFIX + minted.token_id, "tenant_id": tenant_id, "project_id": project_id,
                "secret_hash": hashed.hash, "pepper_version": hashed.pepper_version,
            },
        ).fetchone()
        assert made is not None
        audit.append(
            connection, act, "service_account.created", made["service_account_id"], tenant_id=tenant_id, after=made
        )
    return _with_secret(made, minted.token)


def list_page(store: Store, act: Act, tenant: str, *, after: str | None, limit: int) -> list[dict[str, Any]]:
    """Service accounts of a tenant by id, those after *after*; never the secret."""
    with store.transaction(act.scope) as connection:
        return connection.execute(
            f"select {_COLUMNS} from service_account where tenant_id = %s and service_account_id > coalesce(%s, '') "
            "order by service_account_id limit %s",
            (tenants.resolve_id(connection, tenant), after, limit),
        ).fetchall()


def find(store: Store, act: Act, service_account_id: str) -> dict[str, Any]:
    """One service account; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        found = connection.execute(_SELECT, (service_account_id,)).fetchone()
    if found is None:
        raise no_such(service_account_id)
    return found


def resolve(connection: Connection, service_account_id: str) -> dict[str, Any]:
    """One service account, locked until the transaction ends; raises `NotFound`."""
    found = connection.execute(f"{_SELECT} for update", (service_account_id,)).fetchone()
    if found is None:
        raise no_such(service_account_id)
    return found


def no_such(service_account_id: str) -> NotFound:
    """The same for an account that does not exist and for one in another place."""
    return NotFound(
        f"There is no service account {service_account_id!r}.", mend="See `peaje service-accounts list`."
    )


def set_state(store: Store, act: Act, service_account_id: str, state: State) -> dict[str, Any]:
    """Suspend or activate an account: no new token from now on, and extauth refuses those it has."""
    with store.transaction(act.scope) as connection:
        return set_state_in(connection, act, service_account_id, state)


def set_state_in(connection: Connection, act: Act, service_account_id: str, state: State) -> dict[str, Any]:
    """`set_state` within another use case's transaction."""
    before = resolve(connection, service_account_id)
    after = connection.execute(
        f"update service_account set state = %s where service_account_id = %s returning {_COLUMNS}",
        (state, service_account_id),
    ).fetchone()
    assert after is not None
    action = "service_account.suspended" if state == "suspended" else "service_account.activated"
    audit.append(
        connection, act, action, service_account_id, tenant_id=after["tenant_id"], before=before, after=after
    )
    return after


def rotate_secret(
    store: Store, act: Act, mint: Mint, service_account_id: str, *, overlap: timedelta
) -> dict[str, Any]:
    """Make a new client secret; the old one works until *overlap* is over, one from before that no longer."""
    if not timedelta(0) <= overlap <= OVERLAP_MAX:
        raise Invalid("overlap must be between 0 and 30 days.")
    with store.transaction(act.scope) as connection:
        before = resolve(connection, service_account_id)
        token_id = service_account_id.removeprefix(ID_PREFIX)
        minted, hashed = mint.token(formats.CLIENT_SECRET, token_id=token_id)
        after = connection.execute(
            _ROTATE,
            {
                "id": service_account_id, "now": act.now, "end": act.now + overlap, "secret_hash": hashed.hash,
                "pepper_version": hashed.pepper_version,
            },
        ).fetchone()
        assert after is not None
        audit.append(
            connection, act, "service_account.secret_rotated", service_account_id, tenant_id=after["tenant_id"],
            before=before, after=after,
        )
    return _with_secret(after, minted.token)


def _with_secret(account: dict[str, Any], secret: str) -> dict[str, Any]:
    return account | {"client_id": account["service_account_id"], "client_secret": secret}
