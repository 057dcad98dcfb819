# SPDX-License-Identifier: Apache-2.0
"""Services asked over TCP: who shows no certificate of our authority gets no answer, and a renewal costs nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from chassis import certificates, contract, serving
from chassis.certificates import Certificates, WatchedCertificates, channel_credentials
from chassis.errors import Invalid, Unavailable
from chassis.serving import door
from chassis.wire import ratelimit_pb2 as ratelimit_wire
from control.api.__main__ import Settings as ControlSettings
from metering.adapters.slices import METHOD, Slices
from tests.certificates import Authority

_SECONDS = 20


@contextmanager
def _serving(directory: Path) -> Iterator[str]:
    """A server of health behind the door that our services have; its address."""
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    at = door("unused", listen="127.0.0.1:0", tls_directory=directory)
    assert at.certificates is not None
    port = server.add_secure_port(at.address, certificates.server_credentials(at.certificates))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def _ask(address: str, credentials: grpc.ChannelCredentials | None) -> int:
    # Without its own pool an open connection of an earlier question would answer this one.
    options = (("grpc.use_local_subchannel_pool", 1),)
    channel = (
        grpc.insecure_channel(address, options) if credentials is None else grpc.secure_channel(address, credentials, options)
    )
    with channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        return int(answer.status)


def _refused(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        _ask(address, credentials)
    return bool(caught.value.code() == grpc.StatusCode.UNAVAILABLE)


def test_only_who_shows_a_certificate_of_our_authority_is_answered(tmp_path: Path) -> None:
    """Neither plain text, nor TLS without a certificate, nor with somebody else's."""
    ours, others = Authority.make(), Authority.make("others")
    directory = ours.fill(tmp_path / "server", "extauth")
    chain, key = others.pair("gateway")

    with _serving(directory) as address:
        assert health_pb2.HealthCheckResponse.SERVING == _ask(
            address, channel_credentials(certificates.read(ours.fill(tmp_path / "client", "gateway")))
        )
        assert _refused(address, None)
        assert _refused(address, grpc.ssl_channel_credentials(root_certificates=ours.pem()))
        assert _refused(address, channel_credentials(Certificates(chain=chain, key=key, authority=ours.pem())))


def test_a_renewal_takes_hold_while_the_server_runs(tmp_path: Path) -> None:
    """The next handshake is with the new authority: the old certificates are worth nothing."""
    old, new = Authority.make("old"), Authority.make("new")
    directory = old.fill(tmp_path / "server", "extauth")
    old_client = channel_credentials(certificates.read(old.fill(tmp_path / "old", "gateway")))
    new_client = channel_credentials(certificates.read(new.fill(tmp_path / "new", "gateway")))

    with _serving(directory) as address:
        before = _ask(address, old_client)
        new.fill(directory, "extauth")

        assert before == _ask(address, new_client)
        assert _refused(address, old_client)


def test_a_renewal_that_cannot_be_used_keeps_the_last_good_one(tmp_path: Path) -> None:
    """Half of a new pair, or no PEM at all, closes no door."""
    authority = Authority.make()
    directory = authority.fill(tmp_path / "server", "extauth")
    client = channel_credentials(certificates.read(authority.fill(tmp_path / "client", "gateway")))

    with _serving(directory) as address:
        for broken in (authority.pair("extauth")[0], b"-----BEGIN NOTHING-----\n", b""):
            (directory / ".new").write_bytes(broken)
            os.replace(directory / ".new", directory / "tls.crt")

            assert health_pb2.HealthCheckResponse.SERVING == _ask(address, client)


