# SPDX-License-Identifier: Apache-2.0
"""Stores that the user runs: look whether they answer before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg
import redis

from control.laptop.errors import Trouble

_SECONDS = 5


def check_postgres(url: str) -> None:
    """Raise `Trouble` that names PEAJE_POSTGRES_URL and the cause, without the password."""
    _check_scheme("PEAJE_POSTGRES_URL", url, ("postgresql", "postgres"))
    try:
        with psycopg.connect(url, connect_timeout=_SECONDS) as connection:
            connection.execute("select 1")
    except psycopg.ProgrammingError as exc:
        # Its text quotes the URL.
        raise Trouble("PEAJE_POSTGRES_URL is not a PostgreSQL URL.", mend="Give one like postgresql://user:password@host:5432/database.") from exc
    except psycopg.Error as exc:
        raise _does_not_answer("PEAJE_POSTGRES_URL", url, exc) from exc


def check_redis(url: str) -> None:
    """Raise `Trouble` that names PEAJE_REDIS_URL and the cause, without the password."""
    _check_scheme("PEAJE_REDIS_URL", url, ("redis", "rediss", "unix"))
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=_SECONDS, socket_timeout=_SECONDS) as client:
            client.ping()
    except (redis.RedisError, OSError) as exc:
        raise _does_not_answer("PEAJE_REDIS_URL", url, exc) from exc
    except ValueError as exc:
        raise Trouble("PEAJE_REDIS_URL is not a Redis URL.", mend="Give one like redis://:password@host:6379/0.") from exc


def check(postgres_url: str | None, redis_url: str | None) -> None:
    """Check those that were given."""
    checks: tuple[tuple[str | None, Callable[[str], None]], ...] = (
        (postgres_url, check_postgres),
        (redis_url, check_redis),
    )
    for url, look in checks:
        if url:
            look(url)


def passwords_in(url: str) -> set[str]:
    """The passwords that a store's URL holds, in each spelling in which they may be seen again."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return set()
    password = parts.password or ""
    return {password, unquote(password), *parse_qs(parts.query).get("password", ())} - {""}


def _check_scheme(variable: str, url: str, schemes: tuple[str, ...]) -> None:
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        scheme = ""
    if scheme not in schemes or "://" not in url:
        raise Trouble(f"{variable} does not start with {schemes[0]}://.", mend="Correct it, or unset it to use the embedded one.")


def _does_not_answer(variable: str, url: str, exc: Exception) -> Trouble:
    # libpq goes on with advice and with each address it tried.
    text = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
    return Trouble(
        f"{variable}: {_without_password(text, url)}",
        mend="Nothing was started; correct it, or unset it to use the embedded one.",
    )


def _without_password(text: str, url: str) -> str:
    for secret in {url, *passwords_in(url)}:
        text = text.replace(secret, "***")
    return text.rstrip(".") + "."
