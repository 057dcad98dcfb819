# SPDX-License-Identifier: Apache-2.0
"""The engines' own counters: read from their pages, compared between quiet moments."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from chassis.models import ModelCatalogue
from metering.adapters.conservation import comparable
from metering.adapters.engines import NAMES, fetch, parse
from metering.core.conservation import INTERVAL_MAX, INTERVAL_MIN, Counters, State, Watch, unexplained
from tests.fake_engine.kinds import KINDS

RECORDED = Path(__file__).resolve().parents[1] / "fixtures/engine_metrics"
NOON = datetime(2026, 11, 12, 12, 0, tzinfo=UTC)
TICK = timedelta(microseconds=1)


def counters(input: int, output: int, running: int = 0) -> Counters:
    return Counters(input_tokens=input, output_tokens=output, running=running)


@pytest.mark.parametrize(("engine", "expected"), [("vllm", counters(412, 42)), ("dynamo", counters(31, 20))])
def test_a_recorded_page_is_read(engine: str, expected: Counters) -> None:
    """As the engines wrote them; another model's counters are not there."""
    page = (RECORDED / f"{engine}.txt").read_text()

    assert expected == parse(page, names=NAMES[engine], model="tiny")
    assert None is parse(page, names=NAMES[engine], model="other")


@pytest.mark.parametrize("engine", NAMES)
def test_the_names_are_those_that_the_fake_engine_serves(engine: str) -> None:
    """Which stand for TensorRT-LLM's too, of which there is no recorded page."""
    served = {name for name, _, _ in KINDS[engine].metrics}

    assert {NAMES[engine].input_tokens, NAMES[engine].output_tokens, NAMES[engine].running[0]} <= served
    assert NAMES[engine].path == KINDS[engine].metrics_path


def test_a_pool_is_the_sum_of_its_engines_or_nothing() -> None:
    """One that does not answer hides an unknown part."""
    [model] = ModelCatalogue.parse(
        {"models": [{"name": "m", "engine": "vllm", "endpoints": ["a:1", "[::1]:2"]}]}, source="test"
    ).models
    page = 'vllm:prompt_tokens_total{model_name="m",engine="0"} 5\nvllm:generation_tokens_total{model_name="m",engine="0"} 7\n'

    def get(url: str) -> str:
        assert url in ("http://a:1/metrics", "http://[::1]:2/metrics")
        return page

    def fail(url: str) -> str:
        raise httpx.ConnectError("no") if "a:1" in url else AssertionError

    assert counters(10, 14) == fetch(model, get)
    assert None is fetch(model, fail)
    assert None is fetch(model, lambda _: "what is {this")
    assert None is fetch(model, lambda _: "")


@pytest.mark.parametrize(("drift", "cut_count", "left"), [(-7, 0, -7), (-7, 1, 0), (3, 0, 3), (3, 1, 3), (0, 0, 0)])
def test_what_nobody_received_explains_that_the_engine_has_more_and_nothing_else(drift: int, cut_count: int, left: int) -> None:
    """A ledger that has more than the engine is never explained by that."""
    assert left == unexplained(drift, cut_count=cut_count)


def test_an_interval_goes_from_one_quiet_moment_to_the_next_that_is_late_enough() -> None:
    """At the bound: a minute."""
    watch, nothing = Watch().next(NOON, counters(10, 20))
    assert nothing is None
    same, nothing = watch.next(NOON + INTERVAL_MIN - TICK, counters(11, 22))
    assert (watch, None) == (same, nothing)

    _, busy = watch.next(NOON + INTERVAL_MIN, None)
    after, interval = watch.next(NOON + INTERVAL_MIN, counters(15, 29))

    assert busy is None
    assert interval is not None
    assert (State.COMPARED, 5, 9) == (interval.state, interval.input_tokens, interval.output_tokens)
    assert (NOON, NOON + INTERVAL_MIN) == (interval.starts_at, interval.ends_at)
    _, nothing = after.next(NOON + INTERVAL_MIN + INTERVAL_MIN - TICK, counters(15, 29))
    assert nothing is None


def test_counters_that_went_back_are_no_drift() -> None:
    """An engine was restarted."""
    watch, _ = Watch().next(NOON, counters(10, 20))

    _, interval = watch.next(NOON + INTERVAL_MIN, counters(10, 3))

    assert interval is not None
    assert (State.RESET, 0, 0) == (interval.state, interval.input_tokens, interval.output_tokens)


def test_a_pool_that_is_never_quiet_is_told_of_and_waited_for() -> None:
    """An hour, and then from the next quiet moment on."""
    watch, _ = Watch().next(NOON, counters(10, 20))
    same, nothing = watch.next(NOON + INTERVAL_MAX - TICK, None)
    assert (watch, None) == (same, nothing)

    waiting, interval = watch.next(NOON + INTERVAL_MAX, None)

    assert Watch() == waiting
    assert interval is not None
    assert State.BUSY is interval.state


def test_models_that_share_an_engines_counters_are_not_compared() -> None:
    """By the engine's own name for the model, at the same server."""
    models = ModelCatalogue.parse(
        {
            "models": [
                {"name": "a", "engine": "vllm", "endpoints": ["h:1"], "model": "x"},
                {"name": "b", "engine": "vllm", "endpoints": ["h:1", "h:2"], "model": "x"},
                {"name": "c", "engine": "vllm", "endpoints": ["h:1"], "model": "y"},
            ]
        },
        source="test",
    ).models

    assert ["c"] == [model.name for model in comparable(models)]
