# SPDX-License-Identifier: Apache-2.0
"""
Put Envoy's tracer, which is in envoy/tracing.yaml, into its bootstrap: `up` does it on one machine, `prepare` in a pod.

Spans leave by plain HTTP, from Envoy and from the services. What a collector elsewhere wants (TLS, credentials) is said
once, by a collector beside the gateway that passes them on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import ValidationError

from chassis.errors import Invalid
from chassis.telemetry import traces

TRACING_FILE: Final = "tracing.yaml"
TENANTS_LISTENER: Final = "tenants"
_JOURNAL: Final = "journal"
_HTTP_PORT: Final = 80
#: Envoy's sampler counts in millionths.
_OF_A_PERCENT: Final = 10_000


def trace_settings() -> traces.Settings:
    """The environment's; raises `Invalid`."""
    try:
        return traces.Settings()
    except ValidationError as exc:
        raise Invalid("PEAJE_TRACES_PERCENT is not a number from 0 to 100.") from exc


def add_tracing(bootstrap: dict[str, Any], block: Mapping[str, Any], settings: traces.Settings) -> None:
    """
    Have Envoy send its spans to the collector that *settings* names, as *block* (the content of tracing.yaml) says.

    Raises `Invalid` for what is no address of one; *bootstrap* is then as it was.
    """
    host, port = _address(settings.url)
    block = copy.deepcopy(block)
    tracing, cluster = block["tracing"], block["cluster"]
    config = tracing["provider"]["typed_config"]
    config["http_service"]["http_uri"]["uri"] = f"{settings.url.rstrip('/')}/v1/traces"
    config["sampler"]["typed_config"]["sampling_percentage"]["numerator"] = round(settings.percent * _OF_A_PERCENT)
    [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    endpoint["endpoint"]["address"]["socket_address"] = {"address": host, "port_value": port}
    listeners = bootstrap["static_resources"]["listeners"]
    for chain in next(one for one in listeners if one["name"] == TENANTS_LISTENER)["filter_chains"]:
        manager = chain["filters"][0]["typed_config"]
        manager["tracing"] = tracing
        records = next(log for log in manager["access_log"] if log["name"] == _JOURNAL)["typed_config"]["log_format"]["json_format"]
        records.update(block["journal"])
    bootstrap["static_resources"]["clusters"].append(cluster)


def _address(url: str) -> tuple[str, int]:
    """Host and port. What is refused is not repeated: it may hold a password."""
    try:
        address = urlsplit(url)
        host, port = address.hostname or "", _HTTP_PORT if address.port is None else address.port
    except ValueError:
        address, host, port = urlsplit(""), "", 0
    if address.scheme == "https":
        raise Invalid(
            "PEAJE_TRACES_URL is https; spans are sent by plain HTTP.",
            mend="Name a collector near by, which passes them on by TLS with the credentials that it needs.",
        )
    if address.scheme != "http" or not host or not port or "@" in address.netloc or address.query or address.fragment:
        raise Invalid("PEAJE_TRACES_URL is not an address like http://127.0.0.1:4318, without user, query and fragment.")
    return host, port
