# SPDX-License-Identifier: Apache-2.0
"""
Judge what was seen of a running installation: what is fine, what wants a look, what is broken, and what mends it.

Each judgement is of one thing and takes it as a value; what could not be looked at is `None` and said so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

#: Seconds between two clocks. Beyond the first, reset times mislead callers; beyond the second, bills are dated wrong.
CLOCK_WARN_SECONDS: Final = 2.0
CLOCK_FAULT_SECONDS: Final = 60.0
#: Seconds since a journal was read to its end: the promise, and when rows wait for long.
LAG_WARN_SECONDS: Final = 5.0
LAG_FAULT_SECONDS: Final = 60.0
#: Days of partitions that are there already; the collector makes two weeks.
PARTITIONS_WARN_DAYS: Final = 7
PARTITIONS_FAULT_DAYS: Final = 1
#: Percent, as the collector acts on them.
DISK_WARN_PERCENT: Final = 80.0
DISK_FAULT_PERCENT: Final = 95.0
CERTIFICATE_WARN_DAYS: Final = 14
KEY_EXPIRES_WITHIN: Final = timedelta(days=7)
#: An exchange that is under way longer is a stream that nobody reads, or one whose Envoy nobody knows.
OPEN_WARN: Final = timedelta(hours=1)


class Level(StrEnum):
    """How bad it is."""

    FINE = "fine"
    LOOK = "look"
    FAULT = "fault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One judgement."""

    about: str
    level: Level
    says: str
    #: What to do; empty where nothing is to be done.
    mend: str = ""


def fine(about: str, says: str) -> Remark:
    """All is well."""
    return Remark(about=about, level=Level.FINE, says=says)


def judge_parts(states: Mapping[str, str], restarts: Mapping[str, int]) -> Remark:
    """Every process runs, and none had to be started again."""
    broken = sorted(name for name, state in states.items() if state not in ("ready", "done"))
    if broken:
        return Remark(
            about="parts", level=Level.FAULT, says=f"not running: {', '.join(f'{name} ({states[name]})' for name in broken)}.",
            mend="Read the end of their logs (./peaje status names them); ./peaje down and up start all of it anew.",
        )
    again = {name: count for name, count in sorted(restarts.items()) if count}
    if again:
        return Remark(
            about="parts", level=Level.LOOK, says=f"started again: {', '.join(f'{name} {count} times' for name, count in again.items())}.",
            mend="Their logs say why they ended.",
        )
    return fine("parts", f"{len(states)} run, none was started again.")


def judge_services(healthy: Mapping[str, int]) -> Remark:
    """Envoy sees a healthy process of each service that it asks."""
    gone = sorted(name for name, count in healthy.items() if count == 0)
    if gone:
        return Remark(
            about="services", level=Level.FAULT, says=f"Envoy has no healthy {', '.join(gone)}.",
            mend="Requests are refused (503), or pass without metering. See ./peaje status and that part's log.",
        )
    return fine("services", "Envoy sees " + ", ".join(f"{name} {count}" for name, count in sorted(healthy.items())) + ".")


def judge_scripts(errors: Mapping[str, int]) -> Remark:
    """How often each script failed since Envoy was started: never."""
    failed = {name: count for name, count in sorted(errors.items()) if count}
    if not failed:
        return fine("scripts", "none has failed.")
    return Remark(
        about="scripts", level=Level.FAULT, says=", ".join(f"{name}.lua failed {count} times" for name, count in failed.items()) + ".",
        mend="log/envoy.log has file and line. Put the release's scripts back into envoy/ and start again.",
    )


def judge_key_sets(failing: Mapping[str, str]) -> Remark:
    """Issuers of identity.yaml whose keys cannot be fetched, with the kind of failure."""
    if not failing:
        return fine("key sets", "every issuer's can be fetched.")
    return Remark(
        about="key sets", level=Level.FAULT, says="not to be had: " + ", ".join(f"{name} ({kind})" for name, kind in sorted(failing.items())) + ".",
        mend="Its tokens are taken for 24 h after the last good set, then refused. Is the issuer up, is jwks_url right?",
    )


def judge_version(about: str, found: str, expected: str) -> Remark:
    """The schema is the one that this code knows."""
    if found == expected:
        return fine(about, f"{found}.")
    return Remark(
        about=about, level=Level.FAULT, says=f"{found}, and this Peaje knows {expected}.",
        mend="Run the newer Peaje, or `python -m chassis.schema` to bring the schema up.",
    )


def judge_clock(about: str, ahead_seconds: float) -> Remark:
    """A store's clock against this machine's; *ahead_seconds* less than 0 is behind."""
    apart = abs(ahead_seconds)
    level = Level.FAULT if apart > CLOCK_FAULT_SECONDS else Level.LOOK if apart > CLOCK_WARN_SECONDS else Level.FINE
    says = f"{apart:.3f} s {'ahead' if ahead_seconds >= 0 else 'behind'}."
    return Remark(about=about, level=level, says=says, mend="" if level is Level.FINE else "Set both machines' clocks by NTP.")


def judge_lag(lags: Mapping[str, float]) -> Remark:
    """Seconds since each journal was read to its end."""
    if not lags:
        return Remark(about="journals", level=Level.FAULT, says="nobody has read one yet.", mend="See the collector's log.")
    name, worst = max(lags.items(), key=lambda item: item[1])
    level = Level.FAULT if worst > LAG_FAULT_SECONDS else Level.LOOK if worst > LAG_WARN_SECONDS else Level.FINE
    mend = "" if level is Level.FINE else "Rows wait on disk, none is lost. Is Postgres there, and fast? See the collector's log."
    return Remark(about="journals", level=level, says=f"{name} was read to its end {worst:.1f} s ago.", mend=mend)


