# SPDX-License-Identifier: Apache-2.0
"""
Certificates for gRPC between machines: both sides show one, and both are signed by the same authority.

A directory holds `tls.crt`, `tls.key` and `ca.crt`, the names that Kubernetes and cert-manager give them. They are read
again when they change; what cannot be used keeps the last good ones, so that a renewal costs no connection.
The authority must be Peaje's own: whoever it signs for may ask.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from chassis.errors import Invalid
from chassis.files import read_bounded
from chassis.watching import file_version

log = structlog.get_logger()

CHAIN_FILE: Final = "tls.crt"
KEY_FILE: Final = "tls.key"
AUTHORITY_FILE: Final = "ca.crt"
_FILES: Final = (CHAIN_FILE, KEY_FILE, AUTHORITY_FILE)
#: Bytes. A long chain has a few thousand; a wrong path may name a very large file.
_FILE_BYTES_MAX: Final = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Who we are and whose word we take, in PEM."""

    chain: bytes
    authority: bytes
    key: bytes = field(repr=False)


class WatchedCertificates:
    """The certificates in one directory; safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._seen = self._versions()
        self._current = read(directory)

    def current(self) -> Certificates:
        """The newest good ones; a look is three stat()."""
        seen = self._versions()
        if seen == self._seen:
            return self._current
        with self._lock:
            if seen != self._seen:
                self._seen = seen
                try:
                    self._current = read(self._directory)
                    log.info("certificates_reloaded", directory=self._directory.name)
                except Invalid as exc:
                    log.error("certificates_refused", reason=exc.message)
        return self._current

    def _versions(self) -> tuple[object, ...]:
        return tuple(file_version(self._directory / name) for name in _FILES)


def read(directory: Path) -> Certificates:
    """Read the three files; raises `Invalid` for what no connection could be made with."""
    chain, key, authority = (read_bounded(directory / name, bytes_max=_FILE_BYTES_MAX) for name in _FILES)
    try:
        public = x509.load_pem_x509_certificate(chain).public_key()
        private = load_pem_private_key(key, password=None)
        x509.load_pem_x509_certificates(authority)
    except (ValueError, TypeError) as exc:
        # Never the library's own words: they may quote the key.
        raise Invalid(f"The certificates in {directory} cannot be read.", mend="Each file is PEM, the key without a password.") from exc
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*form) != private.public_key().public_bytes(*form):
        raise Invalid(f"{directory / KEY_FILE} is not the key of {CHAIN_FILE}.", mend="Put the pair there that belongs together.")
    return Certificates(chain=chain, key=key, authority=authority)


def server_credentials(watched: WatchedCertificates) -> grpc.ServerCredentials:
    """For a server: a client without a certificate of the authority does not get as far as a call."""
    given = watched.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks at each handshake; None keeps what it has.
        nonlocal given
        current = watched.current()
        if current is given:
            return None
        given = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(_configuration(given), renewed, require_client_authentication=True)


def channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    """For a client. They do not follow a renewal: make another channel with the new ones."""
    return grpc.ssl_channel_credentials(
        root_certificates=certificates.authority, private_key=certificates.key, certificate_chain=certificates.chain
    )


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], root_certificates=certificates.authority
    )
