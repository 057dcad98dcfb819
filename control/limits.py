# SPDX-License-Identifier: Apache-2.0
"""
Limits: set, show, explain, delete. A change acts within a second.

A scope (tenant, and perhaps project, key, model) has any number of limits, each under the name
by which people set it: `requests_per_minute`, `monthly_budget`, `concurrency`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final, Literal

from chassis.errors import Conflict, Invalid, NotFound
from chassis.models import ModelCatalogue
from control import audit, keys, projects, shares, tenants
from control.act import Act
from control.store import Connection, Store

REQUESTS_MAX: Final = 1_000_000_000
TOKENS_MAX: Final = 1_000_000_000_000
#: Beyond this a double, in which the counter store computes, holds nano-units no longer exactly.
MONEY_MAX: Final = 9_000_000
CONCURRENCY_MAX: Final = 1_000_000
CURRENCY_DEFAULT: Final = "USD"
_NANO: Final = 1_000_000_000

Effect = Literal["refuse", "count", "shadow"]
OnStoreError = Literal["local", "allow", "deny"]

_BUCKET_UNITS: Final = ("requests", "tokens", "input_tokens", "output_tokens", "cached_tokens")
_BUCKET_PERIODS: Final = ("second", "minute", "hour", "day")
#: Name of a number in the API → (unit, period).
NUMBERS: Final[Mapping[str, tuple[str, str]]] = {
    **{f"{unit}_per_{period}": (unit, period) for unit in _BUCKET_UNITS for period in _BUCKET_PERIODS},
    "concurrency": ("concurrency", "now"),
    "daily_requests": ("requests", "calendar_day"),
    "monthly_requests": ("requests", "calendar_month"),
    "daily_tokens": ("tokens", "calendar_day"),
    "monthly_tokens": ("tokens", "calendar_month"),
}
#: Amounts of money, as decimal text.
BUDGETS: Final[Mapping[str, tuple[str, str]]] = {
    "daily_budget": ("money", "calendar_day"),
    "monthly_budget": ("money", "calendar_month"),
    "prepaid_budget": ("money", "ever"),
}
_PLACES: Final = {**NUMBERS, **BUDGETS}
_NAMES: Final = {place: name for name, place in _PLACES.items()}

_SCOPE = "tenant_id, project_id, key_id, model"
_COLUMNS = f"limit_id, {_SCOPE}, unit, period, amount, burst, effect, on_store_error, currency, updated_at"
_IN_SCOPE = (
    f"({_SCOPE}) is not distinct from (%(tenant_id)s, %(project_id)s::text, %(key_id)s::text, %(model)s::text)"
)
#: A tenant with credits is never without this one: what it has not paid for would pass.
_IS_OF_CREDITS = (
    "unit = 'money' and period = 'ever' and num_nonnulls(project_id, key_id, model) = 0 "
    "and exists (select from credit_book b where b.tenant_id = rate_limit.tenant_id)"
)
#: Budgets in a currency that nothing they bind is charged in, now or later.
_WITHOUT_PRICE = """
where unit = 'money' and not exists (
    select from rate_card c
    where c.currency = rate_limit.currency and (c.tenant_id is null or c.tenant_id = rate_limit.tenant_id)
      and (rate_limit.model is null or c.model = rate_limit.model) and coalesce(upper(c.effective), 'infinity') > %(now)s
)
"""
_UPSERT = f"""
insert into rate_limit ({_SCOPE}, unit, period, amount, burst, effect, on_store_error, currency, updated_at)
values (%(tenant_id)s, %(project_id)s, %(key_id)s, %(model)s, %(unit)s, %(period)s, %(amount)s, %(burst)s,
        coalesce(%(effect)s, 'refuse'), coalesce(%(on_store_error)s, 'local'), %(currency)s, %(now)s)
on conflict ({_SCOPE}, unit, period) do update set
    amount         = excluded.amount,
    burst          = coalesce(%(burst)s, rate_limit.burst),
    effect         = coalesce(%(effect)s, rate_limit.effect),
    on_store_error = coalesce(%(on_store_error)s, rate_limit.on_store_error),
    currency       = excluded.currency,
    updated_at     = excluded.updated_at
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What a limit binds; None means any."""

    tenant: str
    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How the limits that are being set behave; None leaves what is there, or the default."""

    burst: int | None = None
    effect: Effect | None = None
    on_store_error: OnStoreError | None = None
    currency: str | None = None


