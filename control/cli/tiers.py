# SPDX-License-Identifier: Apache-2.0
"""How a tier of a price is written in one option, and shown in one cell."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import typer

from chassis.errors import Invalid

Tiers = Annotated[
    list[str] | None,
    typer.Option(
        "--tier", show_default=False,
        help="ABOVE:input=PRICE,output=PRICE[,cached=PRICE][,reasoning=PRICE]: prices of requests with more than ABOVE input "
        "tokens, such as 200000:input=2.50,output=15. Once for each tier.",
    ),
]
_PRICES: Final = ("input", "output", "cached", "reasoning")
_DEMANDED: Final = frozenset(("input", "output"))
_ABOVE: Final = re.compile(r"[0-9]{1,9}", re.ASCII)


def tier_bodies(texts: list[str] | None) -> list[dict[str, Any]]:
    """
    Each tier as the API takes it; raises `Invalid`.

    >>> tier_bodies(["200000:input=2.50,output=15"])
    [{'above_tokens': 200000, 'input': '2.50', 'output': '15'}]
    """
    return [_body(text) for text in texts or ()]


def tiers_cell(tiers: list[dict[str, Any]]) -> str:
    """
    Tiers as they would be written to set them again.

    >>> tiers_cell([{"above_tokens": 7, "input": "1.00", "output": "2.00", "cached": "1.00", "reasoning": "2.00"}])
    '7:input=1.00,output=2.00,cached=1.00,reasoning=2.00'
    """
    return " ".join(f"{tier['above_tokens']}:" + ",".join(f"{name}={tier[name]}" for name in _PRICES) for tier in tiers)


def _body(text: str) -> dict[str, Any]:
    above, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    names = [name for name, _, _ in pairs]
    is_whole = all(equals for _, equals, _ in pairs) and set(names) >= _DEMANDED and len(set(names)) == len(names)
    if not _ABOVE.fullmatch(above) or not is_whole or not set(names) <= set(_PRICES):
        raise Invalid(f"Tier {text!r} is not usable.", mend="Write --tier 200000:input=2.50,output=15, each name once.")
    return {"above_tokens": int(above), **{name: price for name, _, price in pairs}}
