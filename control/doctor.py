# SPDX-License-Identifier: Apache-2.0
"""
Look at a running installation from outside, read only: its processes, Envoy, both stores, disks.

What does not answer is a remark like any other, and the rest is looked at all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg
import redis
from psycopg.rows import tuple_row

from chassis.contract import IDENTITY_PATH
from chassis.errors import PeajeError
from chassis.schema.migrate import newest_version
from control.core import diagnosis
from control.core.diagnosis import Remark
from extauth.adapters.document import JwtIssuer
from extauth.adapters.document import load as load_identity
from extauth.adapters.jwks import fetch_document
from extauth.core.claims import Unusable
from metering.adapters.disk import measure

_SECONDS: Final = 3.0
_SERVICES: Final = ("extauth", "ratelimit", "metering")
_SCRIPTS: Final = ("gate", "tap")

_LAGS: Final = "select journal, extract(epoch from now() - read_until)::float8 from journal_state"
#: Models whose newest interval has a difference that no cut request explains, as `peaje_conservation_drift_tokens` says it.
_DRIFTING: Final = """
select model from (
    select distinct on (model) model, state, ledger_input_tokens - engine_input_tokens as input,
           ledger_output_tokens - engine_output_tokens as output, cut_count
    from conservation_check order by model, ended_at desc
) newest
where state = 'compared' and (greatest(input, output) > 0 or (least(input, output) < 0 and cut_count = 0))
order by model
"""
_DIFFERENCES: Final = """
select (select count(*) from reconciliation_exception where state = 'open'),
       (select count(*) from journal_defect where recorded_at > now() - interval '1 day')
"""
_LAST_PARTITION: Final = """
select max(substring(child.relname from '\\d{8}$')) from pg_inherits join pg_class child on child.oid = inhrelid
where inhparent = 'usage_event'::regclass
"""
_EXPIRING: Final = """
select key_id from api_key
where revoked_at is null and state = 'active' and rotated_to is null and expires_at between now() and now() + %s
order by expires_at limit 100
"""
_ACTIVE: Final = "select count(*) from api_key where revoked_at is null and state = 'active' and (expires_at is null or expires_at > now())"
_OPEN: Final = "select count(*), min(started_at) from open_exchange"
_WEBHOOKS: Final = "select webhook_id from webhook where state = 'failed' order by 1 limit 100"


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the parts are; empty where this machine does not know of one."""

    postgres_url: str
    redis_url: str
    envoy_admin: str
    home: Path


def examine(
    addresses: Addresses, parts: Iterable[Mapping[str, Any]], limits: Callable[[], list[str]]
) -> Iterator[Remark]:
    """Every remark, as it is made; *parts* as `peaje status --json` has them, *limits* asks the control API."""
    parts = list(parts)
    if parts:
        yield diagnosis.judge_parts(
            {part["name"]: part["state"] for part in parts}, {part["name"]: part["restarts"] for part in parts}
        )
    yield from _looked("Envoy", lambda: _envoy(addresses.envoy_admin), "See ./peaje status and log/envoy.log.")
    yield from _looked("Postgres", lambda: _postgres(addresses.postgres_url), "Known callers are served for 300 s: see ./peaje status.")
    yield from _looked("store", lambda: _store(addresses.redis_url), "Each limit follows its on_store_error: see ./peaje status.")
    yield from _looked("disk", lambda: [diagnosis.judge_disk("disk", measure(addresses.home / "journal"))], "Is PEAJE_HOME right?")
    yield from _looked("key sets", lambda: _key_sets(addresses.home), "./peaje check says what is wrong with identity.yaml.")
    yield from _looked("limits", lambda: [diagnosis.judge_limits(limits())], "See ./peaje status and log/control.log.")


def _looked(about: str, look: Callable[[], Iterable[Remark]], mend: str) -> Iterator[Remark]:
    try:
        yield from look()
    except (PeajeError, httpx.HTTPError, psycopg.Error, redis.RedisError, OSError, ValueError, KeyError) as exc:
        # Only the kind: a message may hold a URL with its password.
        reason = exc.message if isinstance(exc, PeajeError) else f"it does not answer ({type(exc).__name__})."
        yield diagnosis.unknown(about, reason, mend=mend)


