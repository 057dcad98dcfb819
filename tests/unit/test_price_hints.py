# SPDX-License-Identifier: Apache-2.0
"""What `check` says of price hints."""

from __future__ import annotations

from typing import Any

import pytest

from chassis.models import ModelCatalogue
from control.price_hints import findings


def price(**fields: Any) -> dict[str, Any]:
    """A price in force, for everybody."""
    return {"model": "m", "tenant": None, "input": "0.15", "output": "0.6", "cached": "0.15", "currency": "USD"} | fields


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        ([price()], []),
        ([price(output="0.600")], []),
        ([price(output="0.61")], ["is not its price hint"]),
        ([price(cached="0.075")], ["is not its price hint"]),
        ([price(currency="EUR")], ["is not its price hint"]),
        ([price(tenant="acme")], ["./peaje prices set --model m --input 0.15 --output 0.60 --currency USD."]),
        ([], ["has a price hint and no price"]),
    ],
)
def test_a_hint_that_no_price_follows_is_told(prices: list[dict[str, Any]], said: list[str]) -> None:
    """Amounts are compared as amounts; one tenant's price is nobody else's."""
    entry = {"name": "m", "engine": "vllm", "endpoints": ["h:1"], "price_hint": {"input": "0.15", "output": "0.60"}}
    models = ModelCatalogue.parse({"models": [entry, {"name": "n", "engine": "vllm", "endpoints": ["h:1"]}]}, source="x").models

    found = findings(models, prices)

    assert len(said) == len(found)
    assert all(text in line for text, line in zip(said, found, strict=True))
