# SPDX-License-Identifier: Apache-2.0
"""
Read where the stores are and where this installation keeps its state.

Every service's own settings extend `StoreSettings`. Read once, at start; never printed whole.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis.errors import Invalid

_HIDDEN: Final = "***"
#: libpq also takes `key=value` pairs, and the same keys in a URL's query.
_PASSWORD_PAIR: Final = re.compile(r"(?i)\b(\w*password|passwd|pwd)(\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]*)")


class StoreSettings(BaseSettings):
    """
    Hold what every process needs to find its state and its stores.

    URLs are kept out of `repr` because they hold passwords; print `redacted(url)` instead.
    """

    model_config = SettingsConfigDict(env_prefix="PEAJE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    #: Directory. The state of one installation: sockets, secrets, journal, Envoy's files.
    #: Default: beside whoever starts it, so that two checkouts never share state.
    home: Path = Path(".peaje")
    #: libpq URL. The record of everything. No default: writing to a database that
    #: nobody named would be worse than not starting.
    postgres_url: str = Field(default="", repr=False)
    #: Redis or Valkey URL. Counters only, never the record. No default, for the same reason.
    redis_url: str = Field(default="", repr=False)

    #: Directory with tls.crt, tls.key and ca.crt, for services that are asked over TCP; read again when they change.
    tls_directory: Path | None = None
    #: How long a service that is told to stop goes on serving while its health says that it ends. Two of Envoy's checks are
    #: 4 s: then nobody is refused. Only where another process takes its place; alone it would refuse all that while.
    drain_seconds: float = Field(default=0.0, ge=0, le=600)
    #: Address on which services show their metrics. Not loopback only where nobody else reaches it, as in a pod.
    metrics_host: str = "127.0.0.1"

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        # Processes change their working directory to the state directory; a relative path would move.
        return home.expanduser().absolute()

    def require_postgres(self) -> str:
        """Return the Postgres URL or refuse to go on without one."""
        if not self.postgres_url:
            raise Invalid("PEAJE_POSTGRES_URL is not set.", mend="Set it to postgresql://user:password@host:port/database.")
        return self.postgres_url

    def require_redis(self) -> str:
        """Return the Redis URL or refuse to go on without one."""
        if not self.redis_url:
            raise Invalid("PEAJE_REDIS_URL is not set.", mend="Set it to redis://:password@host:port/0.")
        return self.redis_url


def redacted(url: str) -> str:
    """
    Hide every password in a store's URL or in libpq's `key=value` form.

    >>> redacted("postgresql://gw:s3cret@db:5432/peaje?sslmode=require")
    'postgresql://gw:***@db:5432/peaje?sslmode=require'
    >>> redacted("host=db password='a b' dbname=peaje")
    'host=db password=*** dbname=peaje'
    >>> redacted("redis://:s3@cret@127.0.0.1:6379/0")
    'redis://:***@127.0.0.1:6379/0'
    """
    visible = _PASSWORD_PAIR.sub(rf"\1\2{_HIDDEN}", url)
    if "://" not in visible:
        return visible
    try:
        parts = urlsplit(visible)
    except ValueError:
        # Not a URL after all: nothing of it is known to be safe to show.
        return f"{visible.partition('://')[0]}://{_HIDDEN}"
    # A password may itself contain "@": the last one ends it.
    user_info, at, host = parts.netloc.rpartition("@")
    user, colon, _password = user_info.partition(":")
    if colon:
        parts = parts._replace(netloc=f"{user}:{_HIDDEN}{at}{host}")
    return urlunsplit(parts)
