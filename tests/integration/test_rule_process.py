# SPDX-License-Identifier: Apache-2.0
"""ratelimit as a process with operators' rules: its settings, its socket for both kinds of domain, its metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx

from chassis import contract
from chassis.wire import ratelimit_pb2 as wire
from ratelimit.servicer import METHOD
from tests.integration.ports import free_ports
from tests.ratelimit_rules import OK, OVER, Ask, request
from tests.waiting import WAIT_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]
#: Far above the usual: the machine may be busy.
_RULES = "domain: shop\ndescriptors:\n- {key: path, detailed_metric: true, rate_limit: {unit: year, requests_per_unit: 2}}\n"


@contextmanager
def running(home: Path, **settings: str) -> Iterator[Ask]:
    """A ratelimit of its own process; asks it over its socket."""
    environment = os.environ | settings | {"PEAJE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with (home / "log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "ratelimit"], cwd=home, env=environment, stderr=log)
    try:
        with grpc.insecure_channel(f"unix:{home}/{contract.SOCKETS[contract.CLUSTER_RATELIMIT]}") as channel:
            grpc.channel_ready_future(channel).result(timeout=WAIT_SECONDS)
            call = channel.unary_unary(
                METHOD, request_serializer=wire.RateLimitRequest.SerializeToString,
                response_deserializer=wire.RateLimitResponse.FromString,
            )  # fmt: skip
            yield lambda made: call(made, timeout=10)
    finally:
        process.terminate()
        process.wait(timeout=WAIT_SECONDS)


def code(answer: Ask, made: wire.RateLimitRequest) -> object:
    """The overall code, or the error's."""
    try:
        return answer(made).overall_code
    except grpc.RpcError as exc:
        return exc.code()


def test_a_process_with_rules_answers_both_kinds_of_domain_and_shows_what_it_did(
    postgres_url: str, counter_store: str, tmp_path: Path
) -> None:
    """It starts on a bad file, takes the mended one, keeps it against the next mistake, and says all of that."""
    directory = tmp_path / "rules"
    directory.mkdir()
    (directory / "shop.yaml").write_text("domain: [")
    (tmp_path / "envoy").mkdir()
    (tmp_path / contract.MODELS_PATH).write_text('models: [{name: m, engine: vllm, endpoints: ["127.0.0.1:1"]}]\n')
    (metrics,) = free_ports(1)
    admit = request(contract.RLS_DOMAIN, ["phase=admit"])
    settle = request(contract.RLS_DOMAIN, ["phase=settle, tenant=t, request_id=r, hold=no"])

    def shown() -> str:
        return httpx.get(f"http://127.0.0.1:{metrics}/metrics", timeout=10).text

    with running(
        tmp_path, PEAJE_POSTGRES_URL=postgres_url, PEAJE_REDIS_URL=counter_store, PEAJE_RATELIMIT_CONFIG="rules",
        PEAJE_RATELIMIT_METRICS_PORT=str(metrics), PEAJE_RATELIMIT_RLS_HEADERS="true",
    ) as answer:  # fmt: skip
        shop = request("shop", ["path=/orders"])
        refused = grpc.StatusCode.INVALID_ARGUMENT
        assert [refused, refused, OK] == [code(answer, made) for made in (shop, admit, settle)]
        assert "peaje_ratelimit_rules_current 0.0" in shown()

        (directory / "shop.yaml").write_text(_RULES)
        until(lambda: "peaje_ratelimit_rules_current 1.0" in shown())
        assert [OK, OK, OVER, refused, OK] == [code(answer, made) for made in (shop, shop, shop, admit, settle)]
        assert "2" == {header.key: header.value for header in answer(shop).response_headers_to_add}["ratelimit-limit"]

        (directory / "shop.yaml").write_text(_RULES.replace("unit: year", "unit: decade"))
        until(lambda: "peaje_ratelimit_rules_current 0.0" in shown())
        assert OVER == code(answer, shop)
        said = shown()

    for line in (
        'peaje_ratelimit_rule_hits_total{descriptor="shop.path_/orders",domain="shop",stat="over_limit"} 3.0',
        'peaje_ratelimit_rule_hits_total{descriptor="shop.path_/orders",domain="shop",stat="total_hits"} 5.0',
        'peaje_ratelimit_rule_reloads_total{outcome="refused"} 2.0',
        'peaje_ratelimit_rule_reloads_total{outcome="taken"} 1.0',
    ):
        assert line in said, said
    log = (tmp_path / "log").read_text()
    assert 2 == log.count("rules_refused")
    assert "rules/shop.yaml:3: unit 'decade' is none. Write one of second" in log
