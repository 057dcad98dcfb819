# SPDX-License-Identifier: Apache-2.0
"""The callers that rows name in braces, each with a key of its own: as values for the decision, as rows for Postgres."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import psycopg

from chassis import keys
from extauth.core.identity import Identity, KeyState, Standing
from extauth.core.patterns import NOTHING, Patterns

#: Characters that two keys may share in front; a cache that looked at no more would take one for the other.
_SHARED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A key and what it may do; times are relative to when the test runs."""

    key: str = field(repr=False)
    tenant: str
    tenant_state: str = "active"
    project_state: str = "active"
    state: str = "active"
    scopes: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    denied_models: tuple[str, ...] = ()
    cidrs: tuple[str, ...] | None = None
    expires_in: timedelta | None = None
    revoked_in: timedelta | None = None
    has_successor: bool = False

    @property
    def key_id(self) -> str:
        """The id within the key."""
        parsed = keys.parse(self.key)
        assert parsed is not None
        return parsed.key_id

    def stored(self, pepper: bytes, now: datetime) -> KeyState:
        """What the directory would say of this key."""
        return KeyState(
            identity=Identity(
                tenant_id=self.tenant, project_id="default", key_id=self.key_id, known_at=now,
                standing=Standing(
                    tenant_active=self.tenant_state == "active", project_active=self.project_state == "active"
                ),
                scopes=None if self.scopes is None else frozenset(self.scopes),
                models=None if self.models is None else Patterns.of(self.models),
                denied_models=Patterns.of(self.denied_models) if self.denied_models else NOTHING,
                networks=None if self.cidrs is None else tuple(map(ipaddress.ip_network, self.cidrs)),
                is_active=self.state == "active", is_rotated=self.has_successor,
                expires_at=None if self.expires_in is None else now + self.expires_in,
                revoked_at=None if self.revoked_in is None else now + self.revoked_in,
            ),
            key_hash=keys.hash_key(pepper, self.key), pepper_version=1,
        )  # fmt: skip

    def insert(self, connection: psycopg.Connection[Any], peppers: Mapping[int, bytes], now: datetime) -> None:
        """Make the tenant, its project and the key."""
        connection.execute(
            "insert into tenant (tenant_id, name, state, created_at) values (%s, %s, %s, %s) on conflict do nothing",
            (self.tenant, self.tenant, self.tenant_state, now),
        )
        connection.execute(
            "insert into project (tenant_id, project_id, state, created_at) values (%s, 'default', %s, %s) on conflict do nothing",
            (self.tenant, self.project_state, now),
        )
        version = max(peppers)
        connection.execute(
            """
            insert into api_key (key_id, tenant_id, project_id, name, environment, key_hash, pepper_version, last_four,
                                 models, denied_models, scopes, allowed_cidrs, state, created_at, expires_at, revoked_at)
            values (%s, %s, 'default', 'bad inputs', 'live', %s, %s, %s, %s, %s, %s, %s::cidr[], %s, %s, %s, %s)
            """,
            (
                self.key_id, self.tenant, keys.hash_key(peppers[version], self.key), version, self.key[-4:],
                None if self.models is None else list(self.models), list(self.denied_models),
                None if self.scopes is None else list(self.scopes), None if self.cidrs is None else list(self.cidrs),
                self.state, now - timedelta(days=1),
                None if self.expires_in is None else now + self.expires_in,
                None if self.revoked_in is None else now + self.revoked_in,
            ),
        )  # fmt: skip
        if self.has_successor:
            connection.execute("update api_key set rotated_to = key_id where key_id = %s", (self.key_id,))


def make() -> dict[str, Caller]:
    """New callers by the names that rows use."""
    mine, past, soon = secrets.token_hex(4), timedelta(seconds=-1), timedelta(hours=1)
    good = new_key()
    made = {
        "good": Caller(key=good, tenant=f"good-{mine}"),
        "other": Caller(key=new_key(), tenant=f"other-{mine}"),
        "twin": Caller(key=new_key(good.split("_")[2][: _SHARED - len("peaje_live_")]), tenant=f"twin-{mine}"),
        "revoked": Caller(key=new_key(), tenant=f"good-{mine}", revoked_in=past),
        "expired": Caller(key=new_key(), tenant=f"good-{mine}", expires_in=past),
        "overlapping": Caller(key=new_key(), tenant=f"good-{mine}", expires_in=soon, has_successor=True),
        "rotated_out": Caller(key=new_key(), tenant=f"good-{mine}", expires_in=past, has_successor=True),
        "disabled": Caller(key=new_key(), tenant=f"good-{mine}", state="disabled"),
        "of_suspended_tenant": Caller(key=new_key(), tenant=f"tenant-{mine}", tenant_state="suspended"),
        "of_suspended_project": Caller(key=new_key(), tenant=f"project-{mine}", project_state="suspended"),
        "embeddings_only": Caller(key=new_key(), tenant=f"good-{mine}", scopes=("embeddings",)),
        "nothing": Caller(key=new_key(), tenant=f"good-{mine}", scopes=()),
        "from_elsewhere": Caller(key=new_key(), tenant=f"good-{mine}", cidrs=("198.51.100.0/24", "2001:db8::/32")),
        "from_here": Caller(key=new_key(), tenant=f"good-{mine}", cidrs=("127.0.0.0/8",)),
        "other_model_only": Caller(key=new_key(), tenant=f"good-{mine}", models=("llama-*",)),
        "no_models": Caller(key=new_key(), tenant=f"good-{mine}", models=()),
        "denied_by_pattern": Caller(key=new_key(), tenant=f"good-{mine}", models=("*",), denied_models=("ti*y",)),
    }
    assert made["good"].key[:_SHARED] == made["twin"].key[:_SHARED] != made["other"].key[:_SHARED]
    return made


def spellings(callers: Mapping[str, Caller]) -> dict[str, str]:
    """What rows write in braces: each caller's key, and what looks like one."""
    good = callers["good"].key
    body = good[: -keys.CHECKSUM_LENGTH]
    other_secret = body[:-1] + ("a" if body[-1] != "a" else "b")
    return {
        **{name: caller.key for name, caller in callers.items()},
        "unknown": new_key(),
        "wrong_secret": other_secret + keys.checksum(other_secret),
        "bad_checksum": good[:-1] + ("a" if good[-1] != "a" else "b"),
        "wrong_environment": good.replace("_live_", "_test_"),
        "upper": good.upper(),
        "homoglyph": good.replace("peaje", "pe\u0430je").encode().decode("latin-1"),
        "good_tenant": callers["good"].tenant,
        "other_tenant": callers["other"].tenant,
    }


def new_key(id_prefix: str = "") -> str:
    """A new key whose id begins with *id_prefix*."""
    key_id = (id_prefix + secrets.token_hex(8))[: keys.KEY_ID_LENGTH]
    body = f"peaje_live_{key_id}_{secrets.token_hex(keys.SECRET_LENGTH // 2)}"
    return body + keys.checksum(body)
