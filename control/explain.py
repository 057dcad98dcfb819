# SPDX-License-Identifier: Apache-2.0
"""What became of a request, in plain words."""

from __future__ import annotations

from typing import Any

from chassis.errors import NotFound
from control.act import Act
from control.store import Store

#: As the billing view has it; the view itself would read past row-level security.
_USAGE = """
select request_id, tenant_id as tenant, project_id as project, key_id, model, dialect, started_at, ended_at,
       status, outcome, input_tokens, output_tokens, cached_tokens, reasoning_tokens, basis,
       currency, amount_nano, rate_card_id, meter, quantity, tier_above_tokens, anomaly, upstream, streamed
from usage_event where request_id = %s
"""

_BASIS = {
    "reported": "the engine's closing usage",
    "running": "the engine's last running usage before the stream ended",
    "counted": "what was delivered: frames, a token each, or what else the request is metered by",
    "checkpoint": "what the journal last heard before Envoy died",
    "estimated": "an estimate, because the engine said nothing",
    "none": "nothing: it failed before a token, or has none",
}


def explain(store: Store, act: Act, request_id: str) -> dict[str, Any]:
    """`state` (billed, in_flight, answered or refused), `explanation`, and what is on record; raises `NotFound`."""
    with store.transaction(act.scope) as connection:
        row = connection.execute(_USAGE, (request_id,)).fetchone()
        if row is not None:
            return {"request_id": request_id, "state": "billed", "explanation": _billed(row), "usage": row}
        open_ = connection.execute(
            "select started_at, seen_at, entry -> 'identity' ->> 'tenant' as tenant, "
            "entry -> 'request' ->> 'model' as model, entry -> 'usage' as usage from open_exchange where request_id = %s",
            (request_id,),
        ).fetchone()
        if open_ is not None:
            said = f"Admitted for tenant {open_['tenant']} on model {open_['model']}; it has not ended yet."
            return {"request_id": request_id, "state": "in_flight", "explanation": said, "exchange": open_}
        refused = connection.execute(
            "select started_at, tenant_id as tenant, key_id, model, status, details from refusal where request_id = %s",
            (request_id,),
        ).fetchone()
    if refused is not None:
        if 200 <= refused["status"] < 400:
            said = f"A list of models, which the gateway answered by itself for tenant {refused['tenant']}: no limit counts it; not billed."
            return {"request_id": request_id, "state": "answered", "explanation": said, "answer": refused}
        said = f"Refused with {refused['status']} ({refused['details']}) for tenant {refused['tenant']}; not billed."
        return {"request_id": request_id, "state": "refused", "explanation": said, "refusal": refused}
    raise NotFound(
        f"Nothing is known of request {request_id!r}.",
        mend="It ended less than a second ago, was refused before anybody was recognised, or never came.",
    )


_OUTCOME = {
    "budget_exhausted": "was ended by the gateway where its quota or budget was used up (budget_exhausted)",
}


def _billed(row: dict[str, Any]) -> str:
    metered = f", {row['quantity']} {row['meter']}" if row["meter"] else ""
    tier = row["tier_above_tokens"]
    priced = "" if tier is None else f", at the prices of requests with more than {tier} input tokens"
    ended = _OUTCOME.get(row["outcome"], f"ended {row['outcome']}")
    return (
        f"Admitted for tenant {row['tenant']} on model {row['model'] or '(none)'}, {ended} with status "
        f"{row['status']}; billed {row['input_tokens']} input and {row['output_tokens']} output tokens{metered} by "
        f"{_BASIS[row['basis']]}{priced}."
    )
