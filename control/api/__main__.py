# SPDX-License-Identifier: Apache-2.0
"""`python -m control.api`: serve the control API, on loopback unless it has a certificate."""

from __future__ import annotations

import ipaddress
import secrets
import threading
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog
import uvicorn
from pydantic import Field, ValidationError

from chassis import contract
from chassis.certificates import CHAIN_FILE, KEY_FILE
from chassis.clock import utc_now
from chassis.errors import Invalid, Unavailable
from chassis.models import WatchedCatalogue
from chassis.secrets import BOOTSTRAP_TOKEN_NAME, load_peppers
from chassis.serving import run
from chassis.settings import StoreSettings
from chassis.telemetry.log import configure
from control import bootstrap
from control.api.app import build
from control.api.services import Services
from control.minting import Mint
from control.oauth import Issuer
from control.secret_scanning import load_public_keys
from control.signing_keys import SigningKeys
from control.store import Store

log = structlog.get_logger()

#: Between attempts to look for a platform-admin while Postgres is away.
_RETRY_SECONDS: Final = 2.0


class Settings(StoreSettings):
    """What the control API needs besides the stores."""

    #: TCP port.
    control_port: int = Field(default=10001, ge=1, le=65535)
    #: Address to listen on. Any but loopback needs a certificate: operators' tokens would be read on the way.
    control_host: str = "127.0.0.1"
    #: Directory with tls.crt and tls.key: serve https. Read once, at start.
    control_tls_directory: Path | None = None
    #: What tokens name as their issuer: where clients and verifiers reach this API. Empty: http://127.0.0.1:<port>.
    control_issuer: str = ""
    #: File with a secret-scanning partner's public keys, in GitHub's form. None: every alert is refused.
    secret_scanning_keys: Path | None = None
    #: Webhooks may go to this machine's loopback, by http too: for trying things out, never beside other services.
    events_loopback_allowed: bool = False

    @property
    def issuer(self) -> str:
        """The issuer, without a slash at the end; raises `Invalid` for what cannot be one (RFC 8414 2)."""
        url = (self.control_issuer or f"http://127.0.0.1:{self.control_port}").rstrip("/")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
            raise Invalid(f"PEAJE_CONTROL_ISSUER is {url!r}.", mend="Write a URL such as https://control.example.com.")
        return url

    def certificate_file(self, name: str) -> Path | None:
        """One of the certificate's files, None on loopback without one; raises `Invalid` where there must be one."""
        if self.control_tls_directory is not None:
            path = self.control_tls_directory / name
            if not path.is_file():
                raise Invalid(f"The certificate file {path} is missing.", mend="PEAJE_CONTROL_TLS_DIRECTORY holds tls.crt and tls.key.")
            return path
        if not _is_loopback(self.control_host):
            raise Invalid(
                f"PEAJE_CONTROL_HOST={self.control_host} without a certificate would show operators' tokens to the network.",
                mend="Name a directory with tls.crt and tls.key in PEAJE_CONTROL_TLS_DIRECTORY.",
            )
        return None


def main() -> None:
    """Serve until SIGTERM."""
    configure("control")
    settings = _read_settings()
    chain, key = (settings.certificate_file(name) for name in (CHAIN_FILE, KEY_FILE))
    secrets_directory = settings.home / "secrets"
    mint = Mint(peppers=load_peppers(settings.home), random_bytes=secrets.token_bytes)
    load_public_keys(settings.secret_scanning_keys)  # a bad file is refused now, not at the first alert
    issuer = Issuer(url=settings.issuer, keys=SigningKeys(secrets_directory), mint=mint)
    issuer.keys.all(now=utc_now())  # makes the first key, or refuses one that others can read
    services = Services(
        store=Store(settings.require_postgres()),
        mint=mint,
        issuer=issuer,
        catalogue=WatchedCatalogue(settings.home, process="control").watch().current,
        clock=utc_now,
        bootstrap_token_path=secrets_directory / BOOTSTRAP_TOKEN_NAME,
        scanning_keys_path=settings.secret_scanning_keys,
        identity_path=settings.home / contract.IDENTITY_PATH,
        loopback_allowed=settings.events_loopback_allowed,
    )
    if not _open_bootstrap(services):
        threading.Thread(target=_open_bootstrap_later, args=(services,), name="bootstrap", daemon=True).start()
    app = build(services)
    uvicorn.run(
        app, host=settings.control_host, port=settings.control_port, ssl_certfile=chain, ssl_keyfile=key,
        access_log=False, log_config=None, server_header=False,
    )  # fmt: skip


def _read_settings() -> Settings:
    try:
        return Settings()
    except ValidationError as exc:
        first = exc.errors()[0]
        raise Invalid(f"PEAJE_{str(first['loc'][0]).upper()}: {first['msg']}.") from exc


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_bootstrap(services: Services) -> bool:
    """Offer the first operator's road if nobody can administrate the platform; False if Postgres is away."""
    try:
        opened = bootstrap.open_road(services.store, services.mint, services.bootstrap_token_path, now=utc_now())
    except Unavailable as exc:
        log.warning("bootstrap_waits", reason=exc.message)
        return False
    if opened:
        log.warning("bootstrap_token_written", path=str(services.bootstrap_token_path))
    return True


def _open_bootstrap_later(services: Services) -> None:
    while not _open_bootstrap(services):
        threading.Event().wait(_RETRY_SECONDS)


if __name__ == "__main__":
    run(main)
