# SPDX-License-Identifier: Apache-2.0
"""What is served, as values: models, the pools of servers behind them, and how those are chosen."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

#: Engine kinds that are known, and whether each sends running usage when asked
#: (`stream_options.continuous_usage_stats`). "openai" stands for any other compatible server,
#: which may refuse a field it does not know.
ENGINES: Final = {"vllm": True, "dynamo": True, "trtllm": True, "openai": False}

#: What a model's only pool is called when it is written without `pools`.
ONLY_POOL: Final = "main"


class Retry(enum.Enum):
    """Which attempts are made again at another server; never once the first byte has reached the caller."""

    #: Only what cannot have reached a model: nothing is generated twice.
    UNSENT = "unsent"
    #: Also what a server took and never answered.
    UNANSWERED = "unanswered"


class Balance(enum.Enum):
    """What chooses among the servers of a pool."""

    #: The one with fewer requests under way of two at random.
    LEAST_REQUEST = "least_request"
    #: Turns, as many as each server has room for by the load that it reports with its answers (ORCA).
    ORCA = "orca"


class WhenAway(enum.Enum):
    """What becomes of a request whose endpoint picker does not answer."""

    #: The pool's own balancing chooses.
    OPEN = "open"
    #: It is refused.
    CLOSE = "close"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a model server listens."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointPicker:
    """Who is asked, for each request, which server of a pool it goes to (Gateway API Inference Extension)."""

    address: Endpoint
    when_away: WhenAway = WhenAway.OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Servers of one kind and release behind a served model."""

    name: str
    engine: str
    endpoints: tuple[Endpoint, ...]
    #: Its part of the model's requests, of the sum of all weights; 0: none while another pool has a healthy server.
    weight: int = 1
    #: What its engine calls the model; None: as it is served.
    model: str | None = None
    #: Holds the token that its servers want, below the state directory; None: they want none.
    credential_file: Path | None = None
    #: Requests under way at the most; None: admission alone is the bound.
    requests_max: int | None = None
    #: A server that is new or was away gets its full part after this long.
    slow_start_seconds: int = 30
    #: None: what the engine's kind has.
    health_path: str | None = None
    balance: Balance = Balance.LEAST_REQUEST
    #: None: Envoy chooses by itself.
    endpoint_picker: EndpointPicker | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether it is used only when the pools before it are dead."""
        return self.weight == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """What keeps requests that belong together at one server: a header of the caller's, or how the prompt begins."""

    #: None: the prompt's beginning.
    header: str | None = None
    #: Bytes of the prompt that are looked at; 0: the header.
    prefix_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceHint:
    """What its operator thinks a million tokens cost; prices in force are set by `peaje prices set`."""

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    currency: str = "USD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A served model: its name, the pools behind it."""

    name: str
    #: In the document's order; at least one has a weight.
    pools: tuple[Pool, ...]
    #: Other names for it. Keys, limits, prices and usage know its own name only.
    aliases: tuple[str, ...] = ()
    #: The model's own tokenizer.json, where ratelimit runs; None: prompts are estimated by their bytes alone.
    tokenizer: Path | None = None
    affinity: Affinity | None = None
    retry: Retry = Retry.UNSENT
    #: The most that its engines generate for one choice; None: not known.
    output_tokens_max: int | None = None
    price_hint: PriceHint | None = None

    @property
    def sends_running_usage(self) -> bool:
        """Whether every engine that may answer sends running usage when asked."""
        return all(supports_continuous_usage(pool.engine) for pool in self.pools)

    def engine_name(self, pool: Pool) -> str:
        """What the engines of *pool* call this model."""
        return pool.model or self.name


def supports_continuous_usage(engine: str) -> bool:
    """Whether *engine* sends running usage in each chunk when asked."""
    return ENGINES.get(engine, False)
