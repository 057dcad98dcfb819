# SPDX-License-Identifier: Apache-2.0
"""
How many tokens a request will use: learned from what has settled, bounded in memory.

Prompts err upwards (an estimate that is too low is an overshoot); outputs of callers who name
no or a huge maximum are held at what this tenant's requests to this model usually reach.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

#: Bytes of request body per prompt token while nothing is learned, on the low side: English text
#: has about 4, and the JSON around it counts as bytes as well.
BYTES_PER_TOKEN_ASSUMED: Final = 2.5
#: Learned ratios outside this range are noise: no tokenizer makes two tokens of a byte, and a
#: prompt that is nearly all JSON says nothing about the next.
BYTES_PER_TOKEN_MIN: Final = 0.5
BYTES_PER_TOKEN_MAX: Final = 6.0
#: Output tokens held for one choice of a request that names no maximum, while nothing is learned.
OUTPUT_TOKENS_ASSUMED: Final = 512
#: A maximum above this is no statement about the answer: clients send the context's length.
OUTPUT_TOKENS_BELIEVED_MAX: Final = 4096
#: The share of a tenant's answers that stay within what is held for them.
_OUTPUT_QUANTILE: Final = 0.95
#: Samples of a tenant's answers: enough for their quantile, and an hour of odd traffic is forgotten.
OUTPUT_SAMPLES_MAX: Final = 256
#: Samples of a model's prompts. The smallest ratio of the last 1,024 is undercut by one prompt in 1,025: p99.9.
PROMPT_SAMPLES_MAX: Final = 1_024
SAMPLES_MIN: Final = 32
#: Rings kept; beyond it the one that was longest unused goes. A ring has 10 to 50 KB.
RINGS_MAX: Final = 2_000
#: For how long a tenant's largest request to a model counts, and of how many this is kept.
LARGEST_FOR: Final = timedelta(seconds=60)
LARGEST_MAX: Final = 20_000


class _Ring:
    """The last samples, and one quantile of them."""

    __slots__ = ("_ordered", "_quantile", "_samples", "_samples_max", "value")

    def __init__(self, quantile: float, samples_max: int) -> None:
        self._quantile = quantile
        self._samples_max = samples_max
        self._samples: deque[float] = deque()
        #: The same in order: one sample in and one out cost less than sorting all of them each time.
        self._ordered: list[float] = []
        self.value: float | None = None

    def add(self, sample: float) -> None:
        self._samples.append(sample)
        insort(self._ordered, sample)
        if len(self._samples) > self._samples_max:
            del self._ordered[bisect_left(self._ordered, self._samples.popleft())]
        if len(self._samples) >= SAMPLES_MIN:
            self.value = self._ordered[min(int(self._quantile * len(self._ordered)), len(self._ordered) - 1)]


class Estimates:
    """What has been learned so far; safe to share between threads."""

    def __init__(self) -> None:
        self._rings: OrderedDict[tuple[str, ...], _Ring] = OrderedDict()
        self._calibrated: dict[str, float] = {}
        #: By tenant and model: since when, the largest before it, the largest since.
        self._largest: OrderedDict[tuple[str, str], tuple[datetime, tuple[int, int], tuple[int, int]]] = OrderedDict()
        self._lock = threading.Lock()

    def prompt_tokens(self, *, model: str, prompt_bytes: int) -> int:
        """
        Tokens of a prompt of so many bytes of request body, rather too many than too few.

        >>> Estimates().prompt_tokens(model="m", prompt_bytes=101)
        41
        """
        learned = self._value(("ratio", model))
        known = learned or self._calibrated.get(model) or BYTES_PER_TOKEN_ASSUMED
        ratio = min(max(known, BYTES_PER_TOKEN_MIN), BYTES_PER_TOKEN_MAX)
        return math.ceil(prompt_bytes / ratio)

    def calibrate(self, ratios: Mapping[str, float]) -> None:
        """Bytes per token that models' own tokenizers make of texts like prompts: they stand until more is learned."""
        self._calibrated = dict(ratios)

    def output_tokens(self, *, tenant_id: str, model: str, named_max: int, cap: int) -> int:
        """
        Tokens to hold for one choice: what this tenant's answers usually reach, at most what was named or *cap*.

        While nothing is learned, what the caller named (0: nothing) stands if it is believable.
        """
        most = min(named_max or cap, cap)
        learned = self._value(("output", tenant_id, model))
        if learned is not None:
            return min(most, max(1, math.ceil(learned)))
        return min(most, OUTPUT_TOKENS_BELIEVED_MAX if named_max else OUTPUT_TOKENS_ASSUMED)

    def learn(
        self, *, tenant_id: str, model: str, prompt_bytes: int, input_tokens: int, output_tokens: int
    ) -> None:
        """Take in one settled exchange; one whose tokens nobody counted teaches nothing."""
        with self._lock:
            if prompt_bytes > 0 and input_tokens > 0:
                # The smallest of the ring: every prompt below it is an overshoot.
                self._ring(("ratio", model), 0.0, PROMPT_SAMPLES_MAX).add(prompt_bytes / input_tokens)
            if output_tokens > 0:
                self._ring(("output", tenant_id, model), _OUTPUT_QUANTILE, OUTPUT_SAMPLES_MAX).add(output_tokens)

    def largest(self, *, tenant_id: str, model: str, prompt_bytes: int, output_tokens: int, now: datetime) -> tuple[int, int]:
        """
        Bytes and output tokens of the largest requests to *model* that this tenant asked for lately, this one included.

        Lately is within `LARGEST_FOR` and as long again at the most. So small and large requests that take turns are
        lent to alike.
        """
        name, own = (tenant_id, model), (prompt_bytes, output_tokens)
        with self._lock:
            since, before, latest = self._largest.pop(name, (now, (0, 0), (0, 0)))
            if not timedelta(0) <= now - since < LARGEST_FOR:
                is_past = now - since >= 2 * LARGEST_FOR or now < since
                since, before, latest = now, (0, 0) if is_past else latest, (0, 0)
            latest = _larger(latest, own)
            self._largest[name] = (since, before, latest)
            if len(self._largest) > LARGEST_MAX:
                self._largest.popitem(last=False)
        return _larger(before, latest)

    def __len__(self) -> int:
        return len(self._rings)

    def _value(self, name: tuple[str, ...]) -> float | None:
        with self._lock:
            ring = self._rings.get(name)
            if ring is None:
                return None
            self._rings.move_to_end(name)
            return ring.value

    def _ring(self, name: tuple[str, ...], quantile: float, samples_max: int) -> _Ring:
        ring = self._rings.get(name)
        if ring is None:
            ring = self._rings[name] = _Ring(quantile, samples_max)
            if len(self._rings) > RINGS_MAX:
                self._rings.popitem(last=False)
        self._rings.move_to_end(name)
        return ring


def _larger(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])
