# SPDX-License-Identifier: Apache-2.0
"""The limiter in memory against the model."""

from __future__ import annotations

from hypothesis import settings

from ratelimit.core.decide import Memory, Outcome, Renewal, renew, settle, take
from ratelimit.core.demand import Demand
from ratelimit.core.usage import Report
from tests.ratelimit_model.machine import Lives


class InMemory(Lives):
    """`ratelimit.core.decide` beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.tenant = Memory(), "t"

    def take(self, demand: Demand) -> Outcome:
        return take(self.memory, demand, self.now)

    def renew(self, demand: Demand, renewal: Renewal) -> int:
        return renew(self.memory, demand.request_id, renewal, self.now)

    def settle(self, demand: Demand, report: Report) -> bool:
        return settle(self.memory, demand.request_id, report, self.now)

    def expire(self) -> None:
        # What is over stays over, also when the clock goes back.
        self.memory.reservations = {
            request_id: held for request_id, held in self.memory.reservations.items() if held is None or held.ends_us > self.now
        }


TestInMemory = InMemory.TestCase
TestInMemory.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