async def _check_streaming_server(directory: Path, good: grpc.ChannelCredentials, authority: bytes) -> tuple[int, grpc.StatusCode]:
    server = grpc.aio.server()
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    await status.set("", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_secure_port("127.0.0.1:0", certificates.server_credentials(WatchedCertificates(directory)))
    await server.start()
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", good) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        nothing = grpc.ssl_channel_credentials(root_certificates=authority)
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", nothing) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        return int(answer.status), caught.value.code()
    finally:
        await server.stop(0)


def test_the_streaming_server_has_the_same_door(tmp_path: Path) -> None:
    """metering's server is asyncio's; it asks for the certificate as well."""
    authority = Authority.make()
    client = channel_credentials(certificates.read(authority.fill(tmp_path / "client", "gateway")))

    found = asyncio.run(_check_streaming_server(authority.fill(tmp_path / "server", "metering"), client, authority.pem()))

    assert (health_pb2.HealthCheckResponse.SERVING, grpc.StatusCode.UNAVAILABLE) == found


def test_the_services_bind_what_their_settings_say(tmp_path: Path) -> None:
    """A taken port is one line, not a traceback."""
    directory = Authority.make().fill(tmp_path, "extauth")

    with _serving(directory) as address:
        server = grpc.server(ThreadPoolExecutor(1), options=(("grpc.so_reuseport", 0),))
        with pytest.raises(Unavailable, match="Nothing can listen"):
            serving._bind(server, door("unused", listen=address, tls_directory=directory))
        server.stop(0)


@pytest.mark.parametrize("listen", ["9001", "localhost:", "localhost:http", "[::]:65536", ":٣"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, listen: str) -> None:
    """Said at start, with how to write it."""
    with pytest.raises(Invalid, match="no address to listen on"):
        door("run/extauth.sock", listen=listen, tls_directory=tmp_path)


def test_tcp_without_certificates_is_refused() -> None:
    """Whoever reaches the port could reserve and settle."""
    with pytest.raises(Invalid, match="PEAJE_TLS_DIRECTORY"):
        door("run/extauth.sock", listen="[::]:9001", tls_directory=None)


@pytest.mark.parametrize("missing", ["tls.crt", "tls.key", "ca.crt"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    """And no content of the others."""
    directory = Authority.make().fill(tmp_path)
    (directory / missing).unlink()

    with pytest.raises(Invalid, match=missing):
        certificates.read(directory)


def test_a_file_at_the_bound_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    """A wrong path may name anything."""
    directory = Authority.make().fill(tmp_path)
    authority = (directory / "ca.crt").read_bytes()

    (directory / "ca.crt").write_bytes(authority.ljust(certificates._FILE_BYTES_MAX, b"\n"))
    assert certificates._FILE_BYTES_MAX == len(certificates.read(directory).authority)

    (directory / "ca.crt").write_bytes(authority.ljust(certificates._FILE_BYTES_MAX + 1, b"\n"))
    with pytest.raises(Invalid, match="larger than"):
        certificates.read(directory)


def test_no_key_is_ever_shown(tmp_path: Path) -> None:
    """Neither in repr nor in the refusal of a pair that does not belong together."""
    authority = Authority.make()
    directory = authority.fill(tmp_path)
    shown = repr(certificates.read(directory))
    (directory / "tls.key").write_bytes(authority.pair()[1])

    with pytest.raises(Invalid, match="is not the key") as caught:
        certificates.read(directory)
    assert "PRIVATE KEY" not in shown + str(caught.value)


def test_metering_asks_ratelimit_with_the_newest_certificates(tmp_path: Path) -> None:
    """A renewal makes another channel; without one the channel stays."""

    async def calls() -> tuple[bool, bool]:
        authority = Authority.make()
        directory = authority.fill(tmp_path, "metering")
        slices = Slices("127.0.0.1:1", certificates=WatchedCertificates(directory))
        first, second = slices._method(), slices._method()
        authority.fill(directory, "metering")
        return first is second, slices._method() is second

    assert (True, False) == asyncio.run(calls())


def _hold(request: ratelimit_wire.RateLimitRequest, _context: grpc.ServicerContext) -> ratelimit_wire.RateLimitResponse:
    response = ratelimit_wire.RateLimitResponse()
    response.dynamic_metadata.fields[contract.ADM_SLICE_TOKENS].number_value = 10 * len(request.descriptors)
    return response


def test_a_slice_is_held_over_tcp_through_a_renewal_of_both_sides(tmp_path: Path) -> None:
    """metering's next call is on a channel with its new certificates, to a server that takes no others."""
    old, new = Authority.make("old"), Authority.make("new")
    ours, theirs = old.fill(tmp_path / "metering", "metering"), old.fill(tmp_path / "ratelimit", "ratelimit")
    server = grpc.server(ThreadPoolExecutor(2))
    _, service, method = METHOD.split("/")
    handler = grpc.unary_unary_rpc_method_handler(
        _hold, request_deserializer=ratelimit_wire.RateLimitRequest.FromString, response_serializer=ratelimit_wire.RateLimitResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_secure_port("127.0.0.1:0", certificates.server_credentials(WatchedCertificates(theirs)))
    server.start()

    async def renew_twice() -> tuple[int, int]:
        slices = Slices(f"127.0.0.1:{port}", certificates=WatchedCertificates(ours), patience_seconds=_SECONDS)
        first = await slices.renew(tenant_id="acme", request_id="r1", input_tokens=3, output_tokens=9)
        new.fill(ours, "metering")
        new.fill(theirs, "ratelimit")
        return first, await slices.renew(tenant_id="acme", request_id="r1", input_tokens=3, output_tokens=19)

    try:
        assert (10, 10) == asyncio.run(renew_twice())
    finally:
        server.stop(0).wait()


def test_the_control_api_shows_no_token_to_a_network(tmp_path: Path) -> None:
    """Another address than loopback only with a certificate that is there."""
    open_wide = ControlSettings(control_host="0.0.0.0")
    with pytest.raises(Invalid, match="operators' tokens"):
        open_wide.certificate_file("tls.crt")
    with pytest.raises(Invalid, match="is missing"):
        ControlSettings(control_host="0.0.0.0", control_tls_directory=tmp_path).certificate_file("tls.crt")

    directory = Authority.make().fill(tmp_path, "control")

    assert directory / "tls.crt" == ControlSettings(control_host="0.0.0.0", control_tls_directory=directory).certificate_file("tls.crt")
    assert ControlSettings().certificate_file("tls.crt") is None
