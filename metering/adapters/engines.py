# SPDX-License-Identifier: Apache-2.0
"""
Read the engines' own counters: one table of names per engine kind.

An engine is asked at its own address, past Envoy; that its counters cannot be read concerns nobody
but the check that wanted them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from chassis.served import Endpoint, Model
from metering.core.conservation import Counters

_TIMEOUT_SECONDS: Final = 2.0
#: Bytes. A page of a busy engine has a few hundred kilobytes.
_PAGE_BYTES_MAX: Final = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Where an engine kind says what it counted."""

    path: str
    label: str
    input_tokens: str
    output_tokens: str
    running: tuple[str, ...]


#: "openai" stands for any other server and has no page that we know. vLLM's and Dynamo's names are from their
#: own pages; TensorRT-LLM's are from its documentation, and no page of it has been read yet.
NAMES: Final = {
    "vllm": Names(
        path="/metrics", label="model_name", input_tokens="vllm:prompt_tokens_total",
        output_tokens="vllm:generation_tokens_total", running=("vllm:num_requests_running", "vllm:num_requests_waiting"),
    ),
    "dynamo": Names(
        path="/metrics", label="model", input_tokens="dynamo_frontend_input_sequence_tokens_sum",
        output_tokens="dynamo_frontend_output_sequence_tokens_sum",
        running=("dynamo_frontend_inflight_requests", "dynamo_frontend_queued_requests"),
    ),
    "trtllm": Names(
        path="/prometheus/metrics", label="model_name", input_tokens="trtllm_prompt_tokens_total",
        output_tokens="trtllm_generation_tokens_total", running=("trtllm_num_requests_running", "trtllm_num_requests_waiting"),
    ),
}


def parse(text: str, *, names: Names, model: str) -> Counters | None:
    """The counters of *model* on a page, summed over whatever else labels them; None if it has none of the model."""
    wanted = {names.input_tokens, names.output_tokens, *names.running}
    sums: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted and sample.labels.get(names.label) == model:
                sums[sample.name] = sums.get(sample.name, 0) + int(sample.value)
    if names.input_tokens not in sums and names.output_tokens not in sums:
        return None
    return Counters(
        input_tokens=sums.get(names.input_tokens, 0), output_tokens=sums.get(names.output_tokens, 0),
        running=sum(sums.get(name, 0) for name in names.running),
    )


def fetch(model: Model, get: Callable[[str], str] | None = None) -> Counters | None:
    """The counters of all engines behind a model together; None if one of them cannot be read."""
    total = Counters(input_tokens=0, output_tokens=0, running=0)
    for pool in model.pools:
        names = NAMES.get(pool.engine)
        if names is None:
            return None
        for endpoint in pool.endpoints:
            try:
                page = (get or _page)(f"{_base(endpoint)}{names.path}")
                counters = parse(page, names=names, model=model.engine_name(pool))
            except (httpx.HTTPError, ValueError):
                return None
            if counters is None:
                return None
            total += counters
    return total


def _page(url: str) -> str:
    with httpx.stream("GET", url, timeout=_TIMEOUT_SECONDS, trust_env=False) as answer:
        answer.raise_for_status()
        data = b""
        for piece in answer.iter_bytes():
            data += piece
            if len(data) > _PAGE_BYTES_MAX:
                raise ValueError("the page is too long")
    return data.decode("utf-8")


def _base(endpoint: Endpoint) -> str:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return f"{endpoint.scheme}://{host}:{endpoint.port}"
