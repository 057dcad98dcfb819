# SPDX-License-Identifier: Apache-2.0
"""What becomes of a request to a receiver that nobody trusts: real sockets, real TLS, names that lie."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from metering.adapters.sending import ANSWER_BYTES_MAX, Answer, Sender
from metering.core.outgoing import Outgoing
from metering.core.retry import Outcome
from tests.receivers import Reply, receiving

NAME = "hook.example"


def send(url: str, *, loopback_allowed: bool = True, context: ssl.SSLContext | None = None, total_seconds: float = 10.0) -> Answer:
    """Send one request in one life of a sender."""
    request = Outgoing(body=b"{}", headers={"webhook-id": "1"}, event_id="1", kind="key.created", event_count=1, position=1)

    async def work() -> Answer:
        sender = Sender(loopback_allowed=loopback_allowed, ssl_context=context, total_seconds=total_seconds)
        try:
            return await sender.send(url, "standard", request)
        finally:
            await sender.close()

    return asyncio.run(work())


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Names and what they resolve to, one list of addresses after the other; the last one stays."""
    known: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
        if host not in known:
            return real(host, port, *rest, **more)
        answers = known[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            (socket.AF_INET6 if ":" in it else socket.AF_INET, socket.SOCK_STREAM, 6, "", (it, port)) for it in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of `hook.example`, key included."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["169.254.169.254"], ["fd00:ec2::254"], ["::ffff:192.168.0.1"], ["93.184.215.14", "127.0.0.1"], ["2002:7f00:1::1"]],
    ids=str,
)
def test_a_name_that_leads_inside_is_not_connected_to(names: dict[str, list[list[str]]], addresses: list[str]) -> None:
    """Nor is one of several addresses tried while another is bad."""
    names[NAME] = [addresses]

    assert Outcome.ADDRESS_REFUSED is send(f"https://{NAME}/", loopback_allowed=False).outcome


def test_what_was_written_down_when_loopback_was_allowed_is_refused_once_it_is_not() -> None:
    """The setting is read by the process that sends."""
    with receiving() as receiver:
        assert Outcome.ADDRESS_REFUSED is send(receiver.url, loopback_allowed=False).outcome
        assert [] == receiver.got


def test_the_address_that_was_judged_is_the_one_connected_to(names: dict[str, list[list[str]]], certificate: Path) -> None:
    """A name that answers differently the second time is not asked a second time; TLS still checks the name."""
    names[NAME] = [["127.0.0.1"], ["169.254.169.254"]]
    names["other.example"] = [["127.0.0.1"]]
    context = ssl.create_default_context(cafile=str(certificate))
    with receiving(certificate=certificate) as receiver:
        answer = send(f"https://{NAME}:{receiver.port}/x", context=context)
        wrong_name = send(f"https://other.example:{receiver.port}/x", context=context)
        unknown_issuer = send(f"https://other.example:{receiver.port}/x")

        assert (Outcome.DELIVERED, 200, 1) == (answer.outcome, answer.status, len(receiver.got))
        assert f"{NAME}:{receiver.port}" == receiver.got[0].headers["host"]
        assert [Outcome.UNREACHABLE] * 2 == [wrong_name.outcome, unknown_issuer.outcome]


def test_a_redirect_is_not_followed() -> None:
    """It would lead around everything above."""
    with receiving() as inside, receiving(lambda _: Reply(status=307, headers={"location": inside.url})) as receiver:
        answer = send(receiver.url)

        assert (Outcome.REDIRECTED, 307, []) == (answer.outcome, answer.status, inside.got)


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would resolve names by itself."""
    with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")

        assert Outcome.DELIVERED is send(receiver.url).outcome
        assert [] == proxy.got


@pytest.mark.parametrize("size", [0, ANSWER_BYTES_MAX, ANSWER_BYTES_MAX + 1, 8 << 20])
def test_an_answer_is_read_up_to_a_bound_and_its_status_counts(size: int) -> None:
    """An endless one costs no memory."""
    with receiving(lambda _: Reply(body=b"x" * size)) as receiver:
        assert Outcome.DELIVERED is send(receiver.url).outcome


def test_an_answer_that_trickles_ends_with_the_time_for_it() -> None:
    """A byte now and then keeps no task alive."""
    release = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                while not release.wait(0.05):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        answer = send(f"http://127.0.0.1:{server.getsockname()[1]}/", total_seconds=0.5)
        release.set()
        thread.join(timeout=10)

    assert Outcome.TIMEOUT is answer.outcome


def test_a_receiver_that_speaks_something_else_or_is_not_there_is_unreachable(names: dict[str, list[list[str]]]) -> None:
    """Garbage, nobody, no such name."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def garbage() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        thread = threading.Thread(target=garbage, daemon=True)
        thread.start()
        spoken = send(f"http://127.0.0.1:{port}/").outcome
        thread.join(timeout=10)
    absent = send(f"http://127.0.0.1:{port}/").outcome

    assert [Outcome.UNREACHABLE] * 3 == [spoken, absent, send("https://no-such-name.invalid/").outcome]


def test_a_receiver_that_asks_for_time_is_heard() -> None:
    """In seconds, bounded; anything else is no number."""
    values = iter(["7", "99999999", "tomorrow", "-1"])
    with receiving(lambda _: Reply(status=429, headers={"retry-after": next(values)})) as receiver:
        waits = [send(receiver.url).asked_to_wait for _ in range(4)]

    assert [timedelta(seconds=7), timedelta(minutes=15), timedelta(0), timedelta(0)] == waits
