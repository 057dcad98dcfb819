# SPDX-License-Identifier: Apache-2.0
"""Money as people write it: decimal text to integer nano-currency and back, exactly."""

from __future__ import annotations

import re

from chassis.errors import Invalid

_NANO = 1_000_000_000
_AMOUNT = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?")
#: Decimal places that are always shown.
_PLACES_MIN = 2


def nano(text: str, *, what: str) -> int:
    """
    Integer nano-currency of a decimal text; *what* names it in the error.

    >>> nano("0.15", what="input")
    150000000
    """
    matched = _AMOUNT.fullmatch(text)
    if matched is None:
        raise Invalid(f"{what} is {text!r}.", mend="Write a number such as 0.15, with at most nine digits before the point and after it.")
    return int(matched[1]) * _NANO + int((matched[2] or "").ljust(9, "0"))


def decimal_text(amount_nano: int) -> str:
    """
    The amount as a decimal text, without losing a nano.

    >>> decimal_text(1_500_000_000), decimal_text(1), decimal_text(-250_000_000)
    ('1.50', '0.000000001', '-0.25')
    """
    whole, rest = divmod(abs(amount_nano), _NANO)
    places = f"{rest:09d}".rstrip("0").ljust(_PLACES_MIN, "0")
    return f"{'-' if amount_nano < 0 else ''}{whole}.{places}"