def put(
    store: Store,
    act: Act,
    scope: Scope,
    changes: Mapping[str, int | str | None],
    *,
    manner: Manner = Manner(),
    catalogue: ModelCatalogue,
) -> dict[str, Any]:
    """
    Set the numbers and budgets in *changes* by name; None removes one, those not in it stay.

    A scope without any would be no limit: `Invalid`. Answers with the scope's limits.
    """
    amounts = _amounts(changes)
    _refuse_bad_manner(changes, manner)
    if scope.model is not None:
        keys.refuse_unknown_models([scope.model], catalogue)
    with store.transaction(act.scope) as connection:
        place = _resolved(connection, scope)
        # Two writers of one tenant's limits take turns, so that what is checked is what is written.
        connection.execute("select from tenant where tenant_id = %(tenant_id)s for update", place)
        before = _rows(connection, f"where {_IN_SCOPE}", place)
        if "prepaid_budget" in changes and scope == Scope(tenant=scope.tenant):
            _refuse_if_credits(connection, place["tenant_id"])
        for name, amount in amounts.items():
            unit, period = _PLACES[name]
            row = {**place, "unit": unit, "period": period}
            if amount is None:
                connection.execute(
                    f"delete from rate_limit where {_IN_SCOPE} and unit = %(unit)s and period = %(period)s", row
                )
                continue
            connection.execute(
                _UPSERT,
                {
                    **row, "amount": amount, "effect": manner.effect, "on_store_error": manner.on_store_error, "now": act.now,
                    "burst": manner.burst if period in _BUCKET_PERIODS else None,
                    "currency": (manner.currency or CURRENCY_DEFAULT) if unit == "money" else None,
                },
            )  # fmt: skip
        kept = _rows(connection, f"where {_IN_SCOPE}", place)
        if not kept:
            raise Invalid("That would leave no limit.", mend="Use `peaje limits delete`.")
        for problem in _problems(_rows(connection, "where tenant_id = %(tenant_id)s", place)):
            if problem.limit_id in {row["limit_id"] for row in kept} and problem.name in changes:
                raise Invalid(problem.what, mend=problem.mend)
        after = _document(kept)
        audit.append(
            connection, act, "limit.set", _subject(place), tenant_id=place["tenant_id"],
            before=_document(before) if before else None, after=after,
        )  # fmt: skip
    return after


def list_all(store: Store, act: Act, tenant: str | None) -> list[dict[str, Any]]:
    """Limits of a tenant, or of all in scope if the caller says None: one entry per scope."""
    with store.transaction(act.scope) as connection:
        tenant_id = tenants.resolve_id(connection, tenant)
        rows = _rows(connection, "where %(it)s::text is null or tenant_id = %(it)s", {"it": tenant_id})
    scopes: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        scopes.setdefault(_scope_of(row), []).append(row)
    return [_document(rows) for rows in scopes.values()]


