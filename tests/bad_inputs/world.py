# SPDX-License-Identifier: Apache-2.0
"""The tenants and keys that the rows speak of, in memory and in Postgres, and the rows themselves."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
import yaml

from chassis import keys
from extauth.core.identity import AccountState, Identity, KeyState, Standing
from extauth.core.patterns import Patterns

_ROWS: Final = yaml.safe_load(Path(__file__).with_name("rows.yaml").read_text())
LEVELS: Final = ("function", "grpc", "envoy")
#: Row K17: tenants other than b have nothing to look for on b's host.
POLICIES: Final = [{"name": "own-host", "deny": "host == 'b.example' && tenant != 'b'"}]
MODEL: Final = "tiny"


def rows(section: str, level: str) -> list[dict[str, Any]]:
    """Rows of a section that run at *level*."""
    return [row for row in _ROWS[section] if level in row.get("levels", LEVELS)]


@dataclass(slots=True)
class World:
    """Keys by the name that rows use."""

    texts: dict[str, str] = field(default_factory=dict)
    #: Columns of each key's row.
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fill(self, template: str) -> bytes:
        """A row's text with the keys it names; bytes, because not all of them are text."""
        raw = template.encode("latin-1")
        for name, text in self.texts.items():
            raw = raw.replace(f"{{{name}}}".encode(), text.encode("utf-8", "surrogateescape"))
        return raw

    def headers(self, row: Mapping[str, Any]) -> list[tuple[str, bytes]]:
        """What the row sends."""
        return [(name, self.fill(value)) for name, value in row["headers"]]


def build(peppers: Mapping[int, bytes], now: datetime) -> World:
    """Mint every key that the rows name."""
    world = World()
    hour = timedelta(hours=1)
    special: dict[str, dict[str, Any]] = {
        "good": {},
        "revoked": {"revoked_at": now - hour},
        "rotated": {"expires_at": now + hour, "rotated_to": "good"},
        "expired": {"expires_at": now - timedelta(milliseconds=1)},
        "disabled": {"state": "disabled"},
        "suspended": {"tenant_id": "gone"},
        "suspended_project": {"project_id": "frozen"},
        "suspended_account": {"service_account_id": "sa_0123456789AB"},
        "elsewhere": {"allowed_cidrs": [ipaddress.ip_network("192.0.2.0/24")]},
        "here": {"allowed_cidrs": [ipaddress.ip_network("127.0.0.0/8")]},
        "embeddings_only": {"scopes": ["embeddings"]},
        "denied_model": {"models": ["*"], "denied_models": ["ti*"]},
        "model_pattern": {"models": ["t*y"]},
    }
    version = max(peppers)
    for name, columns in special.items():
        minted = keys.mint("live", secrets.token_bytes)
        world.texts[name] = minted.key
        world.rows[name] = {
            "key_id": minted.key_id, "tenant_id": "acme", "project_id": "default", "name": name, "environment": "live",
            "key_hash": keys.hash_key(peppers[version], minted.key), "pepper_version": version,
            "last_four": minted.last_four, "created_at": now, "expires_at": None, "revoked_at": None, "state": "active",
            "scopes": None, "models": None, "denied_models": [], "allowed_cidrs": None, "service_account_id": None,
            "rotated_to": None, **columns,
        }  # fmt: skip
    world.rows["rotated"]["rotated_to"] = world.rows["good"]["key_id"]
    good = world.texts["good"]
    body = f"peaje_live_{world.rows['good']['key_id']}_{'A' * keys.SECRET_LENGTH}"
    world.texts |= {
        "bad_checksum": good[:-1] + ("0" if good[-1] != "0" else "1"),
        "unknown": keys.mint("live", secrets.token_bytes).key,
        "wrong_secret": body + keys.checksum(body),
        "10k": "a" * 10_000,
        "ff": "\udcff\udcfe" + good[2:],
        "homoglyph": good.replace("a", "а", 1),
        "good_head": good[:20] + "".join(reversed(good[20:])),
        "hash": world.rows["good"]["key_hash"].hex(),
    }
    return world


def store(world: World, connection: psycopg.Connection[Any], now: datetime) -> None:
    """Write tenants, projects, the account and all keys; *connection* belongs to an owner."""
    tenants = {"acme": "active", "gone": "suspended", "other": "active"}
    for tenant, state in tenants.items():
        connection.execute("insert into tenant values (%s, %s, %s, %s)", (tenant, tenant, state, now))
        connection.execute("insert into project values (%s, 'default', 'active', %s)", (tenant, now))
    connection.execute("insert into project values ('acme', 'frozen', 'suspended', %s)", (now,))
    connection.execute(
        "insert into service_account (service_account_id, tenant_id, project_id, name, state, secret_hash, "
        "pepper_version, created_at) values ('sa_0123456789AB', 'acme', 'default', 'a', 'suspended', %s, 1, %s)",
        (bytes(32), now),
    )
    columns = list(world.rows["good"])
    insert = f"insert into api_key ({', '.join(columns)}) values ({', '.join(f'%({name})s' for name in columns)})"
    for row in world.rows.values():
        connection.execute(insert, row)  # type: ignore[arg-type] - made of our own column names


class Memory:
    """A directory in memory that counts what it is asked."""

    def __init__(self, world: World) -> None:
        self.lookups = 0
        self._standings = {
            "acme/default": Standing(tenant_active=True, project_active=True),
            "acme/frozen": Standing(tenant_active=True, project_active=False),
            "gone/default": Standing(tenant_active=False, project_active=True),
            "other/default": Standing(tenant_active=True, project_active=True),
        }
        self._keys = {row["key_id"]: self._state(row) for row in world.rows.values()}

    def find(self, key_id: str) -> KeyState | None:
        """As the real one."""
        self.lookups += 1
        return self._keys.get(key_id)

    def remembers(self, key_id: str) -> bool:
        """As `Directory`, with nothing in its memory."""
        del key_id
        return False

    def find_account(self, account_id: str) -> AccountState | None:
        """There is none."""
        self.lookups += 1
        return None

    def find_project(self, tenant_id: str, project_id: str) -> Standing | None:
        """As the real one."""
        self.lookups += 1
        return self._standings.get(f"{tenant_id}/{project_id}")

    def _state(self, row: dict[str, Any]) -> KeyState:
        identity = Identity(
            tenant_id=row["tenant_id"], project_id=row["project_id"], key_id=row["key_id"],
            standing=self._standings[f"{row['tenant_id']}/{row['project_id']}"],
            scopes=None if row["scopes"] is None else frozenset(row["scopes"]),
            models=None if row["models"] is None else Patterns.of(row["models"]),
            denied_models=Patterns.of(row["denied_models"]),
            networks=None if row["allowed_cidrs"] is None else tuple(row["allowed_cidrs"]),
            is_active=row["state"] == "active", account_active=row["service_account_id"] is None,
            is_rotated=row["rotated_to"] is not None, expires_at=row["expires_at"], revoked_at=row["revoked_at"],
        )  # fmt: skip
        return KeyState(identity=identity, key_hash=row["key_hash"], pepper_version=row["pepper_version"])


def write_identity(home: Path, document: Mapping[str, Any]) -> None:
    """Put an identity document into a state directory, by a rename."""
    temporary = home / "identity.new"
    temporary.write_text(json.dumps(document))
    temporary.chmod(0o600)
    temporary.rename(home / "identity.yaml")
