"""How does the front speak HTTPS? With a certificate and its key, read anew when they are renewed."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from supervisor.config import ServerSection
from supervisor.errors import ConfigError
from supervisor.followed_file import Follower, Signature, signature

log = logging.getLogger(__name__)

POLL_SECONDS = 10.0
"""How often to look whether the certificate was renewed."""


class CertificateError(ConfigError):
    """The certificate or its key cannot be used."""


class Tls:
    """The certificate of the front; `context` is None without one.

    A renewed one is taken over for the next connections once it is good together with its key; a bad one is logged, and
    the one from before stays.
    """

    def __init__(self, server: ServerSection) -> None:
        self.context: ssl.SSLContext | None = None
        self._cert = server.tls_cert
        self._key = server.tls_key
        self._seen: tuple[Signature | None, ...] = ()
        self._paths = [path for path in (self._cert, self._key) if path is not None]
        self._follower = Follower(self._paths, self.look)

    def start(self) -> None:
        """Read the certificate. Raises `CertificateError`."""
        if self._cert is not None:
            self._seen = self._signatures()
            self.context = server_context(self._cert, self._key)

    def follow(self) -> None:
        """From now on take over a renewed certificate, until `stop`."""
        if self._cert is not None:
            self._follower.start(POLL_SECONDS)

    async def stop(self) -> None:
        """Look at the files no more."""
        await self._follower.stop()

    async def look(self) -> None:
        """Take over the certificate if it changed."""
        assert self.context is not None and self._cert is not None
        now = await asyncio.to_thread(self._signatures)
        if now == self._seen:
            return
        self._seen = now
        try:
            await asyncio.to_thread(server_context, self._cert, self._key)  # a bad one must not get into the other
        except CertificateError as error:
            log.error("%s; the certificate from before stays in force", error)
            return
        self.context.load_cert_chain(self._cert, self._key, password=_no_password)
        log.info("the certificate in %s was renewed", self._cert)

    def _signatures(self) -> tuple[Signature | None, ...]:
        return tuple(map(signature, self._paths))


def server_context(cert: Path, key: Path | None) -> ssl.SSLContext:
    """Return what a server with this certificate (a chain, PEM) needs; without `key` that is in the same file.

    Raises `CertificateError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in filter(None, (cert, key)):
        try:
            path.open("rb").close()
        except OSError as error:
            raise CertificateError([f"{path}: {error.strerror or error}"]) from None
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        where = f"{cert} and {key} are" if key is not None else f"{cert} is"
        raise CertificateError([f"{where} no certificate with its key: {_reason(error)}"]) from None
    return context


def client_context(cert: Path) -> ssl.SSLContext:
    """Return what a client of our own supervisor needs, which trusts the certificate that this serves.

    It goes by the file and not by the name: a command on the same machine connects to 127.0.0.1.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cert)
    except (OSError, ValueError) as error:
        raise CertificateError([f"server.tls_cert: {cert}: {_reason(error)}"]) from None
    return context


def _no_password() -> str:
    raise ValueError("the key needs a password; take that off")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return str(getattr(error, "strerror", None) or error)
