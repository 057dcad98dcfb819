# SPDX-License-Identifier: Apache-2.0
"""What clusters of Envoy have in common, whoever listens there: bounds, ejection, TLS."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Final

import betterproto2
from envoy_data_plane.envoy.config.cluster import v3 as cluster
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls
from envoy_data_plane.envoy.type import v3 as kind
from envoy_data_plane.google import protobuf

from chassis.errors import Invalid
from chassis.served import Endpoint

#: A server on the same network that takes longer to accept is not there.
CONNECT_TIMEOUT: Final = timedelta(seconds=1)
#: Envoy's own default of 1024 would refuse requests that limits have admitted. Admission is
#: ratelimit's decision, so this is far above it and only bounds a runaway.
POOL_MAX: Final = 10000
#: Second attempts at a time, in percent of the requests under way, and so many in any case: a pool that
#: fails is not asked twice as often as one that works.
RETRY_BUDGET_PERCENT: Final = 20.0
RETRIES_ALWAYS: Final = 10

HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
#: Where systems keep the certificates that they trust, when Python's own place is empty.
_TRUSTED_CERTIFICATES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)


def pack(message: betterproto2.Message) -> protobuf.Any:
    """Wrap *message* with its type, as extensions are configured."""
    return protobuf.Any.pack(message)


def stat_name(name: str) -> str:
    """
    What counts of a cluster are called by, where its name will not do: Envoy takes what follows a dot for the count's own name.

    >>> stat_name("pool/main/llama-3.1-8b"), stat_name("pool/main/tiny")
    ('pool/main/llama-3_1-8b', '')
    """
    return name.replace(".", "_") if "." in name else ""


def breakers(requests_max: int) -> cluster.CircuitBreakers:
    """Refuse what is more than *requests_max* under way, and second attempts beyond their budget."""
    return cluster.CircuitBreakers(
        thresholds=[
            cluster.CircuitBreakersThresholds(
                max_connections=POOL_MAX,
                max_pending_requests=POOL_MAX,
                max_requests=requests_max,
                retry_budget=cluster.CircuitBreakersThresholdsRetryBudget(
                    budget_percent=kind.Percent(value=RETRY_BUDGET_PERCENT), min_retry_concurrency=RETRIES_ALWAYS
                ),
            )
        ]
    )


def outliers(*, percent_max: int) -> cluster.OutlierDetection:
    """
    Leave out, for a while, what cannot be reached; at most *percent_max* of all: 100 includes the last one.

    Connections that fail count, and gateways on the way that say so. An engine's own 500 puts nobody out: a caller who
    knows what makes one could put out all.
    """
    return cluster.OutlierDetection(
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=2,
        consecutive_gateway_failure=5,
        enforcing_consecutive_gateway_failure=100,
        enforcing_consecutive_5xx=0,
        enforcing_success_rate=0,
        enforcing_local_origin_success_rate=0,
        interval=timedelta(seconds=1),
        # A good health check brings it back before.
        base_ejection_time=timedelta(seconds=5),
        max_ejection_time=timedelta(seconds=30),
        max_ejection_percent=percent_max,
    )


def tls_socket(protocol: str) -> core.TransportSocket:
    """TLS with a peer that speaks *protocol*, by its name in ALPN."""
    context = tls.UpstreamTlsContext(
        # Each server is asked for, and must prove, the name that the document gives it.
        auto_host_sni=True,
        auto_sni_san_validation=True,
        common_tls_context=tls.CommonTlsContext(
            alpn_protocols=[protocol],
            validation_context=tls.CertificateValidationContext(
                trusted_ca=core.DataSource(filename=_trusted_certificates())
            ),
        ),
    )
    return core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=pack(context))


def _trusted_certificates() -> str:
    places: Iterable[str | None] = (os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *_TRUSTED_CERTIFICATES)
    for place in places:
        if place and Path(place).is_file():
            return place
    raise Invalid("No trusted certificates were found for https.", mend="Name a file of them in SSL_CERT_FILE.")


def socket_address(server: Endpoint) -> core.Address:
    """Where *server* listens, as Envoy writes it."""
    return core.Address(socket_address=core.SocketAddress(address=server.host, port_value=server.port))


def host_name(server: Endpoint) -> str:
    """What *server* is called in a Host header and to its certificate: an IPv6 address is written in brackets."""
    return f"[{server.host}]" if ":" in server.host else server.host


def is_address(host: str) -> bool:
    """Whether *host* is an address and no name, which DNS has to be asked for."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