def delete(store: Store, act: Act, scope: Scope) -> dict[str, Any]:
    """Remove all limits of exactly *scope*, but for a prepaid budget that follows the tenant's credits; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        place = _resolved(connection, scope)
        gone = connection.execute(
            f"delete from rate_limit where {_IN_SCOPE} and not ({_IS_OF_CREDITS}) returning {_COLUMNS}", place
        ).fetchall()
        if not gone:
            if _rows(connection, f"where {_IN_SCOPE}", place):
                _refuse_if_credits(connection, place["tenant_id"])
            raise NotFound("There is no such limit.", mend="See `peaje limits show`.")
        before = _document(gone)
        audit.append(
            connection, act, "limit.deleted", _subject(place), tenant_id=place["tenant_id"], before=before
        )
    return before


def explain(
    store: Store, act: Act, *, tenant: str, key_id: str | None, model: str | None
) -> list[dict[str, Any]]:
    """Each limit that a request of this tenant, key and model would meet, in words; null means any."""
    with store.transaction(act.scope) as connection:
        place = _resolved(connection, Scope(tenant=tenant, key_id=key_id, model=model))
        project_id = keys.resolve(connection, key_id)["project_id"] if key_id is not None else None
        rows = _rows(connection, "where tenant_id = %(tenant_id)s", place)
        shared = shares.explain(connection, place["tenant_id"], model)
    named = {"project_id": project_id, "key_id": key_id, "model": model}
    return [
        {
            "limit_id": row["limit_id"], "name": _name(row), "amount": _shown(row), "binds": _binds(row),
            "when_reached": _WHEN_REACHED[row["effect"]], "when_store_is_away": row["on_store_error"],
        }
        for row in rows
        if all(value is None or row[column] in (None, value) for column, value in named.items())
    ] + shared  # fmt: skip


def findings(store: Store, act: Act, catalogue: ModelCatalogue) -> list[str]:
    """Limits that can never act: on what is not served, over or without a price, or in another limit's shadow."""
    with store.transaction(act.scope) as connection:
        rows = _rows(connection, "", {})
        unpriced = _rows(connection, _WITHOUT_PRICE, {"now": act.now})
        found = shares.findings(connection, catalogue)
        revoked = {
            row["key_id"]
            for row in connection.execute("select key_id from api_key where revoked_at is not null").fetchall()
        }
    for row in rows:
        if row["model"] is not None and row["model"] not in catalogue.served:
            found.append(f"A limit of tenant {row['tenant_id']} is on model {row['model']!r}, which is not served.")
        if row["key_id"] in revoked:
            found.append(f"A limit of tenant {row['tenant_id']} is on key {row['key_id']}, which is revoked.")
    found += [
        f"{_name(row)} of tenant {row['tenant_id']} is in {row['currency']}, and no price that charges it is: nothing uses it up. "
        "See `peaje prices list`."
        for row in unpriced
    ]
    return found + [f"{problem.what} {problem.mend}" for problem in _problems(rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    limit_id: int
    name: str
    what: str
    mend: str


_WHEN_REACHED: Final = {"refuse": "refuses", "count": "lets pass and counts on", "shadow": "lets pass, only logs"}
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}


def _problems(rows: list[dict[str, Any]]) -> list[_Problem]:
    """Limits that another one, as wide or wider and never looser, makes pointless."""
    found = []
    for row in rows:
        for other in rows:
            if other is not row and _shadows(other, row):
                found.append(
                    _Problem(
                        limit_id=row["limit_id"], name=_name(row),
                        what=f"{_name(row)} of {_shown(row)} for this {_binds(row)} can never bind: "
                        f"{_name(other)} of {_shown(other)} for the {_binds(other)} is always reached first.",
                        mend="Lower it, or leave it out.",
                    )
                )  # fmt: skip
                break
    return found


def _shadows(wide: dict[str, Any], narrow: dict[str, Any]) -> bool:
    if wide["effect"] != "refuse" or narrow["effect"] == "shadow":
        return False
    if wide["tenant_id"] != narrow["tenant_id"] or wide["unit"] != narrow["unit"] or wide["currency"] != narrow["currency"]:
        return False
    if any(wide[column] not in (None, narrow[column]) for column in ("project_id", "key_id", "model")):
        return False
    if wide["period"] == narrow["period"]:
        # Of one scope there is only one; a wider one that allows no more is always reached no later.
        return wide["amount"] <= narrow["amount"] and _burst(wide) <= _burst(narrow)
    if wide["period"] in _SECONDS and narrow["period"] in _SECONDS:
        # In each window the wide bucket lets out at most its burst and what drains in it. The narrow
        # one has room for that at any moment if it drains no slower and holds no less.
        drains_no_slower = narrow["amount"] * _SECONDS[wide["period"]] >= wide["amount"] * _SECONDS[narrow["period"]]
        return drains_no_slower and _burst(narrow) >= _burst(wide)
    month_and_day = (wide["period"], narrow["period"]) == ("calendar_month", "calendar_day")
    return month_and_day and bool(wide["amount"] <= narrow["amount"])


def _burst(row: dict[str, Any]) -> int:
    return int(row["amount"] if row["burst"] is None else row["burst"])


def _rows(connection: Connection, where: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    query = (
        f"select {_COLUMNS} from rate_limit {where} order by tenant_id, project_id nulls first, key_id nulls first, "
        "model nulls first, limit_id"
    )
    return connection.execute(query, parameters).fetchall()


def _document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    document: dict[str, Any] = {
        "tenant_id": first["tenant_id"], "project_id": first["project_id"], "key_id": first["key_id"],
        "model": first["model"], "requests_per_minute": None, "tokens_per_minute": None,
    }  # fmt: skip
    document |= {_name(row): _shown(row) for row in rows}
    document["updated_at"] = max(row["updated_at"] for row in rows)
    document["limits"] = {
        _name(row): {
            "limit_id": row["limit_id"], "amount": _shown(row), "burst": row["burst"], "effect": row["effect"],
            "on_store_error": row["on_store_error"], "currency": row["currency"],
        }
        for row in rows
    }  # fmt: skip
    return document


def _name(row: dict[str, Any]) -> str:
    name: str = _NAMES[row["unit"], row["period"]]
    return name


def _shown(row: dict[str, Any]) -> int | str:
    if row["unit"] != "money":
        return int(row["amount"])
    amount = Decimal(row["amount"]) / _NANO
    return f"{amount:f}" if amount != amount.quantize(Decimal("0.01")) else f"{amount:.2f}"


def _refuse_if_credits(connection: Connection, tenant_id: str) -> None:
    if connection.execute("select from credit_book where tenant_id = %s", (tenant_id,)).fetchone() is not None:
        raise Conflict(f"The prepaid budget of {tenant_id!r} follows its credits.", mend="Use `peaje credits grant`.")


def _binds(row: dict[str, Any]) -> str:
    named = (("project", row["project_id"]), ("key", row["key_id"]), ("model", row["model"]))
    return " and ".join(f"{word} {value}" for word, value in named if value is not None) or "tenant"


def _scope_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[column] for column in ("tenant_id", "project_id", "key_id", "model"))


def _subject(place: Mapping[str, Any]) -> str:
    """The scope, as the audit log names it."""
    named = (("project", place["project_id"]), ("key", place["key_id"]), ("model", place["model"]))
    return " ".join([place["tenant_id"], *(f"{word}={value}" for word, value in named if value is not None)])


def _resolved(connection: Connection, scope: Scope) -> dict[str, Any]:
    tenant_id = tenants.resolve(connection, scope.tenant)["tenant_id"]
    if scope.project_id is not None:
        projects.resolve(connection, tenant_id, scope.project_id)
    if scope.key_id is not None:
        key = keys.resolve(connection, scope.key_id)
        if key["tenant_id"] != tenant_id:
            raise keys.no_such(scope.key_id)
        if scope.project_id not in (None, key["project_id"]):
            raise Invalid(
                f"Key {scope.key_id!r} is of project {key['project_id']!r}: this limit could never bind.",
                mend="Leave the project out.",
            )
    return {"tenant_id": tenant_id, "project_id": scope.project_id, "key_id": scope.key_id, "model": scope.model}


def _amounts(changes: Mapping[str, int | str | None]) -> dict[str, int | None]:
    if not changes:
        raise Invalid("No limit is given.", mend="Give --rpm, --tpm, --concurrency, --monthly-budget, or another.")
    return {name: None if value is None else _amount(name, value) for name, value in changes.items()}


def _amount(name: str, value: int | str) -> int:
    if name in BUDGETS:
        return _nano(name, value)
    if name not in NUMBERS:
        raise Invalid(f"There is no limit called {name!r}.", mend=f"Known: {', '.join(_PLACES)}.")
    unit, _ = NUMBERS[name]
    most = {"requests": REQUESTS_MAX, "concurrency": CONCURRENCY_MAX}.get(unit, TOKENS_MAX)
    if not isinstance(value, int) or not 0 <= value <= most:
        raise Invalid(f"{name} is {value}; it must be a whole number from 0 to {most}.", mend="0 stops all requests.")
    return value


def _nano(name: str, value: int | str) -> int:
    try:
        nano = Decimal(value) * _NANO
    except (InvalidOperation, ValueError) as exc:
        raise Invalid(f"{name} is {str(value)[:20]!r}.", mend="Write an amount of money such as 100.00.") from exc
    if not nano.is_finite() or nano != nano.to_integral_value() or not 0 <= nano <= MONEY_MAX * _NANO:
        raise Invalid(
            f"{name} is {str(value)[:40]}; it must be from 0 to {MONEY_MAX} with at most nine decimals.",
            mend="Write an amount of money such as 100.00.",
        )
    return int(nano)


def _refuse_bad_manner(changes: Mapping[str, int | str | None], manner: Manner) -> None:
    if manner.burst is not None:
        if not 0 < manner.burst <= TOKENS_MAX:
            raise Invalid(f"burst is {manner.burst}; it must be from 1 to {TOKENS_MAX}.")
        buckets = [name for name, value in changes.items() if value is not None and "_per_" in name]
        if len(buckets) != 1:
            raise Invalid("A burst belongs to one limit per second, minute, hour or day.", mend="Set that one alone.")
    if manner.currency is not None and not any(name in BUDGETS for name in changes):
        raise Invalid("A currency belongs to a budget.", mend="Give --monthly-budget, --daily-budget or --prepaid.")
    if manner.currency is not None and not (len(manner.currency) == 3 and manner.currency.isascii() and manner.currency.isupper()):
        raise Invalid("A currency has three capital letters, such as USD.")
