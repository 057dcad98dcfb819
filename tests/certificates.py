# SPDX-License-Identifier: Apache-2.0
"""Authorities and certificates that exist for a test."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_YEARS = timedelta(days=3650)
_BEGAN = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs what it is asked to."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str = "test") -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, subject, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(key, builder.sign(key, hashes.SHA256()))

    def pair(self, *names: str) -> tuple[bytes, bytes]:
        """A certificate for *names* and 127.0.0.1, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0] if names else "localhost")])
        alternatives = [*map(x509.DNSName, names), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = _builder(subject, self.certificate.subject, key).add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        chain = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)
        return chain, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def fill(self, directory: Path, *names: str) -> Path:
        """Put a pair and the authority where services look for them, each by a rename."""
        directory.mkdir(parents=True, exist_ok=True)
        chain, key = self.pair(*names)
        for name, data in (("tls.crt", chain), ("tls.key", key), ("ca.crt", self.pem())):
            temporary = directory / f".{name}"
            temporary.write_bytes(data)
            os.replace(temporary, directory / name)
        return directory


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer, subject_name=subject, public_key=key.public_key(),
        serial_number=x509.random_serial_number(), not_valid_before=_BEGAN, not_valid_after=_BEGAN + 3 * _YEARS,
    )  # fmt: skip
