# SPDX-License-Identifier: Apache-2.0
"""Compare what the models document thinks that a model costs with the prices in force. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from chassis.served import Model, PriceHint


def findings(models: Iterable[Model], prices: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each hint that no price for everybody follows; *prices* are those in force."""
    in_force = {str(price["model"]): price for price in prices if price.get("tenant") is None}
    found = []
    for model in models:
        hint = model.price_hint
        if hint is None:
            continue
        price = in_force.get(model.name)
        if price is None:
            found.append(f"Model {model.name!r} has a price hint and no price. Set one: ./peaje prices set {_options(model.name, hint)}.")
        elif _said(price) != _hinted(hint):
            found.append(f"Model {model.name!r}: the price in force is not its price hint ({_options(model.name, hint)}). Mend one of them.")
    return found


def _hinted(hint: PriceHint) -> tuple[Decimal, Decimal, Decimal, str]:
    return hint.input, hint.output, hint.input if hint.cached is None else hint.cached, hint.currency


def _said(price: Mapping[str, Any]) -> tuple[Decimal, Decimal, Decimal, str]:
    return Decimal(price["input"]), Decimal(price["output"]), Decimal(price["cached"]), str(price["currency"])


def _options(name: str, hint: PriceHint) -> str:
    cached = "" if hint.cached is None else f" --cached {hint.cached}"
    return f"--model {name} --input {hint.input} --output {hint.output}{cached} --currency {hint.currency}"