def _envoy(admin: str) -> Iterator[Remark]:
    with httpx.Client(base_url=admin, timeout=_SECONDS, trust_env=False) as client:
        info = client.get("/server_info").json()
        yield diagnosis.fine("Envoy", f"{info['version'].split('/')[1]}, {info['state'].lower()}, up for {info['uptime_current_epoch']}.")
        services = _stats(client, f"^cluster\\.({'|'.join(_SERVICES)})\\.membership_healthy$")
        yield diagnosis.judge_services({name.split(".")[1]: count for name, count in services.items()})
        scripts = _stats(client, f"\\.lua\\.({'|'.join(_SCRIPTS)})\\.errors$")
        yield diagnosis.judge_scripts({name: sum(count for stat, count in scripts.items() if f".{name}." in stat) for name in _SCRIPTS})
        loaded = client.get("/certs").json().get("certificates", [])
    yield diagnosis.judge_certificates(
        {
            Path(one.get("path", "<inline>")).name: int(one["days_until_expiration"])
            for certificate in loaded for kind in ("cert_chain", "ca_cert") for one in certificate.get(kind, [])
        }
    )  # fmt: skip


def _stats(client: httpx.Client, pattern: str) -> dict[str, int]:
    stats = client.get("/stats", params={"filter": pattern, "format": "json"}).json()["stats"]
    return {stat["name"]: int(stat["value"]) for stat in stats if "value" in stat}


def _key_sets(home: Path) -> Iterator[Remark]:
    """Fetched from here, where extauth runs too."""
    path = home / IDENTITY_PATH
    failing = {}
    for issuer in load_identity(path).issuers if path.exists() else ():
        if isinstance(issuer, JwtIssuer):
            try:
                fetch_document(issuer.jwks_url)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, Unusable) as exc:
                failing[issuer.name] = type(exc).__name__
    yield diagnosis.judge_key_sets(failing)


def _postgres(url: str) -> Iterator[Remark]:
    with psycopg.connect(
        url, connect_timeout=int(_SECONDS), autocommit=True, row_factory=tuple_row, application_name="doctor",
        options="-c statement_timeout=10000 -c timezone=UTC -c default_transaction_read_only=on",
    ) as connection:  # fmt: skip
        began = datetime.now(UTC)
        [(theirs, version)] = connection.execute("select clock_timestamp(), current_setting('server_version')").fetchall()
        ended = datetime.now(UTC)
        yield diagnosis.fine("Postgres", f"{version}.")
        yield diagnosis.judge_clock("clock of Postgres", (theirs - (began + (ended - began) / 2)).total_seconds())
        [(schema,)] = connection.execute("select version_num from alembic_version").fetchall()
        yield diagnosis.judge_version("schema", schema, newest_version())
        yield diagnosis.judge_lag(dict(connection.execute(_LAGS).fetchall()))
        [(exceptions, defects)] = connection.execute(_DIFFERENCES).fetchall()
        drifting = [model for (model,) in connection.execute(_DRIFTING).fetchall()]
        yield diagnosis.judge_differences(exceptions=exceptions, drifting=drifting, defects=defects)
        [(last,)] = connection.execute(_LAST_PARTITION).fetchall()
        until = datetime.strptime(last, "%Y%m%d").replace(tzinfo=UTC).date() if last else ended.date()
        yield diagnosis.judge_partitions((until - ended.date()).days)
        [(count, oldest)] = connection.execute(_OPEN).fetchall()
        yield diagnosis.judge_open(oldest, count=count, now=ended)
        [(active,)] = connection.execute(_ACTIVE).fetchall()
        expiring = connection.execute(_EXPIRING, (diagnosis.KEY_EXPIRES_WITHIN,)).fetchall()
        yield diagnosis.judge_keys([key_id for (key_id,) in expiring], active=active)
        yield diagnosis.judge_webhooks([webhook_id for (webhook_id,) in connection.execute(_WEBHOOKS).fetchall()])


def _store(url: str) -> Iterator[Remark]:
    with redis.Redis.from_url(url, socket_connect_timeout=_SECONDS, socket_timeout=_SECONDS) as client:
        began = time.time()
        seconds, micros = client.time()
        ended = time.time()
        yield diagnosis.judge_clock("clock of the store", seconds + micros / 1e6 - (began + ended) / 2)
        memory: Any = client.info("memory")
        yield diagnosis.judge_store(
            policy=memory["maxmemory_policy"], used_bytes=memory["used_memory"], max_bytes=memory["maxmemory"]
        )