def judge_differences(*, exceptions: int, drifting: Sequence[str], defects: int) -> Remark:
    """What two records say differently: nothing, or somebody must look. *defects* are of the last day."""
    found, mends = [], []
    if exceptions:
        found.append(f"{exceptions} exceptions are open (./peaje reconcile list --state open)")
        mends.append("A month with an open exception is not closed: explain it, or sign.")
    if drifting:
        found.append(f"engine and ledger differ in {', '.join(drifting)} (select * from conservation_check)")
        mends.append("Does anybody reach the model servers past the gateway?")
    if defects:
        found.append(f"{defects} runs of bytes were no record (select * from journal_defect; ./peaje journal verify)")
        mends.append("Look at the journal's disk, and at who writes there; all else was read. After a day this is told no longer.")
    if not found:
        return fine("ledger", "no exception is open, nothing drifts, no journal is damaged.")
    return Remark(about="ledger", level=Level.FAULT, says="; ".join(found) + ".", mend=" ".join(mends))


def judge_partitions(days_ahead: int) -> Remark:
    """Days after today for which `usage_event` has a partition."""
    if days_ahead >= PARTITIONS_WARN_DAYS:
        return fine("partitions", f"{days_ahead} days ahead.")
    level = Level.FAULT if days_ahead < PARTITIONS_FAULT_DAYS else Level.LOOK
    return Remark(
        about="partitions", level=level, says=f"{days_ahead} days ahead.",
        mend="No row is lost: they go to usage_event_default. The collector makes partitions each hour: see its log.",
    )


def judge_disk(about: str, used_percent: float) -> Remark:
    """The disk that holds the journal, or the state."""
    says = f"{used_percent:.0f} % used."
    if used_percent < DISK_WARN_PERCENT:
        return fine(about, says)
    if used_percent < DISK_FAULT_PERCENT:
        return Remark(about=about, level=Level.LOOK, says=says, mend="Make room: at 95 % new requests are refused.")
    return Remark(about=about, level=Level.FAULT, says=says, mend="Make room below 80 %: the road opens by itself then.")


def judge_certificates(days_left: Mapping[str, int]) -> Remark:
    """Days until each certificate that Envoy has loaded ends."""
    if not days_left:
        return fine("certificates", "Envoy has none.")
    name, days = min(days_left.items(), key=lambda item: item[1])
    if days > CERTIFICATE_WARN_DAYS:
        return fine("certificates", f"the first ends in {days} days.")
    return Remark(
        about="certificates", level=Level.FAULT if days <= 0 else Level.LOOK, says=f"{name} ends in {days} days.",
        mend="Put a new one in its place; Envoy takes files that tls.yaml names by a watched directory at once.",
    )


def judge_keys(expiring: Sequence[str], *, active: int) -> Remark:
    """Keys without a successor that end within `KEY_EXPIRES_WITHIN`; *expiring* are their ids."""
    if not expiring:
        return fine("keys", f"{active} are active, none ends within a week unrotated.")
    shown = ", ".join(expiring[:5]) + (f" and {len(expiring) - 5} more" if len(expiring) > 5 else "")
    return Remark(about="keys", level=Level.LOOK, says=f"{shown} end within a week.", mend="Tell their owners; ./peaje keys rotate ID.")


def judge_limits(findings: Sequence[str]) -> Remark:
    """Limits that can never act, as `peaje check` words them."""
    if not findings:
        return fine("limits", "each can act.")
    more = f" And {len(findings) - 1} more." if len(findings) > 1 else ""
    return Remark(about="limits", level=Level.LOOK, says=findings[0] + more, mend="./peaje check names all of them.")


def judge_open(oldest_started_at: datetime | None, *, count: int, now: datetime) -> Remark:
    """Exchanges that are under way."""
    if oldest_started_at is None or now - oldest_started_at <= OPEN_WARN:
        return fine("exchanges", f"{count} are under way.")
    return Remark(
        about="exchanges", level=Level.LOOK, says=f"{count} are under way, the oldest since {oldest_started_at:%Y-%m-%d %H:%M} UTC.",
        mend="A stream of an hour is one that nobody reads, or its Envoy's journal is not read: select * from open_exchange.",
    )


def judge_store(*, policy: str, used_bytes: int, max_bytes: int) -> Remark:
    """The counter store's memory: it may refuse, and may never forget by itself."""
    if policy != "noeviction":
        return Remark(
            about="store", level=Level.FAULT, says=f"maxmemory-policy is {policy}: it may forget what is held.",
            mend="Set maxmemory-policy to noeviction.",
        )
    if max_bytes and used_bytes > 0.8 * max_bytes:
        return Remark(
            about="store", level=Level.LOOK, says=f"{100 * used_bytes // max_bytes} % of its memory is used.",
            mend="Full, it counts as away and limits follow their mode: give it more memory.",
        )
    return fine("store", f"{used_bytes // 1024} KiB used, never evicts.")


def judge_webhooks(failed: Sequence[str]) -> Remark:
    """Webhooks that are given up; *failed* are their ids."""
    if not failed:
        return fine("webhooks", "none is given up.")
    return Remark(
        about="webhooks", level=Level.LOOK, says=f"{', '.join(failed[:5])} failed for three days and are given up.",
        mend="Mend the receiver, then ./peaje webhooks resume ID.",
    )


def unknown(about: str, reason: str, *, mend: str) -> Remark:
    """What could not be looked at."""
    return Remark(about=about, level=Level.FAULT, says=reason, mend=mend)
