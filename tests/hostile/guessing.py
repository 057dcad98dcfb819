# SPDX-License-Identifier: Apache-2.0
"""K04: somebody makes up credentials that look right, each another, as fast as they are refused."""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

#: The status and the error's code of an answer.
Said = tuple[int, str | None]

#: Turns of an address where a test guesses: few enough to use them up, many more than all other tests need.
UNKNOWN_PER_MINUTE: Final = 300
#: Who guess at the same time, each on a connection.
GUESSERS: Final = 4
#: Guesses above the turns of a minute; more than there are new turns while the slowest machine guesses.
GUESSES_BEYOND: Final = 200
#: Looked up, and nobody's; and not looked up.
REFUSED: Final[Said] = (401, "invalid_api_key")
UNSEEN: Final[Said] = (429, "too_many_unknown_credentials")


def guess(port: int, credentials: Sequence[str], *, address: str = "127.0.0.1") -> Counter[Said]:
    """Present each of *credentials* once, from *address* of this machine; how often which answer came back."""

    def one(first: int) -> Counter[Said]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(address, 0))
        return Counter(ask(connection, credential) for credential in credentials[first::GUESSERS])

    with ThreadPoolExecutor(GUESSERS) as pool:
        return sum(pool.map(one, range(GUESSERS)), Counter())


def ask(connection: http.client.HTTPConnection, credential: str) -> Said:
    """What a request with *credential* gets."""
    connection.request("GET", "/v1/models", headers={"authorization": f"Bearer {credential}"})
    answer = connection.getresponse()
    document = json.loads(answer.read())
    return answer.status, document.get("error", {}).get("code")
